"""Locations of models and tokenizers: directories, the hub's local cache, the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workbench import embedded
from workbench.io.errors import DataError, RequestError, nearest
from workbench.io.parse import read_json
from workbench.model.gguf import SUFFIX, the_file

Kind = Literal["model", "tokenizer"]
ADAPTER = "adapter_config.json"
"""The file of PEFT that names the base of an adapter."""

_HUB_ID = re.compile(r"(?=.{1,96}$)(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?(?:/\w(?:[\w.-]*\w)?)?", re.ASCII)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MARKS: Mapping[Kind, tuple[str, ...]] = {
    "model": ("config.json", ADAPTER),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
}
"""Files of which a directory must hold at least one to be a model, or a tokenizer."""


@dataclass(frozen=True)
class Location:
    """Location of a model or tokenizer: a directory, which may be in the hub's cache, or the hub itself."""

    path: str
    """Directory, or hub id if it is yet to be fetched."""
    name: str
    local: bool
    """True if it is read without the network."""
    hub: bool
    """True if `name` is a hub id."""
    file: str | None = None
    """GGUF file of the directory that holds it all; None: it is in the files of transformers."""
    built: bool = False
    """True for the planted model, which code builds: there is nothing at `path`."""


def locate(source: str | Path, revision: str | None = None, kind: Kind = "model") -> Location:
    """Finds a directory or a hub id, without loading anything.

    Args:
        source: A directory, a GGUF file, a hub id, "demo" for the embedded model, "planted" for the one that code
            builds.
        revision: Branch, tag or commit on the hub.
        kind: What the directory must hold.

    Returns:
        The location; a hub id that the local cache holds completely is the directory there.

    Raises:
        RequestError: A path that does not exist, a directory without a `kind`, a hub id while the hub cannot be
            reached.
        DataError: A damaged index in the local cache.
    """
    text = str(source)
    path = Path(text).expanduser()
    marks = _MARKS[kind]
    if not text:
        raise RequestError(f"{kind} is an empty string; give a directory or a hub id")
    if text == embedded.NAME:
        return Location(str(embedded.MODEL), text, local=True, hub=False)
    if text == embedded.PLANTED:
        return Location(str(embedded.FOLDER / text), text, local=True, hub=False, built=True)
    if os.path.isdir(path):
        if not any((path / name).is_file() for name in marks):
            if file := the_file(path):
                return Location(str(path), path.resolve().name, local=True, hub=False, file=file)
            inside = ", ".join(sorted(os.listdir(path))[:5]) or "nothing"
            raise RequestError(
                f"{kind} {text!r} is a directory without {marks[0]} (it holds {inside}); "
                "give the folder that save_pretrained wrote"
            )
        return Location(str(path), path.resolve().name, local=True, hub=False)
    if path.suffix.lower() == SUFFIX and os.path.isfile(path):
        return Location(str(path.parent), path.name, local=True, hub=False, file=path.name)
    if os.path.exists(path):
        raise RequestError(f"{kind} {text!r} is a file; give the folder that holds {marks[0]}")
    inside_folder = "/" in text and os.path.isdir(path.parent)  # models/typo beside a folder models is no hub id
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text) or inside_folder:
        parent = next(folder for folder in path.absolute().parents if os.path.isdir(folder))
        name = path.absolute().relative_to(parent).parts[0]
        close = nearest(name, folders(parent))
        raise RequestError(f"{kind} {text!r}: no such directory ({parent.name}/ has no {name!r}{close})")
    return _locate_on_hub(text, revision, kind)


def _locate_on_hub(name: str, revision: str | None, kind: Kind) -> Location:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    snapshot = _snapshot(name, revision, kind)
    if snapshot is not None:
        return Location(str(snapshot), name, local=True, hub=True)
    suggestion = nearest(name, folders(Path.cwd()))
    if HF_HUB_OFFLINE:
        raise RequestError(
            f"{kind} {name!r} is no directory here, and not in the local hub cache (HF_HUB_OFFLINE is set){suggestion}"
        )
    try:
        HfApi().model_info(name, revision=revision, timeout=1.5)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the hub answers {status}" if status else "the hub cannot be reached"
        raise RequestError(
            f"{kind} {name!r} is no directory here, and {reason}; check the name or give a path{suggestion}"
        ) from error
    return Location(name, name, local=False, hub=True)


def _snapshot(name: str, revision: str | None, kind: Kind) -> Path | None:
    """The folder in the hub's cache, if it holds all files: AutoConfig leaves a config alone, a stopped download a part
    of the weights."""
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(name, mark, revision=revision) for mark in _MARKS[kind])
    folder = next((Path(path).parent for path in paths if isinstance(path, str)), None)
    if folder is None or kind == "tokenizer":
        return folder
    parts = {part for index in folder.glob("*.index.json") for part in _weight_files(index)}
    complete = all((folder / part).is_file() for part in parts)
    return folder if complete and (parts or any((folder / weights).is_file() for weights in _WEIGHTS)) else None


def _weight_files(index: Path) -> set[str]:
    advice = "delete it from the hub's cache, so that it is fetched again"
    listed = read_json(index, advice, finite=False).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(part, str) for part in listed.values()):
        raise DataError(f"{index} lists no files of weights; {advice}")
    return set(listed.values())


def folders(parent: Path) -> list[str]:
    """Returns the names of the visible folders in `parent`, as suggestions for a wrong path."""
    children = os.scandir(parent) if os.access(parent, os.R_OK) else ()
    return [child.name for child in children if child.is_dir() and not child.name.startswith(".")]
