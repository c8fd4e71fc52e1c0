"""Gemma Scope, Gemma Scope 2 and Llama Scope: what their own definitions give, computed in float64 NumPy."""

import numpy as np
import pytest
from formats_example import (
    D_IN,
    D_SAE,
    NORM,
    B,
    C,
    K,
    T,
    V,
    W,
    X,
    assert_close,
    decoded,
    features,
    jump,
    largest,
    relu,
    single,
    tensors,
    text,
)
from refusals import refused

from workbench.io.errors import DataError, RequestError
from workbench.sae.load import load_sae

GEMMA = {"W_enc": W, "b_enc": B, "W_dec": V, "b_dec": C, "threshold": T}
GEMMA_2 = {name.lower(): part for name, part in GEMMA.items()}
ROOT = D_IN**0.5


def arrays(folder, **weights):
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **single(GEMMA | weights))
    return folder


@pytest.mark.parametrize(
    ("release", "site", "model"),
    [
        ("gemma-scope-2b-pt-res", "blocks.20.hook_resid_post", "gemma-2-2b"),
        ("gemma-scope-9b-pt-mlp", "blocks.20.hook_mlp_out", "gemma-2-9b"),
        ("models--google--gemma-scope-9b-it-att", "blocks.20.attn.hook_z", "gemma-2-9b-it"),
        ("gemma-scope-2b-pt-transcoders", "blocks.20.ln2.hook_normalized", "gemma-2-2b"),
        ("renamed", None, None),
    ],
)
def test_gemma_scope_saes_encode_as_defined(release, site, model, tmp_path):
    inner = "layer_20/width_16k/average_l0_71"
    arrays(tmp_path / release / inner)
    sae = load_sae(tmp_path / release, inner, device="cpu")
    expected = jump(X.astype(np.float64) @ W + B, T)
    assert_close(features(sae), expected)
    assert_close(decoded(sae, expected), expected @ V + C, 1e-3)
    assert (sae.site, sae.model_name, sae.reconstructs) == (site, model, "transcoders" not in release)
    assert sae.name == load_sae(tmp_path / release / inner, device="cpu").name == inner


def test_gemma_scope_embeddings_are_read_after_the_models_scaling(tmp_path):
    folder = arrays(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6")
    sae = load_sae(folder, device="cpu")
    expected = jump(X @ W + B, T)
    assert_close(features(sae, X * np.float32(ROOT)), expected)
    assert_close(decoded(sae, expected), (expected @ V + C) * ROOT, 1e-3)
    assert sae.site == "blocks.0.hook_resid_pre"


def test_damaged_arrays_are_refused(tmp_path):
    folder = arrays(tmp_path / "x", more=C)
    assert refused(DataError, lambda: load_sae(folder)).endswith("unknown tensor 'more', which may change the features")
    (folder / "params.npz").write_bytes(b"PK\3\4 short")
    assert refused(DataError, lambda: load_sae(folder)).startswith(f"{folder / 'params.npz'} is damaged (")
    np.savez(folder / "params.npz", **(single(GEMMA) | {"W_enc": np.array([{}], object)}))  # a pickle inside
    assert "allow_pickle=False" in refused(DataError, lambda: load_sae(folder))
    np.savez(folder / "params.npz", **(single(GEMMA) | {"W_enc": np.float32(B)}))
    assert refused(DataError, lambda: load_sae(folder)).endswith(
        "params.npz: W_enc has the shape (30,), expected two axes; save or download the SAE again"
    )


HOOKS = {
    "resid_post": ("output", None, "hook_resid_post"),
    "attn_out": ("self_attn.o_proj.input", None, "attn.hook_z"),
    "mlp_out": ("post_feedforward_layernorm.output", None, "hook_mlp_out"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output", "mlp.hook_in"),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("with_config", [True, False])
def test_gemma_scope_2_saes_encode_as_defined(kind, with_config, tmp_path):
    folder = tmp_path / "gemma-scope-2-1b-pt" / kind / "layer_12_width_16k_l0_small"
    tensors(folder / "params.safetensors", GEMMA_2)
    read, written, site = HOOKS[kind]
    places = {"hf_hook_point_in": read} | ({"hf_hook_point_out": written} if written else {})
    config = {name: f"model.layers.12.{place}" for name, place in places.items()}
    if with_config:
        text(folder / "config.json", config | {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"})
    sae = load_sae(folder, device="cpu")
    expected = jump(X.astype(np.float64) @ W + B, T)
    assert_close(features(sae), expected)
    assert_close(decoded(sae, expected), expected @ V + C, 1e-3)
    assert (sae.site, sae.reconstructs) == (f"blocks.12.{site}", kind != "transcoder")
    assert sae.model_name == ("google/gemma-3-1b-pt" if with_config else None)


def test_an_affine_connection_is_added_to_the_output(tmp_path):
    skip = np.random.default_rng(3).normal(size=(D_IN, D_IN))
    folder = tmp_path / "transcoder" / "layer_3_width_16k_l0_small_affine"
    tensors(folder / "params.safetensors", GEMMA_2 | {"affine_skip_connection": skip})
    sae = load_sae(folder, device="cpu")
    expected = jump(X @ W + B, T)
    assert_close(features(sae), expected)
    assert_close(sae.module(__import__("torch").from_numpy(X)).detach().numpy(), expected @ V + C + X @ skip, 1e-3)
    text(folder / "config.json", {"architecture": "gated"})
    assert refused(RequestError, lambda: load_sae(folder)).endswith(
        "architecture 'gated' is not supported; only jump_relu is"
    )


LLAMA = {"encoder.weight": W.T, "encoder.bias": B, "decoder.weight": V.T, "decoder.bias": C}
BEFORE, AFTER, THRESHOLD = 3.0, 11.0, 0.2
S_IN, S_OUT = ROOT / BEFORE, ROOT / AFTER


def llama(folder, output="blocks.15.hook_resid_post", weights=LLAMA, **config):
    tensors(folder / "checkpoints" / "final.safetensors", weights)
    config = {
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": output,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": THRESHOLD,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": BEFORE, "out": AFTER},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "top_k": K,
        **config,
    }
    return text(folder / "hyperparams.json", config)


def inference_form(x, gated=True, output_scale=S_OUT):
    """Pre-activations and decoder by lm_saes' steps: to the model's units, then to decoder rows of length 1."""
    bias, decoder, after = B / S_IN, V * S_IN / output_scale, C / output_scale
    norm = np.linalg.norm(decoder, axis=1) if gated else np.ones(D_SAE)
    pre = x @ (W * norm) + bias * norm
    return pre, lambda f: f @ (decoder / norm[:, None]) + after


@pytest.mark.parametrize("gated", [True, False])
def test_llama_scope_saes_encode_as_their_inference_form(gated, tmp_path):
    folder = llama(tmp_path / "Llama3_1-8B-Base-L15R-8x", "blocks.15.hook_mlp_out", sparsity_include_decoder_norm=gated)
    sae = load_sae(folder, device="cpu")
    pre, decode = inference_form(X.astype(np.float64), gated)
    expected = np.where(pre > THRESHOLD, pre, 0)
    assert_close(features(sae), expected)
    assert_close(decoded(sae, expected), decode(expected), 1e-3)
    assert (sae.site, sae.model_name) == ("blocks.15.hook_resid_post", "meta-llama/Llama-3.1-8B")
    assert not sae.reconstructs


def test_llama_scope_autoencoders_subtract_the_decoder_bias_where_they_say_so(tmp_path):
    norms = {"in": BEFORE, "out": BEFORE}
    folder = llama(
        tmp_path / "x", dataset_average_activation_norm=norms, apply_decoder_bias_to_pre_encoder=True, act_fn="relu"
    )
    sae = load_sae(folder, device="cpu")
    pre, decode = inference_form(X - C / S_IN, output_scale=S_IN)
    assert_close(features(sae), relu(pre))
    assert_close(decoded(sae, relu(pre)), decode(relu(pre)), 1e-3)
    assert sae.reconstructs


def test_llama_scope_rows_can_be_normalised_one_by_one(tmp_path):
    sae = load_sae(llama(tmp_path / "x", norm_activation="token-wise"), device="cpu")
    x = X / np.linalg.norm(X, axis=1, keepdims=True) * ROOT
    pre = (x @ W + B) * NORM
    assert_close(features(sae), np.where(pre > THRESHOLD, pre, 0))


def test_llama_scope_settings_that_change_the_features_are_refused(tmp_path):
    def message(kind, **config):
        return refused(kind, lambda: load_sae(llama(tmp_path / "x", **config))).removeprefix(str(tmp_path / "x"))

    assert message(RequestError, norm_activation="batch-wise").endswith("its norms depend on the batch")
    assert message(RequestError, use_glu_encoder=True).endswith(
        "use_glu_encoder changes the features and is not supported"
    )
    assert message(RequestError, act_fn="gelu").startswith(
        "/hyperparams.json: act_fn 'gelu' is not supported; supported"
    )
    assert message(DataError, dataset_average_activation_norm={"in": 1.0}).startswith(
        "/hyperparams.json: dataset_average_activation_norm.out is missing; "
    )
    assert message(DataError, d_sae=31) == "/hyperparams.json declares 31 features, but the weights have 30"
    assert message(DataError, jump_relu_threshold=-1).endswith("is -1, expected a number from 0 on")


NEW = {"W_E": W, "b_E": B, "W_D": V, "b_D": C}
LOGS = {"activation_function.log_jumprelu_threshold": np.log(T)}


def lm_saes(folder, weights, **config):
    norms = {"dataset_average_activation_norm.blocks.3.hook_resid_post": np.array(BEFORE)}
    norms["dataset_average_activation_norm.blocks.3.hook_mlp_out"] = np.array(AFTER)
    tensors(folder / "sae_weights.safetensors", weights | norms)
    about = {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_mlp_out", "d_model": D_IN}
    return text(folder / "config.json", {"sae_type": "sae", "expansion_factor": 3.75, **about, **config})


@pytest.mark.parametrize("act", ["jumprelu", "relu", "topk"])
@pytest.mark.parametrize("gated", [True, False])
def test_lm_saes_dictionaries_encode_as_defined(act, gated, tmp_path):
    weights = NEW | (LOGS if act == "jumprelu" else {})
    folder = lm_saes(tmp_path / "x", weights, act_fn=act, top_k=K, sparsity_include_decoder_norm=gated)
    sae = load_sae(folder, device="cpu")
    norm = NORM if gated else np.ones(D_SAE)
    pre = X.astype(np.float64) * S_IN @ W + B
    scaled = {"jumprelu": pre * (pre * norm > T), "relu": relu(pre), "topk": largest(relu(pre * norm))}[act]
    assert_close(features(sae), scaled)
    latents = scaled / norm if act == "topk" else scaled
    assert_close(decoded(sae, scaled), (latents @ V + C) / S_OUT, 1e-3)
    assert (sae.site, sae.reconstructs) == ("blocks.3.hook_resid_post", False)


def test_dictionaries_of_other_types_are_refused(tmp_path):
    folder = lm_saes(tmp_path / "x", NEW, sae_type="crosscoder")
    assert refused(RequestError, lambda: load_sae(folder)).endswith(
        "sae_type 'crosscoder' is not supported; only sae is"
    )
