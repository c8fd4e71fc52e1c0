"""Stages: deletion and swap against models built without or with exchanged blocks, planted blocks, planted markers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from change_oracles import weights_exchanged, without_block
from planted import linear_unembed, planted_store
from planted_circuit import END, NAMES, planted_circuit
from refusals import refused

import workbench as wb
from workbench.analysis.neuron_moments import vocabulary_moments
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import Stages
from workbench.testing import ProbeContract

IDS = [list(range(5, 15)), [20, 21, 22], [30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return Model(tiny_models["llama"], None, "tiny-llama")


@pytest.fixture(scope="module")
def tiny_store(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("stages") / "s"
    return wb.record(tiny, IDS, sites=["pattern", "resid_post"], out=out, dtype="float32", show_progress=False)


class TestContract(ProbeContract):
    probe = Stages
    settings = {"resamples": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, tiny_store):
        return tiny_store

    @pytest.fixture
    def model(self, tiny):
        return tiny

    def test_all_markers_and_the_control_are_there(self, result):
        assert {"recent", "entropy", "prediction_neurons", "kl_delete", "kl_swap_random"} <= set(result.data)
        assert set(result.figures()) == {"agreement", "kl", "attention", "lens", "neurons"}
        assert "random weights" in result.headline()


def divergences(module, changed):
    """KL and agreement over tokens with one before and one after, of plain Hugging Face, in float64."""
    kl, agreement = [], []
    for ids in IDS:
        with torch.no_grad():
            a, b = (model(torch.tensor([ids])).logits[0, 1:-1].double().log_softmax(-1) for model in (module, changed))
        kl += (a.exp() * (a - b)).sum(-1).tolist()
        agreement += (a.argmax(-1) == b.argmax(-1)).tolist()
    return np.mean(kl), np.mean(agreement)


def test_deletion_and_swap_are_models_without_and_with_exchanged_blocks(tiny, tiny_store):
    data = Stages(control=False, resamples=2).run(tiny_store, model=tiny).data
    assert int(data["rows"]) == sum(len(ids) - 2 for ids in IDS)
    for layer in range(3):
        expected = divergences(tiny.module, without_block(tiny.module, "model.layers", layer))
        measured = float(data["kl_delete"][layer]), float(data["agreement_delete"][layer])
        assert measured == pytest.approx(expected, abs=1e-5)
    for layer in range(2):
        expected = divergences(tiny.module, weights_exchanged(tiny.module, "model.layers", layer, layer + 1))
        measured = float(data["kl_swap"][layer]), float(data["agreement_swap"][layer])
        assert measured == pytest.approx(expected, abs=1e-5)
    assert np.isnan(data["kl_swap"][2])


def test_an_identity_block_and_blocks_that_commute_cost_nothing(tiny_models, tmp_path):
    module = copy.deepcopy(tiny_models["gpt2"])
    with torch.no_grad():
        for block, constant in zip(module.transformer.h, (0.5, 2.0, 0.0), strict=True):
            block.attn.c_proj.weight.zero_()
            block.attn.c_proj.bias.zero_()
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.bias.copy_(constant * torch.arange(32) / 32)  # sums are exact
        module.transformer.wte.weight.copy_((8 * module.transformer.wte.weight).round() / 8)
        module.transformer.wpe.weight.copy_((8 * module.transformer.wpe.weight).round() / 8)
    model = Model(module, None, "planted")
    store = wb.record(model, IDS, sites=["resid_post.0"], out=tmp_path / "s", show_progress=False)
    data = Stages(control=False, resamples=2).run(store, model=model).data
    assert float(data["kl_delete"][2]) == 0
    assert float(data["agreement_delete"][2]) == 1
    assert data["kl_swap"].to_numpy()[:2].tolist() == [0, 0]
    assert float(data["kl_delete"][1]) > 1e-3


def test_the_block_that_alone_writes_the_answer_is_found(tmp_path):
    model = Model(planted_circuit(), None, "circuit")
    ids = [[name, END, name, 7] for name in NAMES]
    store = wb.record(model, ids, sites=["resid_post"], out=tmp_path / "s", show_progress=False)
    probe = Stages(where=f"token_id = {END}", control=False, resamples=2)
    data = probe.run(store, model=model).data
    assert data["agreement_delete"].to_numpy().tolist() == [0, 0]
    assert (data["loss_delete"].to_numpy() > 2).all()  # of ln 16 = 2.8


def test_markers_are_planted_ones(tmp_path):
    draw = np.random.default_rng(0)
    length, vocab = 12, 5
    previous, first = np.zeros((2, length, length))
    for query in range(length):
        previous[query, max(0, query - 1)] = first[query, 0] = 1
    pattern = np.stack([previous, first], 1).reshape(length, 2, length)
    states = draw.normal(size=(2, length, vocab))
    sites = {"pattern.0": pattern, "resid_post.0": states[0], "resid_post.1": states[1]}
    store = planted_store(tmp_path / "s", [list(range(length))], sites, linear_unembed(np.eye(vocab)), n_layers=2)
    data = Stages(markers_only=True).run(store).data
    queries = np.arange(5, length - 1)
    # the first head attends to the token before; the second to position 0, which is one of the last five at query 5
    assert float(data["recent"][0]) == pytest.approx((1 + (queries == 5).mean()) / 2)
    assert float(data["recent_uniform"]) == pytest.approx((5 / (1 + queries)).mean())
    log = states - np.log(np.exp(states).sum(-1, keepdims=True))
    log = log[:, 1:-1]
    assert data["entropy"].to_numpy() == pytest.approx(-(np.exp(log) * log).sum(-1).mean(-1), abs=1e-5)
    expected = (np.exp(log[1]) * (log[1] - log[0])).sum(-1).mean()
    assert data["kl_lens"].to_numpy() == pytest.approx([np.nan, expected], abs=1e-5, nan_ok=True)


def test_neurons_that_raise_or_lower_one_token_are_counted():
    draw = np.random.default_rng(1)
    weight = draw.normal(size=(400, 64))
    unembed = linear_unembed(weight)
    single = weight[7] / np.linalg.norm(weight[7])
    outputs = torch.tensor(np.stack([single, -3 * single, draw.normal(size=64)]), dtype=torch.float32)
    moments = vocabulary_moments(outputs, unembed)
    directions = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    for row, output in enumerate(outputs.double().numpy()):
        cosine = directions @ output / np.linalg.norm(output)
        z = (cosine - cosine.mean()) / cosine.std()
        assert float(moments.kurtosis[row]) == pytest.approx((z**4).mean(), rel=1e-3)
        assert float(moments.skew[row]) == pytest.approx((z**3).mean(), rel=1e-3, abs=1e-4)
    assert moments.prediction == pytest.approx(1 / 3)
    assert moments.suppression == pytest.approx(1 / 3)


def test_settings_matter(tiny, tiny_store):
    last_layer = Stages(control=False, resamples=2, layers=(-1,), row_limit=1, where="position > 2").run(
        tiny_store, model=tiny
    )
    assert last_layer.data["layer"].to_numpy().tolist() == [2]
    assert int(last_layer.data["rows"]) in (3, 6)  # one sequence of more than four tokens
    assert "kl_delete_random" not in last_layer.data


def test_tokens_are_as_many_as_the_time_pays_for(tiny, tiny_store, monkeypatch):
    parameters = 12 * 3 * 32**2 + 320 * 32
    monkeypatch.setattr("workbench.probes.stages._CPU_WORK", 2 * parameters * 2 * 3 * 5)  # five tokens of six passes
    chosen, all_tokens = {"control": False, "resamples": 2, "device": "cpu"}, 8 + 1 + 5
    few = Stages(**chosen).run(tiny_store, model=tiny)
    assert few.headline().endswith(
        "about 5 tokens measured, as many as some minutes allow; set row_limit to measure more."
    )
    assert 5 <= int(few.data["rows"]) < all_tokens
    assert "about 2 tokens" in Stages(**chosen | {"control": True}).run(tiny_store, model=tiny).headline()
    whole = Stages(**chosen, row_limit=1000).run(tiny_store, model=tiny)
    assert int(whole.data["rows"]) == all_tokens
    assert "some minutes" not in whole.headline()
    monkeypatch.undo()
    assert int(Stages(**chosen).run(tiny_store, model=tiny).data["rows"]) == all_tokens


def test_requests_without_an_answer_are_refused(tiny, tiny_store):
    refused(RequestError, lambda: Stages(where="position = 0").run(tiny_store, model=tiny))
    assert "layers" in refused(RequestError, lambda: Stages(layers=(7,)).run(tiny_store, model=tiny))
