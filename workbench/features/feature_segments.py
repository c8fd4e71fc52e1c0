"""Features of consecutive rows as files that are there as a whole or not at all: what extraction resumes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Integer

from workbench.io import files
from workbench.io.tensors import array_bytes, map_arrays, new_arrays

Span = tuple[int, int]
"""Consecutive rows of a store: the first, and the one behind the last."""


@dataclass(frozen=True)
class Segment:
    """Features of some rows, as the three arrays of a CSR matrix."""

    indptr: Int64[np.ndarray, " row_plus_1"]
    feature: Integer[np.ndarray, " entry"]
    value: Float32[np.ndarray, " entry"]


def joined(parts: list[Segment]) -> Segment:
    """Parts that follow each other as one."""
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    return Segment(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([part.feature for part in parts]),
        np.concatenate([part.value for part in parts]),
    )


def commit(folder: Path, rows: Span, segment: Segment) -> None:
    """Write the segment of `rows`, and only then give it its name."""
    layout = _layout(rows, len(segment.feature), segment.feature.dtype.name)
    with new_arrays(_path(folder, rows), layout) as file:
        for name in layout:
            file.append(name, getattr(segment, name))


def committed(folder: Path) -> Iterator[Span]:
    """Rows of the committed segments, in their order; gaps between them are still to be written."""
    done = 0
    for path in sorted(folder.glob("*-*.safetensors")):
        first, stop = map(int, path.stem.split("-"))
        if first >= done:  # else another worker had written it before, divided otherwise
            yield first, stop
            done = stop


def missing(folder: Path, spans: Sequence[Span]) -> list[Span]:
    """What no committed segment has of these rows, span by span."""
    there, found = list(committed(folder)), []
    for first, stop in spans:
        for begun, ended in there:
            if begun < stop and ended > first:
                if begun > first:
                    found.append((first, begun))
                first = ended
        if first < stop:
            found.append((first, stop))
    return found


def read(folder: Path, rows: Span, kind: str) -> Segment:
    """The committed segment of `rows`, its arrays views of the file. `kind`: the type of its feature ids."""
    path = _path(folder, rows)
    width = np.dtype("float32").itemsize + np.dtype(kind).itemsize
    entries = (array_bytes(path) - 8 * (rows[1] - rows[0] + 1)) // width
    return Segment(**map_arrays(path, _layout(rows, entries, kind)))


def discard(folder: Path, spans: Sequence[Span]) -> None:
    """Remove the segments that have any of these rows."""
    for begun, ended in list(committed(folder)):
        if any(begun < stop and ended > first for first, stop in spans):
            files.remove(_path(folder, (begun, ended)))


def clear(folder: Path) -> None:
    """Remove what is in the folder but the committed segments."""
    known = {_path(folder, rows) for rows in committed(folder)}
    for leftover in set(folder.iterdir()) - known:
        files.remove(leftover)


def _path(folder: Path, rows: Span) -> Path:
    return folder / f"{rows[0]:012d}-{rows[1]:012d}.safetensors"


def _layout(rows: Span, entries: int, kind: str) -> dict[str, tuple[str, int]]:
    return {"indptr": ("int64", rows[1] - rows[0] + 1), "feature": (kind, entries), "value": ("float32", entries)}
