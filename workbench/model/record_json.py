"""Interventions as JSON: canonical for a store, and as a user writes them in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.model.direction import Direction
from workbench.model.intervene import Intervention, kind_of
from workbench.model.token_choice import tokens_at
from workbench.sites.grammar import full_name
from workbench.store.reader import Rows, Store
from workbench.store.stored_changes import FORMAT, Arrays, StoredChanges, none_ran

_CHOICES = ("at", "key", "keys", "queries")
_LISTS = ("head", "position", "ids")


def stored_changes(records: Sequence[Intervention]) -> tuple[StoredChanges, Arrays]:
    """Returns records in the form in which a store keeps them, and the arrays that they name.

    Raises:
        RequestError: A record that has no JSON form: a function, or a mask of one batch.
    """
    arrays = Arrays()
    return StoredChanges(FORMAT, tuple(_record(record, arrays) for record in records), none_ran(len(records))), arrays


def _record(record: Intervention, arrays: Arrays) -> dict[str, Any]:
    if not is_dataclass(record):
        raise RequestError(f"{record}: a record must be a dataclass to be kept in a store")
    entries = {field.name: _value(record, field.name, arrays) for field in fields(record)}
    return {"kind": kind_of(record)} | entries


def _value(record: Intervention, name: str, arrays: Arrays) -> Any:
    value: Any = getattr(record, name)
    if name in _CHOICES:
        choice = tokens_at(value)
        if isinstance(choice, Tensor):
            raise RequestError(f"{record}: {name} is a mask of one batch; choose tokens by position, id, span or SQL")
        return choice.described()
    if name == "site" and isinstance(value, str):
        return full_name(value)
    if name in _LISTS and value is not None:
        return [int(number) for number in (value if isinstance(value, Sequence) else (value,))]
    if isinstance(value, Direction):
        return arrays.add(value.vector.numpy()) | {"name": value.name, "made_of": dict(value.made_of)}
    if isinstance(value, Tensor):
        wide = value.detach().cpu()
        return arrays.add((wide.float() if wide.is_floating_point() else wide).numpy())
    if isinstance(value, Store | Rows):
        store = value if isinstance(value, Store) else value.store
        ids = "all" if isinstance(value, Store) else arrays.add(value.ids.astype(np.int64))
        return {"store": store.manifest.fingerprint, "name": store.path.name, "rows": ids}
    if value is not None and hasattr(value, "fingerprint"):  # an SAE, whose folder imports this one
        return {"name": value.name, "sha256": value.fingerprint()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise RequestError(f"{record}: {name} is a {type(value).__name__}, which a store cannot keep")
