"""Attention changed where the model's kernel takes no additive mask: a pretended flash attention, against SDPA."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from change_oracles import generated, logits
from refusals import refused
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from warned import warned

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model

NAME = "pretended_kernel"  # transformers asks for the real library where a name has "flash" in it
IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def pretended(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **_settings):
    """What flash attention computes, by its own rules: causal, a mask of two axes at most, a window."""
    assert attention_mask is None or attention_mask.ndim == 2
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    at = torch.arange(queries)[:, None] + keys - queries
    visible = torch.arange(keys)[None] <= at
    if sliding_window:
        visible &= at - torch.arange(keys)[None] < sliding_window
    visible = visible[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, -keys:].bool()
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, pretended)
AttentionMaskInterface.register(NAME, flash_attention_mask)


@pytest.fixture(scope="module")
def mistral():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = MistralConfig(vocab_size=320, intermediate_size=48, sliding_window=4, **sizes)
        module = MistralForCausalLM(config).eval()
    module.config.architectures = ["MistralForCausalLM"]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return module


@pytest.fixture(params=["llama", "mistral"])
def model_pair(request, tiny_models, mistral):
    """A model with SDPA, and its copy with the pretended kernel."""
    module = copy.deepcopy(mistral if request.param == "mistral" else tiny_models["llama"])
    pretended = copy.deepcopy(module)
    pretended.set_attn_implementation(NAME)
    return Model(module, None, "sdpa"), Model(pretended, None, "flash")


RECORDS = [
    wb.ScaleAttention(1, [0, 3], 2, 3.0),
    wb.BiasAttention(0, None, [0, 1], -2.0, queries=slice(3, None)),
    wb.ScaleAttention(0, 1, 0, 0.0),
    wb.RedistributeAttention(1, 2, [0, 1], 0.4),
]


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_changed_layers_run_sdpa_and_give_its_numbers_with_one_warning(model_pair, record):
    sdpa, flash = model_pair
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0  # padding on the left
    torch.testing.assert_close(logits(flash.module, IDS), logits(sdpa.module, IDS), atol=1e-5, rtol=0)
    for arguments in ({}, {"attention_mask": mask}):
        with wb.intervene(sdpa, record) as run:
            expected = logits(sdpa.module, IDS, **arguments)
        with (
            warned(r"attention\.\d: pretended_kernel takes no additive mask"),
            wb.intervene(flash, record) as flash_run,
        ):
            output = logits(flash.module, IDS, **arguments)
        real = arguments.get("attention_mask", torch.ones_like(IDS)).bool()
        torch.testing.assert_close(output[real], expected[real], atol=1e-5, rtol=0)
        assert run.table().drop(columns="record").equals(flash_run.table().drop(columns="record"))
    with wb.intervene(sdpa, record):
        expected = generated(sdpa.module, IDS)
    with warned("takes no additive mask"), wb.intervene(flash, record):
        torch.testing.assert_close(generated(flash.module, IDS), expected, atol=1e-5, rtol=0)


def test_a_store_of_a_changed_flash_model_names_the_kernel(model_pair, tmp_path):
    _, flash = model_pair
    with warned("SDPA computes these layers"):
        changes = {"interventions": [RECORDS[0]], "show_progress": False}
        store = wb.record(flash, IDS.tolist(), sites=["pattern.1"], out=tmp_path / "s", **changes)
    assert store.manifest.interventions.records[0]["kernel"] == "sdpa"
    assert json.loads((store.path / "manifest.json").read_text())["interventions"]["records"][0]["kernel"] == "sdpa"


def test_neutral_factors_leave_the_kernel_alone_and_soft_caps_are_refused(model_pair):
    _, flash = model_pair
    plain = logits(flash.module, IDS)
    with warned("takes no additive mask"), wb.intervene(flash, wb.ScaleAttention(1, 0, 0, 1.0)):
        assert torch.equal(logits(flash.module, IDS), plain)
    attention = flash.module.get_submodule("model.layers.1.self_attn")
    attention.register_forward_pre_hook(lambda _m, args, kwargs: (args, kwargs | {"softcap": 3.0}), with_kwargs=True)

    def run():
        with wb.intervene(flash, RECORDS[0]):
            logits(flash.module, IDS)

    with warned("takes no additive mask"):
        assert "computes no soft-cap" in refused(RequestError, run)
