"""Transcoders of circuit-tracer: a folder of `config.yaml` and one file a layer, or two for cross-layer transcoders.

f = activation(x W_encᵀ + b_enc) of the site `feature_input_hook` of the layer; the activation is a JumpReLU where the
file has thresholds, a TopK where the config says so, else a ReLU. A cross-layer transcoder's features write to their
own layer and to all later ones; their decoders are not needed to encode, and are not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from workbench.io.errors import DataError, RequestError, first_line, shown
from workbench.io.reading import read_file
from workbench.sae.config import check_count
from workbench.sae.conversion import (
    AGAIN,
    Converted,
    check_axes,
    check_none_left,
    check_shapes,
    check_thresholds,
    converted,
    read_tensors,
    take,
    take_weights,
    whole,
)
from workbench.sae.scope_formats import GEMMA, gemma_scope, without_decoder

CONFIG = "config.yaml"
_LAYER, _ENCODER = re.compile(r"layer_(\d+)\.safetensors"), re.compile(r"W_enc_(\d+)\.safetensors")


def layer_files(folder: Path) -> list[Path]:
    """Returns the files of a folder's layers in order: `layer_N.safetensors` or `W_enc_N.safetensors`; maybe none.

    Raises:
        RequestError: The config lists files that are not on this disk.
    """
    listed = _read_config(folder).get("transcoders")
    if isinstance(listed, list):
        paths = [folder / str(name) for name in listed]
        if missing := [str(name) for name, path in zip(listed, paths, strict=True) if not path.is_file()]:
            raise RequestError(
                f"{folder / CONFIG} lists {shown(missing[0])}, which is not in the folder; download the files and list "
                "their names there"
            )
        return paths
    for pattern in (_LAYER, _ENCODER):
        numbered = {
            int(match[1]): path for path in folder.glob("*.safetensors") if (match := pattern.fullmatch(path.name))
        }
        if numbered:
            return [numbered[layer] for layer in sorted(numbered)]
    return []


def transcoder(path: Path) -> Converted:
    """Returns the transcoder in one file of a folder, or the encoder of one layer of a cross-layer transcoder.

    Raises:
        RequestError: An activation that is not supported.
        DataError: A file that is damaged or has other tensors, or a damaged config.
    """
    config = _read_config(path.parent)
    layers = [file.name for file in layer_files(path.parent)] if "transcoders" in config else []
    number = re.search(r"_(\d+)\.safetensors$", path.name)
    layer = layers.index(path.name) if path.name in layers else int(number[1]) if number else None
    metadata: dict[str, Any] = {"model_name": config.get("model_name")}
    for key, hook in (("hook_name", "feature_input_hook"), ("hook_name_out", "feature_output_hook")):
        if layer is not None and isinstance(config.get(hook), str):
            metadata[key] = f"blocks.{layer}.{config[hook]}"
    if path.name == GEMMA:
        gemma = gemma_scope(path.parent)
        return converted("jumprelu_transcoder", gemma.weights, {"apply_b_dec_to_input": False}, metadata)
    if _ENCODER.fullmatch(path.name):
        return _cross_layer(path, metadata)
    return _one_layer(path, config, metadata)


def _one_layer(path: Path, config: dict[str, Any], metadata: dict[str, Any]) -> Converted:
    tensors = read_tensors(path)
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    weights = take_weights(tensors, names, path, transposed=["W_enc"])
    thresholds = ("activation_function.threshold", "threshold")
    threshold = next((tensors.pop(name) for name in thresholds if name in tensors), None)
    k, skip = tensors.pop("k", None), tensors.pop("W_skip", None)
    check_none_left(tensors, path)
    settings: dict[str, Any] = {"apply_b_dec_to_input": False}
    activation = config.get("activation")
    if activation == "topk" or (activation is None and k is not None):
        count = config.get("k") if k is None else whole(path, "k", k)
        settings["k"] = check_count(path, "k", count)
        return converted("topk", weights, settings, {**metadata, "transcode": True, "keeps_negative": True})
    if activation not in (None, "relu", "jump_relu", "jumprelu"):
        raise RequestError(f"{path.parent / CONFIG}: activation {shown(activation)} is not supported")
    if (threshold is not None) == (activation == "relu") and activation is not None:
        wrong = "has thresholds" if threshold is not None else "has no thresholds"
        raise DataError(f"{path} {wrong}, but {CONFIG} declares the activation {activation!r}; {AGAIN}")
    if threshold is not None:
        weights["threshold"] = check_thresholds(threshold.flatten(), path)
        check_shapes(path, weights)
    if skip is not None:
        weights["W_skip"] = skip
    name = f"{'' if threshold is None else 'jumprelu_'}{'' if skip is None else 'skip_'}transcoder"
    return converted(name, weights, settings, metadata)


def _cross_layer(path: Path, metadata: dict[str, Any]) -> Converted:
    match = _ENCODER.fullmatch(path.name)
    assert match is not None
    layer = match[1]
    tensors = read_tensors(path)
    encoder = take(tensors, f"W_enc_{layer}", path)
    check_axes(path, f"W_enc_{layer}", encoder)
    weights = {
        "W_enc": encoder.T,  # a feature's weights stay contiguous, as encoders want them
        "b_enc": take(tensors, f"b_enc_{layer}", path),
    }
    if f"threshold_{layer}" in tensors:
        weights["threshold"] = check_thresholds(tensors.pop(f"threshold_{layer}").flatten(), path)
    check_shapes(path, weights, {name: f"{name}_{layer}" for name in weights})
    for name in (f"b_dec_{layer}", f"W_skip_{layer}"):  # parts of the output, which is not computed
        tensors.pop(name, None)
    check_none_left(tensors, path)
    return without_decoder(weights, metadata)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(read_file(path, AGAIN))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not YAML ({first_line(error)}); {AGAIN}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected an object, found {shown(config)}")
    kind = config.get("model_kind")
    if kind not in (None, "transcoder_set", "cross_layer_transcoder"):
        raise RequestError(f"{path}: model_kind {shown(kind)} is not supported")
    for key in ("model_name", "feature_input_hook", "feature_output_hook"):
        if not isinstance(config.get(key), str | NoneType):
            raise DataError(f"{path}: {key} is {shown(config[key])}, expected a text; {AGAIN}")
    if not isinstance(config.get("transcoders"), list | NoneType):
        raise DataError(f"{path}: transcoders is {shown(config['transcoders'])}, expected a list of files; {AGAIN}")
    return config
