"""Attention calibration: planted hidden sinks under both thresholds, and weights moved after an eager softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from change_oracles import eager, edited_softmax
from refusals import refused
from sink_example import planted

import workbench as wb
from workbench.analysis.change_effects import MeasuredRows
from workbench.analysis.sink_changes import Received, read_received
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import AttentionCalibration
from workbench.testing import ProbeContract

IDS = [list(range(5, 17)), list(range(40, 54)), [20, 31, 22, 80, 81, 82, 83, 84], list(range(90, 102))]
THRESHOLD, VISIBLE = 0.2, 3


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return Model(tiny_models["llama"], None, "tiny-llama")


@pytest.fixture(scope="module")
def tiny_store(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "s"
    return wb.record(tiny, IDS, sites=["pattern"], out=out, dtype="float32", show_progress=False)


class TestContract(ProbeContract):
    probe = AttentionCalibration
    settings = {"first": 0, "last": 0, "threshold": THRESHOLD, "min_visible": VISIBLE, "resamples": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, tiny_store):
        return tiny_store

    @pytest.fixture
    def model(self, tiny):
        return tiny

    def test_chosen_layers_lower_the_loss_of_the_first_half(self, result):
        loss = result.data["loss_layer"].to_numpy()
        chosen = [int(layer) for layer in result.data.attrs["chosen"].split(", ") if layer]
        assert chosen == np.flatnonzero(loss < 0).tolist()
        assert np.isnan(result.data["loss"].sel(kind="chosen")) == (not chosen)


def test_hidden_sinks_are_the_planted_ones_under_both_thresholds(tmp_path):
    """METHODS 1.3: queries 4 to 9 pay 0.3 to key 0, 0.5 to key 4, the rest alike; alpha is 0.58 and 0.50."""
    pattern = np.zeros((10, 10))
    pattern[:4, 0] = 1
    for query in range(4, 10):
        other_keys = [key for key in range(query + 1) if key not in (0, 4)]
        pattern[query, other_keys] = 0.2 / len(other_keys)
        pattern[query, [0, 4]] = 0.3, 0.5
    store = planted(tmp_path / "s", [pattern])
    received = read_received(store, np.arange(10))
    assert received.alpha[0][[0, 4], 0] == pytest.approx([0.58, 0.50])
    assert np.flatnonzero(received.hidden_sinks(0.1, 5)[0]).tolist() == [4]
    assert np.flatnonzero(received.hidden_sinks(None, 5)[0]).tolist() == []  # 0.50 is not above 5 / 10
    assert np.flatnonzero(received.hidden_sinks(0.1, 7)[0]).tolist() == []  # six queries see key 4
    keys = received.random_keys(received.hidden_sinks(0.1, 5), 1, 10, 0)[0]
    assert keys.sum() == 1
    assert not keys[0].any()


def test_effects_are_those_of_weights_moved_after_an_eager_softmax(tiny, tiny_store):
    probe = AttentionCalibration(first=0, last=0, threshold=THRESHOLD, min_visible=VISIBLE, keep=0.4, resamples=2)
    rows = np.flatnonzero(tiny_store.tokens["position"].to_numpy() > 0)
    rows = rows[np.append(np.diff(tiny_store.tokens["sequence"].to_numpy()) == 0, False)[rows]]
    hidden = read_received(tiny_store, rows).hidden_sinks(THRESHOLD, VISIBLE)
    assert hidden[1].any()
    effect = probe._effects(tiny, MeasuredRows(tiny_store, {"all": rows}), {"one": {1: hidden[1]}})[0][0, 0]
    module = eager(tiny.module)

    def calibrated(weights):
        new = weights.clone()
        length = weights.shape[-1]
        for head in range(weights.shape[1]):
            alpha = weights[0, head].sum(0) / torch.arange(length, 0, -1)
            keys = [key for key in range(1, length - VISIBLE + 1) if alpha[key] > THRESHOLD]
            mass = weights[0, head][:, keys].sum(-1, keepdim=True)
            rest = 1 - mass
            moved = weights[0, head] * torch.where(rest > 1e-6, 1 + 0.6 * mass / rest.clamp(min=1e-9), 1)
            moved[:, keys] = weights[0, head][:, keys] * torch.where(rest > 1e-6, 0.4, 1)
            new[0, head] = moved
        return new

    losses = {"plain": [], "calibrated": []}
    for ids in IDS:
        with torch.no_grad():
            plain = module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            with edited_softmax(1, calibrated):
                changed = module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for name, log in (("plain", plain), ("calibrated", changed)):
            losses[name] += [-float(log[at, ids[at + 1]]) for at in range(1, len(ids) - 1)]
    assert effect == pytest.approx(np.mean(losses["calibrated"]) - np.mean(losses["plain"]), abs=1e-5)


def test_a_layer_with_hidden_sinks_in_one_half_alone_is_left_out(tiny, tiny_store, monkeypatch):
    hidden_sinks = Received.hidden_sinks

    def in_the_first_sequence(received, *arguments):
        choice = hidden_sinks(received, *arguments)
        alone = np.zeros_like(choice[1])
        alone[3, 0] = True
        return {**choice, 1: alone}

    monkeypatch.setattr(Received, "hidden_sinks", in_the_first_sequence)
    probe = AttentionCalibration(first=0, last=0, threshold=THRESHOLD, min_visible=VISIBLE, resamples=2)
    result = probe.run(tiny_store, model=tiny)
    assert np.isnan(result.data["loss_layer"].sel(layer=1))
    assert np.isfinite(result.data["loss_layer"].sel(layer=[0, 2])).all()
    assert "in one half of the documents alone: 1" in result.headline()


def test_requests_without_an_answer_are_refused(tiny, tiny_store):
    assert "keep" in refused(RequestError, lambda: AttentionCalibration(keep=1.5))
    none = AttentionCalibration(threshold=1.0)
    assert "no head of these layers has a hidden sink" in refused(
        RequestError, lambda: none.run(tiny_store, model=tiny)
    )
