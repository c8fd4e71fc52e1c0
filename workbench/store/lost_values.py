"""Gate for numbers made of activations: NaN and infinite values are refused or left out, clipped ones are named.

A recording stores the model's NaN and infinite values as they come, and values beyond the range of the stored type as
its largest. Every segment has counts of both; values are read only where its counts are above 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from workbench.io.errors import RequestError
from workbench.store.manifest import SiteRecord, read_segment_record
from workbench.store.reader import Store
from workbench.store.unchanged import unchanged

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class LostValues:
    """Values of one site, among some rows, that are not those of the model."""

    site: str
    """Label of the site: `resid_post.3`."""
    nonfinite: int
    """NaN and infinite values."""
    nonfinite_rows: Int[np.ndarray, " row"]
    """Ids of the rows that have one, ascending."""
    clipped: int
    """Values beyond the range of the stored type, stored as its largest."""
    limit: float
    """Largest value of the stored type: 65,504 for float16."""


@dataclass(frozen=True)
class FiniteRows:
    """Rows that are finite at every site that is read."""

    rows: Int[np.ndarray, " row"]
    left_out: Int[np.ndarray, " nonfinite_row"]
    """Ids of the rows with a NaN or infinite value, ascending."""
    lost: Mapping[str, LostValues]
    """By label of the site; sites without lost values are not in it."""

    @property
    def notes(self) -> list[str]:
        """Sentences about the rows that were left out and the values that are clipped; none if there are none."""
        notes = []
        if len(self.left_out):
            sites = [entry.site for entry in self.lost.values() if entry.nonfinite]
            notes.append(
                f"{len(self.left_out):,} {_rows(len(self.left_out))} with NaN or infinite values left out "
                f"({_sites(sites)})"
            )
        clipped = [entry for entry in self.lost.values() if entry.clipped]
        if clipped:
            number = sum(entry.clipped for entry in clipped)
            notes.append(
                f"{number:,} {'value is' if number == 1 else 'values are'} clipped to ±{clipped[0].limit:,.6g} "
                f"({_sites([entry.site for entry in clipped])}): sizes there are lower bounds; record in bfloat16 or "
                "float32 to keep them"
            )
        return notes

    def clipped(self, sites: Iterable[str]) -> int:
        """Returns the number of clipped values at these sites."""
        return sum(self.lost[site].clipped for site in sites if site in self.lost)


def lost_values(
    store: Store, sites: Sequence[str], rows: Int[np.ndarray, "*shape"] | None = None
) -> dict[str, LostValues]:
    """Returns what was lost at each site among some rows, by label; sites without lost values are not in it.

    Exact for the given rows. Costs one small file a segment that holds one of them; values are read only of segments
    that have a count above 0.

    Args:
        store: The recorded activations.
        sites: Names or labels of sites.
        rows: Ids of rows, of any shape. None: all.

    Raises:
        RequestError: A site was not recorded.
        DataError: The record of a segment is missing or damaged.
    """
    records = [store[site].site for site in dict.fromkeys(sites)]
    starts = store.manifest.starts
    ids = np.arange(store.rows) if rows is None else np.unique(rows)
    edges = np.searchsorted(ids, starts)
    suspect: dict[str, list[np.ndarray]] = {}
    overflow = Counter()
    for index in np.flatnonzero(np.diff(edges)).tolist():
        with unchanged(store.path, store.manifest):
            counts = read_segment_record(store.path, store.manifest.segments[index])
        overflow.update(counts.overflow)
        for site in records:
            if counts.nonfinite.get(site.name, 0) or counts.overflow.get(site.name, 0):
                suspect.setdefault(site.label, []).append(ids[edges[index] : edges[index + 1]])
    counted = (
        _count(store, site, np.concatenate(suspect[site.label]), overflow[site.name])
        for site in records
        if site.label in suspect
    )
    return {entry.site: entry for entry in counted if entry.nonfinite or entry.clipped}


def finite_rows(
    store: Store, sites: Sequence[str], rows: Int[np.ndarray, "*shape"] | None = None, *, allow_nonfinite: bool = False
) -> FiniteRows:
    """Returns the rows among `rows` that are finite at every one of `sites`; all of them, or the values are refused.

    Args:
        store: The recorded activations.
        sites: Names or labels of the sites that are read.
        rows: Ids of the rows that are read, of any shape; the order of a flat array is kept. None: all.
        allow_nonfinite: True leaves out rows with a NaN or infinite value at any of the sites.

    Raises:
        RequestError: A site has NaN or infinite values in these rows and `allow_nonfinite` is False, or no row is left.
    """
    ids = np.arange(store.rows) if rows is None else np.asarray(rows).ravel()
    lost = lost_values(store, sites, ids)
    if not allow_nonfinite:
        refuse_nonfinite(lost, len(np.unique(ids)))
    bad = [entry for entry in lost.values() if entry.nonfinite]
    left_out = np.unique(np.concatenate([np.zeros(0, np.int64), *(entry.nonfinite_rows for entry in bad)]))
    finite_ids = ids[~np.isin(ids, left_out)]
    if len(ids) and not len(finite_ids):
        raise RequestError(
            f"every row that is read has a NaN or infinite value ({_sites([entry.site for entry in bad])}); record "
            "again with the model in bfloat16 or float32"
        )
    return FiniteRows(finite_ids, left_out, lost)


def refuse_nonfinite(lost: Mapping[str, LostValues], rows: int) -> None:
    """Raises RequestError, with the first site and its counts, where a site has NaN or infinite values.

    Args:
        lost: What `lost_values` gives.
        rows: Number of rows that are read.
    """
    bad = [entry for entry in lost.values() if entry.nonfinite]
    if bad:
        more = (
            f", as {'have' if len(bad) > 2 else 'has'} {_sites([entry.site for entry in bad[1:]])}" if bad[1:] else ""
        )
        raise RequestError(
            f"{bad[0].site} has {bad[0].nonfinite:,} NaN or infinite values in {len(bad[0].nonfinite_rows):,} of the "
            f"{rows:,} rows that are read{more}; record again with the model in bfloat16 or float32, or set "
            "allow_nonfinite to leave these rows out"
        )


def _count(store: Store, site: SiteRecord, ids: Int[np.ndarray, " row"], overflow: int) -> LostValues:
    """Counts of a site among some rows; `overflow`: recorded in their segments, whose other rows may have them all."""
    array = store[site.label]
    limit = torch.finfo(array.dtype).max
    nonfinite = clipped = 0
    bad = []
    step = max(1, _BLOCK_BYTES // site.row_bytes)
    for block in (ids[first : first + step] for first in range(0, len(ids), step)):
        values = array[block].reshape(len(block), -1)  # a scalar site has one value a row
        wrong = ~torch.isfinite(values)
        nonfinite += int(wrong.sum())
        clipped += int((values.abs() == limit).sum())
        bad.append(block[wrong.any(1).numpy()])
    return LostValues(site.label, nonfinite, np.concatenate(bad), min(clipped, overflow), limit)


def _sites(sites: Sequence[str]) -> str:
    """One or two sites by name; of more, their number, the first and the last."""
    return " and ".join(sites) if len(sites) < 3 else f"{len(sites)} sites, {sites[0]} to {sites[-1]}"


def _rows(number: int) -> str:
    return "row" if number == 1 else "rows"
