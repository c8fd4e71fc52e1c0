"""The inverted index: the entries of a sparse matrix by row, sorted anew by feature, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int, Int64, Integer, UInt, UInt64
from scipy.sparse import csr_array

from workbench.io.errors import RequestError
from workbench.io.tensors import ArrayFile

T = TypeVar("T")
U = TypeVar("U")

ENTRIES = 1 << 20
"""Entries held at a time by each thread; about 50 bytes each while they are sorted."""

_THREADS = min(4, 1 + (os.cpu_count() or 1))  # one more than cores: this one waits for the disk


def feature_groups(
    indptr: Int64[np.ndarray, " feature_plus_1"], entries: int = ENTRIES, most: int | None = None
) -> Iterator[slice]:
    """Consecutive features, `most` at most, that have `entries` entries or fewer together; one that has more comes
    alone."""
    first, features = 0, len(indptr) - 1
    while first < features:
        fitting = int(np.searchsorted(indptr, indptr[first] + entries, side="right")) - 1
        fitting = fitting if most is None else min(fitting, first + most)
        yield slice(first, max(first + 1, fitting))
        first = max(first + 1, fitting)


def feature_sums(
    values: Float[np.ndarray, " entry"], counts: Int64[np.ndarray, " feature"]
) -> Float[np.ndarray, " feature"]:
    """Sums over each feature's entries, in float64; `values` in the order of features, `counts` of each."""
    sums, some = np.zeros(len(counts)), counts > 0
    if some.any():  # reduceat gives an empty stretch the element that follows it
        starts = np.cumsum(counts) - counts
        sums[some] = np.add.reduceat(values, starts[some], dtype=np.float64)
    return sums


def entry_rows(indptr: Int64[np.ndarray, " row_plus_1"], start: int, stop: int) -> Int64[np.ndarray, " entry"]:
    """The row of each entry from `start` up to `stop`."""
    first = int(np.searchsorted(indptr, start, side="right")) - 1
    last = int(np.searchsorted(indptr, stop, side="left"))
    return np.repeat(np.arange(first, last), np.diff(np.clip(indptr[first : last + 1], start, stop)))


def invert(
    indptr: Int64[np.ndarray, " row_plus_1"],
    feature: Integer[np.ndarray, " entry"],
    value: Float[np.ndarray, " entry"],
    counts: Int[np.ndarray, " feature"],
    file: ArrayFile,
    spill: Path,
    row_type: str,
    entries: int = ENTRIES,
) -> None:
    """Write the by-feature order into `file`: arrays indptr, row, value; largest values first, ties in row order.

    `feature`, `value`: the entries by row; `counts`: entries of each feature; `spill`: a file to use meanwhile, 8 bytes
    an entry. Two passes: entries are dealt to groups of neighbouring features that fit in memory, then each group is
    sorted. Everything is read and written in long stretches.

    An entry travels as one integer of 64 bits, from the top: its feature's place in the group, its value so that the
    largest comes first, its row. Sorting them is all there is to do, and NumPy sorts nothing faster.
    """
    low, bits = max(1, (len(indptr) - 2).bit_length()), 8 * value.dtype.itemsize
    if low + bits > 64:
        raise RequestError(f"{len(indptr) - 1} rows are too many for an index of {value.dtype}; float16 takes more")
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    groups = list(feature_groups(starts, entries, 1 << (64 - low - bits)))
    sizes = [group.stop - group.start for group in groups]
    group_of = np.repeat(np.arange(len(groups), dtype=np.int32), sizes)
    firsts = np.repeat([group.start for group in groups], sizes)
    high = (np.arange(len(counts)) - firsts).astype(np.uint64)
    if low + bits < 64:
        high <<= np.uint64(low + bits)

    def dealt(start: int) -> tuple[UInt64[np.ndarray, " dealt"], Int64[np.ndarray, " group"]]:
        """The keys of a stretch of entries, those of each group together; how many each has."""
        own = slice(start, min(start + entries, len(feature)))
        keys = high[feature[own]]
        keys |= _falling(value[own]).astype(np.uint64) << np.uint64(low)
        keys |= entry_rows(indptr, own.start, own.stop).astype(np.uint64)
        by_row = csr_array((keys, group_of[feature[own]], [0, len(keys)]), shape=(1, len(groups)))
        by_group = by_row.tocsc()  # a counting sort
        return by_group.data, np.diff(by_group.indptr).astype(np.int64)

    def in_order(group: slice) -> tuple[Integer[np.ndarray, " sorted"], Float[np.ndarray, " sorted"]]:
        """Rows and values of a group's entries."""
        first, stop = int(starts[group.start]), int(starts[group.stop])
        keys = np.fromfile(spill, np.uint64, stop - first, offset=8 * first)
        keys.sort()
        rows = (keys & np.uint64((1 << low) - 1)).astype(row_type)
        keys >>= np.uint64(low)
        return rows, _values(keys.astype(f"uint{bits}"), value.dtype)

    file.append("indptr", starts)
    places = starts[[group.start for group in groups]]
    with open(spill, "wb") as out:
        for keys, dealing in _ahead(dealt, range(0, len(feature), entries)):
            done = 0
            for index in np.flatnonzero(dealing):
                out.seek(8 * int(places[index]))
                out.write(keys[done : done + dealing[index]])
                done += dealing[index]
            places += dealing
    for rows, values in _ahead(in_order, groups):
        file.append("row", rows)
        file.append("value", values)
    spill.unlink()


def _falling(value: Float[np.ndarray, " entry"]) -> UInt[np.ndarray, " entry"]:
    """Integers in the order of values from the largest to the smallest; -0 as 0."""
    kind = np.dtype(f"uint{8 * value.dtype.itemsize}")
    sign = kind.type(1 << (8 * kind.itemsize - 1))
    bits = np.ascontiguousarray(value).view(kind)
    return np.where(bits > sign, bits, ~(bits | sign))


def _values(falling: UInt[np.ndarray, " entry"], dtype: np.dtype) -> Float[np.ndarray, " entry"]:
    """The values that `_falling` was given."""
    sign = falling.dtype.type(1 << (8 * falling.dtype.itemsize - 1))
    return np.where(falling & sign, falling, ~(falling | sign)).view(dtype)


def _ahead(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`map`, a few items ahead in threads: NumPy lets them run side by side."""
    waiting: deque = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
