"""Weights that accelerate keeps on the CPU or the disk: sites, fingerprint, unembedding and circuits as without it."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from workbench.model.behaviour import measure_identity
from workbench.model.circuits import head_writes
from workbench.model.load import Model
from workbench.model.offload import placeholders, real_copy, real_weight, running_device
from workbench.model.unembed import measure_unembed
from workbench.store.identity import difference

PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "model.layers.0": "cpu"}
PLACES |= {"model.layers.1": "disk", "lm_head": "disk"}


def llama(tied: bool) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(params=["all on the CPU", "some on the disk", "tied, on the disk"])
def pair(request, tmp_path):
    """A model, and the same one with its weights elsewhere."""
    plain = llama(tied=request.param.startswith("tied"))
    if request.param == "all on the CPU":
        return plain, accelerate.cpu_offload(copy.deepcopy(plain), execution_device="cpu")
    plain.save_pretrained(tmp_path / "model")
    places = PLACES | ({"lm_head": "cpu"} if request.param.startswith("tied") else {})
    moved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    )
    return plain, moved


def test_an_offloaded_model_is_the_same_model(pair):
    plain, moved = pair
    assert placeholders(moved)
    assert not placeholders(plain)
    assert Model(moved, None, "a").device == running_device(moved) == torch.device("cpu")
    a, b = (measure_identity(module, "model.layers.1") for module in pair)
    assert difference(a, b) is None
    assert a.weights == b.weights


def test_its_unembedding_and_its_heads_are_read_from_where_they_are(pair):
    plain, moved = (Model(module, None, "a") for module in pair)
    assert plain.sites == moved.sites
    lenses = [measure_unembed(model.module, model.site_map.last_block) for model in (plain, moved)]
    assert torch.equal(lenses[0].weight, lenses[1].weight)
    assert torch.equal(lenses[0].gain, lenses[1].gain)
    stream = torch.linspace(-1, 1, 48).reshape(3, 16)
    for (_, moved_write), (_, plain_write) in zip(head_writes(moved, stream), head_writes(plain, stream), strict=True):
        assert torch.equal(moved_write, plain_write)


def test_a_copy_holds_the_values_and_runs_alone(pair):
    plain, moved = pair
    for path in ("lm_head", "model.norm", "model.layers.1.mlp"):
        copied, original = real_copy(moved.get_submodule(path)), plain.get_submodule(path)
        assert not placeholders(copied)
        for values, expected in zip(copied.parameters(), original.parameters(), strict=True):
            assert torch.equal(values, expected)
        # weights elsewhere in memory give other last bits on some processors
        torch.testing.assert_close(copied(torch.ones(1, 1, 16)), original(torch.ones(1, 1, 16)), rtol=1e-6, atol=1e-7)
    assert torch.equal(real_weight(moved.lm_head), plain.lm_head.weight)
    ids = torch.tensor([[3, 4]])
    torch.testing.assert_close(moved(ids).logits, plain(ids).logits, rtol=1e-6, atol=1e-7)
