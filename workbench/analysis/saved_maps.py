"""Folders of fitted maps of one model: arrays in maps.safetensors, and a record of what they are in lens.json."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from workbench.io.checks import as_path
from workbench.io.errors import DataError, RequestError
from workbench.io.files import explain_full_disk, refuse_full, replace_folder, sha256_file, write_file
from workbench.io.parse import check_checksum, parse, read_json, to_checked_json
from workbench.io.tensors import new_arrays, open_safetensors
from workbench.store.reader import Store

RECORD, MAPS = "lens.json", "maps.safetensors"
ADVICE = "save the lens again"


@dataclass(frozen=True)
class MapsRecord:
    """`lens.json`: what every kind of maps states; some state more."""

    format: str
    version: int
    site: str
    layers: tuple[int, ...]
    model: str
    model_fingerprint: str | None
    n_layers: int
    d_model: int
    made_of: dict[str, Any]
    sha256: str
    """Of the maps' file."""


def save_maps(
    folder: str | os.PathLike[str], format: str, version: int, facts: Mapping[str, Any], maps: Mapping[str, Tensor]
) -> Path:
    """Writes maps and facts into a new or empty folder, and returns it.

    Raises:
        RequestError: The folder is not empty.
        DataError: The disk is full or read-only.
    """
    folder = as_path("folder", folder)
    refuse_full(folder)
    with explain_full_disk(str(folder), "save it again"), replace_folder(folder.resolve(), ()) as new:
        arrays = {name: part.numpy() for name, part in maps.items()}
        with new_arrays(new / MAPS, {name: ("float32", array.shape) for name, array in arrays.items()}) as file:
            for name, array in arrays.items():
                file.append(name, array)
        record = {"format": format, "version": version, **facts, "sha256": sha256_file(new / MAPS)}
        write_file(new / RECORD, to_checked_json(record).encode())
    return folder


def format_of(folder: Path) -> str:
    """Returns the format that lens.json names; DataError where it is damaged."""
    return str(read_json(folder / RECORD, ADVICE).get("format"))


def load_maps(folder: Path, kind: Any, version: int) -> tuple[Any, dict[str, Tensor]]:
    """Returns the record of a folder, parsed as `kind`, and its arrays; shapes are left to the caller.

    Raises:
        RequestError: A later version.
        DataError: The files are damaged.
    """
    source = folder / RECORD
    value = read_json(source, ADVICE)
    if isinstance(file_version := value.get("version"), int) and file_version > version:
        raise RequestError(f"{source} has format version {file_version}; upgrade the workbench")
    check_checksum(value, source, ADVICE)
    record = parse(kind, value, str(source))
    with open_safetensors(folder / MAPS, ADVICE) as file:
        maps = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if sha256_file(folder / MAPS) != record.sha256:
        raise damaged(folder)
    return record, maps


def damaged(folder: Path) -> DataError:
    """Returns the error for maps that are not those of the record."""
    return DataError(f"{folder / MAPS} is damaged: it does not hold what {RECORD} says; {ADVICE}")


def check_lens_model(
    store: Store, name: str, fingerprint: str | None, n_layers: int, d_model: int, noun: str = "lens"
) -> None:
    """Raises RequestError for a store of another model than a lens's; warns where only the shape can be compared."""
    model = store.manifest.model
    if (n_layers, d_model) != (model.n_layers, model.d_model):
        raise RequestError(
            f"the {noun} is of {name} ({n_layers} layers, d_model {d_model}), and {store.path.name} of "
            f"{model.name} ({model.n_layers} layers, d_model {model.d_model}); read a store of the {noun}'s model"
        )
    if fingerprint is None:
        logging.getLogger(__name__).warning(
            "the lens names no weights (it is of %s): only its layers and dimensions were compared with %s",
            name,
            model.name,
        )
    elif fingerprint != model.fingerprint:
        raise RequestError(
            f"the {noun} is of {name} with the weights {fingerprint[:12]}, and {store.path.name} of "
            f"{model.name} with {model.fingerprint[:12]}; read a store of the {noun}'s model, or train one for this"
        )
