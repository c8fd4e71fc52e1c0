"""The inverted index: the entries of a sparse matrix by row, sorted anew by feature, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Int64, Integer

from workbench.sae.arrays import ArrayFile

ENTRIES = 1 << 22
"""Entries held at a time; about 50 bytes each while they are sorted."""


def feature_groups(indptr: Int64[np.ndarray, " feature_plus_1"], entries: int = ENTRIES) -> Iterator[slice]:
    """Consecutive features that have at most `entries` entries together; one that has more comes alone."""
    first, features = 0, len(indptr) - 1
    while first < features:
        fitting = int(np.searchsorted(indptr, indptr[first] + entries, side="right")) - 1
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

    `feature`, `value`: the entries by row; `counts`: entries of each feature; `spill`: a file to use meanwhile, as
    large as the entries. Two passes: entries are dealt to groups of neighbouring features that fit in memory, then
    each group is sorted. Everything is read and written in long stretches, and every sort is a radix sort.
    """
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    groups = list(feature_groups(starts, entries))
    group_of = np.repeat(np.arange(len(groups)), [group.stop - group.start for group in groups])
    group_of = group_of.astype(np.uint16 if len(groups) <= 1 << 16 else np.int64)
    places = starts[[group.start for group in groups]]
    record = np.dtype([("feature", feature.dtype), ("row", row_type), ("value", value.dtype)])
    file.append("indptr", starts)
    with open(spill, "w+b") as dealt:
        for start in range(0, len(feature), entries):
            stop = min(start + entries, len(feature))
            records = np.empty(stop - start, record)
            records["feature"], records["value"] = feature[start:stop], value[start:stop]
            records["row"] = entry_rows(indptr, start, stop)
            group = group_of[feature[start:stop]]
            order = np.argsort(group, kind="stable")
            records, dealing = records[order], np.bincount(group, minlength=len(groups))
            done = 0
            for index in np.flatnonzero(dealing):
                dealt.seek(int(places[index]) * record.itemsize)
                dealt.write(records[done : done + dealing[index]])
                done += dealing[index]
            places += dealing
        for group in groups:
            dealt.seek(int(starts[group.start]) * record.itemsize)
            records = np.fromfile(dealt, record, int(starts[group.stop] - starts[group.start]))
            order = _order(records["feature"], records["value"], group.start)
            file.append("row", records["row"][order])
            file.append("value", records["value"][order])
    spill.unlink()


def _order(
    feature: Integer[np.ndarray, " entry"], value: Float[np.ndarray, " entry"], first: int
) -> Int64[np.ndarray, " entry"]:
    """The stable order by feature, of which `first` is the lowest, and from the largest value to the smallest.

    What `np.lexsort` gives, at several times its speed: NumPy has a radix sort for integers of 16 bits.
    """
    kind = np.dtype(f"uint{8 * value.dtype.itemsize}")
    sign = kind.type(1 << (8 * kind.itemsize - 1))
    bits = np.ascontiguousarray(value).view(kind)
    bits = np.where(bits == sign, 0, bits)  # -0 is 0
    falling = np.where(bits & sign, bits, ~(bits | sign))
    local = (feature.astype(np.int64) - first).astype(np.uint32)
    parts = [(falling >> shift).astype(np.uint16) for shift in range(0, 8 * kind.itemsize, 16)]
    parts += [(local >> shift).astype(np.uint16) for shift in (0, 16) if shift == 0 or local.max(initial=0) >> 16]
    order = np.argsort(parts[0], kind="stable")
    for part in parts[1:]:
        order = order[np.argsort(part[order], kind="stable")]
    return order
