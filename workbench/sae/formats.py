"""Conversion of SAEs saved by sparsify and dictionary_learning to SAELens' settings and weights.

sparsify writes `cfg.json` and `sae.safetensors`. dictionary_learning writes `config.json` and `ae.pt`, a pickle, which
is not opened here; the same tensors saved as `ae.safetensors` are. Every setting or tensor that changes a feature's
activation is converted or raises an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.io.errors import DataError, RequestError
from workbench.io.parse import read_json
from workbench.io.tensors import open_safetensors
from workbench.sae.config import check_count

AGAIN = "save or download the SAE again"
"""Advice in errors about damaged files."""

Converted = tuple[dict[str, Any], dict[str, Tensor]]
"""Settings as in SAELens' `cfg.json`, and tensors under SAELens' names."""

_SPARSIFY, _PICKLE, _DICTIONARY = "sae.safetensors", "ae.pt", "ae.safetensors"
_SPARSIFY_TRAINING = {"expansion_factor", "normalize_decoder", "multi_topk", "lookup_max_order", "gram_table_hash"}
_SPARSIFY_REFUSED = ("signed", "embed_skip", "gram_lookup")


def converter(folder: Path) -> Callable[[], Converted] | None:
    """Returns the function that reads the directory, None if neither library wrote it; RequestError for a pickle."""
    if (folder / _SPARSIFY).is_file():
        return lambda: _sparsify(folder)
    if (folder / _DICTIONARY).is_file():
        return lambda: _dictionary_learning(folder)
    if (folder / _PICKLE).is_file():
        raise RequestError(
            f"SAE {str(folder)!r} contains {_PICKLE}, a pickle, which can run code and is not opened; if you trust it: "
            f"safetensors.torch.save_file(torch.load({_PICKLE!r}, weights_only=True), {_DICTIONARY!r})"
        )
    return None


def _sparsify(folder: Path) -> Converted:
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
    tensors = _tensors(folder / _SPARSIFY)
    d_in, k, latents = (config.pop(name, None) for name in ("d_in", "k", "num_latents"))
    if unknown := sorted(config.keys() - _SPARSIFY_TRAINING):
        raise DataError(f"{source}: unknown sparsify setting {unknown[0]!r}, which may change the features")
    weights = {
        "W_enc": _take(tensors, "encoder.weight", folder / _SPARSIFY).T.contiguous(),
        "b_enc": _take(tensors, "encoder.bias", folder / _SPARSIFY),
        "W_dec": _take(tensors, "W_dec", folder / _SPARSIFY),
        "b_dec": _take(tensors, "b_dec", folder / _SPARSIFY),
    }
    tensors.pop("W_skip", None)  # part of a transcoder's output, which is not computed here
    _check_none_left(tensors, folder / _SPARSIFY)
    _check_shape(source, weights["W_enc"], d_in, latents or None)
    run_config = folder.parent / "config.json"
    metadata: dict[str, Any] = {
        "model_name": read_object(run_config).get("model") if run_config.is_file() else None,
        "transcode": transcode or None,
    }
    if place := re.fullmatch(r"(?:layers|h)[._](\d+)(\.mlp)?", folder.name):
        part = "mlp_out" if place[2] else "resid_post"
        metadata["hook_name"] = None if transcode else f"blocks.{place[1]}.hook_{part}"
    settings = {"k": check_count(source, "k", k), "apply_b_dec_to_input": not transcode}
    return _settings("topk", weights, settings, metadata), weights


def _dictionary_learning(folder: Path) -> Converted:
    source, path = folder / "config.json", folder / _DICTIONARY
    trainer = read_object(source).get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise DataError(f"{source}: trainer has no dict_class")
    kind = trainer["dict_class"]
    if not isinstance(kind, str) or kind not in _DICTIONARIES:
        raise RequestError(f"{source}: dict_class {kind!r} is not supported; supported are {', '.join(_DICTIONARIES)}")
    architecture, names, subtracted, scaled = _DICTIONARIES[kind]
    tensors = _tensors(path)
    weights = {name: _take(tensors, source_name, path) for name, source_name in names.items()}
    for name in ("W_enc", "W_dec"):
        if names[name].endswith(".weight"):  # nn.Linear stores (out, in)
            weights[name] = weights[name].T.contiguous()
    settings: dict[str, Any] = {"apply_b_dec_to_input": subtracted}
    k = tensors.pop("k", None)
    if architecture == "topk":
        settings["k"] = check_count(source, "trainer.k", trainer.get("k"))
        if k is not None and int(k) != settings["k"]:
            raise DataError(f"{source}: trainer.k is {settings['k']}, but {path.name} has k {int(k)}")
        tensors.pop("threshold", None)  # this class encodes by k
    if "threshold" in weights and weights["threshold"].ndim == 0:
        weights["threshold"] = weights["threshold"].expand(weights["W_enc"].shape[1]).clone()
    tensors.pop("group_sizes", None)  # for nested training losses; encoding uses all groups
    _check_none_left(tensors, path)
    _check_shape(source, weights["W_enc"], trainer.get("activation_dim"), trainer.get("dict_size"))
    if scaled:  # features are multiplied by the decoder's norms, and the decoder divided by them
        norm = weights["W_dec"].norm(dim=1)
        for name in weights.keys() & {"W_enc", "b_enc", "b_gate", "b_mag", "threshold"}:
            weights[name] = weights[name] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    metadata: dict[str, Any] = {"model_name": trainer.get("lm_name"), "hook_name": None}
    if str(trainer.get("submodule_name")).startswith("resid_post") and isinstance(trainer.get("layer"), int):
        metadata["hook_name"] = f"blocks.{trainer['layer']}.hook_resid_post"
    return _settings(architecture, weights, settings, metadata), weights


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
    "AutoEncoder": ("standard", _LINEAR | {"b_dec": "bias"}, True, False),
    "AutoEncoderNew": ("standard", _LINEAR | {"b_dec": "decoder.bias"}, False, False),
    "GatedAutoEncoder": ("gated", _GATED, True, True),
    "JumpReluAutoEncoder": ("jumprelu", _PLAIN | {"threshold": "threshold"}, False, True),
    "AutoEncoderTopK": ("topk", _LINEAR | {"b_dec": "b_dec"}, True, False),
    "BatchTopKSAE": ("jumprelu", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, True, False),
    "MatryoshkaBatchTopKSAE": ("jumprelu", _PLAIN | {"threshold": "threshold"}, True, False),
}
"""dict_class -> (architecture, names of its tensors, whether b_dec is subtracted from the input, whether features are
multiplied by the decoder's norms)."""


def _settings(
    architecture: str, weights: dict[str, Tensor], settings: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, Any]:
    d_in, d_sae = weights["W_enc"].shape
    declared = {name: value for name, value in metadata.items() if value is not None}
    return {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "metadata": {"sae_lens_version": version("sae-lens"), **declared},
        **settings,
    }


def _check_shape(source: Path, weight: Tensor, d_in: object, d_sae: object) -> None:
    for declared, actual, axis in ((d_in, weight.shape[0], "inputs"), (d_sae, weight.shape[1], "features")):
        if declared is not None and declared != actual:
            raise DataError(f"{source} declares {declared} {axis}, but the weights have {actual}")


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; DataError if it has none."""
    return read_json(path, AGAIN, finite=False)


def _tensors(path: Path) -> dict[str, Tensor]:
    with open_safetensors(path, AGAIN) as file:
        return {name: file.get_tensor(name).to(torch.float32) for name in file.keys()}  # noqa: SIM118


def _take(tensors: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in tensors:
        raise DataError(f"{path} has no tensor {name!r}; it contains {', '.join(sorted(tensors)) or 'nothing'}")
    return tensors.pop(name)


def _check_none_left(tensors: dict[str, Tensor], path: Path) -> None:
    if tensors:
        raise DataError(f"{path}: unknown tensor {min(tensors)!r}, which may change the features")
