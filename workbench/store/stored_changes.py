"""Interventions of a recording, as a store keeps them: canonical records, their arrays, and what they did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from workbench.io import files
from workbench.io.files import sha256_bytes
from workbench.io.parse import to_json
from workbench.io.tensors import header_bytes

FORMAT = 1
ARRAYS = "interventions"
"""Folder of the arrays that records name, each under its SHA-256."""


@dataclass(frozen=True)
class Ran:
    """Counts of one record over the committed rows."""

    passes: int
    """Forward passes that reached it."""
    rows: int
    """Tokens that it chose; for attention, queries."""
    changed: int | None
    """Chosen tokens whose values differ afterwards; None where these are not compared, as in attention."""
    exempt: int
    """Chosen tokens at which the change is not defined, left as they are."""
    relative_change: float | None
    """Mean of ‖x' - x‖ / ‖x‖ over the chosen tokens; None without any, or where these are not compared."""


@dataclass(frozen=True)
class StoredChanges:
    """Interventions with which a store was recorded."""

    format: int
    records: tuple[dict[str, Any], ...]
    """Records in canonical form: full names of sites, explicit defaults, arrays and stores by their SHA-256."""
    ran: tuple[Ran, ...]
    """What each record did."""

    def __post_init__(self) -> None:
        if self.format != FORMAT or len(self.records) != len(self.ran) or not self.records:
            raise ValueError(f"interventions of format {self.format} with {len(self.ran)} counts; expected {FORMAT}")

    @property
    def digest(self) -> str:
        """SHA-256 of the records."""
        return sha256_bytes(to_json({"records": list(self.records)}).encode())

    @property
    def names(self) -> list[str]:
        """One short text for each record: its kind and its site or layer."""
        return [record_name(record) for record in self.records]


def record_name(record: Mapping[str, Any]) -> str:
    """Returns the kind of a record with its place: `zero blocks.3.attn.hook_z head 0`."""
    site, head = record.get("site"), record.get("head")
    places = [f"{name} {record[name]}" for name in ("layer", "a", "b", "id") if record.get(name) is not None]
    heads = "" if head is None else f"head {', '.join(map(str, head))}"
    return " ".join(part for part in (str(record["kind"]), str(site or ""), *places, heads) if part)


def check_metric(metric: Mapping[str, Any]) -> None:
    """Checks that a recorded metric has what `metric_name` reads.

    Raises:
        ValueError: It has no kind, or no places.
    """
    if not isinstance(metric.get("kind"), str) or not isinstance(metric.get("at"), dict):
        raise ValueError(
            f"gradient_of has the keys {', '.join(map(repr, metric))}; a text kind and a record at expected"
        )


def metric_name(metric: Mapping[str, Any]) -> str:
    """Returns what a recorded metric is, as one phrase: `logit_difference, token ' Mary', against ' John', at -1`."""
    at = {name: value for name, value in metric["at"].items() if name != "index" or value != "all"} or {"index": "all"}
    places = [str(value if not isinstance(value, list) else ", ".join(map(str, value))) for value in at.values()]
    ordered = sorted(metric.items(), key=lambda entry: entry[0].startswith("against"))
    named = [f"{name} {value!r}" for name, value in ordered if name not in ("kind", "at") and value is not None]
    return ", ".join([str(metric["kind"]), *named, f"at {' and '.join(places)}"])


def none_ran(count: int) -> tuple[Ran, ...]:
    """Returns counts of records that have done nothing yet."""
    return tuple(Ran(0, 0, 0, 0, None) for _ in range(count))


def added(first: Sequence[Ran], second: Sequence[Ran]) -> tuple[Ran, ...]:
    """Returns the counts of both together, record by record."""
    return tuple(_sum((a, b)) for a, b in zip(first, second, strict=True))


def _sum(counts: Iterable[Ran]) -> Ran:
    counts = list(counts)
    known = [count for count in counts if count.relative_change is not None and count.rows]
    rows = sum(count.rows for count in known)
    relative = sum((count.relative_change or 0.0) * count.rows for count in known) / rows if rows else None
    compared = [count.changed for count in counts]
    changed = None if None in compared else sum(number or 0 for number in compared)
    totals = {name: sum(getattr(count, name) for count in counts) for name in ("passes", "rows", "exempt")}
    return Ran(**totals, changed=changed, relative_change=relative)


@dataclass
class Arrays:
    """Arrays that records name, by their SHA-256."""

    values: dict[str, Shaped[np.ndarray, ...]] = field(default_factory=dict)

    def add(self, array: Shaped[np.ndarray, ...]) -> dict[str, Any]:
        """Keeps an array and returns how a record names it."""
        array = np.ascontiguousarray(array)
        name = f"{array.dtype} {array.shape} ".encode()
        digest = sha256_bytes(name + array.tobytes())
        self.values[digest] = array
        return {"array": f"sha256:{digest}", "shape": list(array.shape)}

    def write(self, store: Path) -> None:
        """Writes the arrays that a store does not have yet."""
        for digest, array in self.values.items():
            path = store / ARRAYS / f"{digest}.safetensors"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                header = header_bytes("array", str(array.dtype), array.shape, {})
                files.replace_file(path, header + array.tobytes())
