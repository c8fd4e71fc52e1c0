"""The identity of a model's behaviour: equal for the same model, and a name for whatever makes it behave otherwise."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from types import MethodType

import pytest
import torch

from workbench.io.parse import from_json, parse, to_json
from workbench.model.behaviour import measure_identity
from workbench.model.load import Model
from workbench.store.identity import TOLERANCE, Identity, difference


@pytest.fixture
def module(tiny_models):
    return copy.deepcopy(tiny_models["llama"])


def identity(module) -> Identity:
    return measure_identity(module, f"{'model.' if hasattr(module, 'lm_head') else ''}layers.2")


def shifted(_module, _arguments, output):
    return output + 0.5


def steer(module):
    module.model.layers[1].register_forward_hook(shifted)


def shift_input(module):
    module.model.layers[1].register_forward_pre_hook(lambda _module, arguments: (arguments[0] * 1.01, *arguments[1:]))


def scale_attention(module):
    module.model.layers[0].self_attn.scaling *= 1.1


def patch_forward(module):
    block = module.model.layers[2]
    forward = type(block).forward
    block.forward = MethodType(lambda self, *args, **kwargs: 1.01 * forward(self, *args, **kwargs), block)


def change_buffer(module):
    module.model.rotary_emb.inv_freq.mul_(1.001)


def change_weight(module):
    module.model.norm.weight.data[0] += 1


CHANGES = {
    steer: r"forward hooks are model\.layers\.1: .*shifted, not none",
    shift_input: r"forward hooks are model\.layers\.1: ",
    scale_attention: r"after a short fixed text differs by .* attribute or a method",
    patch_forward: r"last residual stream after a short fixed text differs by 0\.01 ",
    change_buffer: r"buffer model\.rotary_emb\.inv_freq has other values",
    change_weight: r"weights are other ones",
    lambda module: setattr(module.config, "rms_norm_eps", 0.01): r"config has rms_norm_eps = 0\.01",
    lambda module: module.set_attn_implementation("eager"): r"attention is computed by eager, not by sdpa",
    lambda module: module.double(): "computes in float64, not in float32",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_behaviour_is_named(module, change):
    before = identity(module)
    change(module)
    phrase = difference(before, identity(module))
    assert phrase is not None
    assert re.search(CHANGES[change], phrase), phrase


def test_the_same_model_has_the_same_identity(module):
    before = identity(module)
    assert difference(before, identity(copy.deepcopy(module))) is None
    module.train()
    module(torch.tensor([[5, 6]]), output_hidden_states=True)  # transformers leaves hooks behind
    module.config.use_cache = False
    assert difference(before, identity(module)) is None
    assert module.training


def test_a_hook_that_is_gone_again_leaves_no_trace(module):
    before = identity(module)
    handle = module.model.layers[0].register_forward_hook(shifted)
    assert difference(before, identity(module))
    handle.remove()
    assert difference(before, identity(module)) is None


def test_states_of_adapters_count(module):
    """Of PEFT's layers these attributes are read; here a plain module has them."""
    layer = module.model.layers[0].self_attn.q_proj
    layer.active_adapters, layer.merged_adapters, layer.disable_adapters = ["lora"], [], False
    before = identity(module)
    assert before.adapters == ("active lora",)
    layer.disable_adapters = True
    assert difference(before, identity(module)) == "its adapters are disabled lora, not active lora"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_answers_are_compared_within_the_tolerance_of_the_type(module, dtype):
    known = replace(identity(module), dtype=dtype)

    def with_logits(factor):
        return replace(known, answers=known.answers | {"logits": tuple(x * factor for x in known.answers["logits"])})

    assert difference(known, with_logits(1 + 0.9 * TOLERANCE[dtype])) is None
    assert "logits" in difference(known, with_logits(1 + 1.1 * TOLERANCE[dtype]))


def test_an_identity_travels_as_json(module):
    known = identity(module)
    assert parse(Identity, from_json(to_json(known), "here"), "here") == known


def test_half_precision_and_a_model_without_head_have_an_identity(module):
    for variant in (copy.deepcopy(module).bfloat16(), module.model):
        assert difference(identity(variant), identity(copy.deepcopy(variant))) is None


def test_a_loaded_model_gives_its_own_identity(module):
    assert Model(module, None, "a").identity() == identity(module)


def test_values_that_json_lacks_are_counted(module):
    """A mask of -inf that is not saved, and weights whose logits are NaN."""
    module.model.register_buffer("mask", torch.full((2, 2), -torch.inf), persistent=False)
    module.lm_head.weight.data[3] = torch.nan
    known = identity(module)
    assert parse(Identity, from_json(to_json(known), "here"), "here") == known
    module.model.mask[0, 1] = 0
    assert difference(known, identity(module)) == "its buffer model.mask has other values"
