"""Matching of the features of two SAEs over the same store: by activations, by decoder directions, and splitting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from workbench.features.feature_store import Features
from workbench.features.labels import with_names
from workbench.features.pairs import add_product, columns, numbered, text_blocks
from workbench.features.promoted import check_sae
from workbench.features.queries import text_counts, text_rows
from workbench.io.checks import check, whole_number
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.sae.autoencoder import Sae
from workbench.sae.decoder import decoder_directions, unit_directions, unit_rows

_BYTES = 256 << 20  # sums of the pairs of one group of features with all others
_EXACT = 1 << 22  # pairs of features up to which the assignment looks at all of them
_CANDIDATES = 16  # partners of a feature that the assignment looks at beyond that


@plain_torch()
def match_features(
    one: Features, other: Features, sae: Sae | None = None, other_sae: Sae | None = None
) -> pd.DataFrame:
    """Returns, for each feature of one SAE, the features of another that are most like it on the same store.

    Activations are compared by Pearson's correlation over all rows of text, computed from the sparse entries; with both
    SAEs and decoders of the same width, directions are compared by cosine. The best match may serve several features;
    the assignment gives each a partner of its own so that the sum of correlations is largest. Beyond 4 million pairs it
    looks at the 16 most correlated partners of each feature, in both directions, alone.

    Cost: d_sae x d_sae sums over the entries that share a row, twice: the second time with the rows of `other` shifted
    by half of the store, which shows what chance reaches. Memory: 256 MiB.

    Args:
        one: Features of the first SAE; a line each.
        other: Features of the second SAE.
        sae: The SAE of `one`; with `other_sae`, adds cosines.
        other_sae: The SAE of `other`.

    Returns:
        One line per feature of `one` that is active on text: feature; active, its rows of text; match, the feature of
        `other` with the largest correlation; correlation, -1 to 1; mutual, whether that feature's best match is this
        one; assigned and assigned_correlation, partner in the assignment, missing without a positive one; chance, the
        largest correlation with shifted rows, the value under the null; with SAEs cosine, of the match, and nearest and
        nearest_cosine, the feature with the largest cosine; with labels description and match_description.

    Raises:
        RequestError: Features of different stores, one SAE alone, another SAE than the features', or no active feature.
        DataError: The direction of an active feature has NaN or infinite values.
    """
    _check_stores(one, other)
    if (sae is None) != (other_sae is None):
        raise RequestError(f"{'sae' if sae is None else 'other_sae'} is missing; give both SAEs, or none")
    for features, its_sae in ((one, sae), (other, other_sae)):
        if its_sae is not None:
            check_sae(features, its_sae)
    counts = text_counts(one)
    left, right = np.flatnonzero(counts), np.flatnonzero(text_counts(other))
    if not len(left) or not len(right):
        raise RequestError("one of the two has no feature that is active on text; nothing can be matched")
    matches = _matches(one, other, left, right)
    shift = int(text_rows(one.store).sum()) // 2
    chance = [part.max(1) for _, part in _correlations(one, other, left, right, shift)]
    table = pd.DataFrame(
        {
            "feature": left,
            "active": counts[left],
            "match": right[matches.best],
            "correlation": matches.correlation,
            "mutual": matches.best_left[matches.best] == np.arange(len(left)),
            "assigned": pd.array([right[index] if index >= 0 else None for index in matches.assigned], "Int64"),
            "assigned_correlation": matches.assigned_correlation,
            "chance": np.concatenate(chance),
        }
    )
    if sae is not None and other_sae is not None:
        table = table.assign(**_cosines(sae, other_sae, left, table["match"].to_numpy()))
    return with_names(with_names(table, one.labels), other.labels, "match", "match_description")


class _Matches(NamedTuple):
    """Best partners and assignment, as indices among the active features; -1: none assigned."""

    best: Int64[np.ndarray, " left"]
    correlation: Float[np.ndarray, " left"]
    best_left: Int64[np.ndarray, " right"]
    assigned: Int64[np.ndarray, " left"]
    assigned_correlation: Float[np.ndarray, " left"]


def _matches(
    a: Features, b: Features, left: Int64[np.ndarray, " left"], right: Int64[np.ndarray, " right"]
) -> _Matches:
    best, largest = np.zeros(len(left), np.int64), np.full(len(left), -np.inf)
    best_left, largest_left = np.zeros(len(right), np.int64), np.full(len(right), -np.inf)
    candidates: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    width = len(right) if len(left) * len(right) <= _EXACT else min(_CANDIDATES, len(right))
    for first, part in _correlations(a, b, left, right, 0):
        rows = np.arange(first, first + len(part))
        best[rows], largest[rows] = part.argmax(1), part.max(1)
        better = part.max(0) > largest_left
        best_left[better], largest_left[better] = first + part.argmax(0)[better], part.max(0)[better]
        chosen = np.argpartition(-part, width - 1, axis=1)[:, :width]
        candidates.append((np.repeat(rows, width), chosen.ravel(), np.take_along_axis(part, chosen, 1).ravel()))
    candidates.append((best_left, np.arange(len(right)), largest_left))
    assigned, value = _assign(len(left), len(right), *map(np.concatenate, zip(*candidates, strict=True)))
    return _Matches(best, largest, best_left, assigned, value)


def _correlations(
    a: Features, b: Features, left: Int64[np.ndarray, " left"], right: Int64[np.ndarray, " right"], shift: int
) -> Iterator[tuple[int, Float[np.ndarray, "group right"]]]:
    """Groups of features of `a`: index of the first, and correlations with all of `b`."""
    rows = int(text_rows(a.store).sum())
    number, mean, spread = _moments(a, left, rows)
    other_number, other_mean, other_spread = _moments(b, right, rows)
    step = max(1, _BYTES // (8 * len(right)))
    for first in range(0, len(left), step):
        size = min(step, len(left) - first)
        sums = np.zeros((size, len(right)))
        for block, partner in text_blocks(a, b, shift=shift):
            add_product(
                sums,
                columns(block, number - first, size, values=True),
                columns(partner, other_number, len(right), values=True),
            )
        group = slice(first, first + size)
        scale = np.multiply.outer(spread[group], other_spread)
        covariance = sums / rows - np.multiply.outer(mean[group], other_mean)
        yield first, np.divide(covariance, scale, out=np.zeros_like(sums), where=scale > 0).clip(-1, 1)


def _moments(
    features: Features, ids: Int64[np.ndarray, " id"], rows: int
) -> tuple[Int64[np.ndarray, " feature"], Float[np.ndarray, " id"], Float[np.ndarray, " id"]]:
    """Index of each feature among `ids`, -1 for others, and mean and standard deviation of these over rows of text."""
    number = numbered(features, ids)
    sums, squares = np.zeros((2, len(ids)))
    for (block,) in text_blocks(features):
        values = columns(block, number, len(ids), values=True)
        sums += np.bincount(values.indices, values.data, minlength=len(ids))
        squares += np.bincount(values.indices, values.data**2, minlength=len(ids))
    mean = sums / rows
    return number, mean, np.sqrt(np.maximum(squares / rows - mean**2, 0))


def _assign(
    left: int,
    right: int,
    row: Int64[np.ndarray, " pair"],
    column: Int64[np.ndarray, " pair"],
    value: Float[np.ndarray, " pair"],
) -> tuple[Int64[np.ndarray, " left"], Float[np.ndarray, " left"]]:
    """Partner of each row, -1 without one, with the largest sum of positive values; each column serves one row."""
    positive = value > 0
    row, column, value = row[positive], column[positive], value[positive]
    assigned, values = np.full(left, -1), np.full(left, np.nan)
    if left * right <= _EXACT:
        cost = np.zeros((left, right))
        cost[row, column] = -value
        rows, partners = linear_sum_assignment(cost)
        gained = -cost[rows, partners]
    else:  # each row has a column of its own, at cost 2, for no partner; others cost 2 - value
        unmatched = np.arange(left)
        costs = np.concatenate([2 - value, np.full(left, 2.0)])
        places = np.concatenate([row, unmatched]), np.concatenate([column, right + unmatched])
        order = np.unique(places[0] * (left + right) + places[1], return_index=True)[1]
        graph = csr_array((costs[order], (places[0][order], places[1][order])), shape=(left, left + right))
        rows, partners = min_weight_full_bipartite_matching(graph)
        gained = np.where(partners < right, 2 - np.asarray(graph[rows, partners]).ravel(), 0)
    used = gained > 0
    assigned[rows[used]], values[rows[used]] = partners[used], gained[used]
    return assigned, values


def _cosines(
    sae: Sae, other_sae: Sae, left: Int64[np.ndarray, " left"], match: Int64[np.ndarray, " left"]
) -> dict[str, np.ndarray]:
    """Cosine of the matches' decoder directions, and the feature with the largest cosine."""
    units, matched = (
        unit_rows(decoder_directions(*side).cpu()) for side in ((sae, left.tolist()), (other_sae, match.tolist()))
    )
    if units.shape[1] != matched.shape[1]:
        raise RequestError(
            f"the decoders of {sae.name!r} and {other_sae.name!r} have the widths {units.shape[1]} and "
            f"{matched.shape[1]}; leave the SAEs out to compare activations alone"
        )
    nearest, largest = np.zeros(len(left), np.int64), np.full(len(left), -np.inf)
    for place, directions in unit_directions(other_sae):
        step = max(1, _BYTES // (4 * len(directions)))
        for part in (slice(first, first + step) for first in range(0, len(left), step)):
            products = (units[part] @ directions.cpu().T).nan_to_num(nan=-torch.inf).numpy()
            best, closest = products.argmax(1), products.max(1)
            better = closest > largest[part]
            nearest[part] = np.where(better, place.start + best, nearest[part])
            largest[part] = np.maximum(closest, largest[part])
    return {
        "cosine": (units * matched).sum(1).clamp(-1, 1).numpy(),
        "nearest": nearest,
        "nearest_cosine": largest.clip(-1, 1),
    }


def feature_splits(one: Features, other: Features, *, precision: float | int = 0.8, least: int = 20) -> pd.DataFrame:
    """Returns, for each feature of one SAE, the features of another that are active almost only where it is.

    A feature of a small SAE has split if several features of a larger one lie inside it and together cover it. A
    feature of `other` lies inside if a share of at least `precision` of its active rows of text are the feature's, too.

    Cost: the sums of `coactive_pairs`, between two SAEs. Memory: 256 MiB.

    Args:
        one: Features of the first SAE, usually the smaller one.
        other: Features of the second SAE.
        precision: Smallest share of a part's rows on which the feature is active; null: the feature's density.
        least: Smallest number of active rows of a feature and of a part.

    Returns:
        One line per feature with a part, the most parts first, ties by feature: feature; active, its rows of text;
        parts, their number; covered, share of its rows on which some part is active; largest, the share that the
        largest part covers alone; density, active / rows, the precision under the null; features, the parts, largest
        first; with labels description and features_description.
        Split: several parts, covered near 1 and largest well below.

    Raises:
        RequestError: Features of different stores, or settings out of range.
    """
    check("precision", precision, above=0, at_most=1)
    least = whole_number("least", least, at_least=1)
    _check_stores(one, other)
    counts, other_counts = text_counts(one), text_counts(other)
    left, right = np.flatnonzero(counts >= least), np.flatnonzero(other_counts >= least)
    text, lines = text_rows(one.store), []
    for first, shared in _overlaps(one, other, left, right):
        inside = shared >= precision * other_counts[right]
        for index in np.flatnonzero(inside.any(1)):
            feature = int(left[first + index])
            parts = np.flatnonzero(inside[index])
            parts = parts[np.argsort(-shared[index, parts], kind="stable")]
            rows = one.rows_of(feature)[0]
            rows = rows[text[rows]]
            covered = np.unique(np.concatenate([other.rows_of(part)[0] for part in right[parts]]))
            lines.append(
                {
                    "feature": feature,
                    "active": int(counts[feature]),
                    "parts": len(parts),
                    "covered": float(np.isin(rows, covered).mean()),
                    "largest": float(shared[index, parts[0]] / counts[feature]),
                    "density": float(counts[feature] / text.sum()),
                    "features": tuple(map(int, right[parts])),
                }
            )
    names = ["feature", "active", "parts", "covered", "largest", "density", "features"]
    table = pd.DataFrame(lines, columns=names).sort_values("parts", ascending=False, kind="stable", ignore_index=True)
    return with_names(with_names(table, one.labels), other.labels, "features", "features_description")


def _overlaps(
    a: Features, b: Features, left: Int64[np.ndarray, " left"], right: Int64[np.ndarray, " right"]
) -> Iterator[tuple[int, Int64[np.ndarray, "group right"]]]:
    """Groups of features of `a`: index of the first, and rows of text shared with each feature of `b`."""
    numbers = numbered(a, left), numbered(b, right)
    step = max(1, _BYTES // (8 * max(1, len(right))))
    for first in range(0, len(left), step):
        sums = np.zeros((min(step, len(left) - first), len(right)), np.int64)
        for block, partner in text_blocks(a, b):
            add_product(sums, columns(block, numbers[0] - first, len(sums)), columns(partner, numbers[1], len(right)))
        yield first, sums


def _check_stores(a: Features, b: Features) -> None:
    if a.record.store_fingerprint != b.record.store_fingerprint or len(a) != len(b):
        raise RequestError(
            f"features {a.path.name} and {b.path.name} are of different stores ({a.store.path}, "
            f"{b.store.path}); extract both from one store"
        )
