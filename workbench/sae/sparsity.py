"""Sparsity as one budget: which pre-activations of a whole store stay, when rows or features compete for k a row.

TopK, of `workbench.sae.encode`, gives each row k. The others here compare rows with each other, so what a row keeps
depends on all of them: extraction keeps what may stay, by a bound that rises as rows are seen, and cuts exactly at the
end.
Ayonrinde, Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders (arXiv 2411.02124).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer, UInt32

from workbench.io.errors import RequestError
from workbench.sae.encode import TopK

Entries = tuple[Integer[np.ndarray, " _entry"], Float32[np.ndarray, " _entry"]]
"""Features and activations above 0, in the order of rows, features ascending within a row."""


@dataclass(frozen=True)
class MutualChoice:
    """The k · rows largest pre-activations of a whole store, those of them that are above 0: k a row on average."""

    k: int

    def __post_init__(self) -> None:
        TopK(self.k)

    def quotas(self, rows: int, features: int) -> Int64[np.ndarray, " group"]:
        """Entries that each group may keep: here one group, everything."""
        return np.array([self.k * rows])


@dataclass(frozen=True)
class FeatureChoice:
    """The k · rows / d_sae largest pre-activations of each feature over a whole store, those of them that are above 0:
    no feature is dead that is above 0 anywhere, and none is on everywhere."""

    k: int

    def __post_init__(self) -> None:
        TopK(self.k)

    def quotas(self, rows: int, features: int) -> Int64[np.ndarray, " group"]:
        """Entries that each group may keep: here each feature is one, and the division rounds down.

        RequestError where that leaves none."""
        if rows and self.k * rows < features:
            least = -(-features // rows)
            raise RequestError(
                f"FeatureChoice: k {self.k} on {rows} rows is less than one for each of {features} features; "
                f"k must be at least {least}"
            )
        return np.full(features, self.k * rows // features)


Allocation = TopK | MutualChoice | FeatureChoice
CHOICES: dict[str, type[TopK] | type[MutualChoice] | type[FeatureChoice]] = {
    "topk": TopK,
    "mutual-choice": MutualChoice,
    "feature-choice": FeatureChoice,
}
"""Name -> allocation, each made of k."""


def allocation_record(allocation: Allocation) -> dict[str, Any]:
    """What a record says of it."""
    (name,) = (name for name, kind in CHOICES.items() if type(allocation) is kind)
    return {"choice": name, **asdict(allocation)}


class Bound:
    """Rises as entries are seen: below it nothing stays, because enough that is larger was seen already.

    Counts entries above a ladder of values for each group, so memory does not depend on rows. Made of the first
    entries, whose largest sets the ladder; they may be any.
    """

    _STEPS = 64, 4096  # of each of many groups, of one
    _FROM, _TO = 0.05, 2.0  # of a group's largest among the first entries

    def __init__(self, quotas: Int64[np.ndarray, " group"], features: int, first: Entries) -> None:
        self._quotas, self._features = quotas, features
        steps = self._STEPS[len(quotas) == 1]
        largest = np.zeros(len(quotas), np.float32)
        np.maximum.at(largest, self._group(first[0]), first[1])
        self._scale = np.where(largest > 0, largest, np.inf).astype(np.float64)
        self._ladder = np.geomspace(self._FROM, self._TO, steps)
        self._counts = np.zeros((len(quotas), steps), np.int64)

    def add(self, entries: Entries) -> None:
        """Count what was seen."""
        group = self._group(entries[0])
        step = np.searchsorted(self._ladder, entries[1] / self._scale[group], side="right") - 1
        counted = step >= 0
        places = group[counted] * len(self._ladder) + step[counted]
        self._counts += np.bincount(places, minlength=self._counts.size).reshape(self._counts.shape)

    def threshold(self) -> Float32[np.ndarray, " feature"]:
        """Entries not above it are not among those that stay."""
        above = self._counts[:, ::-1].cumsum(1)[:, ::-1]
        enough = (above >= self._quotas[:, None]).sum(1) - 1  # counts fall along the ladder
        value = np.where(enough >= 0, self._ladder[enough] * np.where(enough >= 0, self._scale, 1), 0)
        below = np.nextafter(np.nextafter(value.astype(np.float32), np.float32(0)), np.float32(0))
        return np.broadcast_to(below, self._features) if len(below) == 1 else below

    def _group(self, feature: Integer[np.ndarray, " _entry"]) -> Integer[np.ndarray, " _entry"]:
        return _grouped(feature, len(self._quotas))


@dataclass(frozen=True)
class Cut:
    """Where each group ends: the bits of its last value, and how many entries of that value stay, the first ones."""

    last: UInt32[np.ndarray, " group"]
    ties: Int64[np.ndarray, " group"]
    entries: int
    """Entries that stay, of all groups."""

    def kept(self, stretches: Iterable[Entries]) -> Iterator[Bool[np.ndarray, " _entry"]]:
        """What stays of each stretch of entries; together they are all that were cut, in order."""
        seen = np.zeros(len(self.last), np.int64)
        for feature, value in stretches:
            group, bits = _grouped(feature, len(self.last)), value.view(np.uint32)
            kept = bits > self.last[group]
            tied = np.flatnonzero(bits == self.last[group])
            owner = group[tied]
            order = np.argsort(owner, kind="stable")
            rank = np.empty(len(tied), np.int64)
            starts = np.searchsorted(owner[order], owner[order])
            rank[order] = np.arange(len(tied)) - starts
            kept[tied] = rank + seen[owner] < self.ties[owner]
            seen += np.bincount(owner, minlength=len(seen))
            yield kept


def find_cut(entries: Callable[[], Iterable[Entries]], quotas: Int64[np.ndarray, " group"]) -> Cut:
    """The largest entries of each group, as many as its quota; among equal ones those that come first.

    `entries` gives all of them, stretch by stretch, and is called four times: each time eight more bits of the last
    value are known (a radix selection: bits of floats above 0 are in the order of the floats). Memory is 256 counts a
    group.
    """
    last, left = np.zeros(len(quotas), np.uint32), quotas.astype(np.int64)
    total, short = 0, np.zeros(len(quotas), bool)
    for shift in (24, 16, 8, 0):
        counts = np.zeros((len(quotas), 256), np.int64)
        for feature, value in entries():
            group, bits = _grouped(feature, len(quotas)), value.view(np.uint32)
            digit = bits >> np.uint32(shift)
            if shift < 24:
                own = digit >> np.uint32(8) == last[group] >> np.uint32(shift + 8)
                group, digit = group[own], digit[own]
            places = group * 256 + (digit & np.uint32(255))
            counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
        if shift == 24:
            short = counts.sum(1) <= quotas
            total = int(np.minimum(counts.sum(1), quotas).sum())
        above = counts[:, ::-1].cumsum(1)
        place = np.minimum((above < left[:, None]).sum(1), 255)
        left = left - np.where(place > 0, np.take_along_axis(above, np.maximum(place - 1, 0)[:, None], 1)[:, 0], 0)
        last |= (255 - place).astype(np.uint32) << np.uint32(shift)
    return Cut(np.where(short, np.uint32(0), last), np.where(short, 0, left), total)


def _grouped(feature: Integer[np.ndarray, " _entry"], groups: int) -> Int64[np.ndarray, " _entry"]:
    return np.zeros(len(feature), np.int64) if groups == 1 else feature.astype(np.int64)
