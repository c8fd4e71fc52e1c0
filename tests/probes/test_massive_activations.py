"""Massive activations: planted places, both rules apart, what each setting changes, and the change of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import planted_store
from refusals import refused

from workbench.analysis.massive import find_massive
from workbench.analysis.token_attention import whole_sequences
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import MassiveActivations
from workbench.testing import ProbeContract

DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]
ROWS = sum(map(len, DOCUMENTS))


def stored(path, *places, median=1.0, width=40, **values):
    """One layer whose |h| is `median` everywhere, but `places`: (row, dimension, value)."""
    hidden = np.where(np.random.default_rng(0).random((ROWS, width)) < 0.5, -median, median)
    for row, dimension, value in places:
        hidden[row, dimension] = value
    norms = np.ones((ROWS, 2))
    norms[0] = 0.1
    sites = {"resid_post.0": hidden, "resid_post.1": 2 * hidden, "v_norm.1": norms}
    return planted_store(path, DOCUMENTS, sites | values, n_layers=2)


class TestContract(ProbeContract):
    probe = MassiveActivations
    settings = {"absolute": 1.0, "relative": 2.0, "resamples": 20, "row_limit": 30}  # noqa: RUF012

    @pytest.fixture
    def store(self, llama_store):
        return llama_store

    @pytest.fixture
    def model(self, tiny_models, tiny_tokenizer):
        return Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")


@pytest.mark.parametrize(
    ("value", "median", "massive"), [(150, 0.1, 1), (90, 0.01, 0), (150, 0.2, 0), (-5000, 2.0, 1), (101, 0.0, 1)]
)
def test_an_activation_is_massive_if_it_is_above_both_thresholds(value, median, massive, tmp_path):
    store = stored(tmp_path / "s", (5, 7, value), median=median)
    data = MassiveActivations(layers=(0,), resamples=5).run(store).data
    np.testing.assert_allclose(data["massive"], [massive / 3])
    np.testing.assert_allclose(data["above_absolute"], [(abs(value) > 100) / 3])
    np.testing.assert_allclose(data["above_ratio"], [(abs(value) > 1000 * median) / 3 if median else 1 / 3])
    np.testing.assert_allclose(data["top"][0], [(abs(value) + 2 * median) / 3, median, median], rtol=1e-6)


def test_places_are_counted_by_dimension_token_and_first_or_later(tmp_path):
    store = stored(tmp_path / "s", (0, 3, 5000), (5, 3, 7000), (6, 9, -9000), (8, 3, 6000))
    result = MassiveActivations(resamples=5).run(store)
    data, table = result.data.sel(layer=0), result.table
    assert (float(data["tokens"]), float(data["dimensions"])) == (4 / ROWS, 2)
    assert float(data["first_tokens"]) == 3 / 4
    assert float(data["largest"]) == 9000
    lines = table.loc[(table["layer"] == 0) & (table["massive"] > 0), ["dimension", "position", "token", "mean"]]
    assert sorted(map(tuple, lines.to_numpy().tolist())) == [
        (3, "first", "t1", 5000),
        (3, "first", "t6", 7000),
        (3, "first", "t9", 6000),
        (9, "later", "t7", -9000),
    ]
    assert "dimension 9, later token 't7'" in result.headline()


def test_value_drain_is_measured_at_tokens_that_enter_the_block_massive(tmp_path):
    store = stored(tmp_path / "s", (0, 3, 5000))
    data = MassiveActivations(resamples=5).run(store).data
    np.testing.assert_allclose(data["value_norm_ratio"].sel(layer=1), [0.1, 0.1])
    assert data["value_norm_ratio"].sel(layer=0).isnull().all()


def test_without_any_the_headline_gives_the_largest(tmp_path):
    result = MassiveActivations(resamples=5).run(stored(tmp_path / "s", (5, 7, 3.0)))
    assert result.headline().startswith("No massive activations: the largest |h| is 3.33 on average")
    assert result.table["massive"].sum() == 0
    assert "value_norm_ratio" not in result.data


def test_where_selects_sequences_and_detail_limits_the_table(tmp_path):
    store = stored(tmp_path / "s", (0, 3, 5000), (5, 3, 7000))
    data = MassiveActivations(where="document = 2", resamples=5).run(store)
    assert float(data.data["massive"].max()) == 0
    assert len(MassiveActivations(detail=1, resamples=5).run(store).table) == 2


def test_changed_rows_are_those_of_the_definition(tmp_path):
    store = stored(tmp_path / "s", (0, 3, 5000), (5, 3, 7000), (6, 9, -9000))
    massive = find_massive(store, 0, whole_sequences(store), 100.0, 1000.0)
    ids = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, -1, -1]])
    rows = torch.ones(2, 5, 40)
    rows[0, 0, 3], rows[1, 0, 3], rows[1, 1, 9] = 5000, 7000, -9000
    expected = rows.clone()
    expected[0, 0, 3] = expected[1, 0, 3] = 6000  # mean over the first tokens of that dimension
    changed, at = massive.changed(rows, ids, "mean", seed=0)
    assert at.nonzero().tolist() == [[0, 0], [1, 0], [1, 1]]
    torch.testing.assert_close(changed, expected)
    expected[0, 0, 3] = expected[1, 0, 3] = expected[1, 1, 9] = 0
    torch.testing.assert_close(massive.changed(rows, ids, "zero", seed=0)[0], expected)
    difference = (massive.changed(rows, ids, "random", seed=0)[0] != rows).nonzero()
    assert difference[:, :2].tolist() == [[0, 0], [1, 0], [1, 1]]
    assert not set(difference[:, 2].tolist()) & {3, 9}


def test_refused_requests(tmp_path):
    assert "absolute must be at least 0" in refused(RequestError, lambda: MassiveActivations(absolute=-1.0))
    probe, store = MassiveActivations(change_layer=7, model="x"), stored(tmp_path / "s", (0, 3, 5000))
    assert "change_layer: layer 7 was not recorded" in refused(RequestError, lambda: probe.run(store))
