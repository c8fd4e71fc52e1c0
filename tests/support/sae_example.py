"""Small random autoencoders of every SAELens architecture, saved as SAELens saves them, and what they compute."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np

ARCHITECTURES = ("standard", "gated", "topk", "abstopk", "jumprelu", "batchtopk", "matching_pursuit")
ABOUT = (
    "hook_name",
    "model_name",
    "context_size",
    "prepend_bos",
    "hook_head_index",
    "seqpos_slice",
    "exclude_special_tokens",
    "model_from_pretrained_kwargs",
)
"""Settings that SAELens keeps in `metadata`."""


def save_sae(
    folder: Path, architecture: str = "standard", d_in: int = 8, d_sae: int = 20, seed: int = 0, **settings
) -> Path:
    """An autoencoder whose every parameter is random; `settings`: fields of its config, `hook_name` and the like go to
    its metadata."""
    import torch
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    about = {name: settings.pop(name) for name in ABOUT if name in settings}
    if architecture in ("topk", "abstopk", "batchtopk"):
        settings.setdefault("k", 3)
    if architecture == "temporal":
        settings = {"n_heads": 2, "bottleneck_factor": 5, "kval_topk": 3} | settings
    kind, config = (get_sae_training_class if architecture == "batchtopk" else get_sae_class)(architecture)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of model_from_pretrained_kwargs
        torch.manual_seed(seed)
        sae = kind(config(d_in=d_in, d_sae=d_sae, metadata=SAEMetadata(**about), **settings))
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if name == "r_mag" else 1))
            if name == "threshold":
                parameter.abs_()
        if architecture == "batchtopk":
            sae.topk_threshold.fill_(1.5)
    (sae.save_inference_model if architecture == "batchtopk" else sae.save_model)(folder)
    return folder


def set_weights(folder: Path, **weights: np.ndarray) -> Path:
    """Replaces some of the weights of a saved autoencoder."""
    from safetensors.numpy import load_file, save_file

    path = folder / "sae_weights.safetensors"
    new = {name: part.astype(np.float32, order="C") for name, part in weights.items()}  # saved as they lie in memory
    save_file({**load_file(path), **new}, path)
    return folder


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes) -> Path:
    """Changes and removes keys of a saved autoencoder's cfg.json."""
    config = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))
    return folder


def encode64(folder: Path, x: np.ndarray) -> np.ndarray:
    """Returns the activations of a saved autoencoder for `x` (row, d_in), in float64 NumPy, from its files alone."""
    from safetensors.numpy import load_file

    weights = {name: part.astype(np.float64) for name, part in load_file(folder / "sae_weights.safetensors").items()}
    config = json.loads((folder / "cfg.json").read_text())
    x = x.astype(np.float64)
    if config["normalize_activations"] == "layer_norm":
        x = x - x.mean(1, keepdims=True)
        x = x / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    if config["apply_b_dec_to_input"]:
        x = x - weights["b_dec"]
    if config["architecture"] == "matching_pursuit":
        return np.array([_pursued(row, weights["W_dec"], config) for row in x])
    if config["architecture"] == "gated":
        gate = x @ weights["W_enc"] + weights["b_gate"] > 0
        return gate * np.maximum(x @ (weights["W_enc"] * np.exp(weights["r_mag"])) + weights["b_mag"], 0)
    pre = x @ weights["W_enc"] + weights["b_enc"]
    if config.get("rescale_acts_by_decoder_norm"):
        pre = pre * np.linalg.norm(weights["W_dec"], axis=1)
    if config["architecture"] in ("topk", "abstopk"):
        rank = -np.abs(pre) if config["architecture"] == "abstopk" else -pre
        mask = np.argsort(np.argsort(rank, axis=1), axis=1) < config["k"]
        return np.where(mask, pre if config["architecture"] == "abstopk" else np.maximum(pre, 0), 0)
    return np.maximum(pre, 0) * (pre > weights.get("threshold", 0))


def _pursued(residual: np.ndarray, directions: np.ndarray, config: dict) -> np.ndarray:
    """One row's matching pursuit: the direction that explains most of what is left, until too little is, or the support
    stays."""
    activations = np.zeros(len(directions))
    for _ in range(config["max_iterations"] or len(residual)):
        before = activations != 0
        best = np.argmax(directions @ residual)
        step = max(0.0, directions[best] @ residual)
        activations[best] += step
        residual = residual - step * directions[best]
        if config["stop_on_duplicate_support"] and np.array_equal(before, activations != 0):
            break
        if config["residual_threshold"] > 0 and np.linalg.norm(residual) < config["residual_threshold"]:
            break
    return activations
