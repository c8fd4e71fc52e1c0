"""Interventions in a JSON file, as the command line takes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from workbench.io.checks import as_path
from workbench.io.errors import RequestError, nearest, shown
from workbench.io.parse import read_json
from workbench.model.attention_records import BiasAttention, RedistributeAttention, ScaleAttention
from workbench.model.block_records import SkipBlock, SwapBlocks
from workbench.model.direction import load_direction
from workbench.model.embedding_records import EmbedTokens
from workbench.model.intervene import Intervention, kind_of
from workbench.model.row_records import Add, Project, Set, Zero
from workbench.model.stored_attention import FreezePattern
from workbench.model.stored_rows import Mean, Patch, Resample
from workbench.model.token_choice import Tokens
from workbench.sae.feature_record import Feature
from workbench.sae.load import load_sae
from workbench.store.reader import Rows, Store, open_store

KINDS: Mapping[str, type[Intervention]] = {
    kind_of(kind): kind
    for kind in (
        *(Set, Zero, Add, Project, Mean, Resample, Patch),
        *(ScaleAttention, BiasAttention, RedistributeAttention, FreezePattern),
        *(SkipBlock, SwapBlocks, EmbedTokens, Feature),
    )
}
"""Kinds of records by their names in JSON."""

_CHOICES = ("at", "key", "keys", "queries")


def read_interventions(path: str | os.PathLike[str]) -> tuple[Intervention, ...]:
    """Reads the interventions in a JSON file: `{"records": [{"kind": "zero", "site": "z.3", "head": 0}]}`.

    Fields are those of the records. A choice of tokens is a position, a list, "all", "new", or an object with any of
    index, ids, span and sql; a slice is `{"start": 2, "stop": null}`. `direction` is the path of a file that
    `Direction.save` wrote; `of` is `{"store": PATH, "where": SQL}`; `sae` is a directory. Paths count from the file.

    Raises:
        RequestError: Another structure, an unknown kind or field, or a file that cannot be used.
        DataError: The file is missing or no JSON.
    """
    path = as_path("path", path)
    value = read_json(path, "give a JSON file with interventions")
    records = value.get("records")
    if records == []:
        raise RequestError(f"{path}: the list of records is empty; name one or more, or leave the file out")
    if value.keys() != {"records"} or not isinstance(records, list):
        raise RequestError(f'{path} must be an object with one key, "records": a list of records')
    return tuple(_record(entry, f"{path}: record {number}", path.parent) for number, entry in enumerate(records))


def _record(entry: Any, where: str, folder: Path) -> Intervention:
    kind = entry.get("kind") if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or not isinstance(kind, str) or kind not in KINDS:
        close = nearest(str(kind), KINDS) or f"; kinds: {', '.join(KINDS)}"
        raise RequestError(f"{where}: kind is {shown(kind)}, which is none{close}")
    record_type = KINDS[kind]
    known: dict[str, Field[Any]] = {field.name: field for field in fields(record_type)}  # pyright: ignore[reportArgumentType]
    settings = {name: value for name, value in entry.items() if name != "kind"}
    if unknown := sorted(settings.keys() - known.keys()):
        raise RequestError(f"{where}: {kind} has no field {unknown[0]!r}; it has {', '.join(known)}")
    required = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    if missing := [name for name in required if name not in settings]:
        raise RequestError(f"{where}: {kind} needs the field {missing[0]!r}")
    try:
        return record_type(**{name: _value(name, value, folder) for name, value in settings.items()})
    except (RequestError, TypeError, ValueError) as error:
        raise RequestError(f"{where}: {error}") from None


def _value(name: str, value: Any, folder: Path) -> Any:
    if name in _CHOICES and isinstance(value, dict):
        return choice_of(value)
    if name == "direction" and isinstance(value, str):
        return load_direction(folder / value)
    if name in ("value", "vectors", "direction") and isinstance(value, list):
        import torch  # seconds

        return torch.tensor(value, dtype=torch.float32)
    if name == "of":
        return _donors(value, folder)
    if name == "sae":
        return load_sae(str(folder / value) if (folder / str(value)).exists() else value, device="cpu")
    return value


def choice_of(value: dict[str, Any]) -> Tokens | slice:
    """Returns the choice of tokens that an object describes: a slice, or any of index, ids, span and sql."""
    if value.keys() <= {"start", "stop", "step"}:
        return slice(value.get("start"), value.get("stop"), value.get("step"))
    if unknown := sorted(value.keys() - {"index", "ids", "span", "sql"}):
        raise RequestError(f"a choice of tokens has no {unknown[0]!r}; it has index, ids, span and sql")
    index = value.get("index", "all")
    return Tokens(**{**value, "index": choice_of(index) if isinstance(index, dict) else index})


def _donors(value: Any, folder: Path) -> Store | Rows:
    if not isinstance(value, dict) or "store" not in value or value.keys() - {"store", "where"}:
        raise RequestError(f'of must be {{"store": PATH, "where": SQL}}, where may be left out; not {shown(value)}')
    store = open_store(folder / value["store"])
    return store.where(value["where"]) if value.get("where") else store
