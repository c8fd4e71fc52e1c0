"""Geometry of token clouds: published cubes, planted planes, a naive reading in float64, losses of the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import linear_unembed, planted_store
from refusals import refused

import workbench as wb
from workbench.analysis.point_clouds import (
    distinct,
    gaussian_like,
    gride,
    mean_cosine,
    nearest_neighbours,
    neighbourhood_overlap,
    two_nn_first_fifth,
)
from workbench.io.errors import RequestError
from workbench.model.unembed import load_unembed
from workbench.probes import TokenGeometry
from workbench.testing import ProbeContract

CUBES = {2: (1.978, 1.978, 1.891, 1.946), 5: (4.910, 4.410, 4.508, 4.381), 10: (8.074, 8.126, 8.053, 7.765)}
"""GRIDE of a uniform cube at neighbours (1, 2), (2, 4), (4, 8), (8, 16): 1,024 points of default_rng(0)."""


def cube(dimension, seed=0, points=1024):
    return torch.tensor(np.random.default_rng(seed).random((points, dimension)))


def run(store, **settings):
    return TokenGeometry(**{"length": 40, "resamples": 20, "device": "cpu", **settings}).run(store)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Six documents of 40 tokens in eight dimensions: a plane, the same turned, an independent cloud."""
    draw = np.random.default_rng(0)
    turn = np.linalg.qr(draw.normal(size=(8, 8)))[0]
    plane = np.zeros((240, 8))
    plane[:, :2] = draw.random((240, 2))
    sites = {"resid_post.0": plane, "resid_post.1": plane @ turn, "resid_post.2": draw.normal(size=(240, 8))}
    documents = draw.integers(0, 5, (6, 40)).tolist()
    kinds = np.repeat(["a", "b"], 120).tolist()
    unembed = linear_unembed(draw.normal(size=(5, 8)))
    return planted_store(tmp_path_factory.mktemp("geometry") / "s", documents, sites, unembed, columns={"kind": kinds})


class TestContract(ProbeContract):
    probe = TokenGeometry
    settings = {"length": 40, "resamples": 10, "group": "kind", "device": "cpu"}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted):
        return planted


@pytest.mark.parametrize("dimension", CUBES)
def test_dimensions_of_cubes_are_the_known_ones(dimension):
    distance = nearest_neighbours(cube(dimension), 16).distance
    estimates = [gride(distance, near, 2 * near) for near in (1, 2, 4, 8)]
    np.testing.assert_allclose(estimates, CUBES[dimension], atol=6e-3)


def test_the_estimate_is_the_likelihoods_maximum():
    """On a grid of dimensions, by the density of the ratio as it is written."""
    distance = nearest_neighbours(cube(3, points=200), 8).distance
    mu, grid = distance[:, 7] / distance[:, 3], np.linspace(1, 6, 5001)
    log = [np.sum(np.log(d) + 3 * np.log(mu**d - 1) - (7 * d + 1) * np.log(mu)) for d in grid]
    assert gride(distance, 4, 8) == pytest.approx(grid[int(np.argmax(log))], abs=1e-3)
    logs = np.sort(np.log(distance[:, 1] / distance[:, 0]))
    x, y = logs[:40], -np.log(1 - np.arange(1, 41) / 200)
    assert two_nn_first_fifth(distance) == pytest.approx((x @ y) / (x @ x))
    assert gride(distance, 1, 2) == pytest.approx(200 / logs.sum())


def test_neighbours_are_those_of_all_differences_where_inner_products_lose_them():
    """A cluster of points 1e-9 apart, 1e3 from the others: their squares differ by less than rounding."""
    draw = np.random.default_rng(0)
    points = draw.normal(size=(60, 6))
    points[:20] = 1e3 + 1e-9 * points[:20]
    neighbours = nearest_neighbours(torch.from_numpy(points), 3)
    distance = np.sqrt(((points[:, None] - points) ** 2).sum(2))
    np.fill_diagonal(distance, np.inf)
    np.testing.assert_allclose(neighbours.distance, np.sort(distance, 1)[:, :3], rtol=1e-12)
    assert np.array_equal(neighbours.index, np.argsort(distance, 1)[:, :3])


def test_neighbours_of_equal_and_of_independent_clouds():
    first, second = (nearest_neighbours(cube(5, seed), 2).index for seed in (0, 1))
    assert neighbourhood_overlap(first, first) == 1
    assert neighbourhood_overlap(first, first[:, ::-1]) == 1
    assert neighbourhood_overlap(first, second) == pytest.approx(0.00146, abs=5e-6)
    assert neighbourhood_overlap(first, second) == pytest.approx(2 / 1023, abs=1e-3)


def test_cosine_equal_points_and_the_gaussian():
    points = torch.tensor(np.random.default_rng(2).normal(size=(30, 4)) + 1)
    units = points / points.norm(dim=1, keepdim=True)
    assert mean_cosine(points) == pytest.approx(float((units @ units.T)[~np.eye(30, dtype=bool)].mean()))
    assert distinct(torch.tensor([[1.0, 2], [3, 4], [1, 2]])).tolist() == [True, True, False]
    wide = cube(3, points=2000) * torch.tensor([1.0, 2.0, 3.0])
    like = gaussian_like(wide, 0)
    np.testing.assert_allclose(np.cov(like.numpy().T), np.cov(wide.numpy().T), atol=0.06)


def test_planted_clouds(planted):
    data = run(planted, skip=0, group="kind").data
    dimension = data["intrinsic_dimension"].sel(scale=1).to_numpy()
    np.testing.assert_allclose(dimension[:2], 2, atol=0.4)
    np.testing.assert_allclose(dimension[0], dimension[1], rtol=1e-4)
    assert dimension[2] > 4
    assert data["overlap"].to_numpy()[0] == 1
    assert data["overlap"].to_numpy()[1] < 0.15
    assert np.isnan(data["overlap"].to_numpy()[2])
    assert data["overlap_permuted"].to_numpy()[0] < 0.15
    assert abs(float(data["cosine"][2])) < 0.1
    assert data["group_sequences"].to_numpy().tolist() == [3, 3]
    np.testing.assert_allclose(data["group_dimension"].mean("group"), dimension)


def test_groups_have_intervals_over_their_documents(planted):
    """Means of resamples of three sequences lie between the smallest and the largest of them."""
    result = run(planted, skip=0, group="kind")
    data, table = result.data, result.table
    for group in data["group"].to_numpy().tolist():
        values = table[(table["group"] == group) & (table["layer"] == 2)]["intrinsic_dimension"]
        at = data.sel(group=group, layer=2)
        low, mean, high = (float(at[f"group_dimension{end}"]) for end in ("_low", "", "_high"))
        assert values.min() - 1e-9 <= low < mean < high <= values.max() + 1e-9
    drawn = result.figure("groups")
    assert all(np.isfinite(np.array(line.error_y.array, float)).all() for line in drawn.data)
    assert "95 % intervals over documents" in drawn.layout.title.subtitle.text
    old = replace(result, data=data.drop_vars(["group_dimension_low", "group_dimension_high"])).figure("groups")
    assert all(line.error_y.array is None for line in old.data)
    assert "95 %" not in old.layout.title.subtitle.text


def test_each_sequence_is_read_alone_and_averaged(planted):
    result = run(planted, skip=3)
    states = planted["resid_post", 2][:].double().numpy().reshape(6, 40, 8)[:, 3:]
    expected = []
    for cloud in states:
        distance = np.sort(np.linalg.norm(cloud[:, None] - cloud[None], axis=-1), axis=1)[:, 1:3]
        expected.append(len(cloud) / np.log(distance[:, 1] / distance[:, 0]).sum())
    lines = result.table[result.table["layer"] == 2]
    np.testing.assert_allclose(lines["intrinsic_dimension"], expected, rtol=1e-6)
    assert float(result.data["intrinsic_dimension"].sel(layer=2, scale=1)) == pytest.approx(np.mean(expected))


def test_loss_is_compared_within_groups(planted):
    """A difference between groups makes no correlation."""
    result = run(planted, group="kind")
    for layer, correlation in enumerate(result.data["loss_correlation"].to_numpy()):
        lines = result.table[result.table["layer"] == layer]
        x, y = np.log(lines["intrinsic_dimension"]), lines["loss"]
        x, y = (part - part.groupby(lines["group"]).transform("mean") for part in (x, y))
        assert correlation == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


def test_losses_are_those_of_the_unembedding(planted):
    weight = load_unembed(planted.path).weight.double().numpy()
    logits = planted["resid_post", 2][:].double().numpy() @ weight.T
    log = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).reshape(6, 40, 5)
    ids = planted.tokens["token_id"].to_numpy().reshape(6, 40)
    expected = [-np.mean([rows[i, of[i + 1]] for i in range(39)]) for rows, of in zip(log, ids, strict=True)]
    lines = run(planted).table
    np.testing.assert_allclose(lines.loc[lines["layer"] == 0, "loss"], expected, atol=1e-5)


def test_equal_points_are_dropped_and_counted(tmp_path):
    states = np.random.default_rng(3).normal(size=(40, 4))
    states[20:] = states[:20]
    sites = {"resid_post.0": states, "resid_post.1": states}
    store = planted_store(tmp_path / "s", [[0] * 40], sites, linear_unembed(np.eye(4)))
    data = run(store, skip=0).data
    assert data["duplicates"].to_numpy().tolist() == [0.5, 0.5]
    assert data["overlap"].to_numpy()[0] == 1
    assert np.isfinite(data["intrinsic_dimension"].to_numpy()).all()
    text = refused(RequestError, lambda: run(store, length=20, skip=1))
    assert text == "length 20 less skip 1 must be 20 points or more"


def test_shuffled_blocks():
    ids = list(range(1024))
    assert wb.shuffled_blocks(ids, 0) == ids
    shuffled = wb.shuffled_blocks(ids, 2, seed=1)
    assert sorted(shuffled) == ids
    assert {tuple(shuffled[i : i + 64]) for i in range(0, 1024, 64)} == {
        tuple(ids[i : i + 64]) for i in range(0, 1024, 64)
    }
    assert sorted(wb.shuffled_blocks(ids, 5)) == ids != wb.shuffled_blocks(ids, 5)
    assert "1022 tokens cannot be cut into 4" in refused(RequestError, lambda: wb.shuffled_blocks(ids[2:], 1))
