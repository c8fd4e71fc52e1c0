"""Pairs of features: how often both are active, among all pairs, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64, Real
from scipy.sparse import csr_array

from workbench.features import index
from workbench.features.feature_store import Features
from workbench.features.labels import with_names
from workbench.features.queries import text_counts, text_rows
from workbench.io.checks import check, whole_number
from workbench.io.progress import progress

MEASURES = ("jaccard", "pmi", "both")
_BYTES = 256 << 20  # sums of the pairs of one group of features with all others


def coactive_pairs(
    features: Features,
    *,
    least: int = 20,
    k: int = 1000,
    by: str = "jaccard",
    show_progress: bool = True,
) -> pd.DataFrame:
    """Returns the pairs of features that are most often active on the same rows, compared with independence.

    All pairs are counted, exactly; special tokens are excluded, as features of BOS would all be partners. Cost: for
    10^6 rows with 32 active features, 10^9 additions, about a minute a core; the entries are read once for every group
    of features whose counts fit in 256 MiB. Memory: that, whatever the number of rows, and the entries of a block.

    Args:
        features: The features.
        least: Smallest number of rows on which both are active.
        k: Largest number of pairs returned.
        by: Order: "jaccard", "pmi" or "both".
        show_progress: Show a progress bar.

    Returns:
        One line per pair, largest `by` first, ties by feature: feature; other, a larger id; active and other_active,
        their numbers of active rows; both, rows on which both are; expected, both under independence, active x
        other_active / (rows of text); lift, both / expected, null 1; pmi, its natural logarithm, null 0; jaccard,
        both / either, 0 to 1; jaccard_expected, that under independence. The lift of rare features is large by chance:
        read it with both. `attrs["pairs"]` is the number of all pairs with `least` rows.

    Raises:
        RequestError: Settings out of range.
    """
    least = whole_number("least", least, at_least=1)
    k = whole_number("k", k, at_least=1)
    check("by", by, one_of=MEASURES)
    counts, rows = text_counts(features), int(text_rows(features.store).sum())
    ids = np.flatnonzero(counts >= least)
    best, pairs, none = pd.DataFrame(), 0, np.empty(0, np.int64)
    for first, shared in _pair_counts(features, ids, show_progress):
        row, column = np.nonzero(np.triu(shared, 1) >= least)
        table = _compared(ids[first + row], ids[first + column], shared[row, column].astype(np.int64), counts, rows)
        pairs += len(table)
        best = pd.concat([best, table]).sort_values([by, "feature", "other"], ascending=[False, True, True]).head(k)
    best = best.reset_index(drop=True) if len(best) else _compared(none, none, none, counts, rows)
    for side in ("feature", "other"):
        best = with_names(best, features.labels, side, f"{side}_description")
    best.attrs["pairs"] = pairs
    return best


def _compared(
    first: Int64[np.ndarray, " pair"],
    second: Int64[np.ndarray, " pair"],
    shared: Int64[np.ndarray, " pair"],
    counts: Int64[np.ndarray, " feature"],
    rows: int,
) -> pd.DataFrame:
    active, other_active = counts[first], counts[second]
    expected = active * (other_active / max(1, rows))
    return pd.DataFrame(
        {
            "feature": first,
            "other": second,
            "active": active,
            "other_active": other_active,
            "both": shared,
            "expected": expected,
            "lift": shared / expected,
            "pmi": np.log(shared / expected),
            "jaccard": shared / (active + other_active - shared),
            "jaccard_expected": expected / (active + other_active - expected),
        }
    )


def _pair_counts(
    features: Features, ids: Int64[np.ndarray, " id"], show_progress: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Groups of consecutive features of `ids`: index of the first, counts (feature of the group, from it on)."""
    number = numbered(features, ids)
    step = max(1, _BYTES // (4 * max(1, len(ids))))
    groups = range(0, len(ids), step)
    text = int(text_rows(features.store).sum())
    with progress("pairs", len(groups) * text, "rows", show=show_progress) as advance:
        for first in groups:
            size, later = min(step, len(ids) - first), len(ids) - first
            sums = np.zeros((size, later), np.int32)
            for blocks in text_blocks(features):
                block: Any = blocks[0]
                active: Any = columns(block, number - first, later)
                add_product(sums, active[:, :size], active)
                advance(block.shape[0])
            yield first, sums


def text_blocks(*stores: Features, shift: int = 0) -> Iterator[tuple[csr_array, ...]]:
    """Yields the features of the rows of text, of several feature stores of the same rows in step.

    A million entries of the densest come at a time. `shift` moves the rows of all but the first on, around the end, so
    that they meet other rows of the first.
    """
    text = np.flatnonzero(text_rows(stores[0].store))
    moved = np.roll(text, -shift)
    most = max(1, *(features.record.entries for features in stores))
    step = max(1, index.ENTRIES * len(stores[0]) // most)
    for start in range(0, len(text), step):
        part = slice(start, start + step)
        yield tuple(features[(moved if place else text)[part]] for place, features in enumerate(stores))


def numbered(features: Features, ids: Int64[np.ndarray, " id"]) -> Int64[np.ndarray, " feature"]:
    """Returns the index of each feature among `ids`, -1 for others."""
    number = np.full(features.shape[1], -1)
    number[ids] = np.arange(len(ids))
    return number


def columns(block: csr_array, number: Int64[np.ndarray, " feature"], width: int, values: bool = False) -> csr_array:
    """Returns the entries of the features whose `number` is at least 0, as columns of that number; ones or values."""
    entries = np.asarray(block.data)
    column = number[np.asarray(block.indices, np.int64)]
    used = (column >= 0) & (column < width)
    ends = np.concatenate([[0], np.cumsum(used)])[np.asarray(block.indptr)]
    data = entries[used].astype(np.float64) if values else np.ones(int(used.sum()), np.int32)
    return csr_array((data, column[used], ends), shape=(len(ends) - 1, width))


def add_product(sums: Real[np.ndarray, "left right"], left: csr_array, right: csr_array) -> None:
    """Adds leftᵀ @ right to `sums`."""
    product = (left.T.tocsr() @ right).tocoo()
    sums[product.row, product.col] += product.data
