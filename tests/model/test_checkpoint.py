"""Loading of checkpoints: the dtype on a CPU, models without head, and warnings of transformers that matter."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaModel
from warned import warned, warned_of

import workbench as wb
from workbench.model import checkpoint
from workbench.model.load import load_model
from workbench.probes import LogitLens


@pytest.fixture
def halved(tiny_models, tmp_path):
    """Saves the tiny Llama in a dtype."""

    def save(dtype):
        copy.deepcopy(tiny_models["llama"]).to(dtype).save_pretrained(tmp_path / "half")
        return tmp_path / "half"

    return save


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_on_a_cpu_is_what_it_computes_well(halved, tiny_models, monkeypatch, saved, has_bfloat16):
    monkeypatch.setattr(checkpoint, "fast_bfloat16", lambda _device: has_bfloat16)
    folder = halved(saved)
    unchanged = saved == torch.float32 or (saved == torch.bfloat16 and has_bfloat16)
    lines = []
    monkeypatch.setattr(checkpoint.PROGRESS, "info", lines.append)
    model = load_model(folder, device="cpu")
    assert model.dtype == (saved if unchanged else torch.float32)
    assert [f"dtype='{str(saved).removeprefix('torch.')}' keeps it" in line for line in lines] == [True] * (
        not unchanged
    )
    for name, weight in tiny_models["llama"].state_dict().items():
        assert torch.equal(model.module.state_dict()[name], weight.to(saved).to(model.dtype))
    assert model.loading is not None
    assert model.loading.load("cpu").dtype == model.dtype
    for dtype in ("checkpoint", str(saved).removeprefix("torch.")):
        assert load_model(folder, device="cpu", dtype=dtype).dtype == saved


def test_a_checkpoint_without_head_is_loaded_without_one(tiny_models, tmp_path):
    LlamaModel(copy.deepcopy(tiny_models["llama"].config)).save_pretrained(tmp_path / "bare")
    model = load_model(tmp_path / "bare")
    assert model.architecture == "LlamaModel"
    store = wb.record(model, [[3, 4, 5]], sites=["resid_post", "pattern"], out=tmp_path / "s.acts", show_progress=False)
    assert "language-model head" in (store.manifest.unembed_reason or "")
    with pytest.raises(wb.WorkbenchError, match="no unembedding: LlamaModel has no linear language-model head"):
        LogitLens().run(store)


def test_tensors_that_the_model_does_not_use_are_named(model_dir):
    weights = load_file(model_dir / "model.safetensors")
    save_file(weights | {"extra.weight": torch.ones(2)}, model_dir / "model.safetensors", metadata={"format": "pt"})
    with warned(r"1 tensors of its checkpoint have no place in LlamaForCausalLM and are not used: extra\.weight"):
        load_model(model_dir)


def test_a_head_that_is_not_tied_though_the_config_says_so_is_a_warning(tiny_models, tmp_path):
    module = copy.deepcopy(tiny_models["llama"])
    module.config.tie_word_embeddings = True
    module.save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file(
        weights | {"lm_head.weight": embedding + 1}, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"}
    )
    with warned("model 'm': transformers warns: The tied weights mapping .* will NOT tie them"):
        model = load_model(tmp_path / "m")
    assert torch.equal(model.module.lm_head.weight, embedding + 1)


@pytest.mark.parametrize(
    ("message", "repeated"),
    [
        ("If you want to use `BertLMHeadModel` as a standalone, add `is_decoder=True.`", True),
        ("Some weights were newly initialized", True),
        ("The fast path is not available, falling back to the naive implementation", False),
        ("`torch_dtype` is deprecated! Use `dtype` instead!", False),
    ],
)
def test_warnings_that_change_the_model_are_repeated(message, repeated, capfd):
    library = logging.getLogger("transformers.models.made_up")
    with warned_of() as records, checkpoint.quietly("model 'a'"):
        library.warning(message)
    assert [record.getMessage() for record in records] == (
        [f"model 'a': transformers warns: {message}"] if repeated else []
    )
    for record in records:
        record.expected = True
    assert message not in capfd.readouterr().out
