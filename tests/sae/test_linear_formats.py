"""Autoencoders of sparsify and dictionary_learning: what their own definition gives, computed in float64 NumPy."""

import numpy as np
import pytest
import torch
from formats_example import (
    D_IN,
    D_SAE,
    MAG,
    NORM,
    B,
    C,
    G,
    K,
    M,
    T,
    V,
    W,
    X,
    assert_close,
    decoded,
    features,
    largest,
    relu,
    single,
    tensors,
    text,
)
from refusals import refused
from safetensors.numpy import save_file

from workbench.io.errors import DataError, RequestError
from workbench.sae.load import load_sae


def written(folder, config: dict, weights: dict, name: str, file: str):
    tensors(folder / file, weights)
    return text(folder / name, config)


def dictionary(folder, dict_class: str, weights: dict, **trainer):
    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "gpt2", **trainer}
    return written(folder, {"trainer": trainer, "buffer": {}}, weights, "config.json", "ae.safetensors")


SPARSIFY = {"encoder.weight": W.T, "encoder.bias": B, "W_dec": V, "b_dec": C}


def sparsify(folder, weights: dict | None = None, **config):
    weights = weights or SPARSIFY
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": K, "d_in": D_IN, **config}
    return written(folder, config, weights, "cfg.json", "sae.safetensors")


LINEAR = {"encoder.weight": W.T, "encoder.bias": B, "decoder.weight": V.T}
CASES = {
    "AutoEncoder": ({**LINEAR, "bias": C}, lambda: relu((X - C) @ W + B) * NORM),
    "AutoEncoderNew": ({**LINEAR, "decoder.bias": C}, lambda: relu(X @ W + B)),
    "GatedAutoEncoder": (
        {
            "encoder.weight": W.T,
            "decoder.weight": V.T,
            "decoder_bias": C,
            "gate_bias": G,
            "mag_bias": M,
            "r_mag": MAG,
        },
        lambda: ((X - C) @ W + G > 0) * relu(np.exp(MAG) * ((X - C) @ W) + M) * NORM,
    ),
    "JumpReluAutoEncoder": (
        {"W_enc": W, "b_enc": B, "W_dec": V, "b_dec": C, "threshold": T},
        lambda: relu((X @ W + B) * (X @ W + B > T)) * NORM,
    ),
    "AutoEncoderTopK": (
        {**LINEAR, "b_dec": C, "k": np.array(K), "threshold": np.array(2.0)},
        lambda: largest(relu((X - C) @ W + B)),
    ),
    "BatchTopKSAE": (
        {**LINEAR, "b_dec": C, "k": np.array(K), "threshold": np.array(2.0)},
        lambda: relu((X - C) @ W + B) * ((X - C) @ W + B > 2),
    ),
    "MatryoshkaBatchTopKSAE": (
        {
            "W_enc": W,
            "b_enc": B,
            "W_dec": V,
            "b_dec": C,
            "k": np.array(K),
            "threshold": np.array(2.0),
            "group_sizes": np.array([10, 20]),
        },
        lambda: relu((X - C) @ W + B) * ((X - C) @ W + B > 2),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_dictionary_learning_saes_encode_as_defined(kind, tmp_path):
    weights, expected = CASES[kind]
    folder = dictionary(tmp_path / "ae", kind, weights, k=K, layer=3, submodule_name="resid_post_layer_3")
    sae = load_sae(folder, device="cpu")
    np.testing.assert_allclose(features(sae), expected(), rtol=1e-4, atol=1e-4)
    assert (sae.site, sae.model_name) == ("blocks.3.hook_resid_post", "gpt2")
    scale = NORM if kind in ("AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder") else 1
    decoded = sae.decode(torch.from_numpy(expected().astype(np.float32))).numpy()
    np.testing.assert_allclose(decoded, expected() / scale @ V + C, rtol=1e-3, atol=1e-3)
    assert load_sae(tmp_path, "ae", device="cpu").fingerprint() == sae.fingerprint()


@pytest.mark.parametrize(
    ("folder", "transcode", "site"),
    [
        ("h.5", False, "hook_resid_post"),
        ("layers.5.mlp", False, "hook_mlp_out"),
        ("model.layers.5.self_attn", False, "hook_attn_out"),
        ("layers.5", True, "hook_resid_pre"),
        ("layers.5.mlp", True, "mlp.hook_in"),
    ],
)
def test_sparsify_saes_encode_as_defined(folder, transcode, site, tmp_path):
    written(tmp_path, {"model": "gpt2"}, {"x": C}, "config.json", "unrelated")
    sae = load_sae(sparsify(tmp_path / folder, transcode=transcode), device="cpu")
    assert_close(features(sae), largest(relu((X - C * (not transcode)) @ W + B)))
    assert (sae.site, sae.model_name) == (f"blocks.5.{site}", "gpt2")
    assert sae.reconstructs is not transcode


def layer_normed(x):
    x = x - x.mean(1, keepdims=True)
    return x / (x.std(1, ddof=1, keepdims=True) + 1e-5)


OPENAI = {"pre_bias": C, "encoder.weight": W.T, "latent_bias": B, "decoder.weight": V.T, "stats_last_nonzero": B}
PLACE = "gpt2-small/resid_delta_mlp_v5_32k/autoencoders"


def openai(folder, name="6.safetensors", metadata=None, **more):
    return tensors(folder / name, {**OPENAI, **more}, metadata)


@pytest.mark.parametrize("metadata", [{"activation": "TopK", "postact_fn": "ReLU"}, None])
def test_openai_topk_saes_encode_as_defined(metadata, tmp_path):
    """Rows are normalised; latents are those of the k largest; the reconstruction has the row's mean and spread."""
    path = openai(tmp_path / PLACE, k=np.array(K), metadata=metadata)
    sae = load_sae(path, device="cpu")
    latents = largest(relu((layer_normed(X.astype(np.float64)) - C) @ W + B))
    assert_close(features(sae), latents)
    assert_close(
        decoded(sae, latents), (latents @ V + C) * X.std(1, ddof=1, keepdims=True) + X.mean(1, keepdims=True), 1e-3
    )
    assert (sae.site, sae.model_name) == ("blocks.6.hook_mlp_out", "gpt2-small")
    assert sae.name == "autoencoders/6"


def test_openai_relu_saes_read_rows_as_they_are(tmp_path):
    sae = load_sae(openai(tmp_path, metadata={"from": "6.pt"}), device="cpu")
    assert_close(features(sae), relu((X - C) @ W + B))
    assert sae.site is None


def test_openai_files_that_lost_their_activation_are_refused(tmp_path):
    assert refused(RequestError, lambda: load_sae(openai(tmp_path))).endswith(
        "6.safetensors does not record its activation function; convert the .pt file again"
    )
    wrong = openai(tmp_path, "7.safetensors", {"activation": "TopK", "postact_fn": "Identity"}, k=np.array(3))
    assert refused(RequestError, lambda: load_sae(wrong)).endswith(
        "activation 'Identity' is not supported; supported are TopK of ReLU, and ReLU"
    )


@pytest.mark.parametrize("suffix", ["_linear", ""])
def test_goodfire_saes_encode_as_defined(suffix, tmp_path):
    weights = {f"encoder{suffix}.weight": W.T, f"encoder{suffix}.bias": B}
    weights |= {f"decoder{suffix}.weight": V.T, f"decoder{suffix}.bias": C}
    tensors(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.safetensors", weights)
    sae = load_sae(tmp_path, "Llama-3.1-8B-Instruct-SAE-l19", device="cpu")
    assert_close(features(sae), relu(X @ W + B))
    assert_close(decoded(sae, relu(X @ W + B)), relu(X @ W + B) @ V + C, 1e-3)
    assert (sae.site, sae.model_name) == ("blocks.19.hook_resid_post", "Llama-3.1-8B-Instruct")


def test_qwen_scope_saes_encode_as_defined(tmp_path):
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4"
    path = tensors(folder / "layer7.sae.safetensors", {"W_enc": W.T, "b_enc": B + 9, "W_dec": V.T, "b_dec": C})
    sae = load_sae(folder, "layer7", device="cpu")
    pre = X @ W + B + 9  # all of the 4 largest are above 0
    assert_close(features(sae), largest(pre))
    assert_close(decoded(sae, largest(pre)), largest(pre) @ V + C, 1e-3)
    assert (sae.site, sae.model_name) == ("blocks.7.hook_resid_post", "Qwen/Qwen3-1.7B-Base")
    moved = path.rename(tmp_path / path.name)
    assert refused(RequestError, lambda: load_sae(moved)) == (
        f"{moved} does not record k; give its folder the release's name, SAE-Res-MODEL-WnnK-L0_k"
    )


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (RequestError, {"signed": True}, "signed changes the features and is not supported"),
        (RequestError, {"gram_lookup": True}, "gram_lookup changes the features and is not supported"),
        (RequestError, {"activation": "groupmax"}, "activation 'groupmax' is not supported; only topk is"),
        (RequestError, {"skip_connection": True}, "skip_connection is supported for transcoders only"),
        (DataError, {"warp": 3}, "unknown sparsify setting 'warp', which may change the features"),
        (DataError, {"k": None}, "k is None, expected a whole number above 0"),
    ],
)
def test_sparsify_settings_are_applied_or_refused(kind, config, message, tmp_path):
    text = refused(kind, lambda: load_sae(sparsify(tmp_path / "x", **config), device="cpu"))
    assert text.startswith(f"{tmp_path / 'x' / 'cfg.json'}: {message}")


def test_files_that_do_not_fit_are_refused(tmp_path):
    weights = CASES["AutoEncoderTopK"][0]

    def text(kind=DataError, dict_class="AutoEncoderTopK", weights=weights, **trainer):
        folder = dictionary(tmp_path / "x", dict_class, weights, **{"k": K, **trainer})
        return refused(kind, lambda: load_sae(folder, device="cpu")).removeprefix(str(folder))

    assert text(RequestError, "CrossCoder2").startswith("/config.json: dict_class 'CrossCoder2' is not supported; supp")
    assert text(k=5) == "/config.json: trainer.k is 5, but ae.safetensors has k 4"
    assert text(dict_size=31) == "/config.json declares 31 features, but the weights have 30"
    assert (
        text(weights={**weights, "more": C}) == "/ae.safetensors: unknown tensor 'more', which may change the features"
    )
    few = {name: part for name, part in weights.items() if name != "b_dec"}
    assert text(weights=few).startswith("/ae.safetensors has no tensor 'b_dec'; it contains k, threshold")
    (tmp_path / "x" / "ae.safetensors").write_bytes(b"short")
    assert refused(DataError, lambda: load_sae(tmp_path / "x")).startswith(
        f"{tmp_path / 'x' / 'ae.safetensors'} is damaged"
    )


@pytest.mark.parametrize(
    ("kind", "name", "part", "message"),
    [
        ("AutoEncoder", "encoder.weight", W.T[None], "encoder.weight has the shape (1, 30, 8), expected two axes"),
        (
            "AutoEncoder",
            "decoder.weight",
            V,
            "decoder.weight is read as (8, 30), expected (30, 30) for 30 features",
        ),
        ("AutoEncoderTopK", "encoder.weight", B, "encoder.weight has the shape (30,), expected two axes"),
        ("AutoEncoderTopK", "k", np.array([4, 4]), "k has the shape (2,), expected one finite number"),
        ("AutoEncoderTopK", "k", np.array(np.nan), "k has the value nan, expected one finite number"),
        ("GatedAutoEncoder", "gate_bias", np.array(1.0), "gate_bias is read as (), expected (30,) for 30 features"),
        ("GatedAutoEncoder", "mag_bias", M[1:], "mag_bias is read as (29,), expected (30,) for 30 features"),
        ("JumpReluAutoEncoder", "W_dec", V[1:], "W_dec is read as (29, 8), expected (30, 8) for 30 features"),
        ("JumpReluAutoEncoder", "b_enc", np.array(0.0), "b_enc is read as (), expected (30,) for 30 features"),
        ("JumpReluAutoEncoder", "threshold", T[1:], "threshold is read as (29,), expected (30,) for 30 features"),
        ("MatryoshkaBatchTopKSAE", "b_dec", C[1:], "b_dec is read as (7,), expected (8,) for 30 features"),
    ],
)
def test_weights_of_other_shapes_are_refused_by_their_names_in_the_file(kind, name, part, message, tmp_path):
    """Before any arithmetic, which would broadcast them or fail in words of torch."""
    folder = dictionary(tmp_path / "x", kind, {**CASES[kind][0], name: part}, k=K)
    text = refused(DataError, lambda: load_sae(folder, device="cpu"))
    assert text.startswith(f"{folder / 'ae.safetensors'}: {message}")


def goodfire(folder, weights):
    return tensors(folder / "m-SAE-l7.safetensors", weights)


def openai_topk(folder, weights):
    return tensors(folder / "7.safetensors", weights, {"activation": "TopK"})


@pytest.mark.parametrize(
    ("write", "weights", "name", "part"),
    [
        (sparsify, SPARSIFY, "encoder.weight", B),
        (openai_topk, {**OPENAI, "k": np.array(K)}, "encoder.weight", B),
        (openai_topk, {**OPENAI, "k": np.array(K)}, "k", np.array(np.inf)),
        (goodfire, {**LINEAR, "decoder.bias": C}, "decoder.weight", V.T[None]),
    ],
)
def test_every_format_of_linear_layers_refuses_other_shapes(write, weights, name, part, tmp_path):
    load_sae(write(tmp_path / "x", weights), device="cpu")
    damaged = write(tmp_path / "x", {**weights, name: part})
    assert f": {name} has the " in refused(DataError, lambda: load_sae(damaged, device="cpu"))


def test_complex_weights_are_refused(tmp_path):
    """Their imaginary part would be dropped."""
    folder = sparsify(tmp_path / "x")
    save_file({**single(SPARSIFY), "b_dec": (C + 1j).astype(np.complex64)}, folder / "sae.safetensors")
    assert refused(DataError, lambda: load_sae(folder)) == (
        f"{folder / 'sae.safetensors'}: b_dec has complex numbers, expected real ones; save or download the SAE again"
    )
