"""The unembedding: its formula against float64 NumPy, what is measured against the models' own logits, and its file."""

import copy
import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from store_example import seal

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model as tiny_of_type
from workbench.io.errors import DataError, RequestError
from workbench.model.discovery import find_sites
from workbench.model.load import Model
from workbench.model.unembed import NoUnembed, Unembed, load_unembed, measure_unembed, save_unembed

D_MODEL, VOCAB = 6, 9


def made_up(**changes) -> Unembed:
    """A small unembedding in which every part matters."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        "weight": torch.randn(VOCAB, D_MODEL, generator=generator),
        "bias": torch.randn(VOCAB, generator=generator),
        "norm": "layer",
        "gain": torch.randn(D_MODEL, generator=generator),
        "shift": torch.randn(D_MODEL, generator=generator),
        "eps": 0.3,
        "scale": 0.25,
        "softcap": 1.5,
    }
    return Unembed(**{**parts, **changes})


def resid(*rows):
    return 3 * torch.randn(*rows, D_MODEL, generator=torch.Generator().manual_seed(1)) + 1


def oracle(unembed, x):
    """softcap(scale * (W_U norm(x) + b_U)) in float64."""
    x = x.double().numpy()
    if unembed.norm == "layer":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + unembed.eps)
    elif unembed.norm == "rms":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + unembed.eps)
    x = x * unembed.gain.double().numpy() + unembed.shift.double().numpy()
    logits = x @ unembed.weight.double().numpy().T
    if unembed.bias is not None:
        logits = logits + unembed.bias.double().numpy()
    logits = unembed.scale * logits
    return logits if unembed.softcap is None else unembed.softcap * np.tanh(logits / unembed.softcap)


# ---- the formula ----------------------------------------------------------------------------------------

CHANGES = [
    {},
    {"norm": "rms"},
    {"norm": "none"},
    {"bias": None},
    {"softcap": None},
    {"scale": 1.0},
    {"eps": 0.0},
    {"softcap": None, "bias": None, "norm": "none", "scale": 1.0},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_logits_follow_the_formula(changes):
    unembed, x = made_up(**changes), resid(50)
    np.testing.assert_allclose(unembed(x), oracle(unembed, x), atol=1e-5)


@pytest.mark.parametrize("change", CHANGES[1:], ids=str)
def test_every_part_of_the_formula_shows(change):
    assert not np.allclose(oracle(made_up(**change), resid(50)), oracle(made_up(), resid(50)), atol=1e-2)


def test_any_axes_may_stand_before_d_model():
    unembed, x = made_up(), resid(2, 3)
    assert unembed(x).shape == (2, 3, VOCAB)
    torch.testing.assert_close(unembed(x)[1, 2], unembed(x[1, 2]))
    assert unembed.normed(x).shape == (2, 3, D_MODEL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_computed_in_float32(dtype):
    x = resid(50).to(dtype)
    logits = made_up()(x)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits, oracle(made_up(), x), atol=1e-5)


def test_tokens_have_their_text_or_their_id():
    named = made_up(tokens=("a", " b", "", "\x00"))
    assert [named.token(i) for i in (1, 2, 3, 4, 8)] == [" b", "", "\x00", "[4]", "[8]"]
    assert made_up().token(3) == "[3]"


def test_vocab_and_device():
    unembed = made_up()
    assert unembed.vocab == VOCAB
    moved = unembed.to("meta")
    assert {part.device.type for part in (moved.weight, moved.bias, moved.gain, moved.shift)} == {"meta"}
    assert made_up(bias=None).to("meta").bias is None
    assert unembed.weight.device.type == "cpu"


# ---- measured on models ---------------------------------------------------------------------------------


@functools.cache
def built(model_type):
    """A tiny model, to be deep-copied where it is changed, and the path of its last block."""
    module = tiny_of_type(model_type)
    return module, find_sites(module).last_block


def last_residual_and_logits(module, last_block):
    """On tokens of our own: the output of the last block, as PyTorch's own hook sees it, and the logits."""
    inputs = []
    handle = module.get_submodule(last_block).register_forward_hook(lambda _m, _a, output: inputs.append(output))
    ids = torch.randint(8, 120, (3, 13), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    handle.remove()
    return inputs[0] if isinstance(inputs[0], torch.Tensor) else inputs[0][0], logits


MEASURED = {
    "gpt2": {"norm": "layer", "eps": 1e-5, "scale": 1.0, "softcap": None},
    "phi": {"norm": "layer", "eps": 1e-5, "scale": 1.0, "softcap": None},  # a bias on the head
    "llama": {"norm": "rms", "eps": 1e-6, "scale": 1.0, "softcap": None},
    "gemma2": {"norm": "rms", "eps": 1e-6, "scale": 1.0, "softcap": 2.0},  # 1 + gain
    "cohere": {"norm": "layer", "eps": 1e-5, "scale": 0.5, "softcap": None},  # multiplies
    "granite": {"norm": "rms", "eps": 1e-6, "scale": 0.5, "softcap": None},  # divides by 2
    "openai-gpt": {"norm": "none", "eps": 0.0, "scale": 1.0, "softcap": None},
    "nanochat": {"norm": "rms", "eps": 1e-6, "scale": 1.0, "softcap": 2.0},  # a norm without weights, a cap by tanh
    "minicpm3": {"norm": "rms", "eps": 1e-5, "scale": 1.0, "softcap": None},  # rescales between norm and head
}


@pytest.mark.parametrize("model_type", MEASURED)
def test_the_measured_unembedding_gives_the_models_logits(model_type):
    module, last_block = built(model_type)
    x, logits = last_residual_and_logits(module, last_block)
    unembed = measure_unembed(module, last_block)
    assert {name: getattr(unembed, name) for name in MEASURED[model_type]} == MEASURED[model_type]
    assert (unembed.bias is not None) == (model_type == "phi")
    np.testing.assert_allclose(unembed(x), logits, atol=1e-4)
    np.testing.assert_allclose(oracle(unembed, x), logits, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_the_measured_norm_is_the_models_weights(model_type):
    module, last_block = built(model_type)
    unembed = measure_unembed(module, last_block)
    norm = module.transformer.ln_f if model_type == "gpt2" else module.model.norm
    gain = 1 + norm.weight if model_type == "gemma2" else norm.weight
    torch.testing.assert_close(unembed.gain, gain.detach(), rtol=1e-5, atol=1e-6)
    shift = norm.bias.detach() if model_type == "gpt2" else torch.zeros(32)
    torch.testing.assert_close(unembed.shift, shift, rtol=1e-5, atol=1e-5)
    assert torch.equal(unembed.weight, module.get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("gpt2", torch.bfloat16), ("gemma2", torch.bfloat16), ("cohere", torch.bfloat16), ("gemma2", torch.float16)],
)
def test_a_half_precision_model_is_measured_without_its_rounding(model_type, dtype):
    """Exact on its rounded weights: as near as rounding allows to its own logits, and nearer to those in float32."""
    module, last_block = built(model_type)
    half = copy.deepcopy(module).to(dtype)
    x, logits = last_residual_and_logits(half, last_block)
    unembed = measure_unembed(half, last_block)
    assert {name: getattr(unembed, name) for name in ("norm", "scale", "softcap")} == {
        name: MEASURED[model_type][name] for name in ("norm", "scale", "softcap")
    }
    np.testing.assert_allclose(unembed(x), logits.float(), atol=0.03 * logits.abs().max().item())
    exact = copy.deepcopy(half).float()
    expected = measure_unembed(exact, last_block)
    torch.testing.assert_close(unembed(x), expected(x.float()), rtol=1e-4, atol=1e-4)


def test_measuring_leaves_the_model_alone():
    module, last_block = built("gemma2")
    module = copy.deepcopy(module).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random = torch.random.get_rng_state()
    measure_unembed(module, last_block)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


# ---- models without such a form -------------------------------------------------------------------------


def refusal(module, last_block):
    with pytest.raises(NoUnembed) as error:
        measure_unembed(module, last_block)
    return str(error.value)


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("bert", "BertPredictionHeadTransform between the last block and the head is neither LayerNorm nor RMSNorm"),
        ("roberta", "RobertaForCausalLM: no single norm lies between its last block and its head"),
        ("hy_v4", "HYV4ForCausalLM: the head reads (2, 7, 32), the stream is (2, 7, 4, 32)"),
    ],
)
def test_a_head_that_is_no_linear_map_is_refused(model_type, text):
    assert refusal(*built(model_type)) == text


@pytest.fixture
def llama(tiny_models):
    return copy.deepcopy(tiny_models["llama"])


def test_a_model_without_head_is_refused(llama):
    assert refusal(llama.model, "layers.2") == "LlamaModel has no linear language-model head"


def test_a_block_that_is_not_the_last_is_refused(llama):
    expected = "LlamaForCausalLM: no single norm lies between its last block and its head"
    assert refusal(llama, "model.layers.1") == expected


def test_another_way_with_the_logits_is_refused(llama):
    llama.lm_head.register_forward_hook(lambda _m, _a, out: out)  # a user's own hook is no hindrance
    inner = llama.forward

    def squared(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits**2
        return output

    llama.forward = squared
    expected = "LlamaForCausalLM: what it does to its logits is neither a scale nor a tanh soft-cap"
    assert refusal(llama, "model.layers.2") == expected


def test_logits_that_a_position_changes_are_refused(llama):
    """Only the comparison on real activations can tell: to the ramp in place of the head it is a scale."""
    inner = llama.forward

    def later(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits + torch.tensor([0.0, 0, 0, 0, 0, 0, 5.0])[:, None]
        return output

    llama.forward = later
    text = refusal(llama, "model.layers.2")
    assert text == "LlamaForCausalLM: norm, W_U and cap of the last residual stream miss its logits by 5"


def test_a_head_that_runs_twice_is_refused(llama):
    norm = llama.model.norm.forward

    def twice(hidden):
        llama.lm_head(hidden)
        return norm(hidden)

    llama.model.norm.forward = twice
    expected = "LlamaForCausalLM: its last block and head do not each run once in a forward pass"
    assert refusal(llama, "model.layers.2") == expected


# ---- the file -------------------------------------------------------------------------------------------

ODD_TOKENS = ("\x00", " Monday", "🙂", "a\x00b", "\n", "</script>", "ß", "\ud800", "")


@pytest.fixture(scope="module")
def recorded(tiny_models, tmp_path_factory):
    """A store without tokenizer, of a model whose logits are capped."""
    model = Model(tiny_models["gemma2"], None, "tiny-gemma2")
    texts = [[5, 6, 7, 8], [9, 10]]
    sites = ["resid_post", "logits"]
    out = tmp_path_factory.mktemp("lens") / "store"
    return wb.record(model, texts, sites=sites, out=out, dtype="float32", show_progress=False)


@pytest.fixture
def store(recorded, tmp_path):
    """A copy of it that may be changed."""
    return wb.open_store(shutil.copytree(recorded.path, tmp_path / "store"))


def test_the_lens_of_a_store_gives_its_logits(store):
    unembed = load_unembed(store.path)
    np.testing.assert_allclose(unembed(store["resid_post", 2][:]), store["logits"][:], atol=1e-4)
    assert unembed.softcap == 2.0
    assert unembed.tokens is None
    assert not np.allclose(unembed(store["resid_post", 1][:]), store["logits"][:], atol=0.1)


def test_a_tokenizer_names_the_vocabulary(tiny_models, tiny_tokenizer, tmp_path):
    model = Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")
    store = wb.record(model, ["Once upon a time"], out=tmp_path / "store", show_progress=False)
    unembed = load_unembed(store.path)
    ids = store.tokens["token_id"].to_pylist()
    assert [unembed.token(i) for i in ids] == store.tokens["token"].to_pylist()
    assert unembed.token(tiny_tokenizer.convert_tokens_to_ids("ĠMonday")) == " Monday"
    assert unembed.token(319) == "<319>"  # the model has more rows than the tokenizer has tokens


@pytest.mark.parametrize("changes", [*CHANGES, {"tokens": ODD_TOKENS}, {"tokens": ()}], ids=str)
def test_what_is_saved_comes_back(store, changes):
    unembed = made_up(**changes)
    save_unembed(unembed, store.path / "unembed.safetensors", torch.float32)
    seal(store.path)
    back = load_unembed(store.path)
    for name in ("norm", "eps", "scale", "softcap", "tokens"):
        assert getattr(back, name) == getattr(unembed, name)
    assert (back.bias is None) == (unembed.bias is None)
    assert torch.equal(back(resid(20)), unembed(resid(20)))


def test_the_same_unembedding_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_unembed(made_up(tokens=ODD_TOKENS), tmp_path / name, torch.float32)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_large_tensors_are_kept_as_the_model_has_them(store):
    weight = made_up().weight.bfloat16()
    unembed = made_up(weight=weight.float(), bias=None)
    path = store.path / "unembed.safetensors"
    save_unembed(unembed, path, torch.bfloat16)
    seal(store.path)
    with safe_open(str(path), framework="pt") as file:
        assert file.get_tensor("weight").dtype == torch.bfloat16
        assert file.get_tensor("gain").dtype == torch.float32
        assert json.loads(file.metadata()["unembed"])["softcap"] == 1.5
    back = load_unembed(store.path)
    assert back.weight.dtype == torch.float32
    assert torch.equal(back.weight, weight.float())


def test_a_store_without_unembedding_says_why(tmp_path):
    model = Model(built("bert")[0], None, "tiny-bert")
    store = wb.record(model, [[5, 6, 7]], out=tmp_path / "bert.acts", show_progress=False)
    with pytest.raises(RequestError) as error:
        load_unembed(store.path)
    assert str(error.value) == (
        "store bert.acts holds no unembedding: "
        "BertPredictionHeadTransform between the last block and the head is neither LayerNorm nor RMSNorm"
    )


def test_a_lost_file_is_named(store):
    (store.path / "unembed.safetensors").unlink()
    with pytest.raises(DataError) as error:
        load_unembed(store.path)
    missing = store.path / "unembed.safetensors"
    assert str(error.value) == (
        f"{missing} cannot be read: No such file or directory; run workbench verify on its store"
    )


def test_replace_keeps_it_a_record():
    assert replace(made_up(), scale=2.0).scale == 2.0
    with pytest.raises(AttributeError):
        made_up().scale = 2.0
