"""Masked sinks: an edit after an eager softmax, and a planted circuit that reads its first token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from change_oracles import eager, edited_softmax
from planted_circuit import END, NAMES, planted_circuit
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import MaskedSinks
from workbench.testing import ProbeContract

LATER = 4
IDS = [list(range(5, 17)), [20, 31, 22], [30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return Model(tiny_models["llama"], None, "tiny-llama")


@pytest.fixture(scope="module")
def tiny_store(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("masked") / "s"
    return wb.record(tiny, IDS, sites=["pattern"], out=out, dtype="float32", show_progress=False)


class TestContract(ProbeContract):
    probe = MaskedSinks
    settings = {"later": LATER, "heads": 2, "draws": 2, "resamples": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, tiny_store):
        return tiny_store

    @pytest.fixture
    def model(self, tiny):
        return tiny


def top_hidden(layer, alone):
    """An edit of eager weights: each head's top key among the first LATER is hidden from later queries."""

    def edit(weights):
        new = weights.clone()
        for head in range(weights.shape[1]) if alone is None else (alone,):
            visible = torch.arange(weights.shape[2], 0, -1)
            alpha = weights[0, head].sum(0) / visible
            key = int(alpha[:LATER].argmax())
            row = weights[0, head, LATER:].clone()
            row[:, key] = 0
            new[0, head, LATER:] = row / row.sum(-1, keepdim=True)
        return new

    return edited_softmax(layer, edit)


def losses(module, edit=None):
    """Losses of tokens at positions from LATER on, by plain Hugging Face in float64."""
    values = []
    for ids in IDS:
        with torch.no_grad():
            if edit is None:
                logits = module(torch.tensor([ids])).logits
            else:
                with edit():
                    logits = module(torch.tensor([ids])).logits
        log = logits[0].double().log_softmax(-1)
        values += [-float(log[at, ids[at + 1]]) for at in range(LATER, len(ids) - 1)]
    return np.array(values)


def test_effects_are_those_of_weights_edited_after_an_eager_softmax(tiny, tiny_store):
    data = MaskedSinks(later=LATER, heads=1, draws=1, resamples=2).run(tiny_store, model=tiny).data
    module = eager(tiny.module)
    plain = losses(module)
    assert int(data["rows"]) == len(plain)
    for layer in range(3):
        expected = (losses(module, lambda layer=layer: top_hidden(layer, None)) - plain).mean()
        assert float(data["loss_layer"].sel(kind="sink", layer=layer)) == pytest.approx(expected, abs=1e-5)
    single = data["loss_head"].sel(kind="sink")
    layer, head = (int(index[0]) for index in np.nonzero(single.notnull().to_numpy()))
    assert float(data["alpha"][layer, head]) == float(data["alpha"].max())
    expected = (losses(module, lambda: top_hidden(layer, head)) - plain).mean()
    assert float(single[layer, head]) == pytest.approx(expected, abs=1e-5)


def test_attention_received_serves_as_well_as_the_pattern(tiny, tiny_store, tmp_path):
    store = wb.record(tiny, IDS, sites=["attn_received"], out=tmp_path / "s", dtype="float32", show_progress=False)
    probe = MaskedSinks(later=LATER, heads=0, layers_too=False, draws=1, resamples=2)
    first, second = (probe.run(part, model=tiny).data for part in (store, tiny_store))
    np.testing.assert_allclose(first["loss"], second["loss"], atol=1e-6)


def test_a_circuit_that_reads_its_first_token_needs_it_and_no_random_key(tmp_path):
    model = Model(planted_circuit(), None, "circuit")
    ids = [[name, 7, 8, END, END, END, END, name] for name in NAMES]
    store = wb.record(model, ids, sites=["pattern"], out=tmp_path / "s", dtype="float32", show_progress=False)
    probe = MaskedSinks(later=3, where="position = 6", heads=1, resamples=50)
    result = probe.run(store, model=model)
    loss = result.data["loss_layer"]
    assert float(loss.sel(kind="sink", layer=0)) > 1
    assert float(loss.sel(kind="random", layer=0)) == 0
    assert float(loss.sel(kind="sink", layer=1)) == 0
    assert float(result.data["loss"].sel(kind="sink")) == float(loss.sel(kind="sink", layer=0))
    assert float(result.data["at_first"].sel(layer=0, head=1)) == 1
    assert "position 3 on" in result.headline()


def test_random_keys_are_early_ones_but_never_the_first(tiny, tiny_store):
    from workbench.analysis.sink_changes import read_received

    received = read_received(tiny_store, np.array([0, 15]))
    top = received.top_keys(LATER)
    assert received.starts.tolist() == [0, 15]
    for seed in range(10):
        for keys in received.random_keys(top, 1, LATER, seed).values():
            rows = np.unique(np.nonzero(keys)[0])
            assert ((rows >= 1) & (rows < LATER) | (rows >= 16) & (rows < 15 + LATER)).all()
            assert keys.sum(0).tolist() == [2] * keys.shape[1]


def test_settings_matter_and_requests_without_an_answer_are_refused(tiny, tiny_store):
    data = MaskedSinks(later=LATER, heads=0, layers_too=False, draws=1, resamples=2).run(tiny_store, model=tiny).data
    assert "loss_layer" not in data
    assert "loss_head" not in data
    assert "selects no token" in refused(RequestError, lambda: MaskedSinks(later=90).run(tiny_store, model=tiny))
