"""Fingerprints: equal for the same weights, config and tokenizer, different for any change."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_files import edit_json
from safetensors.torch import load_file
from torch import nn

from workbench.model.load import Model, load_model

pytestmark = pytest.mark.usefixtures("no_network")


def fingerprint(module) -> str:
    return Model(module, None, "a").fingerprint()


def test_the_fingerprint_is_a_digest_of_names_types_shapes_and_bytes(saved):
    """Computed anew from the file, which has no tied weights here."""
    digest = hashlib.sha256()
    for name, part in sorted(load_file(saved / "model.safetensors").items()):
        digest.update(f"{name} torch.float32 {tuple(part.shape)}\n".encode() + part.numpy().tobytes())
    assert load_model(saved).fingerprint() == digest.hexdigest()


def test_every_weight_counts(tiny_models):
    module = copy.deepcopy(tiny_models["llama"])
    fingerprints = {fingerprint(module)}
    assert fingerprints == {fingerprint(tiny_models["llama"])}
    for parameter in module.parameters():
        with torch.no_grad():
            last = parameter.view(-1)[-1:]
            last.copy_(torch.nextafter(last, torch.tensor(torch.inf)))
        fingerprints.add(fingerprint(module))
    assert len(fingerprints) == 1 + len(list(module.parameters()))


def test_not_the_values_alone_count():
    def linear(rows, columns, dtype=torch.float32):
        layer = nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(torch.zeros(rows, columns, dtype=dtype))
        return layer

    kinds = [linear(2, 4), linear(4, 2), linear(4, 4, torch.float16), nn.Sequential(linear(2, 4))]
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)


def test_buffers_count_where_they_are_saved():
    def with_buffer(value, persistent):
        layer = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(layer.weight)
        layer.register_buffer("seen", torch.tensor(value), persistent=persistent)
        return fingerprint(layer)

    assert with_buffer(1.0, True) != with_buffer(2.0, True)
    assert with_buffer(1.0, False) == with_buffer(2.0, False)


def test_a_tied_weight_counts_once(tiny_models):
    tied = tiny_models["gpt2"]
    assert tied.lm_head.weight is tied.transformer.wte.weight
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    assert fingerprint(untied) != fingerprint(tied)
    assert fingerprint(copy.deepcopy(tied)) == fingerprint(tied)


def test_memory_layout_and_training_do_not_count():
    layer = nn.Linear(3, 5)
    before = fingerprint(layer)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert not layer.weight.is_contiguous()
    assert fingerprint(layer.train().requires_grad_(False)) == before


def test_the_config_fingerprint_is_of_what_the_model_is(saved, tmp_path):
    other_place = Path(shutil.copytree(saved, tmp_path / "moved"))
    edit_json(other_place / "config.json", transformers_version="4.0.0", architectures=None)
    before = load_model(saved).config_fingerprint()
    assert load_model(other_place, dtype="float16").config_fingerprint() == before
    edit_json(other_place / "config.json", rms_norm_eps=1e-3)
    assert load_model(other_place).config_fingerprint() != before


def test_the_tokenizer_fingerprint_is_of_what_the_tokenizer_is(saved, stories260k):
    model = load_model(saved, tokenizer=saved)
    before = model.tokenizer_fingerprint()
    tokenizer = model.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["Monday", "the little day"], padding=True, truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.padding is not None
    assert model.tokenizer_fingerprint() == before == load_model(saved).tokenizer_fingerprint()
    tokenizer.add_tokens(["zork"])
    assert model.tokenizer_fingerprint() != before
    assert load_model(stories260k).tokenizer_fingerprint() not in (before, model.tokenizer_fingerprint())
    assert load_model(saved, tokenizer=None).tokenizer_fingerprint() == before


def test_no_tokenizer_has_no_fingerprint(tiny_models):
    assert load_model(tiny_models["gpt2"]).tokenizer_fingerprint() is None


def test_a_tokenizer_without_a_backend(tiny_models):
    def slow(vocab):
        tokenizer = SimpleNamespace(get_vocab=lambda: vocab, special_tokens_map={"bos_token": "<s>"})
        return Model(tiny_models["gpt2"], tokenizer, "a").tokenizer_fingerprint()

    assert slow({"a": 0, "b": 1}) == slow({"b": 1, "a": 0}) != slow({"a": 1, "b": 0})


def test_a_weight_that_is_changed_out_of_torchs_sight_counts(tiny_models):
    """The same module again: its checksum is kept, and every byte is still compared."""
    module = copy.deepcopy(tiny_models["llama"])
    before = fingerprint(module)
    assert fingerprint(module) == before
    weight = module.model.layers[1].mlp.up_proj.weight
    version = weight._version
    last = weight.detach().numpy().reshape(-1)[-1:]
    last += 1
    assert weight._version == version
    changed = fingerprint(module)
    assert changed == fingerprint(copy.deepcopy(module)) != before
    weight.data[[0, 1]] = weight.data[[1, 0]]
    assert fingerprint(module) == fingerprint(copy.deepcopy(module)) != changed
    last -= 1
    weight.data[[0, 1]] = weight.data[[1, 0]]
    assert fingerprint(module) == before
