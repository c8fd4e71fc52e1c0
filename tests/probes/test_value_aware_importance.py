"""Value-aware importance: planted attention, naive ranks, and outputs with a key hidden in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refusals import refused
from sink_example import plant, rows_of, sink_head, uniform

import workbench as wb
from workbench.analysis.importance import rank_correlation, removal_effects, top_overlap
from workbench.analysis.value_outputs import output_maps
from workbench.figures.describe import figure_data
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import ValueAwareImportance
from workbench.testing import ProbeContract

N = 16


def run(store, model=None, **settings):
    return ValueAwareImportance(**{"length": N, "resamples": 20, "device": "cpu", **settings}).run(store, model=model)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3 * N, 2, 4))
    values[::N] *= 0.001
    sites = {"pattern.0": rows_of(*[[sink_head(N, 0.9), uniform(N)]] * 3), "v.0": values}
    return plant(tmp_path_factory.mktemp("values") / "s", [N] * 3, sites, documents=[0, 1, 2])


class TestContract(ProbeContract):
    probe = ValueAwareImportance
    settings = {"length": N, "resamples": 20, "device": "cpu"}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted):
        return planted


# ---- planted truths -------------------------------------------------------------------------------------


def test_the_planted_attention_turns_its_order_round(tmp_path):
    pattern = np.array([[1, 0, 0, 0], [0.8, 0.2, 0, 0], [0.7, 0.2, 0.1, 0], [0.6, 0.1, 0.2, 0.1]])
    values = np.array([[0.05], [-1], [2], [1]])[:, None]  # L1 norms .05 1 2 1: I = .155 .5 .6 .1, from 3.1 .5 .3 .1
    store = plant(tmp_path / "s", [4], {"pattern.0": rows_of([pattern]), "v.0": values})
    data = run(store, length=4, top=0.25).data.isel(layer=0, head=0)
    assert data["spearman"].item() == pytest.approx(0.2)  # ranks 1 2 3 4 and 3 2 1 4
    assert data["overlap_top"].item() == 0
    assert (data["sink_rank_attention"].item(), data["sink_rank_value"].item()) == (1, 3)
    assert run(store, length=4, top=0.5).data["overlap_top"].item() == 0.5
    # means over 4 3 2 1 queries: .775 .1667 .15 .1, times the norms .0388 .1667 .3 .1
    assert data["spearman_mean"].item() == pytest.approx(1 - 6 * (9 + 0 + 4 + 1) / 60)
    assert data["overlap_top_mean"].item() == 0
    assert run(store, length=4, sink=2).data["sink_rank_value"].item() == 1


def test_a_sink_without_value_loses_its_rank_and_a_uniform_head_keeps_its_order(planted):
    result = run(planted)
    data = result.data.isel(layer=0)
    assert float(data["sink_rank_attention"][0]) == 1
    assert float(data["sink_rank_value"][0]) > 8
    assert "position 0 ranks 1 of 16 by attention and" in result.headline()
    assert "change of outputs not computed: it needs the model" in data.attrs["note"]


def test_ranks_and_overlaps_are_those_of_plain_python():
    from scipy.stats import spearmanr

    draw = np.random.default_rng(3)
    a, b = draw.integers(0, 6, (2, 3, 12, 2)).astype(float)
    correlation, shared = rank_correlation(a, b), top_overlap(a, b, 4)
    for s, h in np.ndindex(3, 2):
        assert correlation[s, h] == pytest.approx(spearmanr(a[s, :, h], b[s, :, h]).statistic)
        tops = [sorted(range(12), key=lambda k, part=part: (-part[s, k, h], k))[:4] for part in (a, b)]
        assert shared[s, h] == len({*tops[0]} & {*tops[1]}) / 4
    assert np.isnan(rank_correlation(np.ones((1, 3, 1)), draw.random((1, 3, 1)))).all()


def test_the_effect_is_the_change_of_the_output_with_the_key_hidden():
    """Grouped values; the first query has one key and does not count."""
    torch.manual_seed(0)
    n, heads, width, d_model = 6, 4, 3, 7
    pattern = torch.rand(2, n, heads, n).double()
    for i in range(n):
        pattern[:, i, :, i + 1 :] = 0
    pattern /= pattern.sum(-1, keepdim=True)
    values, weights = torch.randn(2, n, 2, width).double(), torch.randn(heads, width, d_model)
    effects = removal_effects(pattern, values, output_maps(weights))
    for s, h, k in np.ndindex(2, heads, n):
        total = 0.0
        for i in range(n):
            row, read = pattern[s, i, h], values[s, :, h // 2] @ weights[h].double()
            if i == 0:
                continue
            hidden = row.clone()
            hidden[k] = 0
            total += float((hidden / hidden.sum() @ read - row @ read).norm())
        assert effects[s, k, h] == pytest.approx(total, rel=1e-6)


def test_effects_of_a_recorded_model(tiny_models, tmp_path):
    model, ids = Model(tiny_models["llama"], None, "tiny"), np.random.default_rng(2).integers(8, 200, (5, N)).tolist()
    store = wb.record(model, ids, sites=["pattern", "v"], context=N, dtype="float32", show_progress=False)
    result = run(store, model=model, effect_sequences=3)
    assert int(result.data["effect_sequences"]) == 3
    layer, head = 1, 3
    pattern, values = store["pattern", layer][:][..., :N].reshape(5, N, 4, N), store["v", layer][:].reshape(5, N, 2, 8)
    weight = tiny_models["llama"].model.layers[layer].self_attn.o_proj.weight.detach().T.reshape(4, 8, 32)
    effect = removal_effects(pattern[:3], values[:3], output_maps(weight))[..., head]
    sums = pattern[:3, :, head].double().sum(1).numpy()
    norms = values[:3, :, head // 2].abs().sum(-1).double().numpy()
    expected = rank_correlation((sums * norms)[..., None], effect[..., None]).mean()
    assert float(result.data["effect_value"][layer, head]) == pytest.approx(expected, abs=1e-6)
    gain = result.data["effect_value"] - result.data["effect_attention"]
    assert float(result.data["effect_gain"]) == pytest.approx(float(gain.mean()), abs=1e-9)
    figures = result.figures()
    assert {*figures} == {"heads", "classes", "effect"}
    mean = figure_data(figures["effect"]).iloc[-1]
    for end in ("low", "high"):
        gained = float(result.data[f"effect_gain_{end}"])
        assert mean[end] == pytest.approx(float(result.data["effect_attention"].mean()) + gained, abs=1e-9)
    assert mean["low"] < mean["y"] < mean["high"]
    assert ": overlap 0." in figures["heads"].layout.title.text


def test_derived_attention_gives_the_same_ranks(tiny_models):
    model, ids = Model(tiny_models["gpt2"], None, "tiny"), np.random.default_rng(2).integers(8, 200, (2, N)).tolist()
    options = {"context": N, "dtype": "float32", "show_progress": False}
    whole, derived = (run(wb.record(model, ids, sites=[site, "v"], **options)) for site in ("pattern", "attn_received"))
    for name in ("spearman", "overlap_top", "sink_rank_value", "class_norm"):
        np.testing.assert_allclose(whole.data[name], derived.data[name], atol=0.02)


# ---- refusals -------------------------------------------------------------------------------------------


def test_values_are_needed(tmp_path):
    store = plant(tmp_path / "s", [N], {"pattern.0": rows_of([uniform(N)])})
    assert "v.0 is not recorded" in refused(RequestError, lambda: run(store))
    assert "sink must be from 0 to 15" in refused(RequestError, lambda: ValueAwareImportance(length=N, sink=N))
