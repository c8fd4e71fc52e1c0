"""Last tokens behind kept keys and values: the logits of whole passes, also under interventions, for any copies."""

from __future__ import annotations

import inspect

import pytest
import torch

import workbench as wb
from workbench.model.cached_prompts import CachedPrompts
from workbench.model.load import Model

IDS = torch.tensor([[5, 40, 77, 130, 9, 250, 31], [8, 41, 40, 12, 99, 5, 200]])
LONG = torch.arange(20, 60)[None]  # longer than the windows of the tiny Gemma 2


def whole(model, ids, *records):
    with torch.no_grad(), wb.intervene(model, *records):
        return model.module(ids, use_cache=False).logits[:, -1].double()


@pytest.mark.parametrize("ids", [IDS, LONG], ids=["two", "long"])
def test_logits_are_those_of_whole_passes(tiny_model, ids):
    model = Model(tiny_model, None, "tiny")
    prompts = CachedPrompts.make(model, ids)
    plain = whole(model, ids, wb.Add("resid_post.0", torch.zeros(32)))
    torch.testing.assert_close(prompts.logits()[:, 0], plain, atol=1e-5, rtol=1e-5)
    value = torch.linspace(-3, 3, 8)
    changed = whole(model, ids, wb.Set("z.1", value, at=-1, head=2))
    assert (changed - plain).abs().max() > 1e-3
    masks = torch.tensor([False, True, False]).repeat(len(ids))[:, None]
    copies = prompts.logits(3, [wb.Set("z.1", value, at=masks, head=2)])
    torch.testing.assert_close(copies[:, 1], changed, atol=1e-5, rtol=1e-5)
    for index in (0, 2):
        torch.testing.assert_close(copies[:, index], plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prompts.logits()[:, 0], plain, atol=1e-5, rtol=1e-5)  # the cache did not change


def test_a_recurrent_state_is_no_cache_of_keys():
    from transformers import MambaConfig, MambaForCausalLM

    module = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    model = Model(module, None, "mamba")
    assert CachedPrompts.make(model, IDS) is None
    assert not model.continues_from_cache


def test_a_model_whose_cache_gives_other_logits_does_not_continue_from_it(tiny_model, monkeypatch):
    assert Model(tiny_model, None, "tiny").continues_from_cache
    forget = tiny_model.forward

    def forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            past_key_values.layers[0].values.mul_(1.01)
        return forget(*args, past_key_values=past_key_values, **kwargs)

    forward.__signature__ = inspect.signature(forget)
    monkeypatch.setattr(tiny_model, "forward", forward)
    assert not Model(tiny_model, None, "tiny").continues_from_cache


def test_a_prompt_of_one_token_has_nothing_to_keep(tiny_models):
    assert CachedPrompts.make(Model(tiny_models["llama"], None, "tiny"), IDS[:, :1]) is None
