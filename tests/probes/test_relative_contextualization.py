"""Relative contextualization: METHODS2 1.7's planted values, direct loops over pairs, and every setting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import planted_store
from refusals import refused

import workbench as wb
from workbench.analysis.score_excess import conditional_excess, marginal_excess, mean_excess
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import RelativeContextualization
from workbench.probing import ScoreRule
from workbench.testing import ProbeContract

P, G, D = 6, 5, 3
T = P + G


@pytest.fixture(scope="module")
def store(tiny_models, tmp_path_factory):
    ids = np.random.default_rng(0).integers(5, 300, (6, 20)).tolist()
    model = Model(tiny_models["llama"], None, "tiny-llama")
    out = tmp_path_factory.mktemp("rc") / "x.acts"
    return wb.record(model, ids, sites=["rot_q", "rot_k"], out=out, dtype="float32", show_progress=False)


class TestContract(ProbeContract):
    probe = RelativeContextualization
    settings = {"length": 12, "resamples": 20, "shown": 2, "heads": 3}  # noqa: RUF012

    @pytest.fixture
    def store(self, store):
        return store


def excess(x, y):
    x, y = (torch.tensor(part, dtype=torch.float64)[None] for part in (x, y))
    return float(mean_excess(x, y, torch.ones(y.shape, dtype=torch.bool)).mean())


def test_the_mean_excess_of_planted_scores():
    assert excess([1, 3], [0, 2]) == 1.25
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 200_000))
    assert excess(x, y) == pytest.approx(1 / np.pi**0.5, abs=0.005)
    assert excess(x + 50, y) == pytest.approx(50 + x.mean() - y.mean(), abs=1e-6)
    assert excess(x + 7, y + 7) == pytest.approx(excess(x, y))
    assert excess(3 * x, 3 * y) == pytest.approx(3 * excess(x, y))
    assert excess(0 * x, 0 * y) == 0


def direct(scores, counts):
    """rc, rc_marginal and attribution of one head, pair by pair; `counts`: keys of the prompt that are no sinks."""
    by_query, by_key, newer = [], np.zeros(P), []
    for j in range(P, T):
        pairs = [[max(scores[j, i] - scores[j, k], 0) for k in range(P, j + 1)] for i in range(P) if counts[i]]
        by_query.append(np.mean(pairs))
        for place, i in enumerate(np.flatnonzero(counts)):
            by_key[i] += np.mean(pairs[place]) / G
        newer += [scores[j, k] for k in range(P, j + 1)]
    earlier = [scores[j, i] for j in range(P, T) for i in range(P) if counts[i]]
    marginal = np.mean([max(x - y, 0) for x in earlier for y in newer])
    return np.mean(by_query), marginal, np.where(counts, by_key, np.nan)


def planted(path, texts=3, scale=0.5):
    """A store with random queries and keys; the third head has none."""
    draw = np.random.default_rng(2)
    query, key = draw.normal(size=(texts * T, 3, D)), draw.normal(size=(texts * T, 3, D))
    query[:, 2] = 0
    store = planted_store(path, [list(range(T))] * texts, {"rot_q.0": query, "rot_k.0": key}, n_layers=1)
    rule = ScoreRule(0, "rot_q.0", "rot_k.0", scale, None, None, False)
    model = replace(store.manifest.model, score_rules=(rule,))
    scores = scale * np.einsum("tqhd,tkhd->thqk", query.reshape(texts, T, 3, D), key.reshape(texts, T, 3, D))
    return replace(store, manifest=replace(store.manifest, model=model)), scores, (query, key)


SHORT = {"length": T, "prompt": P, "resamples": 20}


def test_every_measure_is_the_loop_over_pairs(tmp_path):
    store, scores, (query, key) = planted(tmp_path / "s")
    data = RelativeContextualization(**SHORT, leave_out_sinks=False, heads=2, shown=1).run(store).data
    by_text = [[direct(scores[text, head], np.ones(P, bool)) for head in range(3)] for text in range(3)]
    for head in range(3):
        assert float(data["rc"][0, head]) == pytest.approx(np.mean([heads[head][0] for heads in by_text]), rel=1e-6)
        assert float(data["rc_marginal"][0, head]) == pytest.approx(
            np.mean([heads[head][1] for heads in by_text]), rel=1e-6
        )
    assert float(data["rc"][0, 2]) == 0  # no score
    np.testing.assert_allclose(data["attribution"], (by_text[0][0][2] + by_text[0][1][2]) / 2, rtol=1e-6)
    keys = key.reshape(3, T, 3, D).copy()
    keys[:, :P] = np.roll(keys[:, :P], -1, axis=0)  # the next text's prompt
    halved = 0.5 * np.einsum("tqhd,tkhd->thqk", query.reshape(3, T, 3, D), keys)
    for head in range(2):
        expected = np.mean([direct(halved[text, head], np.ones(P, bool))[0] for text in range(3)])
        assert float(data["rc_other"][0, head]) == pytest.approx(expected, rel=1e-6)
        assert float(data["excess"][0, head]) == pytest.approx(float(data["rc"][0, head]) - expected, rel=1e-6)


def test_sinks_are_left_out_of_the_prompt(tmp_path):
    store, scores, _ = planted(tmp_path / "s", texts=1)
    result = RelativeContextualization(**SHORT, sink_threshold=0.2, shown=1, heads=1).run(store)
    for head in range(2):
        weights = np.exp(scores[0, head]) * np.tril(np.ones((T, T)))
        weights /= weights.sum(1, keepdims=True)
        counts = weights[P:, :P].mean(0) <= 0.2
        counts[0] = False
        assert float(result.data["rc"][0, head]) == pytest.approx(direct(scores[0, head], counts)[0], rel=1e-6)
        assert float(result.data["sinks"][0, head]) == pytest.approx(1 - counts.mean())
    assert np.isnan(result.data["attribution"][0])
    assert "rc_other not computed" in result.headline()


def test_a_head_that_looks_back_exceeds_other_prompts(tmp_path):
    """Queries of a text match the keys of its own prompt alone."""
    texts, draw = 4, np.random.default_rng(0)
    marks = np.linalg.qr(draw.normal(size=(8, 8)))[0][:texts]
    key = np.repeat(marks, T, 0)[:, None]
    query = 5 * key.copy()
    key.reshape(texts, T, 1, 8)[:, P:] = 0
    store = planted_store(tmp_path / "s", [list(range(T))] * texts, {"rot_q.0": query, "rot_k.0": key}, n_layers=1)
    rule = ScoreRule(0, "rot_q.0", "rot_k.0", 1.0, None, None, False)
    model = replace(store.manifest.model, score_rules=(rule,))
    store = replace(store, manifest=replace(store.manifest, model=model))
    data = RelativeContextualization(**SHORT).run(store).data
    assert float(data["rc"][0, 0]) == pytest.approx(5, rel=1e-5)
    assert float(data["rc_other"][0, 0]) == pytest.approx(0, abs=1e-5)


def test_causal_masks_and_windows_hide_keys():
    scores = torch.tensor(np.random.default_rng(0).normal(size=(2, G, T)))
    none = torch.zeros(2, G, T, dtype=torch.bool)
    all_queries = torch.ones(2, G, T, dtype=torch.bool)
    total, by_key = conditional_excess(scores, none, all_queries)
    assert total.isnan().all()
    assert by_key.isnan().all()
    assert marginal_excess(scores, none, all_queries).isnan().all()


def test_settings_matter(store):
    def run(**more):
        return RelativeContextualization(**{"length": 12, "resamples": 20, **more}).run(store).data

    plain = run()
    assert plain.sizes["token"] == 4 * 6  # half of the length
    assert run(prompt=4).sizes["token"] == 4 * 4
    assert run(shown=1).sizes["token"] == 6
    assert "attribution" not in run(shown=0)
    assert int(run(where="document < 2")["sequences"]) == 2
    assert run(layers=(1,))["layer"].values.tolist() == [1]
    assert not np.array_equal(run(leave_out_sinks=False)["rc"], plain["rc"])
    assert not np.array_equal(run(heads=1)["attribution"], plain["attribution"], equal_nan=True)
    assert not np.array_equal(run(seed=1)["rc_low"], plain["rc_low"])


def test_generated_tokens_are_the_newer_text(tmp_path):
    draw = np.random.default_rng(0)
    sites = {f"rot_{kind}.0": draw.normal(size=(T, 1, D)) for kind in "qk"}
    generated = {"generated": [False] * 4 + [True] * (T - 4)}
    store = planted_store(tmp_path / "s", [list(range(T))], sites, n_layers=1, columns=generated)
    rule = ScoreRule(0, "rot_q.0", "rot_k.0", 1.0, None, None, False)
    model = replace(store.manifest.model, score_rules=(rule,))
    store = replace(store, manifest=replace(store.manifest, model=model))
    assert RelativeContextualization(resamples=20).run(store).data.sizes["token"] == 4


def test_refusals_say_what_to_do(store, tiny_stores):
    assert "give a smaller length" in refused(RequestError, lambda: RelativeContextualization(length=40).run(store))
    assert "rot_q.0" in refused(RequestError, lambda: RelativeContextualization().run(tiny_stores["llama"]))
    for setting in ({"length": 2}, {"prompt": 64}, {"prompt": 1}, {"heads": 0}, {"sink_threshold": 2.0}):
        refused(RequestError, lambda setting=setting: RelativeContextualization(**setting))
