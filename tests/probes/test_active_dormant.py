"""Active-dormant heads: planted heads and norms, W_O of plain Hugging Face in float64, domains beside permuted ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from refusals import refused
from scipy.stats import binom, norm, t
from sink_example import plant, previous, rows_of, sink_head, uniform

import workbench as wb
from workbench.figures.describe import figure_data
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import ActiveDormant
from workbench.testing import ProbeContract

N, SEQUENCES = 16, 8
SOURCES = ["wiki"] * 4 + ["code"] * 4


def run(store, model=None, **settings):
    return ActiveDormant(**{"length": N, "resamples": 30, "permutations": 40, "device": "cpu", **settings}).run(
        store, model=model
    )


def heads_of(sequence):
    """A sink head in wiki that looks at the previous token in code, a sink head, a uniform one."""
    return [sink_head(N, 0.9) if SOURCES[sequence] == "wiki" else previous(N), sink_head(N, 0.8), uniform(N)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """One layer of these heads, values with a small sink, and a residual stream with a peak at position 0."""
    draw = np.random.default_rng(0)
    rows = N * SEQUENCES
    values = draw.normal(size=(rows, 3, 4))
    values[::N] *= 0.01
    stream = np.ones((rows, 6))
    stream[::N] *= 50
    arrays = {"pattern.0": rows_of(*map(heads_of, range(SEQUENCES))), "v.0": values, "resid_post.0": stream}
    path = tmp_path_factory.mktemp("dormant") / "s"
    return plant(path, [N] * SEQUENCES, arrays, documents=list(range(SEQUENCES)), sources=SOURCES)


class TestContract(ProbeContract):
    probe = ActiveDormant
    settings = {"length": N, "resamples": 20, "permutations": 20, "domain": "source", "device": "cpu"}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted):
        return planted


# ---- planted heads --------------------------------------------------------------------------------------


def test_a_head_that_is_dormant_in_one_domain_and_active_in_the_other(planted):
    result = run(planted, domain="source")
    data = result.data.isel(layer=0)
    assert data["domain"].to_numpy().tolist() == ["code", "wiki"]
    assert data["domain_active"].to_numpy().tolist() == [[1, 0, 1], [0, 0, 1]]
    assert data["gap"].to_numpy().tolist() == [1, 0, 0]
    assert data["active"].to_numpy().tolist() == [0.5, 0, 1]
    expected = [(1 + 15 * 0.9) / 16, (1 + 15 * 0.8) / 16, sum(1 / i for i in range(1, 17)) / 16]
    expected[0] = (expected[0] + 2 / 16) / 2  # the previous-token head pays the first token twice
    np.testing.assert_allclose(data["sink_attention"], expected, rtol=1e-6)
    assert int(data["sink_position"]) == 0
    assert data["peak"].item() == pytest.approx(50)
    best = result.table.iloc[0]
    assert (best["head"], best["gap_most"], best["gap_least"]) == (0, "code", "wiki")
    assert "1 head differs between domains by more than permuted domains do" in result.headline()
    assert {*result.figures()} == {"heads", "phenomena", "domains"}


def test_the_textbook_sink_of_the_backcopy_task(tmp_path):
    """The sink's logit is lambda, the others' 0: alpha is the mean of 1 / (1 + (i - 1) exp(-lambda))."""
    strength = 3.0
    logits = np.where(np.arange(N) == 0, strength, 0.0) + np.zeros((N, N))
    pattern = np.tril(np.exp(logits))
    pattern /= pattern.sum(1, keepdims=True)
    values = np.ones((2 * N, 1, 2))
    values[::N] = 0
    store = plant(tmp_path / "s", [N, N], {"pattern.0": rows_of([pattern], [pattern]), "v.0": values}, documents=[0, 1])
    data = run(store).data
    visible = np.arange(1, N + 1)
    assert data["sink_attention"].item() == pytest.approx(
        np.mean(1 / (1 + (visible - 1) * np.exp(-strength))), abs=1e-6
    )
    assert data["drain_value"].item() == 0
    assert "drain" not in data
    assert "drain not computed: it needs the model" in data.attrs["note"]
    assert "peak" not in data


def test_the_sink_is_the_position_that_receives_most(tmp_path):
    """Not position 0, and no late position that few queries see."""
    store = plant(tmp_path / "s", [N, N], {"pattern.0": rows_of([sink_head(N, 0.9, 3)], [sink_head(N, 0.9, 3)])})
    assert run(store).data["sink_position"].item() == 3
    assert run(store, sink=0).data["sink_position"].item() == 0
    late = plant(tmp_path / "late", [N, N], {"pattern.0": rows_of([np.eye(N)], [np.eye(N)])})
    assert run(late).data["sink_position"].item() == N - 8
    assert "position 8 is the last that counts as a sink" in run(late).headline()
    assert run(late, min_visible=2).data["sink_position"].item() == N - 2


def test_the_threshold_decides_what_is_active(planted):
    assert run(planted, epsilon=0.9).data["active"].to_numpy().tolist() == [[0.5, 1, 1]]
    assert run(planted, epsilon=0.0).data["active"].to_numpy().tolist() == [[0, 0, 0]]


def test_domains_that_do_not_matter_reach_the_permuted_gap(tmp_path):
    draw = np.random.default_rng(1)
    heads = [[sink_head(N, 0.9) if draw.random() < 0.5 else uniform(N) for _ in range(6)] for _ in range(40)]
    sources = [("a", "b")[i % 2] for i in range(40)]
    store = plant(tmp_path / "s", [N] * 40, {"pattern.0": rows_of(*heads)}, documents=list(range(40)), sources=sources)
    data = run(store, domain="source", permutations=200).data
    assert float(data["gap"].max()) <= data["gap_permuted"].item() < 0.7


def test_one_domain_or_one_document_each_has_no_gap(planted):
    result = run(planted, domain="source", where="source = 'wiki'")
    assert result.data["gap"].isnull().all()
    assert "gap not computed: it needs two values of source with two documents each" in result.data.attrs["note"]
    assert {*result.figures()} == {"heads", "phenomena"}


def test_the_curves_have_the_intervals_of_drawn_documents(tmp_path):
    """Two heads are sinks in 8 of 20 documents, with a residual peak there: the share that is drawn is binomial."""
    number, having = 20, 8
    heads = [
        [sink_head(N, 0.9), sink_head(N, 0.9)] if document < having else [uniform(N)] * 2 for document in range(number)
    ]
    stream = np.ones((N * number, 6))
    stream[: N * having : N] *= 50
    arrays = {"pattern.0": rows_of(*heads), "resid_post.0": stream}
    result = run(plant(tmp_path / "s", [N] * number, arrays, documents=list(range(number))), sink=0, resamples=4000)
    tail = norm.cdf(-np.sqrt(number / (number - 1)) * t.ppf(0.975, number - 1))
    shares = np.array([having, *binom.ppf([tail, 1 - tail], number, having / number)]) / number
    sink, even = (1 + 15 * 0.9) / 16, sum(1 / i for i in range(1, 17)) / 16
    table = figure_data(result.figures()["phenomena"])
    for name, (active_value, dormant_value), text in (("mean_sink", (sink, even), "sink"), ("peak", (50, 1), "peak")):
        expected = dormant_value + shares * (active_value - dormant_value)
        step = (active_value - dormant_value) / number
        values = [float(result.data[f"{name}{end}"][0]) for end in ("", "_low", "_high")]
        assert values[0] == pytest.approx(expected[0], rel=1e-5)
        assert values[1:] == pytest.approx(expected[1:], abs=step * 1.01)
        line = table.loc[table["series"].str.startswith(text)].iloc[0]
        assert line[["y", "low", "high"]].tolist() == pytest.approx(values)


# ---- weights of plain Hugging Face ------------------------------------------------------------------------


def test_the_drain_is_that_of_the_values_through_their_own_w_o(tiny_models, tmp_path):
    """Two query heads share a value but not W_O."""
    module = tiny_models["llama"]
    model, ids = Model(module, None, "tiny"), np.random.default_rng(2).integers(8, 200, (3, N)).tolist()
    sites = ["attn_received", "v", "resid_norm"]
    store = wb.record(model, ids, sites=sites, context=N, dtype="float32", show_progress=False)
    data = run(store, model=model, sink=2).data
    for layer, block in enumerate(module.model.layers):
        values = np.asarray(store["v", layer]).reshape(3, N, 2, 8).astype(float)
        weight = block.self_attn.o_proj.weight.detach().double().numpy().T.reshape(4, 8, 32)
        for head in range(4):
            norms = np.linalg.norm(values[:, :, head // 2] @ weight[head], axis=-1)
            medians = np.median(np.delete(norms, 2, axis=1), axis=1)
            assert float(data["drain"][layer, head]) == pytest.approx((norms[:, 2] / medians).mean(), rel=1e-5)
            plain = np.linalg.norm(values[:, :, head // 2], axis=-1)
            expected = (plain[:, 2] / np.median(np.delete(plain, 2, axis=1), axis=1)).mean()
            assert float(data["drain_value"][layer, head]) == pytest.approx(expected, rel=1e-5)
        assert float(data["median_drain"][layer]) == pytest.approx(np.median(data["drain"][layer]))
        assert np.isnan(data["median_drain_low"][layer]) == (len(set(store.tokens["document"].to_pylist())) == 1)
        with torch.no_grad():
            stream = copy.deepcopy(module)(torch.tensor(ids), output_hidden_states=True).hidden_states
        if layer < 2:  # the last one is normed
            norms = stream[layer + 1].double().norm(dim=-1).numpy()
            expected = (norms[:, 2] / np.median(np.delete(norms, 2, axis=1), axis=1)).mean()
            assert float(data["peak"][layer]) == pytest.approx(expected, rel=1e-5)
    assert not data.attrs["note"]


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sink": N - 1}, "sink must be from 0 to 14"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"min_visible": N + 1}, "min_visible"),
        ({"length": 2}, "length"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    assert words in refused(RequestError, lambda: ActiveDormant(**{"length": N, **settings}))


def test_attention_summed_over_longer_sequences_is_refused(tmp_path):
    store = plant(tmp_path / "s", [N, N], {"attn_received.0": np.ones((2 * N, 1))})
    assert "attn_received was summed over whole sequences" in refused(RequestError, lambda: run(store, length=8))
