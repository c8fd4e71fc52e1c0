"""Positions from the causal mask: the closed form and shares of METHODS2 1.8, planted scores, and every setting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted import planted_store
from refusals import refused

import workbench as wb
from workbench.analysis.position_patterns import (
    non_relative,
    non_relative_share,
    second_block_scores,
    simulated_scores,
    slope_of_keys,
)
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import MaskPositions
from workbench.probing import ScoreRule
from workbench.testing import ProbeContract

N = 50
BELOW = np.tril(np.ones((N, N), bool), -1)
QUERY, KEY = np.mgrid[1 : N + 1, 1 : N + 1].astype(float)


@pytest.fixture(scope="module")
def store(tiny_models, tmp_path_factory):
    ids = np.random.default_rng(0).integers(5, 300, (6, 20)).tolist()
    out = tmp_path_factory.mktemp("mask") / "x.acts"
    sites = ["rot_q", "rot_k"]
    model = Model(tiny_models["gemma2"], None, "tiny-gemma2")
    return wb.record(model, ids, sites=sites, out=out, dtype="float32", show_progress=False)


class TestContract(ProbeContract):
    probe = MaskPositions
    settings = {"length": 18}  # noqa: RUF012

    @pytest.fixture
    def store(self, store):
        return store


def test_the_simulation_is_the_closed_form():
    simulated = simulated_scores(N, 3)
    second, third = simulated[1], simulated[2]
    expected = {(2, 1): 0.153521, (10, 1): 0.067820, (10, 9): 0.105879, (50, 1): 0.018220, (50, 49): 0.034299}
    for (i, j), value in expected.items():
        assert second[i - 1, j - 1] == pytest.approx(value, abs=5e-7)
    for (i, j), value in {(10, 1): 0.162648, (10, 9): 0.271058, (50, 49): 0.138995}.items():
        assert third[i - 1, j - 1] == pytest.approx(value, abs=5e-7)
    np.testing.assert_allclose(np.where(BELOW, second, np.nan), second_block_scores(N), atol=1e-12)
    assert non_relative_share(second, second, BELOW) == pytest.approx(0.5742, abs=5e-5)
    assert non_relative_share(third, third, BELOW) == pytest.approx(0.4341, abs=5e-5)


def test_shares_of_planted_scores():
    relative, late, sink = QUERY - KEY, KEY / N, (KEY == 1).astype(float)
    assert non_relative_share(relative, relative, BELOW) == pytest.approx(0, abs=1e-12)
    assert non_relative_share(late, late, BELOW) == pytest.approx(0.75, abs=5e-5)
    assert non_relative_share(sink, sink, BELOW) == pytest.approx(0.9464, abs=5e-5)
    assert np.isnan(non_relative_share(0 * QUERY, 0 * QUERY, BELOW))
    rest = non_relative(2 * KEY / QUERY, BELOW)
    x = (KEY / QUERY)[BELOW]
    slope = np.polyfit(x, rest[BELOW], 1)[0]
    assert slope_of_keys(2 * KEY / QUERY, BELOW) == pytest.approx(slope)
    assert slope > 0.5


def test_halves_take_the_noise_of_texts_out():
    draw = np.random.default_rng(0)
    halves = [(KEY - QUERY) / 5 + draw.normal(size=QUERY.shape) for _ in range(2)]
    whole = np.mean(halves, 0)
    assert non_relative_share(whole, whole, BELOW) > 0.05
    assert abs(non_relative_share(*halves, BELOW)) < 0.02


def planted(path, scores, documents=4, noise=0.0):
    """A store whose heads have these scores at layer 0: queries are rows of S, and keys unit vectors."""
    draw = np.random.default_rng(1)
    heads, n = len(scores), scores[0].shape[0]
    query = np.stack(scores, 1)[None] + noise * draw.normal(size=(documents, n, heads, n))
    key = np.tile(np.eye(n)[None, :, None], (documents, 1, heads, 1))
    sites = {"rot_q.0": query.reshape(-1, heads, n), "rot_k.0": key.reshape(-1, heads, n)}
    store = planted_store(path, [list(range(n))] * documents, sites, n_layers=1)
    rule = ScoreRule(0, "rot_q.0", "rot_k.0", 1.0, None, None, False)
    model = replace(store.manifest.model, score_rules=(rule,))
    return replace(store, manifest=replace(store.manifest, model=model))


def test_planted_heads(tmp_path):
    store = planted(tmp_path / "s", [(QUERY - KEY) / N, KEY / N, 9.0 * (KEY == 1)], noise=0.01)
    data = MaskPositions(length=N).run(store).data
    np.testing.assert_allclose(data["head_share"][0], [0, 0.75, 0.9464], atol=0.01)
    clean = data["head_share_no_sinks"][0].to_numpy()
    np.testing.assert_allclose(clean[:2], [0, 0.74], atol=0.02)  # without key 0
    assert np.isnan(clean[2])  # nothing but noise is left
    assert data["sinks"][0].to_numpy().tolist() == [0, 0, 0]
    mean = ((QUERY - KEY) / N + KEY / N + 9.0 * (KEY == 1)) / 3
    assert float(data["non_relative_share"][0]) == pytest.approx(non_relative_share(mean, mean, BELOW), abs=0.01)
    assert float(data["slope"][0]) == pytest.approx(slope_of_keys(mean, BELOW), rel=0.02)
    without = BELOW.copy()
    without[:, 0] = False
    assert float(data["slope_no_sinks"][0]) == pytest.approx(slope_of_keys(mean, without), rel=0.05)
    np.testing.assert_allclose(data["map"][0], non_relative(mean, BELOW), atol=0.02)
    assert int(data["documents"]) == int(data["sequences"]) == 4


def test_an_inner_sink_is_left_out_by_its_own_head(tmp_path):
    store = planted(tmp_path / "s", [9.0 * (KEY == 7), (QUERY - KEY) / N])
    data = MaskPositions(length=N).run(store).data
    assert data["sinks"][0].to_numpy().tolist() == [1, 0]
    assert float(data["head_share"][0, 0]) > 0.9
    assert np.isnan(data["head_share_no_sinks"][0, 0])  # constant without it
    assert float(data["non_relative_share_no_sinks"][0]) == pytest.approx(0, abs=1e-9)
    strict = MaskPositions(length=N, sink_threshold=1.0).run(store).data
    assert strict["sinks"].to_numpy().sum() == 0


def test_the_simulated_block_correlates_with_itself(tmp_path):
    data = (
        MaskPositions(length=N).run(planted(tmp_path / "s", [3 * simulated_scores(N, 2)[1] + (QUERY - KEY) / N])).data
    )
    assert float(data["simulated_correlation"][0]) == pytest.approx(1, abs=1e-4)
    assert float(data["simulated_share"][1]) == pytest.approx(0.5742, abs=5e-5)


def test_settings_matter(store, tmp_path):
    data = MaskPositions(length=18).run(store).data
    assert data["map"].shape == (3, 18, 18)
    assert np.isnan(data["map"][0, 17, 1])  # layer 0 of this Gemma sees 16 tokens
    assert not np.isnan(data["map"][1, 17, 1])
    assert MaskPositions(length=18, layers=(-1,)).run(store).data["layer"].values.tolist() == [2]
    assert int(MaskPositions(length=18, where="document < 2").run(store).data["sequences"]) == 2
    second = MaskPositions(length=18, seed=1).run(store).data
    assert not np.array_equal(second["head_share"], data["head_share"])
    single = MaskPositions(length=18, where="document = 0").run(store)
    assert "one document" in single.headline()
    np.testing.assert_array_equal(single.data["non_relative_share"], single.data["whole_share"])


def test_refusals_say_what_to_do(store, tiny_stores):
    assert "no sequence has as many tokens" in refused(RequestError, lambda: MaskPositions(length=30).run(store))
    assert "rot_q.0" in refused(RequestError, lambda: MaskPositions().run(tiny_stores["llama"]))
    for setting in ({"length": 4}, {"sink_threshold": 0.0}, {"seed": -1}):
        refused(RequestError, lambda setting=setting: MaskPositions(**setting))
