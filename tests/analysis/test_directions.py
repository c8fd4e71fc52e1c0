"""Mean differences and principal directions against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from planted import planted_store
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError


@pytest.fixture(scope="module")
def values():
    draw = np.random.default_rng(0)
    return {
        "resid_post.0": (draw.normal(size=(60, 5)) * [9, 1, 3, 1, 1] + 4).astype(np.float32),
        "z.0": draw.normal(size=(60, 2, 3)).astype(np.float32),
        "attn_first.0": draw.normal(size=(60,)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def store(values, tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("directions") / "x.acts", [list(range(6))] * 10, values)


def test_a_mean_difference_is_numpys(store, values):
    a, b = store.where("position < 2"), store.where("position > 3")
    for site in ("resid_post.0", "z.0"):
        direction = wb.mean_difference(a, b, site, name="early")
        expected = values[site][a.ids].mean(0) - values[site][b.ids].mean(0)
        np.testing.assert_allclose(direction.vector, expected, atol=1e-5)
        assert (direction.site, direction.name) == (site, "early")
    assert wb.mean_difference(a, b, "resid_post", 0).made_of["rows"] == 20


def test_principal_directions_are_numpys(store, values, monkeypatch):
    monkeypatch.setattr("workbench.analysis.directions._BLOCK_BYTES", 400)  # several blocks
    x = values["resid_post.0"].astype(np.float64)
    _, spread, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    directions = wb.principal_directions(store.where("TRUE"), "resid_post.0", n=3)
    for place, direction in enumerate(directions):
        assert abs(direction.vector.double().numpy() @ axes[place]) == pytest.approx(1, abs=1e-6)
        assert direction.made_of["explained"] == pytest.approx(spread[place] ** 2 / (spread**2).sum())
        assert float(direction.vector[direction.vector.abs().argmax()]) > 0


def test_what_gives_no_direction_is_refused(store, values, tmp_path):
    rows, none = store.where("position < 2"), store.where("position < 0")
    assert refused(RequestError, lambda: wb.mean_difference(rows, none, "resid_post.0")).startswith("b has no rows")
    assert "one number a row" in refused(RequestError, lambda: wb.mean_difference(rows, rows, "attn_first.0"))
    assert "n must be" in refused(RequestError, lambda: wb.principal_directions(rows, "resid_post.0", n=6))
    other_store = planted_store(tmp_path / "o.acts", [[0, 1]] * 30, values, fingerprint="f" * 64)
    text = refused(RequestError, lambda: wb.mean_difference(rows, other_store.where("TRUE"), "resid_post.0"))
    assert text.startswith("b is of another model than a")
    bad = {"resid_post.0": np.where(np.arange(60)[:, None] == 3, np.nan, values["resid_post.0"])}
    store = planted_store(tmp_path / "n.acts", [list(range(6))] * 10, bad)
    rows = store.where("TRUE")
    assert "NaN" in refused(RequestError, lambda: wb.mean_difference(rows, rows[:2], "resid_post.0"))
