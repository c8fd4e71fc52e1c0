"""Gemma Scope (`params.npz`), Gemma Scope 2 (`params.safetensors`) and Llama Scope (`hyperparams.json`, `config.json`).

Gemma Scope: f = relu(p) where p = x W_enc + b_enc exceeds the threshold of its feature, else 0. What the SAE reads is
in the names of folders alone; where they were changed, its site is not known.

Llama Scope was trained on x s_in with s = √d_model / (mean norm of the dataset). Its files of 2024 (`hyperparams.json`,
one threshold) are used as lm_saes uses them: decoder rows scaled to length 1, outputs in the model's units, so
p = (x s_in W_enc + b_enc) |d| / s_out and f = p where p exceeds the threshold. Later files (`config.json`) keep the
units of training: f = p where p |d| exceeds the threshold of its feature, for p = x s_in W_enc + b_enc.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.io.errors import DataError, RequestError, WorkbenchError, first_line, shown
from workbench.io.reading import open_file
from workbench.sae.config import check_count
from workbench.sae.conversion import (
    AGAIN,
    Converted,
    check_none_left,
    check_shape,
    check_shapes,
    converted,
    last_match,
    number,
    one_number,
    read_object,
    read_tensors,
    take,
    take_weights,
)

GEMMA, GEMMA_2 = "params.npz", "params.safetensors"
LLAMA, LLAMA_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
LM_SAES, LM_SAES_WEIGHTS = "config.json", "sae_weights.safetensors"

_GEMMA_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_GEMMA_SITES = {
    "res": "blocks.{}.hook_resid_post",
    "mlp": "blocks.{}.hook_mlp_out",
    "att": "blocks.{}.attn.hook_z",
    "transcoders": "blocks.{}.ln2.hook_normalized",
}
_TRAINED = {"context_size": 1024, "prepend_bos": True}
_HF_SITES = {
    "output": "blocks.{}.hook_resid_post",
    "self_attn.o_proj.input": "blocks.{}.attn.hook_z",
    "pre_feedforward_layernorm.output": "blocks.{}.mlp.hook_in",
    "post_feedforward_layernorm.output": "blocks.{}.hook_mlp_out",
}
"""Hugging Face's places in a Gemma 3 block, by TransformerLens' names."""


def gemma_scope(folder: Path) -> Converted:
    """Returns a Gemma Scope autoencoder or transcoder.

    Raises:
        DataError: Files that are damaged or have other arrays.
    """
    path = folder / GEMMA
    weights = _read_arrays(path)
    release = last_match(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)\b", folder)
    layer = last_match(r"layer_(\d+)", folder)
    metadata: dict[str, Any] = dict(_TRAINED)
    if release:
        metadata["model_name"] = f"gemma-2-{release[1]}" + ("-it" if release[2] == "it" else "")
    if last_match(r"^embedding$", folder):  # trained on embeddings before the model multiplies them by √d_model
        scale = weights["W_enc"].shape[0] ** 0.5
        weights |= {"W_enc": weights["W_enc"] / scale, "W_dec": weights["W_dec"] * scale}
        weights["b_dec"] = weights["b_dec"] * scale
        metadata["hook_name"] = "blocks.0.hook_resid_pre"
    elif release and layer:
        metadata["hook_name"] = _GEMMA_SITES[release[3]].format(layer[1])
    if release and release[3] == "transcoders":
        metadata["hook_name_out"] = f"blocks.{layer[1]}.hook_mlp_out" if layer else None
        return converted("jumprelu_transcoder", weights, {"apply_b_dec_to_input": False}, metadata)
    return converted("jumprelu", weights, {"apply_b_dec_to_input": False}, metadata)


def gemma_scope_2(folder: Path, file: str = GEMMA_2) -> Converted:
    """Returns a Gemma Scope 2 autoencoder or transcoder, or one layer of a cross-layer transcoder or crosscoder.

    Args:
        folder: Folder of `config.json` and the weights.
        file: Name of the weights.

    Raises:
        RequestError: Another architecture than jump_relu.
        DataError: Files that are damaged, do not fit, or have other tensors.
    """
    source, path = folder / "config.json", folder / file
    config = read_object(source) if source.is_file() else {}
    if (architecture := config.get("architecture", "jump_relu")) != "jump_relu":
        raise RequestError(f"{source}: architecture {shown(architecture)} is not supported; only jump_relu is")
    several = file != GEMMA_2
    tensors = read_tensors(path, re.compile("w_dec|affine_skip_connection") if several else None)
    weights = {name: take(tensors, name.lower(), path) for name in _GEMMA_TENSORS if not (several and name == "W_dec")}
    skip = tensors.pop("affine_skip_connection", None)
    check_none_left(tensors, path)
    check_shapes(path, weights)
    metadata: dict[str, Any] = _TRAINED | {"model_name": _gemma_3_name(config.get("model_name"))}
    index = int(match[1]) if (match := re.search(r"params_layer_(\d+)", file)) else None
    site, output = (_hf_site(config.get(f"hf_hook_point_{end}"), index) for end in ("in", "out"))
    metadata["hook_name"] = site or _gemma_2_site(folder, index)
    if several:
        return without_decoder(weights, metadata)
    transcodes = (output is not None and output != site) or skip is not None or bool(last_match("^transcoder", folder))
    if not transcodes:
        return converted("jumprelu", weights, {"apply_b_dec_to_input": False}, metadata)
    layer = last_match(r"layer_(\d+)", folder)
    metadata["hook_name_out"] = output or (f"blocks.{layer[1]}.hook_mlp_out" if layer else None)
    if skip is not None:  # stored as (d_in, d_out)
        weights["W_skip"] = skip.T.contiguous()
    architecture = "jumprelu_transcoder" if skip is None else "jumprelu_skip_transcoder"
    return converted(architecture, weights, {"apply_b_dec_to_input": False}, metadata)


def without_decoder(weights: dict[str, Tensor], metadata: Mapping[str, Any]) -> Converted:
    """Returns the encoder of one layer of an autoencoder that writes to several layers; its decoder is not read."""
    d_in, d_sae = weights["W_enc"].shape
    weights = {name: part for name, part in weights.items() if name != "b_dec"}
    weights |= {"W_dec": torch.zeros(1, 1).expand(d_sae, d_in), "b_dec": torch.zeros(d_in)}  # takes no memory
    architecture = "jumprelu_transcoder" if "threshold" in weights else "transcoder"
    about = {**metadata, "encoder_only": True}
    return converted(architecture, weights, {"apply_b_dec_to_input": False}, about)


def llama_scope(folder: Path) -> Converted:
    """Returns a Llama Scope autoencoder or transcoder of 2024.

    Raises:
        RequestError: Settings whose mathematics is not supported.
        DataError: Files that are damaged or do not fit.
    """
    source, path = folder / LLAMA, folder / LLAMA_WEIGHTS
    config = {"apply_decoder_bias_to_pre_encoder": True, "norm_activation": "token-wise"} | read_object(source)
    weights = _lm_saes_weights(path, config, source)
    norms = config.get("dataset_average_activation_norm")
    scale_in, scale_out = _scales(source, config, norms if isinstance(norms, dict) else {})
    threshold = config.get("jump_relu_threshold", 0.0)
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold < math.inf:
        raise DataError(f"{source}: jump_relu_threshold is {shown(threshold)}, expected a number from 0 on")
    norm = weights["W_dec"].norm(dim=1) if config.get("sparsity_include_decoder_norm", True) else scale_out / scale_in
    unit = norm / scale_out
    weights["W_enc"] = weights["W_enc"] * (scale_in * unit)
    weights["b_enc"] = weights["b_enc"] * unit
    weights["W_dec"] = weights["W_dec"] / (unit[:, None] if isinstance(unit, Tensor) else unit) / scale_out
    weights["b_dec"] = weights["b_dec"] / scale_out
    act = config.get("act_fn", "relu")
    if act == "topk" and threshold > 0:
        act = "jumprelu"
    if act == "jumprelu":
        weights["threshold"] = torch.full((weights["W_enc"].shape[1],), float(threshold))
    return _llama(folder, source, config, act, weights)


def lm_saes(folder: Path) -> Converted:
    """Returns an autoencoder or transcoder as lm_saes (llamascopium) saves them since 2025.

    Raises:
        RequestError: A dictionary of another type, or settings whose mathematics is not supported.
        DataError: Files that are damaged or do not fit.
    """
    source, path = folder / LM_SAES, folder / LM_SAES_WEIGHTS
    config = read_object(source)
    if (kind := config.get("sae_type", "sae")) != "sae":
        raise RequestError(f"{source}: sae_type {shown(kind)} is not supported; only sae is")
    tensors = read_tensors(path)
    prefix = "dataset_average_activation_norm."
    names = [name for name in tensors if name.startswith(prefix)]
    norms = {name.removeprefix(prefix): one_number(path, name, tensors.pop(name)) for name in names}
    thresholds = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
    logs = next((tensors.pop(name) for name in thresholds if name in tensors), None)
    weights = _lm_saes_weights(path, config, source, tensors)
    scale_in, scale_out = _scales(source, config, norms)
    gated = config.get("sparsity_include_decoder_norm", True)
    norm = weights["W_dec"].norm(dim=1) if gated else torch.ones(weights["W_dec"].shape[0])
    act = config.get("act_fn", "relu")
    weights["W_enc"] = weights["W_enc"] * scale_in
    weights["W_dec"] = weights["W_dec"] / scale_out
    weights["b_dec"] = weights["b_dec"] / scale_out
    if act == "jumprelu":
        if logs is None:
            raise DataError(f"{path} has no tensor 'log_jumprelu_threshold'; {AGAIN}")
        check_shapes(path, {"W_enc": weights["W_enc"], "threshold": logs})
        weights["threshold"] = logs.exp() / norm
    elif act == "topk":  # ranked by p |d|, so activations are in units of a decoder row of length 1
        weights |= {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm}
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    return _llama(folder, source, config, act, weights)


def _llama(folder: Path, source: Path, config: Mapping[str, Any], act: object, weights: dict[str, Tensor]) -> Converted:
    site, output = config.get("hook_point_in"), config.get("hook_point_out")
    architectures = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}
    if not isinstance(act, str) or act not in architectures:
        raise RequestError(f"{source}: act_fn {shown(act)} is not supported; supported are {', '.join(architectures)}")
    metadata: dict[str, Any] = {"hook_name": site if isinstance(site, str) else None}
    if last_match(r"Llama3_1-8B-Base", folder):
        metadata["model_name"] = "meta-llama/Llama-3.1-8B"
    subtracted = bool(config.get("apply_decoder_bias_to_pre_encoder", False))
    settings: dict[str, Any] = {"apply_b_dec_to_input": subtracted}
    if config.get("norm_activation") == "token-wise":
        settings["normalize_activations"] = "constant_norm_rescale"
    if act == "topk":
        settings["k"] = check_count(source, "top_k", config.get("top_k"))
    transcodes = output is not None and output != site
    if transcodes:
        if subtracted or "normalize_activations" in settings:
            raise RequestError(
                f"{source}: a transcoder with apply_decoder_bias_to_pre_encoder or token-wise norms is not supported"
            )
        metadata |= {"hook_name_out": output, "transcode": True if act == "topk" else None}
    name = architectures[act] if act == "topk" or not transcodes else f"{architectures[act]}_transcoder"
    return converted(name.removeprefix("standard_"), weights, settings, metadata)


def _lm_saes_weights(
    path: Path, config: Mapping[str, Any], source: Path, tensors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights as (d_in, d_sae) and (d_sae, d_out), of either set of names."""
    if config.get("use_glu_encoder"):
        raise RequestError(f"{source}: use_glu_encoder changes the features and is not supported")
    tensors = read_tensors(path) if tensors is None else tensors
    if "W_E" in tensors:
        names, transposed = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D"}, ()
    else:
        names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
        transposed = ("W_enc", "W_dec")
    weights = take_weights(tensors, names, path, transposed)
    bias = next((name for name in ("b_D", "decoder.bias") if name in tensors), "b_dec")
    weights["b_dec"] = tensors.pop(bias, torch.zeros(weights["W_dec"].shape[1]))
    check_shapes(path, weights, names | {"b_dec": bias})
    check_none_left(tensors, path)
    width, factor = config.get("d_model"), config.get("expansion_factor")
    features = config.get("d_sae")
    if features is None and isinstance(width, int) and isinstance(factor, int | float):
        features = int(width * factor)
    check_shape(source, weights["W_enc"], width, features)
    return {name: part.contiguous() for name, part in weights.items()}


def _scales(source: Path, config: Mapping[str, Any], norms: Mapping[str, Any]) -> tuple[float, float]:
    """s_in and s_out: the factors that bring the mean norms of the dataset to √d_model."""
    way = config.get("norm_activation", "dataset-wise")
    if way in ("inference", "token-wise"):
        return 1.0, 1.0
    if way != "dataset-wise":
        raise RequestError(f"{source}: norm_activation {shown(way)} is not supported; its norms depend on the batch")
    root = check_count(source, "d_model", config.get("d_model")) ** 0.5
    scales = []
    for end in ("in", "out"):
        value = norms.get(end, norms.get(str(config.get(f"hook_point_{end}"))))
        if value is None:
            raise DataError(f"{source}: dataset_average_activation_norm.{end} is missing; {AGAIN}")
        scales.append(root / number(source, f"dataset_average_activation_norm.{end}", value))
    return scales[0], scales[1]


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        with open_file(path, AGAIN) as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {f"W_{name[2:]}" if name.startswith("w_") else name: file[name] for name in file.files}
        weights = {
            name: torch.from_numpy(part.astype(np.float32, casting="same_kind")) for name, part in arrays.items()
        }
    except WorkbenchError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        raise DataError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from None
    tensors = {name: take(weights, name, path) for name in _GEMMA_TENSORS}
    if "scaling_factor" in weights and bool((weights["scaling_factor"] == 1).all()):
        weights.pop("scaling_factor")
    check_none_left(weights, path)
    check_shapes(path, tensors)
    return tensors


def _gemma_3_name(name: object) -> str | None:
    """The hub's name: files have gemma-v3-1b-pt, and the smallest model has no suffix there."""
    if not isinstance(name, str):
        return None
    name = name.rsplit("/", 1)[-1].replace("-v3", "-3")
    return f"google/{name.removesuffix('-pt') if '270m' in name else name}"


def _hf_site(place: object, index: int | None) -> str | None:
    """Site of Hugging Face's name of a place; of a list of names the one at `index`."""
    if isinstance(place, list):
        place = place[index] if index is not None and index < len(place) else None
    match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", place) if isinstance(place, str) else None
    return _HF_SITES[match[2]].format(match[1]) if match and match[2] in _HF_SITES else None


def _gemma_2_site(folder: Path, index: int | None) -> str | None:
    """Site that the names of folders tell, for files without `config.json` or with one for all layers."""
    kinds = {"resid_post": "output", "attn_out": "self_attn.o_proj.input"}
    kinds |= {"mlp_out": "post_feedforward_layernorm.output", "transcoder": "pre_feedforward_layernorm.output"}
    kinds |= {"crosscoder": "output", "clt": "pre_feedforward_layernorm.output"}
    kind = last_match(rf"^({'|'.join(kinds)})(_all)?$", folder)
    layers = last_match(r"layer_(\d+(?:_\d+)*)_width", folder)
    numbers = layers[1].split("_") if layers else []
    if kind is None:
        return None
    if kind[1] == "clt":
        layer = None if index is None else str(index)
    else:
        layer = numbers[index or 0] if (index or 0) < len(numbers) else None
    return None if layer is None else _HF_SITES[kinds[kind[1]]].format(layer)
