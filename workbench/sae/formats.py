"""Which library wrote a folder or file of an autoencoder, and what a folder of many contains.

A place is a folder that holds one autoencoder, or a safetensors file of a release that has a file a layer. Pickles are
not opened: the error has the command that converts one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from workbench.io.errors import RequestError, WorkbenchError
from workbench.io.files import natural_order
from workbench.sae.conversion import Converted
from workbench.sae.linear_formats import DICTIONARY, SPARSIFY, dictionary_learning, of_tensors, sparsify, tensor_file
from workbench.sae.scope_formats import (
    GEMMA,
    GEMMA_2,
    LLAMA,
    LM_SAES,
    LM_SAES_WEIGHTS,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    lm_saes,
)
from workbench.sae.transcoder_formats import layer_files, transcoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
"""Files of an autoencoder as SAELens saves it."""

_LAYERS = re.compile(r"(layer_|W_enc_)\d+\.safetensors")
_PARAMS = re.compile(r"params_layer_(\d+)\.safetensors")
_PICKLE = re.compile(r".+\.(pt|pth|bin|pkl|ckpt)")
_DEEPEST, _MOST = 6, 20_000  # folders below a folder of many, and entries looked at
_SHOWN = 8


def converter(place: Path) -> Callable[[], Converted] | None:
    """Returns the function that reads the autoencoder at a place; None if SAELens wrote it, or it is none.

    Raises:
        RequestError: A pickle, or a folder of dictionary_learning with one.
        DataError: A damaged file.
    """
    if place.is_file():
        return _of_file(place)
    for name, read in _OF_FOLDERS.items():
        if (place / name).is_file():
            return lambda: read(place)
    if (place / LM_SAES).is_file() and (place / LM_SAES_WEIGHTS).is_file() and not (place / CONFIG).is_file():
        return lambda: lm_saes(place)
    if (place / "config.json").is_file() and (place / "ae.pt").is_file():
        raise pickled(place / "ae.pt")
    return None


def check_one_format(place: Path) -> None:
    """Raises RequestError for a folder with the weights of several formats, of which one would be read by chance."""
    if place.is_dir():
        found = [name for name in (WEIGHTS, *_OF_FOLDERS) if (place / name).is_file()]
        if len(found) > 1:
            raise RequestError(
                f"SAE {str(place)!r} has files of several formats, {', '.join(found)}; move all but one into a folder "
                "of their own"
            )


def is_place(path: Path) -> bool:
    """Returns True if a path is a folder or file from which one autoencoder can be read, by the names of its files."""
    if path.is_dir():
        if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            return True
        lm_saes_too = (path / LM_SAES).is_file() and (path / LM_SAES_WEIGHTS).is_file()
        if lm_saes_too or any((path / name).is_file() for name in _OF_FOLDERS):
            return True
    try:
        if path.is_dir():
            return bool(layers_of(path))
        return path.is_file() and path.suffix == ".safetensors" and _of_file(path) is not None
    except WorkbenchError:
        return False


def layers_of(folder: Path) -> list[Path]:
    """Returns the files of the layers of a folder that holds an autoencoder of several layers; none of another folder.

    Raises:
        RequestError: The folder's config lists files that are not there.
        DataError: A damaged config.
    """
    if not folder.is_dir():
        return []
    numbered = {int(match[1]): path for path in folder.iterdir() if (match := _PARAMS.fullmatch(path.name))}
    return [numbered[layer] for layer in sorted(numbered)] or layer_files(folder)


def missing_layers(files: list[Path]) -> list[str]:
    """Returns the numbers that are left out between the first and the last of files that are numbered by layer."""
    matches = [re.search(r"_(\d+)\.safetensors", file.name) for file in files]
    numbers = [int(match[1]) for match in matches if match]
    if len(set(numbers)) < len(files):  # as a config lists them
        return []
    return [str(number) for number in range(min(numbers), max(numbers)) if number not in numbers]


def place_of(folder: Path, sae_id: str | None) -> Path:
    """Returns the place that an id means in a folder of several: a folder, or a file with or without its ending."""
    if sae_id is None:
        return folder
    return next((path for name in _spellings(sae_id) if (path := folder / name).exists()), folder / sae_id)


def places_in(folder: Path) -> list[str]:
    """Returns the ids of the autoencoders in a folder and the folders below it, in their natural order."""
    ids = []
    for path in _walk(folder):
        if is_place(path):
            name = str(path.relative_to(folder))
            ids.append(name.removesuffix(".safetensors") if path.is_file() else name)
    return sorted(ids, key=natural_order)


def pickles_in(folder: Path) -> list[Path]:
    """Returns the pickles in a folder and the folders below it."""
    return [path for path in _walk(folder) if _PICKLE.fullmatch(path.name)]


def pickled(path: Path) -> RequestError:
    """Returns the error about a pickle, with the command that writes its tensors to a safetensors file beside it."""
    source, target, name = map(json.dumps, (str(path), str(path.with_suffix(".safetensors")), path.name))
    code = (
        "import torch; from safetensors.torch import save_file; "
        f'd = torch.load({source}, map_location="cpu", weights_only=True); d = d.get("sae", d); '
        'd = {**d.pop("activation_state_dict", {}), **d}; '
        "save_file({k: torch.as_tensor(v).clone().contiguous() for k, v in d.items() if not isinstance(v, str)}, "
        f'{target}, {{"from": {name}, **{{k: v for k, v in d.items() if isinstance(v, str)}}}})'
    )
    return RequestError(
        f"SAE {str(path)!r} is a pickle, which can run code, and is not opened; if you trust it, convert it and load "
        f"the result: python -c {shlex.quote(code)}"
    )


def listed(ids: list[str]) -> str:
    """Returns ids as a message shows them."""
    return ", ".join(ids[:_SHOWN]) + (f", ... ({len(ids)} in all)" if len(ids) > _SHOWN else "")


_OF_FOLDERS: dict[str, Callable[[Path], Converted]] = {
    SPARSIFY: sparsify,
    DICTIONARY: dictionary_learning,
    GEMMA: gemma_scope,
    GEMMA_2: gemma_scope_2,
    LLAMA: llama_scope,
}
"""File that a folder of this format has -> its reader."""


def _of_file(path: Path) -> Callable[[], Converted] | None:
    if _PICKLE.fullmatch(path.name):
        raise pickled(path)
    if _PARAMS.fullmatch(path.name):
        return lambda: gemma_scope_2(path.parent, path.name)
    if _LAYERS.fullmatch(path.name):
        return lambda: transcoder(path)
    if path.suffix == ".safetensors" and of_tensors(path):
        return lambda: tensor_file(path)
    return None


def _spellings(sae_id: str) -> Iterator[str]:
    yield sae_id
    yield f"{sae_id}.safetensors"
    yield f"{sae_id}.sae.safetensors"
    for ending in (".pt", ".pth", ".sae.pt"):  # which are refused with the command that converts them
        yield f"{sae_id}{ending}"


def _walk(folder: Path) -> Iterator[Path]:
    """Folders, safetensors files and pickles below a folder; what is inside of a place is a part of it.

    A link to a folder above it leads nowhere new.
    """
    count = 0
    waiting: list[tuple[Path, tuple[Path, ...]]] = [(folder, (folder.resolve(),))]
    while waiting:
        parent, above = waiting.pop()
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            count += 1
            path = parent / entry.name
            if count > _MOST:
                return
            if entry.is_dir():
                if (real := path.resolve()) in above:
                    continue
                yield path
                if len(above) <= _DEEPEST and not entry.name.startswith(".") and not is_place(path):
                    waiting.append((path, (*above, real)))
            elif path.suffix == ".safetensors" or _PICKLE.fullmatch(path.name):
                yield path
