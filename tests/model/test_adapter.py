"""Folders of PEFT: the base with the adapter's changes in its weights."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

import workbench as wb
from workbench.io.errors import RequestError

peft = pytest.importorskip("peft", reason="needs peft: pip install 'interp-workbench[peft]'")

# peft (0.21) asks transformers by a name that it is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LLAMA = {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 7}
SETTINGS = {
    "lora": ("llama", LLAMA),
    "scaled by the root of the rank": ("llama", LLAMA | {"use_rslora": True}),
    "magnitudes": ("llama", LLAMA | {"use_dora": True}),
    "ranks by module": ("llama", LLAMA | {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"q_proj": 2}}),
    "a whole module": ("llama", LLAMA | {"modules_to_save": ["lm_head"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True}),
}


def save(folder: Path, base, family: str, settings: dict, tokenizer=None):
    """Saves a base and a random adapter of it; returns peft's own model of both."""
    base.save_pretrained(folder / "base")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(len(family))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    edit(folder, base_model_name_or_path=str(folder / "base"))
    return adapted


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("case", SETTINGS)
def test_it_is_the_adapted_model_with_plain_weights(case, tiny_models, tiny_tokenizer, tmp_path):
    family, settings = SETTINGS[case]
    base = tiny_models[family]
    adapted = save(tmp_path, base, family, settings, tiny_tokenizer)
    model = wb.load_model(tmp_path / "adapter", device="cpu")
    assert (model.name, type(model.module)) == ("adapter", type(base))
    assert model.tokenizer is not None
    assert model.module.state_dict().keys() == base.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    assert not model.module.training
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = model.module(ids).logits
        torch.testing.assert_close(logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        assert (logits - base(ids).logits).abs().max() > 0.1
    assert model.loading is not None
    assert model.loading.load("cpu").fingerprint() == model.fingerprint()


def test_a_merged_weight_is_the_sum_in_float64(tiny_models, tmp_path):
    save(tmp_path, tiny_models["llama"], "llama", LLAMA)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    change = 7 / 3 * weights[f"{prefix}B.weight"].double() @ weights[f"{prefix}A.weight"].double()
    name = "model.layers.1.mlp.down_proj.weight"
    expected = tiny_models["llama"].state_dict()[name].double() + change
    model = wb.load_model(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(model.module.state_dict()[name].double(), expected, rtol=1e-6, atol=1e-6)
    half = wb.load_model(tmp_path / "adapter", device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.module.state_dict()[name].double(), expected, rtol=2e-2, atol=2e-2)


def test_a_base_beside_the_adapter_and_recorded_sites(tiny_models, tmp_path):
    adapted = save(tmp_path, tiny_models["llama"], "llama", LLAMA)
    edit(tmp_path, base_model_name_or_path="../base")
    settings = {"sites": ["resid_post"], "dtype": "float32", "show_progress": False}
    store = wb.record(tmp_path / "adapter", [[3, 4, 5, 6]], out=tmp_path / "s", **settings)
    with torch.no_grad():
        states = adapted(torch.tensor([[3, 4, 5, 6]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(store["resid_post", 0][:], states[1][0], rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_be_merged_are_refused_in_a_line(tiny_models, tmp_path, monkeypatch):
    save(tmp_path, tiny_models["llama"], "llama", LLAMA)
    folder, file = tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"

    def refusal() -> str:
        return refused(RequestError, lambda: wb.load_model(folder, device="cpu"))

    weights = load_file(file)
    first = next(iter(weights))
    save_file({name: weight for name, weight in weights.items() if name != first}, file)
    assert "does not fit its base LlamaForCausalLM: 1 of its tensors are missing or have no place" in refusal()
    save_file({**weights, first.replace("layers.0", "layers.9"): weights[first].clone()}, file)
    assert "1 of its tensors are missing or have no place there, " in refusal()
    save_file({**weights, first: weights[first][:, :-1].contiguous()}, file)
    assert refusal().startswith("adapter 'adapter' cannot be merged into its base: ")
    file.write_bytes(b"no tensors")
    assert refusal().startswith("adapter 'adapter' cannot be merged into its base: ")
    file.rename(folder / "adapter_model.bin")
    assert "pickled weights can run code when read" in refusal()
    save_file(weights, file)
    for changes, text in (
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "is for a base model that was not found: model "),
        ({"base_model_name_or_path": None}, "names no base model; add base_model_name_or_path to its adapter_config"),
        ({"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "WOODEN"}, "cannot be merged into its base"),
    ):
        edit(tmp_path, **changes)
        assert text in refusal()
    edit(tmp_path, peft_type="LORA")
    assert wb.load_model(folder, device="cpu").name == "adapter"
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refusal() == "adapter 'adapter' needs the package peft: pip install 'interp-workbench[peft]'"


def test_a_learned_prompt_is_refused(tiny_models, tmp_path):
    tiny_models["llama"].save_pretrained(tmp_path / "base")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapted = peft.get_peft_model(copy.deepcopy(tiny_models["llama"]), prompt)
    adapted.save_pretrained(tmp_path / "adapter")
    edit(tmp_path, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(RequestError, match="'adapter' is a learned prompt, which has no weights to merge"):
        wb.load_model(tmp_path / "adapter", device="cpu")
