"""The inverted index: entries of a sparse matrix in row order, sorted by feature in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int, Int64, Integer, UInt, UInt64
from scipy.sparse import csr_array

from workbench.io.errors import RequestError
from workbench.io.tensors import ArrayFile, StreamedArray

T = TypeVar("T")
U = TypeVar("U")
Slices = np.ndarray | StreamedArray
"""An array that is read slice by slice."""
_Piece = list[tuple[int, int]]
"""Parts of the file of keys that are sorted together: first key, and the one after the last."""

ENTRIES = 1 << 20
"""Entries in memory per thread; about 50 bytes each while they are sorted."""
INDEX_MEMORY = 256
"""Megabytes in which an index is built."""
_ENTRY_BYTES = 50
_LEAST_ROWS = 1 << 16  # read at a time, however few entries they have

_THREADS = min(4, 1 + (os.cpu_count() or 1))  # one more than cores, as one waits for the disk


def feature_groups(
    indptr: Int64[np.ndarray, " feature_plus_1"], entries: int = ENTRIES, most: int | None = None
) -> Iterator[slice]:
    """Yields groups of at most `most` consecutive features with at most `entries` entries, or one larger feature."""
    first, features = 0, len(indptr) - 1
    while first < features:
        last = int(np.searchsorted(indptr, indptr[first] + entries, side="right")) - 1
        last = last if most is None else min(last, first + most)
        yield slice(first, max(first + 1, last))
        first = max(first + 1, last)


def feature_sums(
    values: Float[np.ndarray, " entry"], counts: Int64[np.ndarray, " feature"]
) -> Float[np.ndarray, " feature"]:
    """Returns the sums over each feature's entries in float64; `values` in feature order, `counts` of each feature."""
    sums, active = np.zeros(len(counts)), counts > 0
    if active.any():  # for an empty slice, reduceat returns the next element
        starts = np.cumsum(counts) - counts
        sums[active] = np.add.reduceat(values, starts[active], dtype=np.float64)
    return sums


def entry_rows(indptr: Int64[np.ndarray, " row_plus_1"], start: int, stop: int) -> Int64[np.ndarray, " entry"]:
    """Returns the row of each entry from `start` up to `stop`."""
    first = int(np.searchsorted(indptr, start, side="right")) - 1
    last = int(np.searchsorted(indptr, stop, side="left"))
    return np.repeat(np.arange(first, last), np.diff(np.clip(indptr[first : last + 1], start, stop)))


def entries_in_memory(megabytes: int) -> int:
    """Returns the number of entries that each thread may hold, for an index built in about this much memory."""
    return max(1, megabytes * 10**6 // (_ENTRY_BYTES * (_THREADS + 2)))


def invert(
    indptr: Slices,
    feature: Slices,
    value: Slices,
    counts: Int[np.ndarray, " feature"],
    file: ArrayFile,
    spill: Path,
    row_type: str,
    entries: int = ENTRIES,
) -> None:
    """Writes the order by feature into `file`: arrays indptr, row, value; largest values first, ties in row order.

    Two passes with sequential reads and writes: entries are distributed to groups of neighbouring features that fit in
    memory, then each group is sorted. A feature that does not fit is sorted in runs, which are merged in pieces that
    fit. The sort key of an entry is one 64-bit integer, from the top bits: index of its feature in the group, its value
    in descending order, its row. NumPy sorts integers fastest.

    Args:
        indptr: Index of each row's first entry, and the number of entries.
        feature: Feature of each entry, in row order.
        value: Activation of each entry, in row order.
        counts: Number of entries of each feature.
        file: The file to fill.
        spill: Path of a temporary file of 8 bytes per entry.
        row_type: Type of the stored rows.
        entries: Number of entries in memory at a time, per thread.

    Raises:
        RequestError: More rows than fit into the key.
    """
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    plan = _key_plan(len(indptr) - 1, value.dtype, starts, entries)

    def distribute(chunk: tuple[slice, Int64[np.ndarray, " chunk"]]) -> tuple[np.ndarray, np.ndarray]:
        part, rows = chunk
        return plan.distribute(feature[part], value[part], rows)

    def sort(piece: _Piece) -> tuple[Integer[np.ndarray, " key"], Float[np.ndarray, " key"]]:
        rows, values = plan.sort(np.concatenate([_read_keys(spill, first, stop) for first, stop in piece]))
        return rows.astype(row_type), values

    def pieces() -> Iterator[_Piece]:
        for group in plan.groups:
            first, stop = int(starts[group.start]), int(starts[group.stop])
            yield from [[(first, stop)]] if stop - first <= entries else _merge_plan(spill, first, stop, entries)

    file.append("indptr", starts)
    places = starts[[group.start for group in plan.groups]]
    with open(spill, "wb") as out:
        for keys, numbers in _ahead(distribute, _chunks(indptr, entries)):
            start = 0
            for index in np.flatnonzero(numbers):
                out.seek(8 * int(places[index]))
                out.write(keys[start : start + numbers[index]].data)
                start += numbers[index]
            places += numbers
    for rows, values in _ahead(sort, pieces()):
        file.append("row", rows)
        file.append("value", values)
    spill.unlink()


def _chunks(indptr: Slices, entries: int) -> Iterator[tuple[slice, Int64[np.ndarray, " chunk"]]]:
    """Consecutive entries, at most so many, and the row of each; reads the rows in pieces."""
    step = max(entries, _LEAST_ROWS)
    for start in range(0, len(indptr) - 1, step):
        borders = indptr[start : min(start + step, len(indptr) - 1) + 1].astype(np.int64)
        for first in range(int(borders[0]), int(borders[-1]), entries):
            part = slice(first, min(first + entries, int(borders[-1])))
            yield part, start + entry_rows(borders, part.start, part.stop)


def _merge_plan(spill: Path, first: int, stop: int, entries: int) -> list[_Piece]:
    """Sorts keys in runs, in their file, and returns the parts of the runs that belong together, in order.

    Every m-th key of each run is known. Between two keys that are R known keys apart, each of R runs has at most m keys
    more than are known, so a piece has at most 2 R m keys: what fits in memory.
    """
    runs = [(start, min(start + entries, stop)) for start in range(first, stop, entries)]
    spacing = max(1, entries // (2 * len(runs)))
    known = []
    with open(spill, "r+b") as out:
        for start, end in runs:
            keys = _read_keys(spill, start, end)
            keys.sort()
            out.seek(8 * start)
            out.write(keys.data)
            known.append(keys[::spacing].copy())
    pieces, before = [], [start for start, _ in runs]
    for border in np.sort(np.concatenate(known))[len(runs) :: len(runs)]:
        after = []
        for (start, end), sample in zip(runs, known, strict=True):
            later = int(np.searchsorted(sample, border))  # the border lies after the known key before it
            begin = start + max(0, later - 1) * spacing
            after.append(begin + int(np.searchsorted(_read_keys(spill, begin, min(begin + spacing, end)), border)))
        pieces.append(list(zip(before, after, strict=True)))
        before = after
    return [*pieces, [(start, end) for start, (_, end) in zip(before, runs, strict=True)]]


def _read_keys(spill: Path, first: int, stop: int) -> UInt64[np.ndarray, " key"]:
    return np.fromfile(spill, np.uint64, stop - first, offset=8 * first)


@dataclass(frozen=True)
class _KeyPlan:
    """Groups of features, and the keys of their entries."""

    row_bits: int
    dtype: np.dtype
    groups: list[slice]
    group_of: Int[np.ndarray, " feature"]
    high: UInt64[np.ndarray, " feature"]
    """Top bits of the keys: index of the feature in its group."""

    def distribute(
        self,
        feature: Integer[np.ndarray, " chunk"],
        value: Float[np.ndarray, " chunk"],
        row: Int64[np.ndarray, " chunk"],
    ) -> tuple[UInt64[np.ndarray, " chunk"], Int64[np.ndarray, " group"]]:
        """Keys of a chunk of entries, ordered by group, and the number of keys in each group."""
        keys = self.high[feature]
        keys |= _descending(value).astype(np.uint64) << np.uint64(self.row_bits)
        keys |= row.astype(np.uint64)
        by_row = csr_array((keys, self.group_of[feature], [0, len(keys)]), shape=(1, len(self.groups)))
        by_group = by_row.tocsc()  # a counting sort
        return by_group.data, np.diff(by_group.indptr).astype(np.int64)

    def sort(self, keys: UInt64[np.ndarray, " key"]) -> tuple[UInt64[np.ndarray, " key"], Float[np.ndarray, " key"]]:
        """Rows and values of a group's keys, in their final order; overwrites `keys`."""
        keys.sort()
        rows = keys & np.uint64((1 << self.row_bits) - 1)
        keys >>= np.uint64(self.row_bits)
        return rows, _values(keys.astype(f"uint{8 * self.dtype.itemsize}"), self.dtype)


def _key_plan(rows: int, dtype: np.dtype, starts: Int64[np.ndarray, " feature_plus_1"], entries: int) -> _KeyPlan:
    """The plan of features whose entries begin at `starts`, for groups of `entries` entries."""
    low, bits = max(1, (rows - 1).bit_length()), 8 * dtype.itemsize
    if low + bits > 64:
        raise RequestError(f"{rows} rows are too many for an index of {dtype}; give dtype='float16'")
    groups = list(feature_groups(starts, entries, 1 << (64 - low - bits)))
    sizes = [group.stop - group.start for group in groups]
    group_of = np.repeat(np.arange(len(groups), dtype=np.int32), sizes)
    firsts = np.repeat([group.start for group in groups], sizes)
    high = (np.arange(len(starts) - 1) - firsts).astype(np.uint64)
    if low + bits < 64:
        high <<= np.uint64(low + bits)
    return _KeyPlan(low, dtype, groups, group_of, high)


def _descending(value: Float[np.ndarray, " entry"]) -> UInt[np.ndarray, " entry"]:
    """Integers that sort like the values in descending order; -0 as 0."""
    kind = np.dtype(f"uint{8 * value.dtype.itemsize}")
    sign = kind.type(1 << (8 * kind.itemsize - 1))
    bits = np.ascontiguousarray(value).view(kind)
    return np.where(bits > sign, bits, ~(bits | sign))


def _values(keys: UInt[np.ndarray, " entry"], dtype: np.dtype) -> Float[np.ndarray, " entry"]:
    """The inverse of `_descending`."""
    sign = keys.dtype.type(1 << (8 * keys.dtype.itemsize - 1))
    return np.where(keys & sign, keys, ~(keys | sign)).view(dtype)


def _ahead(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`map` that computes a few items ahead in threads; NumPy releases the lock."""
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
