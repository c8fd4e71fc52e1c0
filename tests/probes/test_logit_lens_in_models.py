"""The logit lens against plain Hugging Face in float64."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from lens_example import check_against, followers, log_softmax, plain_logits, record, sequences_of
from transformers import AutoModelForCausalLM, PhiConfig

import workbench as wb
from workbench.model.unembed import load_unembed
from workbench.probes import LogitLens

# Against the model


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_every_layer_is_what_plain_transformers_gives(tiny_models, tiny_stores, family):
    store = tiny_stores[family]
    logits = plain_logits(tiny_models[family], sequences_of(store))
    check_against(LogitLens().run(store).data, log_softmax(logits), followers(store))
    final = load_unembed(store.path)(store["resid_post", 2][:])
    np.testing.assert_allclose(final, logits[-1], rtol=0, atol=1e-4)


def test_a_soft_cap_that_is_left_out_would_show(tiny_models, tiny_stores):
    """Gemma 2's caps its logits at 2 here: what the lens says must know of it."""
    entropy = LogitLens().run(tiny_stores["gemma2"]).data["entropy"].to_numpy()
    capped = log_softmax(plain_logits(tiny_models["gemma2"], sequences_of(tiny_stores["gemma2"])))
    logits = 2 * np.arctanh(
        np.clip(plain_logits(tiny_models["gemma2"], sequences_of(tiny_stores["gemma2"])) / 2, -1, 1)
    )
    uncapped = log_softmax(np.clip(logits, -50, 50))
    assert abs(-(np.exp(uncapped) * uncapped).sum(-1) - entropy).min() > 0.05
    np.testing.assert_allclose(-(np.exp(capped) * capped).sum(-1), entropy, atol=1e-4)


def test_a_head_with_a_bias(tmp_path):
    config = PhiConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, bos_token_id=0
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config).eval()
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    store = record(module, ids, tmp_path / "acts")
    check_against(LogitLens().run(store).data, log_softmax(plain_logits(module, ids)), followers(store))


@pytest.mark.parametrize(("name", "loss"), [("stories260K", 1.733), ("babyllama-105", 0.791)])
def test_real_models(name, loss, request, tinystories, tmp_path):
    """The last layer is the model; its loss on 20 of 200 stories is near the one that all of them give."""
    folder = request.getfixturevalue(name.partition("-")[0].lower())
    model = wb.load_model(folder)
    with tinystories.open() as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 0, 200, 10)]
    ids = [model.tokenizer(text)["input_ids"][: model.context_limit] for text in texts]
    store = record(model, ids, tmp_path / "acts", context=model.context_limit)
    assert [part.tolist() for part in sequences_of(store)] == ids
    result = LogitLens(detail=500).run(store)
    logits = plain_logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    np.testing.assert_allclose(load_unembed(store.path)(store["resid_post", 4][:]), logits[-1], rtol=0, atol=1e-4)
    logs, targets = log_softmax(logits), followers(store)
    known = targets >= 0
    losses = -logs[:, np.flatnonzero(known), targets[known]].mean(1)
    np.testing.assert_allclose(result.data["mean_cross_entropy"], losses, rtol=0, atol=1e-4)
    assert losses[-1] == pytest.approx(loss, abs=0.1)
    assert losses[0] > losses[-1] + 1
    data = result.data.isel(layer=slice(3, None))
    np.testing.assert_allclose(data["kl"], (np.exp(logs[-1]) * (logs[-1] - logs[3:])).sum(-1)[:, :500], atol=1e-4)
    assert float(result.data["mean_kl"][-1]) == 0
    assert float(result.data["mean_agreement"][-1]) == 1


def test_half_precision_in_the_store_moves_the_numbers_a_little(tiny_models, tiny_stores, tmp_path):
    ids = [part.tolist() for part in sequences_of(tiny_stores["llama"])]
    half = record(tiny_models["llama"], ids, tmp_path / "acts", dtype="float16")
    exact, rounded = (LogitLens().run(store).data["entropy"].to_numpy() for store in (tiny_stores["llama"], half))
    assert 0 < abs(rounded - exact).max() < 0.01
