"""The OV circuit against float64 written from the weights, family by family, and planted weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, OPTConfig

from workbench.io.errors import RequestError
from workbench.model.circuits import (
    direct_logits,
    embedding,
    first_mlp,
    head_outputs,
    head_writes,
    mlp_outputs,
    ov_logits,
    writes_of,
)
from workbench.model.load import Model
from workbench.model.unembed import measure_unembed

IDS = torch.tensor([5, 9, 40, 7, 300])
TARGETS = torch.tensor([9, 40, 6])
HEADS, WIDTH = 4, 8


def model_of(module) -> Model:
    return Model(module, None, "tiny")


def built(config, seed=0) -> Model:
    """A random model with every parameter, norms and biases too, off its initial value."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config).eval()
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    module.config.architectures = [type(module).__name__]
    return model_of(module)


# ---- float64, from the weights ----------------------------------------------------------------------------


class Weights:
    """Parameters of a module in float64 by name."""

    def __init__(self, module) -> None:
        self.state = {name: value.double().numpy() for name, value in module.state_dict().items()}

    def __call__(self, name: str) -> np.ndarray:
        return self.state[name]


def layer_norm(x, gain, shift, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gain + shift


def rms_norm(x, gain, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def gelu(x):
    return torch.nn.functional.gelu(torch.tensor(x)).numpy()


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def gpt2(w, ids):
    """(W_E, MLP_0(W_E), [layer] -> x -> writes): Conv1D holds its matrices transposed, and q, k, v side by side."""
    x = w("transformer.wte.weight")[ids]
    block = "transformer.h.{}.".format

    def norm(layer, part, x):
        return layer_norm(x, w(block(layer) + f"{part}.weight"), w(block(layer) + f"{part}.bias"))

    inner = norm(0, "ln_2", x) @ w(block(0) + "mlp.c_fc.weight") + w(block(0) + "mlp.c_fc.bias")
    mlp = gelu_tanh(inner) @ w(block(0) + "mlp.c_proj.weight") + w(block(0) + "mlp.c_proj.bias")

    def writes(layer, x):
        qkv = norm(layer, "ln_1", x) @ w(block(layer) + "attn.c_attn.weight") + w(block(layer) + "attn.c_attn.bias")
        value, out = qkv[:, 64:].reshape(-1, HEADS, WIDTH), w(block(layer) + "attn.c_proj.weight")
        return np.stack([value[:, h] @ out[h * WIDTH : (h + 1) * WIDTH] for h in range(HEADS)], 1)

    return x, mlp, writes


def llama_like(w, ids, *, scale=1.0, plus=0.0, act=silu, mlp_norm="post_attention_layernorm", behind=False):
    """Separate projections, two query heads to each value head; Gemma 2: 1 + gain, and norms behind both parts."""
    x = scale * w("model.embed_tokens.weight")[ids]
    block = "model.layers.{}.".format

    def norm(layer, part, x):
        return rms_norm(x, plus + w(block(layer) + f"{part}.weight"))

    normed = norm(0, mlp_norm, x)
    gate, up, down = (w(block(0) + f"mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
    mlp = (act(normed @ gate.T) * (normed @ up.T)) @ down.T
    mlp = norm(0, "post_feedforward_layernorm", mlp) if behind else mlp

    def writes(layer, x):
        value = norm(layer, "input_layernorm", x) @ w(block(layer) + "self_attn.v_proj.weight").T
        out = w(block(layer) + "self_attn.o_proj.weight").T
        value = value.reshape(-1, HEADS // 2, WIDTH)
        heads = [value[:, h // 2] @ out[h * WIDTH : (h + 1) * WIDTH] for h in range(HEADS)]
        return np.stack([norm(layer, "post_attention_layernorm", head) if behind else head for head in heads], 1)

    return x, mlp, writes


def gemma2(w, ids):
    return llama_like(
        w, ids, scale=np.sqrt(32), plus=1.0, act=gelu_tanh, mlp_norm="pre_feedforward_layernorm", behind=True
    )


def gpt_neox(w, ids):
    """The MLP beside attention, with a norm of its own; the fused projection holds q, k and v head by head."""
    x = w("gpt_neox.embed_in.weight")[ids]
    block = "gpt_neox.layers.{}.".format

    def dense(name, x):
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    def norm(name, x):
        return layer_norm(x, w(f"{name}.weight"), w(f"{name}.bias"))

    inner = gelu(dense(block(0) + "mlp.dense_h_to_4h", norm(block(0) + "post_attention_layernorm", x)))
    mlp = dense(block(0) + "mlp.dense_4h_to_h", inner)

    def writes(layer, x):
        fused = dense(block(layer) + "attention.query_key_value", norm(block(layer) + "input_layernorm", x))
        value = fused.reshape(-1, HEADS, 3, WIDTH)[:, :, 2]
        out = w(block(layer) + "attention.dense.weight").T
        return np.stack([value[:, h] @ out[h * WIDTH : (h + 1) * WIDTH] for h in range(HEADS)], 1)

    return x, mlp, writes


FAMILIES = {"gpt2": gpt2, "llama": llama_like, "gpt_neox": gpt_neox, "gemma2": gemma2}


@pytest.fixture(scope="module")
def models(tiny_models):
    """Each family once, so that its sites are looked for once."""
    return {family: model_of(module) for family, module in tiny_models.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_is_what_the_weights_say(models, family):
    model = models[family]
    x, mlp, writes = FAMILIES[family](Weights(model.module), IDS.numpy())
    np.testing.assert_allclose(embedding(model, IDS), x, atol=1e-5)
    np.testing.assert_allclose(first_mlp(model, IDS, "mlp"), mlp, atol=2e-5)
    np.testing.assert_allclose(first_mlp(model, IDS, "residual"), x + mlp, atol=2e-5)
    np.testing.assert_allclose(first_mlp(model, IDS, "none"), x, atol=1e-5)
    by_layer = dict(head_writes(model, torch.tensor(x + mlp, dtype=torch.float32)))
    assert list(by_layer) == [0, 1, 2]
    for layer, wrote in by_layer.items():
        assert wrote.shape == (len(IDS), HEADS, 32)
        np.testing.assert_allclose(wrote, writes(layer, x + mlp), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_go_through_gain_and_scale_of_the_final_norm_and_nothing_constant(models, family):
    model = models[family]
    w = Weights(model.module)
    norm = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(family, "model.norm")
    gain, reads = w(f"{norm}.weight") + (family == "gemma2"), w("lm_head.weight")[TARGETS]
    x, mlp, writes = FAMILIES[family](w, IDS.numpy())
    unembed = measure_unembed(model.module, model.site_map.last_block)
    for layer, logits in ov_logits(model, first_mlp(model, IDS), TARGETS, unembed):
        wrote = writes(layer, x + mlp)
        normed = rms_norm(wrote, gain) if norm == "model.norm" else layer_norm(wrote, gain, 0.0)
        np.testing.assert_allclose(logits, (normed @ reads.T).transpose(1, 0, 2), atol=2e-3, rtol=1e-3)


def test_one_pass_and_many_are_the_same(models):
    """More tokens than go into one pass."""
    model = models["llama"]
    ids = torch.arange(3, 143)
    x = first_mlp(model, ids)
    for part in (slice(0, 5), slice(130, 140)):
        torch.testing.assert_close(first_mlp(model, ids[part]), x[part], atol=1e-5, rtol=1e-5)
        few, all_of_them = dict(head_writes(model, x[part])), dict(head_writes(model, x))
        torch.testing.assert_close(few[2], all_of_them[2][part], atol=1e-5, rtol=1e-5)


def test_transformer_lens_has_the_same_matrices(models):
    model = models["gpt2"]
    bridge = model.bridge()
    for layer, output in head_outputs(model).items():
        weight = bridge.blocks[layer].attn.W_O.detach()
        torch.testing.assert_close(output.weights(), weight.reshape(HEADS, WIDTH, 32), atol=1e-6, rtol=1e-5)


def test_heads_add_up_to_what_attention_adds(models):
    """At the first position a token attends to itself alone: what the model then adds is its heads and a bias."""
    model, tensors = models["gpt_neox"], {}
    module = model.module
    hooks = [
        module.gpt_neox.layers[0].register_forward_pre_hook(lambda _m, args: tensors.update(x=args[0][0].clone())),
        module.gpt_neox.layers[0].attention.register_forward_hook(lambda _m, _a, out: tensors.update(out=out[0][0])),
    ]
    with torch.inference_mode():
        module(input_ids=IDS[:1, None])
    for hook in hooks:
        hook.remove()
    total = dict(head_writes(model, tensors["x"]))[0].sum(1) + module.gpt_neox.layers[0].attention.dense.bias
    torch.testing.assert_close(total, tensors["out"], atol=1e-5, rtol=1e-5)


def test_the_model_is_as_it_was(models):
    module = models["gemma2"].module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.inference_mode():
        logits = module(input_ids=IDS[None]).logits
    list(head_writes(models["gemma2"], first_mlp(models["gemma2"], IDS)))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(module(input_ids=IDS[None]).logits, logits)


# ---- embeddings -------------------------------------------------------------------------------------------


def test_an_embedding_with_a_norm_behind_it():
    """BLOOM's stream begins behind a norm; and its attention module adds the residual itself."""
    model = built(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))
    w = Weights(model.module)
    norm = "transformer.word_embeddings_layernorm"
    x = layer_norm(w("transformer.word_embeddings.weight")[IDS], w(f"{norm}.weight"), w(f"{norm}.bias"))
    np.testing.assert_allclose(embedding(model, IDS), x, atol=1e-5)
    name = "transformer.h.0."
    norm = layer_norm(x, w(f"{name}post_attention_layernorm.weight"), w(f"{name}post_attention_layernorm.bias"))
    inner = gelu_tanh(norm @ w(f"{name}mlp.dense_h_to_4h.weight").T + w(f"{name}mlp.dense_h_to_4h.bias"))
    mlp = inner @ w(f"{name}mlp.dense_4h_to_h.weight").T + w(f"{name}mlp.dense_4h_to_h.bias")
    np.testing.assert_allclose(first_mlp(model, IDS, "mlp"), mlp, atol=1e-4)


def test_half_precision(models):
    half = model_of(copy.deepcopy(models["gemma2"].module).bfloat16())
    exact, rounded = (dict(head_writes(model, first_mlp(model, IDS))) for model in (models["gemma2"], half))
    assert rounded[1].dtype == torch.float32
    assert 0 < (rounded[1] - exact[1]).norm() < 0.05 * exact[1].norm()


def test_an_embedding_of_another_width_is_refused():
    model = built(
        OPTConfig(
            vocab_size=320,
            hidden_size=32,
            word_embed_proj_dim=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
        )
    )
    message = refused(RequestError, lambda: embedding(model, IDS))
    assert message == "model 'tiny' (OPTForCausalLM): its token embedding is not its first stream"


def test_a_stream_that_is_no_scaled_embedding_is_refused(tiny_models):
    module = copy.deepcopy(tiny_models["llama"])
    module.model.embed_tokens.register_forward_hook(lambda _m, _a, output: output)
    module.model.layers[0].register_forward_pre_hook(lambda _m, args: (args[0].abs(), *args[1:]))
    message = refused(RequestError, lambda: embedding(model_of(module), IDS))
    assert message.endswith("its first stream is more than scaled embedding and position")


def test_a_model_without_heads_is_refused():
    model = built(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert refused(RequestError, lambda: head_outputs(model)) == (
        "model 'tiny' (MambaForCausalLM) has no layer with separate attention heads; "
        "this needs an architecture with the site z"
    )


# ---- planted ----------------------------------------------------------------------------------------------


def test_a_projection_without_weights_writes_nothing(tiny_models):
    module = copy.deepcopy(tiny_models["gpt2"])
    torch.nn.init.zeros_(module.transformer.h[1].attn.c_proj.weight)  # its bias stays
    model = model_of(module)
    unembed = measure_unembed(module, model.site_map.last_block)
    logits = dict(ov_logits(model, first_mlp(model, IDS), TARGETS, unembed))
    assert not logits[1].any()
    assert logits[0].any()


def test_one_silent_head(tiny_models):
    module = copy.deepcopy(tiny_models["gpt2"])
    with torch.no_grad():
        module.transformer.h[2].attn.c_proj.weight[2 * WIDTH : 3 * WIDTH] = 0
    model = model_of(module)
    wrote = dict(head_writes(model, first_mlp(model, IDS)))[2]
    assert [bool(wrote[:, head].any()) for head in range(HEADS)] == [True, True, False, True]


def test_the_scale_is_that_of_the_stream_where_there_is_one(models):
    """The logits of a stream are then the sum of what its parts add, up to what is constant."""
    for family in ("gpt2", "llama"):
        unembed = measure_unembed(models[family].module, models[family].site_map.last_block)
        parts = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0))
        stream = parts.sum(0)
        sums = sum(direct_logits(unembed, part, TARGETS, stream) for part in parts)
        zero = replace(unembed, shift=torch.zeros_like(unembed.shift), bias=None)
        torch.testing.assert_close(sums, zero(stream)[:, TARGETS], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(direct_logits(unembed, stream, TARGETS), sums, atol=1e-4, rtol=1e-4)
        alone, within = direct_logits(unembed, parts[0], TARGETS), direct_logits(unembed, parts[0], TARGETS, stream)
        assert not torch.allclose(alone, within)


def test_written_of_a_recorded_z(models):
    """The same heads from their z: what enters the projection."""
    z = torch.randn(5, HEADS, WIDTH, generator=torch.Generator().manual_seed(0))
    out = models["llama"].module.model.layers[1].self_attn.o_proj.weight.detach()
    expected = torch.stack([z[:, h] @ out[:, h * WIDTH : (h + 1) * WIDTH].T for h in range(HEADS)], 1)
    torch.testing.assert_close(writes_of(head_outputs(models["llama"])[1], z), expected, atol=1e-5, rtol=1e-5)


def test_directions_of_neurons_have_the_gain_of_the_norm_behind_them(tiny_models):
    block = tiny_models["gemma2"].model.layers[1]
    output = mlp_outputs(model_of(tiny_models["gemma2"]))[1]
    expected = block.mlp.down_proj.weight.detach().T * (1 + block.post_feedforward_layernorm.weight.detach())
    torch.testing.assert_close(output.directions()[0], expected, atol=1e-5, rtol=1e-4)
    plain = mlp_outputs(model_of(tiny_models["llama"]))[1]
    torch.testing.assert_close(plain.directions(), plain.weights())
