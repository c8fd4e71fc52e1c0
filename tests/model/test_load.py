"""Models: loaded from where they are, refused in one line, left as they were, and told apart by their bytes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_files import edit_json, refusal
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

import workbench as wb
from workbench.io.torch_state import usable_device
from workbench.model.load import Model, load_model

IDS = torch.arange(8, 20).reshape(2, 6)


pytestmark = pytest.mark.usefixtures("no_network")


def hooks(module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


# Loading


def test_a_directory_becomes_a_model(saved, tiny_models, no_network):
    model = load_model(str(saved))
    assert (model.name, model.revision, model.architecture) == ("tiny-llama", None, "LlamaForCausalLM")
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert (model.vocab, model.d_model, model.context_limit) == (320, 32, 128)
    assert repr(model) == "Model('tiny-llama', LlamaForCausalLM, 43,744 parameters, torch.float32, cpu)"
    assert model.module.config._attn_implementation == "sdpa"
    assert not model.module.training
    stored = load_file(saved / "model.safetensors")
    assert all(torch.equal(part, stored[name]) for name, part in model.module.state_dict().items())
    assert torch.equal(model.module(IDS).logits, tiny_models["llama"](IDS).logits)
    assert model.tokenizer("Monday")["input_ids"] == AutoTokenizer.from_pretrained(saved)("Monday")["input_ids"]
    assert no_network == []


def test_the_public_name_takes_a_path_too(saved):
    assert wb.load_model(saved).fingerprint() == load_model(str(saved)).fingerprint()


def test_a_home_directory_is_expanded(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_model("~/tiny-llama").name == "tiny-llama"


def test_loading_says_nothing_and_leaves_the_settings_of_transformers(saved, capfd, monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    level = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load_model(saved)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(level)
        logging.disable_progress_bar()
    load_model(saved)
    assert not logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("dtype", "expected"), [("float16", torch.float16), (torch.bfloat16, torch.bfloat16)])
def test_dtype_is_what_the_model_computes_in(saved, tiny_models, dtype, expected):
    model = load_model(saved, dtype=dtype)
    assert model.dtype == expected
    weights = tiny_models["llama"].state_dict()
    assert all(torch.equal(part, weights[name].to(expected)) for name, part in model.module.state_dict().items())


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, "nn"])
def test_an_impossible_dtype(saved, dtype):
    assert refusal(load_model, saved, dtype=dtype) == (
        f"dtype must be auto, checkpoint, float32, bfloat16 or float16, not {str(dtype)!r}"
    )


def test_device(saved, tiny_models):
    assert load_model(saved, device="meta").device == torch.device("meta")
    spread = load_model(saved, device="auto")
    assert torch.allclose(spread.module(IDS).logits.cpu(), tiny_models["llama"](IDS).logits, atol=1e-5)


def test_devices_that_are_not_there(saved):
    assert refusal(load_model, saved, device="toaster").startswith("device 'toaster' cannot be used here: Expected one")
    device_count = torch.cuda.device_count()
    assert refusal(usable_device, f"cuda:{device_count}").startswith(
        f"device 'cuda:{device_count}' cannot be used here: "
    )
    assert usable_device("cpu") == torch.device("cpu")


def test_a_module_is_taken_as_it_is(tiny_model, tiny_tokenizer):
    module = copy.deepcopy(tiny_model)
    module.train()
    module.get_input_embeddings().eval()
    modes, hooked = [part.training for part in module.modules()], hooks(module)
    before = {name: part.clone() for name, part in module.state_dict().items()}
    model = load_model(module, tokenizer=tiny_tokenizer)
    assert model.module is module
    assert model.tokenizer is tiny_tokenizer
    assert (model.name, model.revision) == (type(module).__name__, None)
    assert "resid_post.2" in model.sites  # one trial pass has run
    assert hooks(module) == hooked
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(part, before[name]) for name, part in module.state_dict().items())
    assert module.config._attn_implementation == tiny_model.config._attn_implementation


def test_sites_are_in_the_order_of_the_forward_pass(tiny_models):
    sites = load_model(tiny_models["llama"]).sites
    order = ["embed", "resid_pre.0", "attn_out.0", "resid_mid.0", "mlp_out.0", "resid_post.0", "resid_post.2", "logits"]
    assert sorted(order, key=sites.index) == order


def test_a_module_without_tokenizer(tiny_models):
    assert load_model(tiny_models["gpt2"]).tokenizer is None


def test_a_module_names_its_origin_without_the_machines_paths(saved, tiny_models):
    module = AutoModelForCausalLM.from_pretrained(saved)
    assert load_model(module).name == "tiny-llama"
    module.config._name_or_path = "/somebody/elses/home/tiny-llama"
    assert load_model(module).name == "tiny-llama"
    module.config._name_or_path = "user/tiny"
    assert load_model(module).name == "user/tiny"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "device='cpu'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"revision": "v1"}, "revision='v1'"),
    ],
)
def test_a_module_is_not_moved_or_cast(tiny_models, options, message):
    assert refusal(load_model, tiny_models["gpt2"], **options) == (
        f"{message} is for a model that is loaded; a module stays as it is given"
    )


def test_neither_path_nor_module():
    assert refusal(load_model, 3) == "model must be a directory, a hub id or a transformers PreTrainedModel, not int"
    assert refusal(load_model, nn.Linear(2, 2)) == (
        "model must be a directory, a hub id or a transformers PreTrainedModel, not Linear"
    )


def test_revision_belongs_to_the_hub(saved):
    assert refusal(load_model, saved, revision="v1") == (
        f"revision='v1' applies to a hub id only; leave it out for the directory {str(saved)!r}"
    )


def test_a_real_checkpoint(stories260k):
    model = load_model(stories260k)
    assert repr(model) == "Model('stories260K', LlamaForCausalLM, 260,032 parameters, torch.float32, cpu)"
    ids = model.tokenizer("Once upon a time", return_tensors="pt").input_ids
    generated = model.module.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert model.tokenizer.decode(generated[0], skip_special_tokens=True) == (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the p"
    )


# Checkpoints that are not what they should be


@pytest.mark.parametrize("keep", [0, 5, 3000])
def test_a_damaged_checkpoint(model_dir, keep):
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert refusal(load_model, model_dir).startswith("model 'tiny-llama' cannot be loaded: Error while deserializing")


def test_no_weights(model_dir):
    (model_dir / "model.safetensors").unlink()
    assert refusal(load_model, model_dir) == (
        f"model 'tiny-llama' cannot be loaded: Error no file named model.safetensors found in directory {model_dir}."
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not a valid JSON file."),
        ("{}", "Should have a `model_type` key in its config.json."),
        ('{"model_type": "zork"}', "has model type `zork` but Transformers does not recognize this architecture."),
        ('{"model_type": "t5"}', "transformers has no causal language model of its type"),
    ],
)
def test_a_wrong_config(model_dir, config, message):
    (model_dir / "config.json").write_text(config)
    text = refusal(load_model, model_dir)
    assert text.startswith("model 'tiny-llama' ")
    assert message in text


def test_weights_that_the_checkpoint_lacks_are_not_made_up(model_dir):
    """transformers would fill them with random numbers, and every recording would be of another model."""
    edit_json(model_dir / "config.json", num_hidden_layers=4)
    assert refusal(load_model, model_dir) == (
        "model 'tiny-llama': its checkpoint does not fit its config.json, 9 of 39 weights are missing or of "
        "another shape: model.layers.3.input_layernorm.weight, ..."
    )


def test_weights_of_another_shape(model_dir):
    edit_json(model_dir / "config.json", intermediate_size=50)
    assert refusal(load_model, model_dir) == (
        "model 'tiny-llama': its checkpoint does not fit its config.json, 9 of 30 weights are missing or of another "
        "shape: model.layers.0.mlp.down_proj.weight ((32, 48) there, (32, 50) here), ..."
    )


def test_tied_weights_are_stored_once_and_not_missing(tiny_models, tmp_path):
    tiny_models["gpt2"].save_pretrained(tmp_path)
    assert load_model(tmp_path).fingerprint() == load_model(tiny_models["gpt2"]).fingerprint()


class Marker:
    """Leaves a file behind when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_only_where_allowed(model_dir, tiny_models):
    weights = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    torch.save(weights, model_dir / "pytorch_model.bin")
    assert refusal(load_model, model_dir) == (
        "model 'tiny-llama' has only pickled weights (pytorch_model.bin), which can run code when read; "
        "convert them to safetensors or pass allow_pickle=True if you trust their author"
    )
    model = load_model(model_dir, allow_pickle=True)
    assert torch.equal(model.module(IDS).logits, tiny_models["llama"](IDS).logits)


def test_a_stray_safetensors_file_lets_no_pickle_in(model_dir):
    torch.save(load_file(model_dir / "model.safetensors"), model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").rename(model_dir / "adapter.safetensors")
    assert refusal(load_model, model_dir).startswith("model 'tiny-llama' cannot be loaded: Error no file named model.")


def test_a_pickle_that_would_run_code_does_not(model_dir):
    (model_dir / "model.safetensors").unlink()
    torch.save({"weight": Marker(model_dir / "ran")}, model_dir / "pytorch_model.bin")
    refusal(load_model, model_dir)
    assert not (model_dir / "ran").exists()


def test_safetensors_win_over_a_pickle_beside_them(model_dir):
    torch.save({"weight": Marker(model_dir / "ran")}, model_dir / "pytorch_model.bin")
    assert load_model(model_dir).name == "tiny-llama"
    assert not (model_dir / "ran").exists()


CUSTOM = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_where_trusted(model_dir, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (model_dir / "own.py").write_text(CUSTOM.format(marker=str(marker)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(model_dir / "config.json", model_type="own-llama", auto_map=classes)
    assert refusal(load_model, model_dir) == (
        "model 'tiny-llama' needs code from its repository, which is not run by default; "
        "pass trust_remote_code=True if you trust its author"
    )
    assert not marker.exists()
    assert load_model(model_dir, trust_remote_code=True).architecture == "OwnModel"
    assert marker.exists()


# Tokenizers


def test_a_directory_without_tokenizer(model_dir):
    for path in model_dir.glob("*token*"):
        path.unlink()
    assert load_model(model_dir).tokenizer is None


def test_another_tokenizer(saved, stories260k):
    assert len(load_model(saved, tokenizer=str(stories260k)).tokenizer) == 512
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert load_model(saved, tokenizer=tokenizer).tokenizer is tokenizer


def test_wrong_tokenizers(saved, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(load_model, saved, tokenizer=tmp_path / "tiny-lama") == (
        f"tokenizer {str(tmp_path / 'tiny-lama')!r}: no such directory "
        f"({tmp_path.name}/ has no 'tiny-lama'; nearest: tiny-llama)"
    )
    assert refusal(load_model, saved, tokenizer=saved / "tokenizer.json") == (
        f"tokenizer {str(saved / 'tokenizer.json')!r} is a file; give the folder that holds tokenizer.json"
    )
    assert refusal(load_model, saved, tokenizer=3) == (
        "tokenizer must be a directory, a hub id or a transformers tokenizer, not int"
    )
    assert refusal(load_model, saved, tokenizer="some/words") == (
        "tokenizer 'some/words' is no directory here, and not in the local hub cache (HF_HUB_OFFLINE is set)"
    )
    for path in model_dir.glob("*token*"):
        path.write_text("{")
    text = refusal(load_model, model_dir)
    assert text.startswith(f"tokenizer {str(model_dir)!r} cannot be loaded: ")
    assert refusal(load_model, saved, tokenizer=model_dir) == text


# What a model says of itself


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 5}, 5),
        ({"n_positions": 7}, 7),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_context_limit(config, limit):
    inner = SimpleNamespace(**config)
    module = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: inner))
    assert Model(module, None, "a").context_limit == limit


def test_context_limit_of_real_configs(tiny_model):
    assert load_model(tiny_model).context_limit == 128


# TransformerBridge


def test_the_bridge_agrees_and_the_model_stays(tiny_model, no_network):
    model = load_model(tiny_model)
    classes = [type(part) for part in tiny_model.modules()]
    hidden = copy.deepcopy(tiny_model)(IDS, output_hidden_states=True).hidden_states
    before, hooked = tiny_model(IDS).logits, hooks(tiny_model)
    bridge = model.bridge()
    logits, cache = bridge.run_with_cache(IDS)
    assert torch.allclose(logits, before, atol=1e-4, rtol=0)
    assert torch.allclose(cache["blocks.0.hook_resid_post"], hidden[1], atol=1e-4, rtol=0)
    assert [type(part) for part in tiny_model.modules()] == classes
    assert torch.equal(tiny_model(IDS).logits, before)
    assert hooks(tiny_model) == hooked
    with torch.no_grad():
        next(iter(bridge.parameters())).zero_()
    assert torch.equal(tiny_model(IDS).logits, before)
    assert no_network == []


def test_the_bridge_of_a_real_checkpoint(stories260k):
    model = load_model(stories260k)
    before = model.tokenizer_fingerprint()
    bridge = model.bridge()
    ids = model.tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert torch.equal(bridge.to_tokens("Once upon a time"), ids)
    assert torch.allclose(bridge("Once upon a time"), model.module(ids).logits, atol=1e-4, rtol=0)
    assert model.tokenizer.pad_token is None
    assert model.tokenizer_fingerprint() == before


def test_the_bridge_takes_a_tokenizer_that_is_on_no_disk(tiny_models):
    vocab = {name: i for i, name in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    bridge = load_model(tiny_models["gpt2"], tokenizer=tokenizer).bridge()
    ids = tokenizer("day")["input_ids"]
    assert bridge.to_tokens("day", prepend_bos=False)[0].tolist() == ids
    assert bridge.to_tokens("day", prepend_bos=True)[0].tolist() == [0, *ids]


def test_the_bridge_computes_in_the_models_dtype(tiny_models):
    bridge = load_model(copy.deepcopy(tiny_models["llama"]).bfloat16()).bridge()
    assert bridge.cfg.dtype == bridge(IDS).dtype == torch.bfloat16


def test_no_bridge_for_what_transformer_lens_does_not_know():
    from transformers import BertConfig, BertModel

    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=16)
    module = BertModel(tiny)
    module.config.architectures = None
    assert refusal(Model(module, None, "tiny-bert").bridge).startswith("model 'tiny-bert' gets no TransformerBridge: ")


def test_the_bridge_installs_nothing(monkeypatch):
    """TransformerLens' own boot fetches torchvision, and another torch with it, for a model that also sees images."""
    from transformers import Gemma3Config

    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    text = small | {"vocab_size": 320, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision = small | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319)
    module = AutoModelForCausalLM.from_config(config).eval()
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_options: commands.append(arguments))
    bridge = load_model(module).bridge()
    assert bridge.cfg.is_multimodal
    assert torch.allclose(bridge(IDS), module(IDS).logits, atol=1e-4, rtol=0)
    assert commands == []


def test_a_model_of_images_is_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    assert refusal(load_model, tmp_path / "vit") == "model 'vit' is no language model: ViTModel embeds no tokens"


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true, "architectures": ["T5ForAll"]}')
    assert refusal(load_model, tmp_path).startswith(f"model {tmp_path.name!r} is an encoder-decoder (T5ForAll); give ")
