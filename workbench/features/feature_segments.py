"""Segments of sparse features: files of consecutive rows, each whole or absent, from which extraction resumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Integer

from workbench.io import files
from workbench.io.tensors import array_bytes, map_arrays, new_arrays

Span = tuple[int, int]
"""Consecutive rows of a store: the first, and the one after the last."""


@dataclass(frozen=True)
class SparseSegment:
    """Features of consecutive rows as the three arrays of a CSR matrix."""

    indptr: Int64[np.ndarray, " row_plus_1"]
    feature: Integer[np.ndarray, " entry"]
    value: Float32[np.ndarray, " entry"]


def concatenate(parts: Sequence[SparseSegment]) -> SparseSegment:
    """Returns consecutive parts as one segment."""
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    return SparseSegment(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([part.feature for part in parts]),
        np.concatenate([part.value for part in parts]),
    )


@dataclass(frozen=True)
class SegmentFolder:
    """The folder of committed segments. Any process may add some."""

    path: Path

    def write(self, span: Span, segment: SparseSegment) -> None:
        """Commits the segment of these rows."""
        layout = _layout(span, len(segment.feature), segment.feature.dtype.name)
        with new_arrays(self._file(span), layout) as file:
            for name in layout:
                file.append(name, getattr(segment, name))

    def read(self, span: Span, feature_type: str) -> SparseSegment:
        """Returns the committed segment of these rows; its arrays are views of the file."""
        path = self._file(span)
        width = np.dtype("float32").itemsize + np.dtype(feature_type).itemsize
        entries = (array_bytes(path) - 8 * (span[1] - span[0] + 1)) // width
        return SparseSegment(**map_arrays(path, _layout(span, entries, feature_type)))

    def spans(self) -> Iterator[Span]:
        """Yields the rows of the committed segments in order; rows in gaps are not encoded yet."""
        end = 0
        for path in sorted(self.path.glob("*-*.safetensors")):
            first, stop = map(int, path.stem.split("-"))
            if first >= end:  # else another process had encoded these rows, divided differently
                yield first, stop
                end = stop

    def missing_spans(self, spans: Sequence[Span]) -> list[Span]:
        """Returns the rows of `spans` that no committed segment has, in order and span by span."""
        committed, missing = list(self.spans()), []
        for first, stop in spans:
            for start, end in committed:
                if start < stop and end > first:
                    if start > first:
                        missing.append((first, start))
                    first = end
            if first < stop:
                missing.append((first, stop))
        return missing

    def discard(self, spans: Sequence[Span]) -> None:
        """Removes the segments that have any of these rows."""
        for start, end in list(self.spans()):
            if any(start < stop and end > first for first, stop in spans):
                files.remove(self._file((start, end)))

    def clean(self) -> None:
        """Removes everything but the committed segments."""
        committed = {self._file(span) for span in self.spans()}
        for leftover in set(self.path.iterdir()) - committed:
            files.remove(leftover)

    def _file(self, span: Span) -> Path:
        return self.path / f"{span[0]:012d}-{span[1]:012d}.safetensors"


def _layout(span: Span, entries: int, feature_type: str) -> dict[str, tuple[str, int]]:
    return {
        "indptr": ("int64", span[1] - span[0] + 1),
        "feature": (feature_type, entries),
        "value": ("float32", entries),
    }
