"""The sinks probe on real and hand-set models, against plain Hugging Face."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sink_example import DERIVED, run
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import workbench as wb
from workbench.experiments.controls import random_copy
from workbench.model.load import Model

# ---- models ---------------------------------------------------------------------------------------------


def plain(folder, sequences):
    """By layer, from Hugging Face in float64: patterns [sequence, head, query, key], values, residuals."""
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    values, blocks = {}, {}
    for index, layer in enumerate(module.model.layers):
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, out, i=index: values.update({i: out}))
        layer.register_forward_hook(
            lambda _m, _a, out, i=index: blocks.update({i: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        attentions = module(input_ids=torch.tensor(sequences), output_attentions=True).attentions
    heads = module.config.num_key_value_heads
    return [
        (
            attentions[i].numpy(),
            values[i].unflatten(-1, (heads, -1)).numpy(),
            blocks[i].numpy(),
        )
        for i in range(len(attentions))
    ]


PLAIN, TRIGGERS = range(1, 9), range(9, 25)  # token ids; 0 is BOS, and trigger 9 + i may stand at position i alone


def backcopy_model(strength):
    """The solution of the Bigram-Backcopy task (Guo et al., arXiv 2410.13835) in one head: a plain token gives BOS the
    logit `strength` and everything else 0, a trigger gives it to the token before, and BOS has no value.

    Every feature stands twice, with both signs, so that LayerNorm takes no mean; all streams are as long, so that its
    scale is one number. A trigger knows its position, since in one head tokens and positions cannot be multiplied.
    """
    tokens, positions = 25, 16
    half = tokens + positions
    config = GPT2Config(vocab_size=tokens, n_positions=positions, n_embd=2 * half, n_layer=1, n_head=1)
    module = GPT2LMHeadModel(config).eval()
    scale = half**0.5 / 2**0.5  # of a feature after LayerNorm, two of `half` being 1
    query, key, value = (torch.zeros(half, half) for _ in range(3))  # [feature, channel]
    query[PLAIN, 0] = key[0, 0] = 1.0
    for position in range(1, positions):
        query[TRIGGERS[position], position] = 1.0
        key[tokens + position - 1, position] = 1.0
    value[PLAIN, PLAIN] = 1.0
    gain = (strength * (2 * half) ** 0.5) ** 0.5 / scale
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        block = module.transformer.h[0]
        for norm in (block.ln_1, block.ln_2, module.transformer.ln_f):
            norm.weight.fill_(1.0)
        signs = torch.cat([torch.eye(half), -torch.eye(half)], 1)
        module.transformer.wte.weight = torch.nn.Parameter(signs[:tokens].clone())
        module.transformer.wpe.weight.copy_(signs[tokens:])
        for part, weight in enumerate((gain * query, gain * key, value)):
            block.attn.c_attn.weight[:half, 2 * half * part : 2 * half * part + half] = weight
        block.attn.c_proj.weight.copy_(10 * torch.cat([signs, torch.zeros_like(signs)]))
        module.lm_head.weight = torch.nn.Parameter(torch.zeros(tokens, 2 * half))
        module.lm_head.weight[PLAIN, PLAIN] = 10.0
    return module


def backcopy_texts(triggered, sequences=6, length=16):
    """[sequence, position] of token ids: BOS, plain tokens, and every third token a trigger with what it copies."""
    draw, texts = np.random.default_rng(0), []
    for _ in range(sequences):
        ids = [0]
        while len(ids) < length:
            if triggered and len(ids) % 3 == 0:
                ids += [TRIGGERS[len(ids)], ids[-1]]
            else:
                ids.append(int(draw.choice(PLAIN)))
        texts.append(ids[:length])
    return np.array(texts)


def test_the_hand_set_solution_of_the_backcopy_task(tmp_path):
    strength, T = 4.0, 16
    module = backcopy_model(strength)
    texts = np.concatenate([backcopy_texts(triggered) for triggered in (False, True)])
    model = Model(module, None, "backcopy")
    settings = {"sites": ["pattern", "v"], "dtype": "float32", "show_progress": False}
    store = wb.record(model, texts.tolist(), out=tmp_path / "s", **settings)
    visible = np.arange(1, T + 1)
    resting = 1 / (1 + (visible - 1) * np.exp(-strength))
    resting[0] = 1
    copying = 1 / (np.exp(strength) + visible - 1)
    trigger = texts >= TRIGGERS[0]
    to_bos = np.where(trigger, copying, resting)
    data = run(store, length=T).data
    np.testing.assert_allclose(data["alpha"][0, 0, 0], to_bos.mean(), rtol=1e-4)
    assert float(data["sink_k"][0]) == 100
    assert float(data["value_norm_ratio"][0, 0]) < 1e-6
    with torch.no_grad():  # and it does the task: after a trigger, the token before it
        logits = module(torch.from_numpy(texts)).logits
    before = torch.from_numpy(np.roll(texts, 1, axis=1))
    assert torch.nn.functional.cross_entropy(logits[trigger], before[trigger]) < 0.01


@pytest.mark.parametrize("name", ["stories260k", "babyllama"])
def test_real_models_against_plain_hugging_face(name, request, tinystories, tmp_path):
    folder, T = request.getfixturevalue(name), 32
    model = wb.load_model(folder)
    with tinystories.open() as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(12)]
    sequences = [model.tokenizer(text)["input_ids"][:T] for text in texts]
    assert {len(ids) for ids in sequences} == {T}
    options = {"dtype": "float32", "show_progress": False, "context": T}
    sites = ["pattern", "v", "resid_post"]
    data = run(wb.record(model, sequences, out=tmp_path / "p", sites=sites, **options), length=T).data
    derived = run(wb.record(model, sequences, out=tmp_path / "d", sites=DERIVED, **options), length=T).data
    above = []
    for layer, (pattern, value, hidden) in enumerate(plain(folder, sequences)):
        alpha = pattern.sum(2) / (T - np.arange(T))  # [sequence, head, key]
        above.append(alpha > 0.3)
        value_norm, norm = np.linalg.norm(value, axis=-1), np.linalg.norm(hidden, axis=-1)
        drain = value_norm[:, 0].mean(0) / value_norm[:, 1:].mean((0, 1))
        for measured in (data, derived):
            np.testing.assert_allclose(measured["alpha"][layer], alpha.mean(0), atol=1e-5)
            np.testing.assert_allclose(measured["value_norm_ratio"][layer], np.repeat(drain, 2), rtol=1e-4)
            ratio = norm[:, 0].mean() / norm[:, 1:].mean()
            np.testing.assert_allclose(measured["residual_norm_ratio"][layer], ratio, rtol=1e-4)
        top = np.abs(hidden).reshape(len(hidden), -1).max(1)
        np.testing.assert_allclose(data["massive_top"][layer], top.mean(), rtol=1e-4)
    expected = 100 * np.mean(above, axis=(0, 1, 2))
    np.testing.assert_allclose(data["sink_k"], expected, atol=1e-9)
    np.testing.assert_allclose(derived["sink_k"], expected, atol=1e-9)
    assert expected.max() > 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_both_ways_of_recording_agree(tiny_models, family, tmp_path):
    """Keys shared by heads (llama), a window of 16 and soft-caps (gemma2), unequal lengths in one batch."""
    draw = np.random.default_rng(1)
    texts = [draw.integers(8, 300, n).tolist() for n in (24, 11, 24, 24, 3)]
    model, options = (
        Model(tiny_models[family], None, family),
        {"dtype": "float32", "show_progress": False, "context": 24},
    )
    store = wb.record(model, texts, out=tmp_path / "p", sites=["pattern", "v", "resid_post"], **options)
    derived_store = wb.record(model, texts, out=tmp_path / "d", sites=DERIVED, **options)
    settings = {"length": 24, "epsilon": 0.1, "domain": "document", "resamples": 10}
    from_patterns, derived = run(store, **settings).data, run(derived_store, **settings).data
    assert (from_patterns.attrs["source"], derived.attrs["source"]) == ("pattern", "derived")
    assert int(derived["short_sequences"]) == 2
    left_out = {name for name in from_patterns if name.startswith(("massive", "example"))}
    assert {*from_patterns} - {*derived} == left_out
    assert "massive activations not computed: resid_post was not recorded" in derived.attrs["note"]
    for name in derived:
        np.testing.assert_allclose(derived[name], from_patterns[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_random_weights_have_no_sink(tmp_path):
    model = random_copy(wb.load_model("demo"))
    ids = np.random.default_rng(0).integers(8, 1000, (12, 64)).tolist()
    options = {"sites": ["attn_received"], "context": 64, "dtype": "float32", "show_progress": False}
    data = run(wb.record(model, ids, out=tmp_path / "s", **options)).data
    assert float(data["sink_k"][0]) == 0
    assert float(data["alpha"][..., 0].max()) < 0.1
