"""Sparsity rules: the pre-activations of a whole store that are kept under a budget of k per row on average.

TopK, of `workbench.sae.choice`, keeps k in each row. Mutual Choice and Feature Choice rank entries of all rows
together, so the entries of one row depend on all others: extraction keeps every candidate above a rising bound, and
selects exactly at the end.
Source: Ayonrinde, Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders (arXiv
2411.02124).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer, UInt32

from workbench.io.errors import RequestError
from workbench.sae.choice import TopK

Entries = tuple[Integer[np.ndarray, " _entry"], Float32[np.ndarray, " _entry"]]
"""Feature ids and activations above 0, in row order, features ascending within a row."""


@dataclass(frozen=True)
class MutualChoice:
    """Keeps the k · rows largest pre-activations of a whole store, as far as they are above 0: k per row on average."""

    k: int

    def __post_init__(self) -> None:
        TopK(self.k)

    def quotas(self, rows: int, features: int) -> Int64[np.ndarray, " group"]:
        """Returns the number of entries that each group may keep; all features are one group."""
        return np.array([self.k * rows])


@dataclass(frozen=True)
class FeatureChoice:
    """Keeps the k · rows / d_sae largest pre-activations of each feature over a whole store, if they are above 0.

    A feature that is above 0 anywhere is not dead, and no feature is active everywhere.
    """

    k: int

    def __post_init__(self) -> None:
        TopK(self.k)

    def quotas(self, rows: int, features: int) -> Int64[np.ndarray, " group"]:
        """Returns the number of entries that each group may keep, k · rows / d_sae, rounded down; a feature is a group.

        Raises:
            RequestError: k is so small that a feature could keep no entry.
        """
        if rows and self.k * rows < features:
            least = -(-features // rows)
            raise RequestError(
                f"FeatureChoice: k {self.k} on {rows} rows leaves less than one entry for each of {features} features; "
                f"k must be at least {least}"
            )
        return np.full(features, self.k * rows // features)


SparsityRule = TopK | MutualChoice | FeatureChoice

SPARSITY_RULES: dict[str, type[TopK] | type[MutualChoice] | type[FeatureChoice]] = {
    "topk": TopK,
    "mutual-choice": MutualChoice,
    "feature-choice": FeatureChoice,
}
"""Name -> rule, each made of k."""


def sparsity_record(rule: SparsityRule) -> dict[str, str | int]:
    """Returns the name and k of a rule, as `features.json` stores them."""
    (name,) = (name for name, kind in SPARSITY_RULES.items() if type(rule) is kind)
    return {"choice": name, "k": rule.k}


class Bound:
    """Rising lower bound of the kept values: enough larger entries have been counted already.

    Counts the entries above a ladder of values for each group, so memory does not depend on the number of rows. The
    largest of the `first` entries sets the scale of the ladder; any entries will do.
    """

    _STEPS = 64, 4096  # ladder steps per group if there are many groups, and if there is one
    _FROM, _TO = 0.05, 2.0  # ends of the ladder, relative to a group's largest first entry

    def __init__(self, quotas: Int64[np.ndarray, " group"], features: int, first: Entries) -> None:
        self._quotas, self._features = quotas, features
        steps = self._STEPS[len(quotas) == 1]
        largest = np.zeros(len(quotas), np.float32)
        np.maximum.at(largest, self._group(first[0]), first[1])
        self._scale = np.where(largest > 0, largest, np.inf).astype(np.float64)
        self._ladder = np.geomspace(self._FROM, self._TO, steps)
        self._counts = np.zeros((len(quotas), steps), np.int64)

    def add(self, entries: Entries) -> None:
        """Counts entries."""
        group = self._group(entries[0])
        step = np.searchsorted(self._ladder, entries[1] / self._scale[group], side="right") - 1
        counted = step >= 0
        places = group[counted] * len(self._ladder) + step[counted]
        self._counts += np.bincount(places, minlength=self._counts.size).reshape(self._counts.shape)

    def threshold(self) -> Float32[np.ndarray, " feature"]:
        """Returns per feature a value that every kept entry exceeds."""
        above = self._counts[:, ::-1].cumsum(1)[:, ::-1]
        enough = (above >= self._quotas[:, None]).sum(1) - 1  # counts decrease along the ladder
        value = np.where(enough >= 0, self._ladder[enough] * np.where(enough >= 0, self._scale, 1), 0)
        below = np.nextafter(np.nextafter(value.astype(np.float32), np.float32(0)), np.float32(0))
        return np.broadcast_to(below, self._features) if len(below) == 1 else below

    def _group(self, feature: Integer[np.ndarray, " _entry"]) -> Integer[np.ndarray, " _entry"]:
        return _grouped(feature, len(self._quotas))


@dataclass(frozen=True)
class Cut:
    """Smallest kept value of each group, as bits, and the number of first entries with that value that are kept."""

    last: UInt32[np.ndarray, " group"]
    ties: Int64[np.ndarray, " group"]
    entries: int
    """Number of kept entries in all groups."""

    def masks(self, chunks: Iterable[Entries]) -> Iterator[Bool[np.ndarray, " _entry"]]:
        """Yields the mask of kept entries for each chunk; the chunks are those of `find_cut`, in order."""
        tie_counts = np.zeros(len(self.last), np.int64)
        for feature, value in chunks:
            group, bits = _grouped(feature, len(self.last)), value.view(np.uint32)
            mask = bits > self.last[group]
            tied = np.flatnonzero(bits == self.last[group])
            tied_group = group[tied]
            order = np.argsort(tied_group, kind="stable")
            rank = np.empty(len(tied), np.int64)
            starts = np.searchsorted(tied_group[order], tied_group[order])
            rank[order] = np.arange(len(tied)) - starts
            mask[tied] = rank + tie_counts[tied_group] < self.ties[tied_group]
            tie_counts += np.bincount(tied_group, minlength=len(tie_counts))
            yield mask


def find_cut(entries: Callable[[], Iterable[Entries]], quotas: Int64[np.ndarray, " group"]) -> Cut:
    """Returns the selection of the largest entries of each group up to its quota; ties go to the first.

    Radix selection: the bits of positive floats are ordered as the floats, and each of four passes fixes eight bits of
    the smallest kept value. Memory: 256 counts per group.

    Args:
        entries: Returns all entries in chunks; called four times.
        quotas: Number of entries that each group may keep.
    """
    last, remaining = np.zeros(len(quotas), np.uint32), quotas.astype(np.int64)
    total, short = 0, np.zeros(len(quotas), bool)
    for shift in (24, 16, 8, 0):
        counts = np.zeros((len(quotas), 256), np.int64)
        for feature, value in entries():
            group, bits = _grouped(feature, len(quotas)), value.view(np.uint32)
            digit = bits >> np.uint32(shift)
            if shift < 24:
                candidate = digit >> np.uint32(8) == last[group] >> np.uint32(shift + 8)
                group, digit = group[candidate], digit[candidate]
            places = group * 256 + (digit & np.uint32(255))
            counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
        if shift == 24:
            short = counts.sum(1) <= quotas
            total = int(np.minimum(counts.sum(1), quotas).sum())
        above = counts[:, ::-1].cumsum(1)
        place = np.minimum((above < remaining[:, None]).sum(1), 255)
        remaining = remaining - np.where(
            place > 0, np.take_along_axis(above, np.maximum(place - 1, 0)[:, None], 1)[:, 0], 0
        )
        last |= (255 - place).astype(np.uint32) << np.uint32(shift)
    return Cut(np.where(short, np.uint32(0), last), np.where(short, 0, remaining), total)


def _grouped(feature: Integer[np.ndarray, " _entry"], groups: int) -> Int64[np.ndarray, " _entry"]:
    return np.zeros(len(feature), np.int64) if groups == 1 else feature.astype(np.int64)
