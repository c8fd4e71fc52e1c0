"""The test for a rise of the dimension: at its level under the exact null, and on planted clouds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.probes.fiber_bundle import (
    dimension_change,
    holm,
    neighbour_distances,
    uniform_ball,
    window_detector,
)


def ball(draw, points, dimension, radius=1.0):
    x = draw.normal(size=(points, dimension))
    return x / np.linalg.norm(x, axis=1, keepdims=True) * radius * draw.random((points, 1)) ** (1 / dimension)


def around_centre(cloud):
    return np.sort(np.linalg.norm(cloud, axis=1))[None]


@pytest.mark.parametrize("dimension", [2.0, 5.0, 10.0])
@pytest.mark.parametrize("neighbours", [60, 300, 1000])
def test_the_test_holds_its_level_under_the_null(dimension, neighbours):
    change = dimension_change(uniform_ball(50_000, dimension, neighbours + 1, 8000, seed=neighbours), 10, 4)
    assert 0.035 <= (change.p < 0.05).mean() <= 0.055
    assert (change.p < 0.001).mean() <= 0.0025
    assert change.dimension.mean() == pytest.approx(dimension, rel=0.02)


def test_the_null_is_a_uniform_ball():
    draw = np.random.default_rng(0)
    drawn = np.array([np.sort(np.linalg.norm(ball(draw, 500, 3), axis=1))[:40] for _ in range(400)])
    null = uniform_ball(500, 3.0, 40, 4000, seed=1)
    np.testing.assert_allclose(null.mean(0), drawn.mean(0), rtol=0.04)
    np.testing.assert_allclose(uniform_ball(40, 2.0, 40, 4000, seed=2).max(1).mean(), 80 / 81, rtol=1e-3)  # all of them


def test_a_disc_inside_a_shell_of_six_dimensions_is_a_rise():
    draw = np.random.default_rng(0)
    disc = np.hstack([ball(draw, 1000, 2), np.zeros((1000, 4))])
    shell = ball(draw, 40_000, 6, 2.0)
    shell = shell[np.linalg.norm(shell, axis=1) > 1][:4000]
    change = dimension_change(around_centre(np.concatenate([disc, shell])), 10, 8)
    assert float(change.p[0]) < 1e-150
    assert float(change.small[0]) == pytest.approx(1.99, abs=0.2)
    assert float(change.large[0]) == pytest.approx(5.33, abs=1.2)


def test_a_segment_of_balls_is_a_fall_and_no_rise():
    draw = np.random.default_rng(0)
    cloud = np.hstack([draw.uniform(-10, 10, (6000, 1)), ball(draw, 6000, 5, 0.5)])
    change = dimension_change(around_centre(cloud), 10, 8)
    assert float(change.p[0]) == 1
    assert float(change.small[0]) == pytest.approx(6, abs=1.5)
    assert float(change.large[0]) == pytest.approx(1.11, abs=0.1)


def test_the_window_detector_rejects_half_of_the_points_under_the_null():
    for dimension in (2.0, 5.0, 10.0):
        assert 0.5 < window_detector(uniform_ball(3000, dimension, 3000, 200, seed=0)).mean() < 0.7


def test_spacings_and_p_are_their_formulas():
    from scipy import stats

    r = np.sort(np.random.default_rng(3).random((1, 81)) ** 0.5)
    change = dimension_change(r, 10, 1)
    k = np.arange(10, 81)
    spacing = np.array([n * np.log(r[0, n] / r[0, n - 1]) for n in k])
    split = int(change.split[0])
    below, above = spacing[k <= split], spacing[k > split]
    assert split == round(np.sqrt(11 * 80))
    assert float(change.small[0]) == pytest.approx(1 / below.mean())
    assert float(change.large[0]) == pytest.approx(1 / above.mean())
    ratio = below.mean() / above.mean()
    assert float(change.p[0]) == pytest.approx(1 - stats.f.cdf(ratio, 2 * len(below), 2 * len(above)))


def test_distances_are_those_of_numpy_and_equal_rows_have_no_ties():
    draw = np.random.default_rng(4)
    points = draw.normal(size=(50, 6)).astype(np.float32)
    points[7] = points[8]
    distances = neighbour_distances(torch.tensor(points), np.array([3, 7]), 49, seed=0)
    exact = points.astype(float)
    for row, index in enumerate((3, 7)):
        expected = np.sort(np.delete(np.linalg.norm(exact - exact[index], axis=1), index))
        np.testing.assert_allclose(distances[row], expected, rtol=3e-6, atol=1e-6)
    assert (np.diff(distances, axis=1) > 0).all()


def test_holm_is_the_step_down_rule():
    assert holm(np.array([0.04, 0.001, 0.02, 0.9])).tolist() == pytest.approx([0.08, 0.004, 0.06, 0.9])
