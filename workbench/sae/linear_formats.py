"""Autoencoders of sparsify, dictionary_learning, OpenAI, Goodfire and Qwen Scope, in SAELens' settings and weights.

sparsify writes `cfg.json` and `sae.safetensors`. dictionary_learning writes `config.json` and `ae.pt`, a pickle, which
is not opened here; the same tensors saved as `ae.safetensors` are. The others publish one pickle a layer; converted to
safetensors, the names of its tensors tell whose it is. Every setting or tensor that changes a feature's activation is
converted or raises an error that names it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from workbench.io.errors import DataError, RequestError, shown
from workbench.io.tensors import open_safetensors
from workbench.sae.config import check_count
from workbench.sae.conversion import (
    AGAIN,
    Converted,
    check_axes,
    check_none_left,
    check_shape,
    check_shapes,
    converted,
    last_match,
    read_object,
    read_tensors,
    take,
    take_weights,
    tensor_names,
    whole,
)

SPARSIFY, DICTIONARY = "sae.safetensors", "ae.safetensors"

_SPARSIFY_TRAINING = {"expansion_factor", "normalize_decoder", "multi_topk", "lookup_max_order", "gram_table_hash"}
_SPARSIFY_REFUSED = ("signed", "embed_skip", "gram_lookup")
_SPARSIFY_PARTS = {
    "": ("hook_resid_post", "hook_resid_pre"),
    "mlp": ("hook_mlp_out", "mlp.hook_in"),
    "attn": ("hook_attn_out", None),
}
"""Part of the block that a folder is named after -> its output, which autoencoders read, and its input, which
transcoders read."""

_OPENAI_TRAINING = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_OPENAI_SITES = {
    "mlp_post_act": "blocks.{}.mlp.hook_post",
    "resid_delta_attn": "blocks.{}.hook_attn_out",
    "resid_post_attn": "blocks.{}.hook_resid_mid",
    "resid_delta_mlp": "blocks.{}.hook_mlp_out",
    "resid_post_mlp": "blocks.{}.hook_resid_post",
}
_GOODFIRE = {"encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias"}
_LINEARS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_OPENAI = {"pre_bias", "encoder.weight", "latent_bias", "decoder.weight"}
_QWEN = {"W_enc", "b_enc", "W_dec", "b_dec"}
_MATRICES = ("W_enc", "W_dec")


def sparsify(folder: Path) -> Converted:
    """Returns an autoencoder or transcoder of sparsify (EleutherAI).

    Raises:
        RequestError: Settings whose mathematics is not supported.
        DataError: Files that are damaged or do not fit, or an unknown setting.
    """
    source = folder / "cfg.json"
    config = read_object(source)
    for name in _SPARSIFY_REFUSED:
        if config.pop(name, False):
            raise RequestError(f"{source}: {name} changes the features and is not supported")
    if (activation := config.pop("activation", "topk")) != "topk":
        raise RequestError(f"{source}: activation {activation!r} is not supported; only topk is")
    transcode, skip = config.pop("transcode", False), config.pop("skip_connection", False)
    if skip and not transcode:
        raise RequestError(f"{source}: skip_connection is supported for transcoders only")
    tensors = read_tensors(folder / SPARSIFY)
    d_in, k, latents = (config.pop(name, None) for name in ("d_in", "k", "num_latents"))
    if unknown := sorted(config.keys() - _SPARSIFY_TRAINING):
        raise DataError(f"{source}: unknown sparsify setting {unknown[0]!r}, which may change the features")
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    weights = take_weights(tensors, names, folder / SPARSIFY, transposed=["W_enc"])
    tensors.pop("W_skip", None)  # part of a transcoder's output, which is not computed here
    check_none_left(tensors, folder / SPARSIFY)
    check_shape(source, weights["W_enc"], d_in, latents or None)
    run_config = folder.parent / "config.json"
    metadata: dict[str, Any] = {
        "model_name": read_object(run_config).get("model") if run_config.is_file() else None,
        "transcode": transcode or None,
    }
    if place := re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h)[._](\d+)(?:\.(mlp|self_attn|attn|attention))?", folder.name):
        part = _SPARSIFY_PARTS["attn" if place[2] and place[2] != "mlp" else place[2] or ""][bool(transcode)]
        metadata["hook_name"] = part and f"blocks.{place[1]}.{part}"
    settings = {"k": check_count(source, "k", k), "apply_b_dec_to_input": not transcode}
    return converted("topk", weights, settings, metadata)


def dictionary_learning(folder: Path) -> Converted:
    """Returns an autoencoder of dictionary_learning.

    Raises:
        RequestError: A class that is not supported.
        DataError: Files that are damaged or do not fit.
    """
    source, path = folder / "config.json", folder / DICTIONARY
    config = read_object(source)
    trainer, buffer = config.get("trainer"), config.get("buffer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise DataError(f"{source}: trainer has no dict_class")
    kind = trainer["dict_class"]
    if kind == "CrossCoder":
        return _crosscoder(source, path, trainer)
    if not isinstance(kind, str) or kind not in _DICTIONARIES:
        raise RequestError(
            f"{source}: dict_class {kind!r} is not supported; supported are {', '.join([*_DICTIONARIES, 'CrossCoder'])}"
        )
    architecture, names, subtracted, scaled = _DICTIONARIES[kind]
    tensors = read_tensors(path)
    of_linear = [name for name in ("W_enc", "W_dec") if names[name].endswith(".weight")]  # stored as (out, in)
    weights = take_weights(tensors, names, path, transposed=of_linear)
    settings: dict[str, Any] = {"apply_b_dec_to_input": subtracted}
    k = tensors.pop("k", None)
    if architecture == "topk":
        settings["k"] = check_count(source, "trainer.k", trainer.get("k"))
        if k is not None and (stored := whole(path, "k", k)) != settings["k"]:
            raise DataError(f"{source}: trainer.k is {settings['k']}, but {path.name} has k {stored}")
        tensors.pop("threshold", None)  # this class encodes by k
    if "threshold" in weights and weights["threshold"].ndim == 0:
        weights["threshold"] = weights["threshold"].expand(weights["W_enc"].shape[1]).clone()
    tensors.pop("group_sizes", None)  # for nested training losses; encoding uses all groups
    check_none_left(tensors, path)
    check_shape(source, weights["W_enc"], trainer.get("activation_dim"), trainer.get("dict_size"))
    norm = weights["W_dec"].norm(dim=1)
    if scaled and not torch.allclose(norm, torch.ones_like(norm)):
        for name in weights.keys() & {"W_enc", "b_enc", "b_gate", "b_mag", "threshold"}:
            weights[name] = weights[name] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    metadata: dict[str, Any] = {"model_name": trainer.get("lm_name"), "hook_name": None}
    if str(trainer.get("submodule_name")).startswith("resid_post") and isinstance(trainer.get("layer"), int):
        metadata["hook_name"] = f"blocks.{trainer['layer']}.hook_resid_post"
    if isinstance(buffer, dict) and isinstance(buffer.get("ctx_len"), int):
        metadata["context_size"] = buffer["ctx_len"]
    return converted(architecture, weights, settings, metadata)


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_dec": "decoder_bias",
    "b_gate": "gate_bias",
    "b_mag": "mag_bias",
    "r_mag": "r_mag",
}
_DICTIONARIES: dict[str, tuple[str, dict[str, str], bool, bool]] = {
    "AutoEncoder": ("standard", _LINEAR | {"b_dec": "bias"}, True, True),
    "AutoEncoderNew": ("standard", _LINEAR | {"b_dec": "decoder.bias"}, False, False),
    "GatedAutoEncoder": ("gated", _GATED, True, True),
    "JumpReluAutoEncoder": ("jumprelu", _PLAIN | {"threshold": "threshold"}, False, True),
    "AutoEncoderTopK": ("topk", _LINEAR | {"b_dec": "b_dec"}, True, False),
    "BatchTopKSAE": ("jumprelu", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, True, False),
    "MatryoshkaBatchTopKSAE": ("jumprelu", _PLAIN | {"threshold": "threshold"}, True, False),
}
"""dict_class -> (architecture, names of its tensors, whether b_dec is subtracted from the input, whether features are
multiplied by the norms of the decoder's rows, as the class or its `from_pretrained` does)."""


def _crosscoder(source: Path, path: Path, trainer: dict[str, Any]) -> Converted:
    """f = relu(Σ x_l W_l + b) over the layers, or models, that rows are read from: one encoder of all side by side."""
    tensors = {name.removeprefix("_orig_mod."): part for name, part in read_tensors(path).items()}
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
    weights = {name: take(tensors, stored, path) for name, stored in names.items()}
    check_none_left(tensors, path)
    for name in ("W_enc", "W_dec"):
        check_axes(path, names[name], weights[name], 3)
    if weights["W_dec"].shape != weights["W_enc"].transpose(1, 2).shape:
        shapes = [tuple(weights[name].shape) for name in ("W_dec", "W_enc")]
        raise DataError(f"{path}: decoder.weight {shapes[0]} does not fit encoder.weight {shapes[1]}; {AGAIN}")
    sites, width, features = weights["W_enc"].shape
    check_shape(source, weights["W_enc"][0], trainer.get("activation_dim"), trainer.get("dict_size"))
    weights["W_enc"] = weights["W_enc"].reshape(sites * width, features)
    weights["W_dec"] = weights["W_dec"].transpose(0, 1).reshape(features, sites * width).contiguous()
    weights["b_dec"] = weights["b_dec"].flatten()
    check_shapes(path, weights, names)
    metadata = {"model_name": trainer.get("lm_name"), "n_sites": sites}
    return converted("standard", weights, {"apply_b_dec_to_input": False}, metadata)


def of_tensors(path: Path) -> bool:
    """Returns True if the names of a file's tensors, and its own name, are those of OpenAI, Goodfire or Qwen Scope."""
    names = tensor_names(path)
    if names >= _OPENAI or names == _GOODFIRE:
        return True
    return (names == _LINEARS and _layer_of(path) is not None) or (names == _QWEN and _qwen_layer(path) is not None)


def tensor_file(path: Path) -> Converted:
    """Returns the autoencoder in one safetensors file, for which `of_tensors` is True.

    Raises:
        RequestError: Settings that are not in the files, or whose mathematics is not supported.
        DataError: A damaged file.
    """
    names = tensor_names(path)
    if names >= _OPENAI:
        return _openai(path)
    return _qwen(path) if names == _QWEN else _goodfire(path)


def _openai(path: Path) -> Converted:
    """f = TopK(relu) or relu of encoder(LN(x) - pre_bias) + latent_bias; LN for TopK alone."""
    tensors = read_tensors(path)
    with open_safetensors(path, AGAIN) as file:
        about = file.metadata() or {}
    names = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
    weights = take_weights(tensors, names, path, transposed=_MATRICES)
    k = tensors.pop("k", None)
    k = None if k is None else whole(path, "k", k)
    for name in _OPENAI_TRAINING:
        tensors.pop(name, None)
    check_none_left(tensors, path)
    release = last_match(r"^(mlp_post_act|resid_(?:delta|post)_(?:attn|mlp))(_v\d+(?:_\d+k)?)?$", path.parent)
    k = 32 if k is None and release and str(release[2]).startswith("_v5") else k
    if k is None and "activation" not in about and "from" not in about and not release:
        raise RequestError(f"{path} does not record its activation function; convert the .pt file again")
    activation = about.get("activation", "ReLU" if k is None else "TopK")
    if activation not in ("ReLU", "TopK") or about.get("postact_fn", "ReLU") != "ReLU":
        wrong = about.get("postact_fn") if activation == "TopK" else activation
        raise RequestError(f"{path}: activation {shown(wrong)} is not supported; supported are TopK of ReLU, and ReLU")
    metadata: dict[str, Any] = {}
    if release and path.stem.isdecimal():
        metadata = {"model_name": "gpt2-small", "hook_name": _OPENAI_SITES[release[1]].format(path.stem)}
    settings: dict[str, Any] = {"apply_b_dec_to_input": True}
    if activation == "ReLU":
        return converted("standard", weights, settings, metadata)
    settings |= {"k": check_count(path, "k", k), "normalize_activations": "layer_norm"}
    return converted("topk", weights, settings, metadata)


def _goodfire(path: Path) -> Converted:
    """f = relu(encoder(x)); b_dec is not subtracted."""
    tensors = read_tensors(path)
    suffix = "_linear" if "encoder_linear.weight" in tensors else ""
    encoder, decoder = f"encoder{suffix}", f"decoder{suffix}"
    names = {
        "W_enc": f"{encoder}.weight",
        "b_enc": f"{encoder}.bias",
        "W_dec": f"{decoder}.weight",
        "b_dec": f"{decoder}.bias",
    }
    weights = take_weights(tensors, names, path, transposed=_MATRICES)
    metadata: dict[str, Any] = {}
    if layer := _layer_of(path):
        metadata = {"model_name": layer[1], "hook_name": f"blocks.{layer[2]}.hook_resid_post"}
    return converted("standard", weights, {"apply_b_dec_to_input": False}, metadata)


def _qwen(path: Path) -> Converted:
    """f = the k largest of x W_encᵀ + b_enc; b_dec is not subtracted."""
    tensors = read_tensors(path)
    release = last_match(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", path.parent)
    if release is None:
        raise RequestError(f"{path} does not record k; give its folder the release's name, SAE-Res-MODEL-WnnK-L0_k")
    weights = take_weights(tensors, {name: name for name in _QWEN}, path, transposed=_MATRICES)
    settings = {"k": check_count(path, "k", int(release[2])), "apply_b_dec_to_input": False}
    metadata = {
        "model_name": f"Qwen/{release[1]}",
        "hook_name": f"blocks.{_qwen_layer(path)}.hook_resid_post",
        "keeps_negative": True,
    }
    return converted("topk", weights, settings, metadata)


def _layer_of(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"(.+)-SAE-l(\d+)", path.stem)


def _qwen_layer(path: Path) -> int | None:
    match = re.fullmatch(r"layer(\d+)\.sae", path.stem)
    return int(match[1]) if match else None
