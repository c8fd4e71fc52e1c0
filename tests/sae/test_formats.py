"""Autoencoders of sparsify and dictionary_learning: what their own definition gives, computed in float64 NumPy."""

import json

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.numpy import save_file
from scipy.sparse import csr_array

from workbench.io.errors import DataError, RequestError
from workbench.sae.encode import encoder
from workbench.sae.load import load_sae

D_IN, D_SAE, K = 8, 30, 4
X = np.random.default_rng(0).normal(size=(40, D_IN)).astype(np.float32) + 0.5
R = np.random.default_rng(1)
W, V = R.normal(size=(D_IN, D_SAE)), R.normal(size=(D_SAE, D_IN))
B, C, T, G, M = R.normal(size=D_SAE), R.normal(size=D_IN), np.abs(R.normal(size=D_SAE)), *R.normal(size=(2, D_SAE))
MAG = R.normal(size=D_SAE) / 5


def relu(x):
    return np.maximum(x, 0)


def largest(x):
    return np.where((-x).argsort(1).argsort(1) < K, x, 0)


def written(folder, config: dict, weights: dict, name: str, file: str):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    save_file({key: np.array(part, np.float32, order="C") for key, part in weights.items()}, folder / file)
    return folder


def dictionary(folder, dict_class: str, weights: dict, **trainer):
    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "gpt2", **trainer}
    return written(folder, {"trainer": trainer, "buffer": {}}, weights, "config.json", "ae.safetensors")


def sparsify(folder, weights: dict | None = None, **config):
    weights = weights or {"encoder.weight": W.T, "encoder.bias": B, "W_dec": V, "b_dec": C}
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": K, "d_in": D_IN, **config}
    return written(folder, config, weights, "cfg.json", "sae.safetensors")


LINEAR = {"encoder.weight": W.T, "encoder.bias": B, "decoder.weight": V.T}
NORM = np.linalg.norm(V, axis=1)
CASES = {
    "AutoEncoder": ({**LINEAR, "bias": C}, lambda: relu((X - C) @ W + B)),
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


def features(sae) -> np.ndarray:
    rows = encoder(sae)(torch.from_numpy(X))
    parts = (part.numpy() for part in (rows.value, rows.feature, rows.indptr))
    return csr_array(tuple(parts), shape=(len(X), D_SAE)).toarray()


@pytest.mark.parametrize("kind", CASES)
def test_dictionary_learning_saes_encode_as_defined(kind, tmp_path):
    weights, expected = CASES[kind]
    folder = dictionary(tmp_path / "ae", kind, weights, k=K, layer=3, submodule_name="resid_post_layer_3")
    sae = load_sae(folder, device="cpu")
    np.testing.assert_allclose(features(sae), expected(), rtol=1e-4, atol=1e-4)
    assert (sae.site, sae.model_name) == ("blocks.3.hook_resid_post", "gpt2")
    scale = NORM if kind in ("GatedAutoEncoder", "JumpReluAutoEncoder") else 1
    decoded = sae.decode(torch.from_numpy(expected().astype(np.float32))).numpy()
    np.testing.assert_allclose(decoded, expected() / scale @ V + C, rtol=1e-3, atol=1e-3)
    assert load_sae(tmp_path, "ae", device="cpu").fingerprint() == sae.fingerprint()


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_saes_encode_as_defined(transcode, tmp_path):
    written(tmp_path, {"model": "gpt2"}, {"x": C}, "config.json", "unrelated")
    sae = load_sae(sparsify(tmp_path / "h.5", transcode=transcode), device="cpu")
    np.testing.assert_allclose(features(sae), largest(relu((X - C * (not transcode)) @ W + B)), rtol=1e-4, atol=1e-4)
    assert (sae.site, sae.model_name) == (None if transcode else "blocks.5.hook_resid_post", "gpt2")
    assert sae.reconstructs is not transcode


def test_a_pickle_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "ae.pt").write_bytes(b"anything")
    assert refused(RequestError, lambda: load_sae(tmp_path)) == (
        f"SAE {str(tmp_path)!r} contains ae.pt, a pickle, which can run code and is not opened; if you trust it: "
        "safetensors.torch.save_file(torch.load('ae.pt', weights_only=True), 'ae.safetensors')"
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

    assert text(RequestError, "CrossCoder").startswith("/config.json: dict_class 'CrossCoder' is not supported; supp")
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
