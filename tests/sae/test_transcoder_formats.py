"""Transcoders of circuit-tracer: what their own definition gives, computed in float64 NumPy."""

import numpy as np
import pytest
from formats_example import (
    D_IN,
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
    tensors,
    text,
)
from refusals import refused

from workbench.io.errors import DataError, RequestError
from workbench.sae.load import load_sae

CONFIG = "model_name: google/gemma-2-2b\nmodel_kind: {}\nfeature_input_hook: {}\nfeature_output_hook: hook_mlp_out\n"
MLP = CONFIG.format("transcoder_set", "mlp.hook_in")
LAYER = {"W_enc": W.T, "b_enc": B, "W_dec": V, "b_dec": C}
SKIP = np.random.default_rng(3).normal(size=(D_IN, D_IN))


def folder_of(path, weights, config=MLP, layer=3):
    tensors(path / f"layer_{layer}.safetensors", weights)
    return text(path / "config.yaml", config)


@pytest.mark.parametrize(
    ("extra", "config", "expected"),
    [
        ({}, "", relu),
        ({"activation_function.threshold": T}, "", lambda pre: jump(pre, T)),
        ({"W_skip": SKIP}, "activation: relu\n", relu),
        ({"activation_function.threshold": T, "W_skip": SKIP}, "", lambda pre: jump(pre, T)),
        ({}, f"activation: topk\nk: {K}\n", lambda pre: largest(relu(pre))),
        ({"k": np.array(K)}, "", lambda pre: largest(relu(pre))),
    ],
)
def test_transcoders_of_one_layer_encode_as_defined(extra, config, expected, tmp_path):
    folder = folder_of(tmp_path / "plt", {**LAYER, **extra}, MLP + config)
    sae = load_sae(folder, "layer_3", device="cpu")
    latents = expected(X.astype(np.float64) @ W + B)
    assert_close(features(sae), latents)
    assert (sae.site, sae.model_name, sae.reconstructs) == ("blocks.3.mlp.hook_in", "google/gemma-2-2b", False)
    assert sae.name == "plt/layer_3"
    if "W_skip" not in extra:
        assert_close(decoded(sae, latents), latents @ V + C, 1e-3)
    assert load_sae(folder / "layer_3.safetensors", device="cpu").fingerprint() == sae.fingerprint()


def test_files_that_a_config_lists_are_layers_in_order(tmp_path):
    tensors(tmp_path / "a_7.safetensors", LAYER)
    base = CONFIG.format("transcoder_set", "ln2.hook_normalized")
    text(tmp_path / "config.yaml", base + "transcoders:\n- layer_9.safetensors\n- layer_4.safetensors\n")
    for layer in (4, 9):
        tensors(tmp_path / f"layer_{layer}.safetensors", LAYER)
    assert load_sae(tmp_path, "layer_4", device="cpu").site == "blocks.1.ln2.hook_normalized"
    text(tmp_path / "config.yaml", base + "transcoders:\n- hf://google/x/params.npz\n")
    assert refused(RequestError, lambda: load_sae(tmp_path, "layer_4")) == (
        f"{tmp_path / 'config.yaml'} lists 'hf://google/x/params.npz', which is not in the folder; download the files "
        "and list their names there"
    )


def test_one_layer_of_a_cross_layer_transcoder_encodes_as_defined(tmp_path):
    encoder = {"W_enc_2": W.T, "b_enc_2": B, "b_dec_2": C, "threshold_2": T}
    tensors(tmp_path / "clt" / "W_enc_2.safetensors", encoder)
    text(tmp_path / "clt" / "config.yaml", CONFIG.format("cross_layer_transcoder", "hook_resid_mid"))
    sae = load_sae(tmp_path / "clt", "W_enc_2", device="cpu")
    assert_close(features(sae), jump(X.astype(np.float64) @ W + B, T))
    assert (sae.site, sae.reconstructs) == ("blocks.2.hook_resid_mid", False)


def test_files_that_do_not_fit_are_refused(tmp_path):
    def message(kind, weights=LAYER, config=MLP):
        folder = folder_of(tmp_path / "x", weights, config)
        return refused(kind, lambda: load_sae(folder, "layer_3")).removeprefix(str(folder))

    assert message(DataError, LAYER | {"more": C}).endswith("unknown tensor 'more', which may change the features")
    assert message(RequestError, LAYER | {"threshold": T - 1}).endswith(
        "so their features can be negative, which is not supported"
    )
    assert message(DataError, LAYER, "activation: jump_relu").startswith(
        "/layer_3.safetensors has no thresholds, but con"
    )
    assert message(RequestError, LAYER, "activation: gelu") == "/config.yaml: activation 'gelu' is not supported"
    assert message(RequestError, LAYER, "model_kind: lorsa") == "/config.yaml: model_kind 'lorsa' is not supported"
    assert message(DataError, LAYER, "activation: [").startswith("/config.yaml is not YAML (")
    assert message(DataError, LAYER, "- a").startswith("/config.yaml: expected an object, found ['a']")
    assert message(DataError, LAYER, "activation: topk").endswith("k is None, expected a whole number above 0")


def test_tensors_of_other_shapes_are_refused_by_name(tmp_path):
    """Before any arithmetic, which would broadcast them or fail in words of torch."""
    for name, part, message in (
        ("W_enc", B, "W_enc has the shape (30,), expected two axes"),
        ("b_enc", np.array(1.0), "b_enc is read as (), expected (30,) for 30 features that write rows of width 8"),
        ("threshold", T[1:], "threshold is read as (29,), expected (30,) for 30 features that write rows of width 8"),
        ("k", np.array([3, 4]), "k has the shape (2,), expected one finite number"),
        ("k", np.array(np.nan), "k has the value nan, expected one finite number"),
        ("k", np.array(2.5), "k is 2.5, expected a whole number above 0"),
    ):
        folder = folder_of(tmp_path / "plt", {**LAYER, name: part})
        text = refused(DataError, lambda folder=folder: load_sae(folder, "layer_3"))
        assert text.startswith(f"{folder / 'layer_3.safetensors'}: {message}")
    path = tmp_path / "clt" / "W_enc_2.safetensors"
    for encoder, message in (
        ({"W_enc_2": B, "b_enc_2": B}, "W_enc_2 has the shape (30,), expected two axes"),
        ({"W_enc_2": W.T, "b_enc_2": C}, "b_enc_2 is read as (8,), expected (30,) for 30 features"),
    ):
        tensors(path, encoder)
        assert refused(DataError, lambda: load_sae(path)).startswith(f"{path}: {message}")
