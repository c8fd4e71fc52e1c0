"""Records that set rows of a site to rows of a store: their mean, random ones, or those of the same tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from workbench.io.checks import SEEDS, check
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.model.row_changes import Change, ChosenRows, Head, Place, RowIntervention, SiteIntervention
from workbench.model.row_records import named
from workbench.model.token_choice import At, tokens_at, whole
from workbench.store.reader import ActivationArray, Rows, Store, StoreOrPath, opened

_BLOCK = 8192  # rows of a store that are read at a time


class StoreIntervention(SiteIntervention):
    """A record that takes rows of a store, which may be given by its path."""

    of: StoreOrPath | Rows

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", opened_donors(self.of))


def opened_donors(of: StoreOrPath | Rows) -> Store | Rows:
    """Returns what a record takes rows of, with a store in place of its path."""
    return opened(of) if isinstance(of, str | os.PathLike) else of


@dataclass(frozen=True, eq=False)
class Mean(StoreIntervention):
    """Sets the chosen rows of a site to a mean of a store's rows (mean ablation).

    One massive row moves a mean: leave sinks out with `of=store.where("position > 0")`.
    """

    site: str
    of: StoreOrPath | Rows
    """Rows of which the mean is taken: all of a store, which may be given by its path, or those that SQL selects."""
    per: Literal["site", "position", "token"] = "site"
    """"site": one mean; "position": of the rows at the same position; "token": of the rows with the same token id."""
    at: At = field(default="all", kw_only=True)
    head: Head = field(default=None, kw_only=True)

    sets = True

    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of rows; see `RowIntervention.change`."""
        check("per", self.per, one_of=("site", "position", "token"))
        rows, _array = donor_rows(self.of, place)
        return partial(_mean, self, place, _means(rows, place.site.name, self.per))

    def __str__(self) -> str:
        return f"mean of {len(opened_donors(self.of)):,} rows at {named(self.site, self.head)}"


@lru_cache(4)
def _means(rows: Rows, site: str, per: str) -> tuple[Int64[np.ndarray, " group"], Float[Tensor, "group ..."]]:
    """Keys of the groups, ascending, and the mean of each, in float64."""
    array = rows.store[site]
    column = {"position": "position", "token": "token_id"}.get(per)
    keys = np.zeros(len(rows), np.int64) if column is None else rows.tokens[column].to_numpy().astype(np.int64)
    groups, number, counts = np.unique(keys, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(groups), *array.site.shape, dtype=torch.float64, device="cpu")
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        sums.index_add_(0, torch.from_numpy(number[part]), array[rows.ids[part]].double())
    means = sums / torch.from_numpy(counts).reshape(-1, *[1] * (sums.ndim - 1))
    if not bool(means.isfinite().all()):
        raise RequestError(f"of: a row of {site} in {rows.store.path} is not finite, so its mean is not; leave it out")
    return groups, means


def _mean(
    record: Mean, place: Place, means: tuple[np.ndarray, Tensor], rows: Tensor, chosen_rows: ChosenRows
) -> Tensor:
    groups, values = means
    values = head_rows(values, place)
    if record.per == "site":
        return values[0].to(rows).expand_as(rows)
    keys = (chosen_rows.position if record.per == "position" else chosen_rows.token_id).numpy()
    number = np.searchsorted(groups, keys).clip(max=len(groups) - 1)
    if (missing := groups[number] != keys).any():
        key_name = "position" if record.per == "position" else "token id"
        raise DataError(
            f"{record}: the rows of the mean have none with {key_name} {keys[missing][0]}; select more rows"
        )
    return values[torch.from_numpy(number)].to(rows)


@dataclass(frozen=True, eq=False)
class Resample(StoreIntervention):
    """Sets each chosen row of a site to a random row of a store (resample ablation).

    The draw depends on the seed, the sequence of the batch and the position alone, so cached and uncached passes agree.
    """

    site: str
    of: StoreOrPath | Rows
    """Rows that are drawn from; all of a store, which may be given by its path."""
    seed: int = field(kw_only=True)
    """Random seed."""
    at: At = field(default="all", kw_only=True)
    head: Head = field(default=None, kw_only=True)

    sets = True

    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of rows; see `RowIntervention.change`."""
        check("seed", self.seed, at_least=0, below=SEEDS, whole=True)
        rows, array = donor_rows(self.of, place)
        return partial(_resample, self, place, rows.ids, array)

    def __str__(self) -> str:
        return f"resample of {len(opened_donors(self.of)):,} rows at {named(self.site, self.head)}"


def _resample(
    record: Resample, place: Place, ids: np.ndarray, array: ActivationArray, rows: Tensor, chosen_rows: ChosenRows
) -> Tensor:
    labels = chosen_rows.tokens.labels
    sequence = chosen_rows.sequence if labels is None else labels.sequence[chosen_rows.sequence]
    draws = _mixed(record.seed, sequence.numpy(), chosen_rows.position.numpy()) % np.uint64(len(ids))
    return _finite_rows(record, array, ids[draws.astype(np.int64)], place).to(rows)


def _mixed(seed: int, sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Random 64-bit numbers that depend on the three (SplitMix64's finalizer, applied to each in turn)."""
    with np.errstate(over="ignore"):
        state = np.full(sequence.shape, seed, np.uint64)
        for part in (sequence, position):
            state = state + (part.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


@dataclass(frozen=True, eq=False)
class Patch(StoreIntervention):
    """Sets the chosen rows of a site to rows of a store: those of the same token, or of a named position.

    Sequences belong together by their order: with S sequences in `of` and a batch of n · S, each of them serves n
    consecutive sequences of the batch (beams, repeats). One sequence serves all.
    """

    site: str
    of: StoreOrPath | Rows
    """Donors: a store, its path, or rows of it; the sequences that have a row in it count."""
    position: int | Sequence[int] | None = None
    """Position of the donor for each position that `at` names; -1 is the last of its sequence. None: the same."""
    at: At = field(kw_only=True)
    head: Head = field(default=None, kw_only=True)

    sets = True

    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of rows; see `RowIntervention.change`."""
        rows, array = donor_rows(self.of, place)
        return partial(_patch, self, place, _donors(rows), array, self._positions())

    def _positions(self) -> Int[Tensor, " position"] | None:
        """Donor position for each named one."""
        if self.position is None:
            return None
        positions = self.position if isinstance(self.position, Sequence) else (self.position,)
        choice = tokens_at(self.at)
        targets = () if isinstance(choice, Tensor) else choice.positions
        if isinstance(positions, str) or not all(map(whole, positions)) or len(positions) != len(targets):
            raise RequestError(
                f"position must be one donor position for each of the {len(targets)} positions that at= names, not "
                f"{self.position!r}"
            )
        return torch.tensor([int(position) for position in positions], device="cpu")

    def __str__(self) -> str:
        of = opened_donors(self.of)
        store = of if isinstance(of, Store) else of.store
        return f"patch {named(self.site, self.head)} from {store.path.name}"


@dataclass(frozen=True)
class _Donors:
    """Row of each token of a selection, by sequence and position."""

    keys: Int64[np.ndarray, " row"]
    """sequence · 2^32 + position, ascending; sequences count those of the selection."""
    ids: Int64[np.ndarray, " row"]
    lengths: Int64[np.ndarray, " sequence"]

    def rows(
        self, sequence: Int64[np.ndarray, " row"], position: Int64[np.ndarray, " row"]
    ) -> Int64[np.ndarray, " row"]:
        """Returns the row ids of tokens; -1 where there is none. Negative positions count from the end."""
        inside = (sequence >= 0) & (sequence < len(self.lengths))
        valid_sequence = np.where(inside, sequence, 0)
        position = np.where(position < 0, self.lengths[valid_sequence] + position, position)
        keys = (valid_sequence << 32) + position
        number = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(inside & (self.keys[number] == keys), self.ids[number], -1)


@lru_cache(16)
def _donors(rows: Rows) -> _Donors:
    table = rows.tokens
    sequence, position = (table[name].to_numpy().astype(np.int64) for name in ("sequence", "position"))
    names, number = np.unique(sequence, return_inverse=True)
    lengths = np.zeros(len(names), np.int64)
    np.maximum.at(lengths, number, position + 1)
    keys = (number << 32) + position
    order = np.argsort(keys, kind="stable")
    return _Donors(keys[order], rows.ids[order], lengths)


def _patch(
    record: Patch,
    place: Place,
    donors: _Donors,
    array: ActivationArray,
    positions: Tensor | None,
    rows: Tensor,
    chosen_rows: ChosenRows,
) -> Tensor:
    sequence = chosen_rows.donors(len(donors.lengths)).numpy()
    position = (chosen_rows.position if positions is None else positions[chosen_rows.named]).numpy()
    ids = donors.rows(sequence, position)
    if (missing := ids < 0).any():
        first = int(np.flatnonzero(missing)[0])
        raise DataError(
            f"{record}: sequence {int(sequence[first])} of its {len(donors.lengths)} has no row at position "
            f"{int(position[first])}; choose tokens that the donors have"
        )
    return _finite_rows(record, array, ids, place).to(rows)


def _finite_rows(record: RowIntervention, array: ActivationArray, ids: np.ndarray, place: Place) -> Tensor:
    values = head_rows(array[ids].float(), place)
    if not bool(values.isfinite().all()):
        raise DataError(f"{record}: a donor row of {array.site.label} in {array.store.path} is not finite")
    return values


def donor_rows(of: StoreOrPath | Rows, place: Place) -> tuple[Rows, ActivationArray]:
    """Returns the rows of a store and its array of a site, if they can take the place of rows of a model.

    Raises:
        RequestError: No row, a site that was not recorded, or rows of another shape.
    """
    if not isinstance(of, Store | Rows):
        raise RequestError(f"of must be a store or rows of one, such as store.where('position > 0'), not {of!r:.60}")
    rows = _all_rows(of) if isinstance(of, Store) else of
    if not len(rows):
        raise RequestError(f"of: no row of {rows.store.path} is selected")
    array = rows.store[place.site.short or place.site.name]
    shape = tuple(length for length in place.site.shape if length is not None)
    if array.site.shape != shape:
        raise RequestError(
            f"of: rows of {array.site.label} in {rows.store.path} have the shape {array.site.shape}, and the model's "
            f"{shape}; give a store of this model"
        )
    return rows, array


@lru_cache(16)
def _all_rows(store: Store) -> Rows:
    return Rows(store, np.arange(store.rows))


def head_rows(values: Float[Tensor, "row ..."], place: Place) -> Float[Tensor, "row ..."]:
    """Returns the heads of rows that a record changes."""
    return values if place.heads is None else values[:, list(place.heads)]
