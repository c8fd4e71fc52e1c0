"""Conversion to another type: the logits of a checkpoint that is loaded in that type."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM

from workbench.model.in_dtype import in_dtype


def test_a_converted_model_computes_as_one_that_is_loaded_in_the_type(tiny_models, tmp_path):
    module = copy.deepcopy(tiny_models["llama"])
    module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.arange(2, 122)[None]
    with torch.no_grad():
        expected = loaded(ids).logits
        rounded = copy.deepcopy(module).to(torch.bfloat16)(ids).logits  # rotary frequencies, too
        assert torch.equal(in_dtype(module, torch.bfloat16)(ids).logits, expected)
    assert not torch.equal(rounded, expected)


def test_tied_weights_stay_tied(tiny_models):
    module = in_dtype(copy.deepcopy(tiny_models["gpt2"]), torch.bfloat16)
    assert module.lm_head.weight is module.transformer.wte.weight
    assert {part.dtype for part in module.parameters()} == {torch.bfloat16}
