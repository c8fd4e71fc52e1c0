"""Interventions against hooks of TransformerBridge, where its own plain pass is that of Hugging Face."""

from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model
from workbench.model.load import load_model

QUICK = ("llama", "gpt_neox", "bloom", "olmo2", "mixtral")
"""Types that are tried in every run of the tests."""
OTHERS = (
    *("gpt2", "gemma", "gemma2", "gemma3_text", "mistral", "opt", "falcon", "phi", "phi3", "qwen2", "qwen3"),
    *("gptj", "gpt_bigcode", "stablelm", "olmo", "qwen2_moe", "olmoe", "granite"),
)
"""Not Cohere: the bridge's own plain pass differs from Hugging Face by 0.2 of the largest logit."""
NO_SCORES = ("opt", "gptj")
"""Types in which hooks of the bridge on scores and patterns change nothing."""
IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(5))
VALUE = torch.randn(32, generator=torch.Generator().manual_seed(1))
LATER = slice(2, None)


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(kind, marks=pytest.mark.torture) for kind in OTHERS)])
def model_and_bridge(request):
    """Type, tiny random model, and its bridge."""
    model = load_model(tiny_model(request.param))
    with contextlib.redirect_stdout(io.StringIO()):
        return request.param, model, model.bridge()


def zero_head(z, hook):
    z = z.clone()
    z.reshape(2, 12, 4, -1)[:, :, 1] = 0
    return z


def set_row(stream, hook):
    stream = stream.clone()
    stream[:, 4] = VALUE
    return stream


def add(stream, hook):
    return stream + 2 * VALUE


def raise_scores(scores, hook):
    scores = scores.clone()
    scores[:, 1, LATER, 0] += math.log(3)
    return scores


EDITS = {
    "a head is set to 0": (wb.Zero("z.1", head=1), "attn.hook_z", zero_head),
    "a row is set": (wb.Set("resid_post.1", VALUE, at=4), "hook_resid_post", set_row),
    "a direction is added": (wb.Add("resid_post.1", VALUE, 2), "hook_resid_post", add),
    "attention is scaled": (wb.ScaleAttention(1, 1, 0, 3, queries=LATER), "attn.hook_attn_scores", raise_scores),
}


def test_an_edit_gives_the_logits_of_a_hook_of_the_bridge(model_and_bridge):
    kind, model, bridge = model_and_bridge
    with torch.no_grad():
        plain = model.module(input_ids=IDS).logits
        scale = plain.abs().max()
        assert (bridge(IDS) - plain).abs().max() < 1e-5 * scale
        for name, (record, site, hook) in EDITS.items():
            if kind in NO_SCORES and "scores" in site:
                continue
            with wb.intervene(model, record):
                changed = model.module(input_ids=IDS).logits
            expected = bridge.run_with_hooks(IDS, fwd_hooks=[(f"blocks.1.{site}", hook)])
            assert (changed - expected).abs().max() < 1e-5 * scale, name
            assert (changed - plain).abs().max() > 1e-3 * scale, name
