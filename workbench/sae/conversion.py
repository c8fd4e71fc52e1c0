"""What the readers of other libraries' files share: tensors by name, and SAELens' settings made of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.io.errors import DataError, RequestError, shown
from workbench.io.parse import read_json
from workbench.io.tensors import open_safetensors

AGAIN = "save or download the SAE again"
"""Advice in errors about damaged files."""

_NUMBERS = {2: "two", 3: "three"}
_PER_FEATURE = ("b_enc", "b_gate", "b_mag", "r_mag", "threshold")


@dataclass(frozen=True)
class Converted:
    """An autoencoder in SAELens' terms."""

    settings: dict[str, Any]
    """As in SAELens' `cfg.json`."""
    weights: dict[str, Tensor]
    """Under SAELens' names."""


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; DataError if it has none."""
    return read_json(path, AGAIN, finite=False)


def read_tensors(path: Path, unless: re.Pattern[str] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file in float32, but those whose whole name matches `unless`."""
    with open_safetensors(path, AGAIN) as file:
        names = [name for name in file.keys() if unless is None or not unless.fullmatch(name)]  # noqa: SIM118
        return {name: _real(path, name, file.get_tensor(name)) for name in names}


def _real(path: Path, name: str, part: Tensor) -> Tensor:
    """A tensor in float32; DataError for a complex one, whose imaginary part would be lost."""
    if part.is_complex():
        raise DataError(f"{path}: {name} has complex numbers, expected real ones; {AGAIN}")
    return part.to(torch.float32)


def tensor_names(path: Path) -> set[str]:
    """Returns the names of the tensors in a safetensors file; reads its header."""
    with open_safetensors(path, AGAIN) as file:
        return set(file.keys())


def take(tensors: dict[str, Tensor], name: str, path: Path) -> Tensor:
    """Removes and returns a tensor; DataError if it is not there."""
    if name not in tensors:
        raise DataError(f"{path} has no tensor {name!r}; it contains {', '.join(sorted(tensors)) or 'nothing'}")
    return tensors.pop(name)


def check_none_left(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises DataError for a tensor that no reader took."""
    if tensors:
        raise DataError(f"{path}: unknown tensor {min(tensors)!r}, which may change the features")


def check_shape(source: Path, weight: Tensor, d_in: object, d_sae: object) -> None:
    """Raises DataError where the encoder (d_in, d_sae) has other lengths than the settings; None is not compared."""
    for declared, actual, axis in ((d_in, weight.shape[0], "inputs"), (d_sae, weight.shape[1], "features")):
        if declared is not None and declared != actual:
            raise DataError(f"{source} declares {declared} {axis}, but the weights have {actual}")


def take_weights(
    tensors: dict[str, Tensor], names: Mapping[str, str], path: Path, transposed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Removes weights from the tensors of a file and returns them under SAELens' names, in SAELens' order of axes.

    Args:
        tensors: The tensors by name.
        names: SAELens' name -> name in the file.
        path: The file, for messages.
        transposed: SAELens' names of those that the file has as (out, in).

    Raises:
        DataError: A tensor that is missing, or of another shape than the others require.
    """
    weights = {name: take(tensors, stored, path) for name, stored in names.items()}
    for name in weights.keys() & set(transposed):
        check_axes(path, names[name], weights[name])
        weights[name] = weights[name].T.contiguous()
    check_shapes(path, weights, names)
    return weights


def check_axes(path: Path, name: str, weight: Tensor, axes: int = 2) -> None:
    """Raises DataError where a tensor has another number of axes."""
    if weight.ndim != axes:
        raise DataError(f"{path}: {name} has the shape {tuple(weight.shape)}, expected {_NUMBERS[axes]} axes; {AGAIN}")


def check_shapes(path: Path, weights: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> None:
    """Raises DataError where weights, under SAELens' names, do not fit W_enc (d_in, d_sae) and W_dec (d_sae, d_out).

    A single threshold is one of all features. `names` has the names in the file, for the message.
    """
    names = names or {}
    for name in ("W_enc", "W_dec"):
        if name in weights:
            check_axes(path, names.get(name, name), weights[name])
    features = weights["W_enc"].shape[1]
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(_PER_FEATURE, (features,))
    written = ""
    if "W_dec" in weights:
        width = weights["W_dec"].shape[1]
        expected |= {"W_dec": (features, width), "b_dec": (width,)}
        written = f" that write rows of width {width}"
    for name in [name for name in ("W_dec", *weights) if name in expected and name in weights]:
        shape = tuple(weights[name].shape)
        if shape != expected[name] and not (name == "threshold" and not shape):
            raise DataError(
                f"{path}: {names.get(name, name)} is read as {shape}, expected {expected[name]} for {features} "
                f"features{written}; {AGAIN}"
            )


def one_number(path: Path, name: str, value: Tensor) -> float:
    """Returns the number in a tensor; DataError where it has none, several, or one that is not finite."""
    if value.numel() != 1 or not bool(value.isfinite().all()):
        found = f"the shape {tuple(value.shape)}" if value.numel() != 1 else f"the value {float(value):g}"
        raise DataError(f"{path}: {name} has {found}, expected one finite number; {AGAIN}")
    return float(value)


def whole(path: Path, name: str, value: Tensor) -> int | float:
    """Returns the number in a tensor, as a whole number where it is one."""
    number = one_number(path, name, value)
    return int(number) if number.is_integer() else number


def check_thresholds(threshold: Tensor, path: Path) -> Tensor:
    """Returns the thresholds; RequestError where one is below 0, and activations would be negative."""
    if (threshold < 0).any():
        raise RequestError(
            f"{path}: {int((threshold < 0).sum())} thresholds are below 0, so their features can be negative, which is "
            "not supported"
        )
    return threshold


def number(source: Path, name: str, value: object) -> float:
    """Returns `value`; DataError where it is no finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise DataError(f"{source}: {name} is {shown(value)}, expected a number above 0")
    return float(value)


def converted(
    architecture: str, weights: dict[str, Tensor], settings: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Converted:
    """Returns the autoencoder of these weights; entries of `metadata` that are None are left out."""
    d_in, d_sae = weights["W_enc"].shape
    declared = {name: value for name, value in metadata.items() if value is not None}
    full = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "metadata": {"sae_lens_version": version("sae-lens"), **declared},
        **settings,
    }
    if architecture.endswith("transcoder"):
        full["d_out"] = weights["W_dec"].shape[1]
    return Converted(full, weights)


def last_match(pattern: str, path: Path) -> re.Match[str] | None:
    """Returns the match of `pattern` in the innermost part of the absolute path that has one."""
    parts: Iterable[str] = reversed(path.absolute().parts)
    return next((match for part in parts if (match := re.search(pattern, part))), None)
