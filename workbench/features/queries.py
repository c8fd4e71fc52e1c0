"""Questions to ask of extracted features: their statistics, where they are active, what they tell, what fires together.

Every answer is read from the two orders on the disk, a few million entries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Int32, Int64

from workbench.features import index
from workbench.features.feature_store import Features
from workbench.io.errors import RequestError, nearest
from workbench.store.reader import Rows, Store

QUANTILES = (0.1, 0.5, 0.9)


def feature_statistics(features: Features, quantiles: Sequence[float | int] = QUANTILES) -> pd.DataFrame:
    """One line a feature, in order: feature; active, the rows where it is; density, active / rows, 0 to 1; max and mean
    of its activations; and their quantiles, in columns q10, q50, ...

    Special tokens' rows count. Maximum and mean of a feature that is never active are 0, its quantiles NaN. Reads every
    value once.
    """
    table = {
        "feature": np.arange(features.shape[1]),
        "active": features.counts,
        "density": features.counts / max(1, len(features)),
        "max": features.max,
        "mean": features.mean,
    }
    values = feature_quantiles(features, quantiles)
    return pd.DataFrame(table | {f"q{100 * q:g}": column for q, column in zip(quantiles, values.T, strict=True)})


def feature_quantiles(
    features: Features, quantiles: Sequence[float | int] = QUANTILES
) -> Float[np.ndarray, "feature quantile"]:
    """Quantiles of each feature's activations over the rows where it is active, between two of them on the line that
    joins them, as `np.quantile`; NaN where it never is.

    They lie sorted on the disk: two values are read for each. Raises RequestError for a quantile beyond 0 and 1.
    """
    if outside := [q for q in quantiles if not 0 <= q <= 1]:
        raise RequestError(f"quantiles must be from 0 to 1, not {outside[0]:g}")
    found = np.full((features.shape[1], len(quantiles)), np.nan)
    some = np.flatnonzero(features.counts)
    place = np.multiply.outer(features.counts[some] - 1, 1 - np.asarray(quantiles, float))  # largest first
    first = features.by_feature["indptr"][some][:, None] + place.astype(np.int64)
    rest = place - place.astype(np.int64)
    value = features.by_feature["value"]
    above, below = (value[part].astype(np.float64) for part in (first, first + (rest > 0)))
    found[some] = above + rest * (below - above)
    return found


def feature_histogram(
    features: Features, feature: int | np.integer, bins: int = 40
) -> tuple[Int64[np.ndarray, " bin"], Float[np.ndarray, " bins_plus_1"]]:
    """Active rows of one feature in `bins` of equal width from 0 to its largest activation, or from its least where it
    goes below 0; and their edges. A bin has its lower edge, the last one both. Never active: zeros, from 0 to 1.

    Raises RequestError for a feature there is not, or fewer than one bin.
    """
    if bins < 1:
        raise RequestError(f"bins must be at least 1, not {bins}")
    rising = features.rows_of(feature)[1][::-1].astype(np.float64)
    low, high = (min(0.0, rising[0]), max(0.0, rising[-1])) if len(rising) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else 1.0, bins + 1)
    return np.diff(np.append(np.searchsorted(rising, edges[:-1]), len(rising))), edges


@dataclass(frozen=True)
class Context:
    """A stretch of a sequence around one row, with a feature's activation on each of its tokens."""

    row: int
    sequence: int
    position: int
    tokens: tuple[str, ...]
    activations: Float[np.ndarray, " token"]
    """0 where the feature is not active."""
    at: int
    """Which of the tokens is the row's."""


def feature_contexts(
    features: Features, feature: int | np.integer, rows: Sequence[int] | Int[np.ndarray, " row"], context: int = 10
) -> list[Context]:
    """The sequences around `rows`, up to `context` tokens on either side, in the order of `rows`.

    A row that an earlier one's context shows already has none of its own. Reads the entries of the rows shown.
    """
    texts, spans = features.texts, dict[int, slice]()
    for row in map(int, rows):
        if not any(span.start <= row < span.stop for span in spans.values()):
            spans[row] = texts.near(row, context)
    if not spans:
        return []
    shown = np.concatenate([np.arange(span.start, span.stop) for span in spans.values()])
    entries = features[shown].tocoo()
    own = entries.col == feature
    activations = np.zeros(len(shown), np.float32)
    activations[entries.row[own]] = entries.data[own]
    cuts = np.cumsum([span.stop - span.start for span in spans.values()])[:-1]
    return [
        Context(
            row,
            int(texts.sequence[row]),
            int(texts.position[row]),
            tuple(texts.words[code] for code in texts.codes[span]),
            part,
            row - span.start,
        )
        for (row, span), part in zip(spans.items(), np.split(activations, cuts), strict=True)
    ]


def active_rows(features: Features, feature: int | np.integer, above: float | int | None = None) -> Rows:
    """The rows where a feature is active, or where its activation is more than `above`: to be combined with other rows.

    active_rows(features, 17, above=2.0) & store.where("token = ' Monday'")

    Costs the reading of those rows. Raises RequestError for a feature there is not.
    """
    rows, values = features.rows_of(feature)
    if above is not None:
        rows = rows[: int(np.searchsorted(-values.astype(np.float64), -above))]
    return Rows(features.store, rows.astype(np.int64))


def best_features(
    features: Features,
    labels: str | Sequence[str] | Mapping[str, Any] | None = None,
    *,
    k: int = 1,
    least: int = 20,
) -> pd.DataFrame:
    """For each value of a label the `k` features that tell it best from all other tokens, all of them in one pass.

    Args:
        features: Active, at whatever strength, means yes.
        labels: One or several columns of the token table, or your own: name to one value a row, None or NaN for no
            value. None: every label that the texts' spans gave.
        k: Features a value, at most; only those that are active on some of its tokens.
        least: Values on fewer tokens are left out: on few, precision is luck. So is one that all tokens have.

    One line a value and feature, best f1 first, ties in order of label, value and feature: label; value; tokens, rows
    of that value; feature; active, rows where the feature is; hits, rows of both; precision, hits / active; recall,
    hits / tokens; f1, 2 hits / (active + tokens), 0 to 1. Rows of special tokens count nowhere. A feature on at random
    has tokens / (all rows of text) as precision.

    Memory is a few million entries; about a second for 10 million of them and each label. Raises RequestError for a
    column there is not, or labels none of whose values is on `least` tokens.
    """
    for name, number in (("k", k), ("least", least)):
        if number < 1:
            raise RequestError(f"{name} must be at least 1, not {number}")
    text = text_rows(features.store)
    coded = [_coded(name, column, text, least) for name, column in _columns(features.store, labels).items()]
    names = [(name, value) for name, values, _ in coded for value in values]
    if not names:
        told = ", ".join(name for name, *_ in coded)
        raise RequestError(f"labels: no value of {told} is on {least} tokens and not on all; give a smaller least")
    starts = np.cumsum([0, *(len(values) for _, values, _ in coded)])
    tokens = np.concatenate([np.bincount(codes[codes >= 0], minlength=len(values)) for _, values, codes in coded])
    active = text_counts(features)
    best = np.empty((3, 0), np.int64)  # value, feature, hits
    for group, rows in _groups(features):
        own = np.repeat(np.arange(group.start, group.stop), features.counts[group])
        found = [best]
        for start, (_, values, codes) in zip(starts, coded, strict=False):
            feature, code, hits = _pairs(own, codes[rows], len(values))
            found.append(np.stack([code + start, feature, hits]))
        best = _first(np.concatenate(found, axis=1), tokens, active, k)
    value, feature, hits = best
    table = pd.DataFrame(
        {
            "label": [names[code][0] for code in value],
            "value": [names[code][1] for code in value],
            "tokens": tokens[value],
            "feature": feature,
            "active": active[feature],
            "hits": hits,
            "precision": hits / active[feature],
            "recall": hits / tokens[value],
            "f1": 2 * hits / (active[feature] + tokens[value]),
        }
    )
    return table.sort_values("f1", ascending=False, kind="stable", ignore_index=True)


def coactivation(features: Features, feature: int | np.integer) -> pd.DataFrame:
    """The features that are active on rows where `feature` is, itself left out, and how far that is more than chance.

    One line a feature, largest jaccard first, ties by feature: feature; active, its rows; both, rows where both are;
    expected, the same were they independent, active x (rows of `feature`) / (rows of text); lift, both / expected, 1 by
    chance, its logarithm is the pointwise mutual information; jaccard, both / either, 0 to 1, 1 for twins. Rows of
    special tokens count nowhere: features of BOS would all be partners. Lift of a rare feature is high by luck: look at
    both.

    Reads the entries of the rows where `feature` is active, a few million at a time. Raises RequestError for a feature
    there is not.
    """
    text = text_rows(features.store)
    rows = np.sort(features.rows_of(feature)[0])
    rows = rows[text[rows]]
    both = _counts_on(features, rows)
    both[feature] = 0
    other = np.flatnonzero(both)
    active, both = text_counts(features)[other], both[other]
    expected = active * len(rows) / max(1, int(text.sum()))
    table = pd.DataFrame(
        {
            "feature": other,
            "active": active,
            "both": both,
            "expected": expected,
            "lift": both / expected,
            "jaccard": both / (active + len(rows) - both),
        }
    )
    return table.sort_values("jaccard", ascending=False, kind="stable", ignore_index=True)


def text_rows(store: Store) -> Bool[np.ndarray, " row"]:
    """Which rows are text, not a special token such as BOS."""
    return ~store.tokens["is_special"].to_numpy(zero_copy_only=False)


def text_counts(features: Features) -> Int64[np.ndarray, " feature"]:
    """Rows of text on which each feature is active. Reads the entries of the other rows."""
    return features.counts - _counts_on(features, np.flatnonzero(~text_rows(features.store)))


def _counts_on(features: Features, rows: Int[np.ndarray, " selected"]) -> Int64[np.ndarray, " feature"]:
    """How many of `rows` each feature is active on."""
    counts = np.zeros(features.shape[1], np.int64)
    step = max(1, index.ENTRIES * len(features) // max(1, features.record.entries))
    for start in range(0, len(rows), step):
        counts += np.bincount(features[rows[start : start + step]].indices, minlength=len(counts))
    return counts


def _groups(features: Features) -> Iterator[tuple[slice, Int[np.ndarray, " entry"]]]:
    """Groups of neighbouring features, and the row of each of their entries."""
    indptr = features.by_feature["indptr"]
    for group in index.feature_groups(indptr):
        yield group, features.by_feature["row"][int(indptr[group.start]) : int(indptr[group.stop])]


def _columns(store: Store, labels: str | Sequence[str] | Mapping[str, Any] | None) -> dict[str, pa.Array]:
    """Name to a value for each row."""
    tokens = store.tokens
    known = tokens.column_names
    if isinstance(labels, Mapping):
        return {name: _own_column(name, values, store.rows) for name, values in labels.items()}
    if labels is None:
        labels = [name for name in known if f"{name}_span" in known]
        if not labels:
            raise RequestError(
                f"labels: the texts of {store.path} had no spans; name columns, of {', '.join(known)}, or give your own"
            )
    labels = [labels] if isinstance(labels, str) else list(labels)
    if unknown := [name for name in labels if name not in known]:
        close = nearest(unknown[0], known)
        raise RequestError(f"labels: there is no column {unknown[0]!r}; columns: {', '.join(known)}{close}")
    return {name: tokens[name].combine_chunks() for name in labels}


def _own_column(name: str, values: Any, rows: int) -> pa.Array:
    if len(values) != rows:
        raise RequestError(f"labels: {name} has {len(values)} values for {rows} rows; give one for each")
    try:
        return pa.array(values, from_pandas=True)
    except pa.ArrowException as error:
        raise RequestError(f"labels: the values of {name} are not of one kind: {str(error).splitlines()[0]}") from None


def _coded(
    name: str, column: pa.Array, text: Bool[np.ndarray, " row"], least: int
) -> tuple[str, list[Any], Int32[np.ndarray, " row"]]:
    """The values of a label that count, and for each row of text which of them it has; -1 elsewhere."""
    encoded = column.dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    codes = np.where(text, codes, -1)
    values = encoded.dictionary.to_pylist()
    tokens = np.bincount(codes[codes >= 0], minlength=len(values))
    kept = np.flatnonzero((tokens >= least) & (tokens < text.sum()))
    renamed = np.full(len(values) + 1, -1, np.int32)  # the last one is that of no value
    renamed[kept] = np.arange(len(kept))
    return name, [values[code] for code in kept], renamed[codes]


def _pairs(
    feature: Int[np.ndarray, " entry"], code: Int[np.ndarray, " entry"], codes: int
) -> tuple[Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"]]:
    """The pairs of a feature and a value that occur, and how often."""
    known = code >= 0
    pair = feature[known].astype(np.int64) * codes + code[known]
    pair, hits = np.unique(pair, return_counts=True)
    return *np.divmod(pair, max(1, codes)), hits


def _first(
    found: Int64[np.ndarray, "3 pair"], tokens: Int[np.ndarray, " value"], active: Int[np.ndarray, " feature"], k: int
) -> Int64[np.ndarray, "3 best"]:
    """The k pairs of each value with the best f1, best first, ties by feature; in order of values."""
    value, feature, hits = found
    found = found[:, np.lexsort((feature, -hits / (active[feature] + tokens[value]), value))]
    starts = np.searchsorted(found[0], np.arange(len(tokens)))
    return found[:, np.arange(found.shape[1]) - starts[found[0]] < k]
