"""Three stores and more against the first, and the results of one probe on several models in one table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from command_line import run
from planted import linear_unembed, planted_store
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.probes import LogitLens, TunedLens

IDS = [[1, 2, 3, 4], [2, 2, 1], [3, 1, 4], [4, 4]]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("three"), np.random.default_rng(0).normal(size=(2, 12, 6))
    unembed = linear_unembed(np.random.default_rng(9).normal(size=(7, 6)))
    recorded = []
    for seed, name in enumerate("abc"):
        values = base + 0.2 * seed * np.random.default_rng(seed).normal(size=base.shape)
        sites = {f"resid_post.{layer}": values[layer] for layer in range(2)}
        recorded.append(planted_store(folder / f"{name}.acts", IDS, sites, unembed))
    return recorded


def test_three_stores_are_each_compared_with_the_first(stores, tmp_path, monkeypatch):
    a, b, c = stores
    pairs = [wb.compare(a, store, probes=("logit-lens", "attention-sinks")) for store in (b, c)]
    runs = []
    whole = LogitLens.run
    monkeypatch.setattr(LogitLens, "run", lambda self, store, **more: runs.append(store.path) or whole(self, store))
    three = wb.compare(a, b, c, probes=("logit-lens", "attention-sinks"))
    assert runs == [a.path, b.path, c.path]  # once on each
    for table in ("sites", "probes"):
        parts = getattr(three, table)
        assert parts["store"].unique().tolist() == ["b.acts", "c.acts"]
        for name, pair in zip(("b.acts", "c.acts"), pairs, strict=True):
            part = parts[parts["store"] == name].drop(columns="store").reset_index(drop=True)
            pd.testing.assert_frame_equal(part, getattr(pair, table))
    assert [comparison.not_run for comparison in three.each] == [pair.not_run for pair in pairs]
    assert [trace.name for trace in three.figure().data] == ["b.acts, resid_post", "c.acts, resid_post"]
    folder = three.save(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"sites.csv", "probes.csv", "cosine.html"}


def test_a_third_store_of_other_tokens_is_refused_before_any_work(stores, tmp_path):
    fourth = planted_store(tmp_path / "d.acts", [[1, 2]], {"resid_post.0": np.ones((2, 6))})
    text = refused(RequestError, lambda: wb.compare(*stores[:2], fourth, probes=()))
    assert "a.acts and d.acts hold different tokens" in text


def test_three_stores_on_the_command_line(stores, tmp_path):
    paths = [str(store.path) for store in stores]
    code, out, err = run("compare", *paths, "--probes", "logit-lens", "--out", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert "b.acts" in out
    assert "c.acts" in out


def test_combined_tables_have_a_column_of_models(stores):
    results = [LogitLens().run(store) for store in stores]
    table = wb.combine(results)
    model = stores[0].manifest.model.name
    assert table.columns[0] == "model"
    assert table["model"].unique().tolist() == [f"{model} ({name}.acts)" for name in "abc"]
    part = table[table["model"] == f"{model} (b.acts)"].drop(columns="model").reset_index(drop=True)
    pd.testing.assert_frame_equal(part, results[1].table)
    assert wb.combine(results, names=["x", "y", "z"])["model"].unique().tolist() == ["x", "y", "z"]
    older = {name: value for name, value in results[1].provenance["settings"].items() if name != "layers"}
    before = replace(results[1], provenance={**results[1].provenance, "settings": {**older, "device": "cuda"}})
    assert len(wb.combine([results[0], before])) == 2 * len(results[0].table)


def test_results_that_differ_are_refused_by_name(stores):
    a, b, _ = stores
    first = LogitLens().run(a)
    for results, message in (
        ([LogitLens(layers=(0,)).run(b)], "results have different settings: layers is None for"),
        ([TunedLens(epochs=0).run(b)], "results are of different probes"),
        ([first], "results: 2 are of"),
    ):
        assert refused(RequestError, lambda results=results: wb.combine([first, *results])).startswith(message)
    assert refused(RequestError, lambda: wb.combine([])).startswith("results is empty")
    assert refused(RequestError, lambda: wb.combine([first], names=["a", "b"])).startswith("names: 1 different")
