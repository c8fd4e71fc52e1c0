"""Queries over extracted features: statistics, contexts, active rows, label detection, coactivation.

Tables of features name them in a last column, description, once `import_labels` has given them labels.
Each query reads one of the two orders on disk, a few million entries at a time.
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
from workbench.features.labels import with_names
from workbench.io.checks import check, check_kind, whole_number
from workbench.io.errors import RequestError, nearest, shown
from workbench.store.reader import Rows, Store

QUANTILES = (0.1, 0.5, 0.9)


def feature_statistics(features: Features, quantiles: Sequence[float | int] = QUANTILES) -> pd.DataFrame:
    """Returns activity and quantiles of every feature; special tokens are included. Cost: reads every value once.

    Args:
        features: The features.
        quantiles: From 0 to 1.

    Returns:
        One line per feature in order: feature; active, its number of active rows; density, active / rows, 0 to 1; max
        and mean of its activations, 0 if never active; quantiles in columns q10, q50, ..., NaN if never active.

    Raises:
        RequestError: A quantile outside 0 to 1.
    """
    table = {
        "feature": np.arange(features.shape[1]),
        "active": features.counts,
        "density": features.counts / max(1, len(features)),
        "max": features.max,
        "mean": features.mean,
    }
    values = feature_quantiles(features, quantiles)
    values = {f"q{100 * q:g}": column for q, column in zip(quantiles, values.T, strict=True)}
    return with_names(pd.DataFrame(table | values), features.labels)


def feature_quantiles(
    features: Features, quantiles: Sequence[float | int] = QUANTILES
) -> Float[np.ndarray, "feature quantile"]:
    """Returns quantiles of each feature's activations over its active rows, with linear interpolation as `np.quantile`.

    NaN if a feature is never active. Cost: two values per quantile, as the activations are sorted on disk.

    Raises:
        RequestError: A quantile outside 0 to 1.
    """
    check_kind("quantiles", quantiles, (Sequence, np.ndarray), "numbers from 0 to 1, such as (0.1, 0.9)")
    for quantile in quantiles:
        check("quantiles", quantile, at_least=0, at_most=1)
    values = np.full((features.shape[1], len(quantiles)), np.nan)
    active = np.flatnonzero(features.counts)
    place = np.multiply.outer(features.counts[active] - 1, 1 - np.asarray(quantiles, float))  # sorted largest first
    first = features.by_feature["indptr"][active][:, None] + place.astype(np.int64)
    rest = place - place.astype(np.int64)
    value = features.by_feature["value"]
    above, below = (value[part].astype(np.float64) for part in (first, first + (rest > 0)))
    values[active] = above + rest * (below - above)
    return values


def feature_histogram(
    features: Features, feature: int | np.integer, bins: int = 40
) -> tuple[Int64[np.ndarray, " bin"], Float[np.ndarray, " bins_plus_1"]]:
    """Returns the histogram of a feature's activations over its active rows: counts and bin edges.

    Bins have equal width, from 0 (or the smallest activation if negative) to the largest. A bin includes its lower
    edge, the last one both. A feature that is never active has zero counts from 0 to 1.

    Raises:
        RequestError: A feature that does not exist, or fewer than one bin.
    """
    bins = whole_number("bins", bins, at_least=1)
    rising = features.rows_of(feature)[1][::-1].astype(np.float64)
    low, high = (min(0.0, rising[0]), max(0.0, rising[-1])) if len(rising) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else 1.0, bins + 1)
    return np.diff(np.append(np.searchsorted(rising, edges[:-1]), len(rising))), edges


@dataclass(frozen=True)
class Context:
    """Tokens around one row of a sequence, with a feature's activation on each."""

    row: int
    sequence: int
    position: int
    tokens: tuple[str, ...]
    activations: Float[np.ndarray, " token"]
    """0 if the feature is not active."""
    at: int
    """Index of the row's own token."""


def feature_contexts(
    features: Features, feature: int | np.integer, rows: Sequence[int] | Int[np.ndarray, " row"], context: int = 10
) -> list[Context]:
    """Returns the contexts of `rows`, with up to `context` tokens on either side, in the order of `rows`.

    A row inside the context of an earlier row is skipped. Cost: reads the entries of the shown rows.
    """
    texts, spans = features.texts, dict[int, slice]()
    for row in map(int, rows):
        if not any(span.start <= row < span.stop for span in spans.values()):
            spans[row] = texts.near(row, context)
    if not spans:
        return []
    context_rows = np.concatenate([np.arange(span.start, span.stop) for span in spans.values()])
    entries = features[context_rows].tocoo()
    selected = entries.col == feature
    activations = np.zeros(len(context_rows), np.float32)
    activations[entries.row[selected]] = entries.data[selected]
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
    """Returns the rows on which a feature is active, or has an activation above `above`, to combine with other rows.

    active_rows(features, 17, above=2.0) & store.where("token = ' Monday'")

    Cost: reads these rows.

    Raises:
        RequestError: A feature that does not exist.
    """
    rows, values = features.rows_of(feature)
    check("above", above, above=-np.inf, below=np.inf, optional=True)
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
    """Returns, for each value of a label, the `k` features that detect it best among all tokens, in one pass.

    A feature detects a token if it is active on it, at any strength. Special tokens are excluded. Cost: about a second
    for 10 million entries and each label; memory for a few million entries.

    Args:
        features: The features.
        labels: Columns of the token table, or your own labels as name -> one value per row (None or NaN: no value).
            None: every label that the spans of the texts defined.
        k: Largest number of features per value; features active on none of its tokens are left out.
        least: Smallest number of tokens of a value; on fewer, precision is chance. A value of all tokens is left out.

    Returns:
        One line per value and feature, best f1 first, ties in order of label, value and feature: label; value; tokens,
        the number of rows with that value; feature; active, its number of active rows; hits, rows with both; precision,
        hits / active; recall, hits / tokens; f1, 2 hits / (active + tokens), 0 to 1. Null: the precision of a feature
        active at random is tokens / (rows of text).

    Raises:
        RequestError: A column that does not exist, or no value with `least` tokens.
    """
    k = whole_number("k", k, at_least=1)
    least = whole_number("least", least, at_least=1)
    text = text_rows(features.store)
    coded = [coded_labels(name, column, text, least) for name, column in label_columns(features.store, labels).items()]
    names = [(name, value) for name, values, _ in coded for value in values]
    if not names:
        columns = ", ".join(name for name, *_ in coded)
        raise RequestError(f"labels: no value of {columns} has {least} tokens without having all; give a smaller least")
    tokens = np.concatenate([np.bincount(codes[codes >= 0], minlength=len(values)) for _, values, codes in coded])
    active = text_counts(features)
    best = np.empty((3, 0), np.int64)
    for candidates in _label_pairs(features, coded):
        best = _k_best(np.concatenate([best, candidates], axis=1), tokens, active, k)
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
    return with_names(table.sort_values("f1", ascending=False, kind="stable", ignore_index=True), features.labels)


def coactivation(features: Features, feature: int | np.integer) -> pd.DataFrame:
    """Returns the features that are active on the same rows as `feature`, compared with independence.

    Special tokens are excluded, as features of BOS would all be partners. Cost: reads the entries of the rows on which
    `feature` is active, a few million at a time.

    Returns:
        One line per other feature, largest jaccard first, ties by feature: feature; active, its number of active rows;
        both, rows on which both are active; expected, both under independence, active x (rows of `feature`) / (rows of
        text); lift, both / expected, value under the null 1, its logarithm is the pointwise mutual information;
        jaccard, both / either, 0 to 1. The lift of a rare feature is large by chance: also look at both.

    Raises:
        RequestError: A feature that does not exist.
    """
    text = text_rows(features.store)
    rows = np.sort(features.rows_of(feature)[0])
    rows = rows[text[rows]]
    shared = _counts_on(features, rows)
    shared[feature] = 0
    partners = np.flatnonzero(shared)
    active, shared = text_counts(features)[partners], shared[partners]
    expected = active * len(rows) / max(1, int(text.sum()))
    table = pd.DataFrame(
        {
            "feature": partners,
            "active": active,
            "both": shared,
            "expected": expected,
            "lift": shared / expected,
            "jaccard": shared / (active + len(rows) - shared),
        }
    )
    return with_names(table.sort_values("jaccard", ascending=False, kind="stable", ignore_index=True), features.labels)


def text_rows(store: Store) -> Bool[np.ndarray, " row"]:
    """Returns a mask of the rows that are text, not a special token such as BOS."""
    return ~store.tokens["is_special"].to_numpy(zero_copy_only=False)


def text_counts(features: Features) -> Int64[np.ndarray, " feature"]:
    """Returns the number of rows of text on which each feature is active; reads the entries of special tokens."""
    return features.counts - _counts_on(features, np.flatnonzero(~text_rows(features.store)))


def _counts_on(features: Features, rows: Int[np.ndarray, " row"]) -> Int64[np.ndarray, " feature"]:
    """Number of `rows` on which each feature is active."""
    counts = np.zeros(features.shape[1], np.int64)
    step = max(1, index.ENTRIES * len(features) // max(1, features.record.entries))
    for start in range(0, len(rows), step):
        counts += np.bincount(features[rows[start : start + step]].indices, minlength=len(counts))
    return counts


def _groups(features: Features) -> Iterator[tuple[slice, Int[np.ndarray, " entry"]]]:
    """Groups of consecutive features, and the rows of their entries."""
    indptr = features.by_feature["indptr"]
    for group in index.feature_groups(indptr):
        yield group, features.by_feature["row"][int(indptr[group.start]) : int(indptr[group.stop])]


def label_columns(store: Store, labels: str | Sequence[str] | Mapping[str, Any] | None) -> dict[str, pa.Array]:
    """Returns name -> one value per row, of columns of the token table or of the labels given; see `best_features`."""
    tokens = store.tokens
    known = tokens.column_names
    if labels is not None and not len(labels):
        raise RequestError("labels is empty; name columns of the token table, or give values")
    if isinstance(labels, Mapping):
        return {name: _given_column(name, values, store.rows) for name, values in labels.items()}
    if labels is None:
        labels = [name for name in known if f"{name}_span" in known]
        if not labels:
            raise RequestError(
                f"labels: the texts of {store.path} had no spans; name columns of {', '.join(known)}, or give values"
            )
    labels = [labels] if isinstance(labels, str) else list(labels)
    if unknown := [name for name in labels if name not in known]:
        close = nearest(unknown[0], known)
        raise RequestError(f"labels: no column {unknown[0]!r}; columns are {', '.join(known)}{close}")
    return {name: tokens[name].combine_chunks() for name in labels}


def _given_column(name: str, values: Any, rows: int) -> pa.Array:
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise RequestError(f"labels: {name} is {shown(values)}; give a list or array of one value per row")
    if len(values) != rows:
        raise RequestError(f"labels: {name} has {len(values)} values for {rows} rows; give one per row")
    try:
        array = pa.array(values, from_pandas=True)
    except pa.ArrowException as error:
        raise RequestError(f"labels: the values of {name} have several types: {str(error).splitlines()[0]}") from None
    if pa.types.is_nested(array.type):
        raise RequestError(f"labels: a value of {name} is {array.type}; give one number or text per row")
    return array


def coded_labels(
    name: str, column: pa.Array, text: Bool[np.ndarray, " row"], least: int
) -> tuple[str, list[Any], Int32[np.ndarray, " row"]]:
    """Returns name and values of a label with `least` tokens of text, and the index of each row's value.

    The index is -1 for special tokens and rows without such a value. A value of all tokens is left out.
    """
    encoded = column.dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    codes = np.where(text, codes, -1)
    values = encoded.dictionary.to_pylist()
    tokens = np.bincount(codes[codes >= 0], minlength=len(values))
    selected = np.flatnonzero((tokens >= least) & (tokens < text.sum()))
    renamed = np.full(len(values) + 1, -1, np.int32)  # the last element stands for no value
    renamed[selected] = np.arange(len(selected))
    return name, [values[code] for code in selected], renamed[codes]


def _label_pairs(
    features: Features, coded: Sequence[tuple[str, list[Any], Int32[np.ndarray, " row"]]]
) -> Iterator[Int64[np.ndarray, "3 pair"]]:
    """Value, feature and hits of all pairs that occur, by groups of features; values are numbered across labels."""
    starts = np.cumsum([0, *(len(values) for _, values, _ in coded)])
    for group, rows in _groups(features):
        entry_feature = np.repeat(np.arange(group.start, group.stop), features.counts[group])
        pairs = []
        for start, (_, values, codes) in zip(starts, coded, strict=False):
            feature, code, hits = _pairs(entry_feature, codes[rows], len(values))
            pairs.append(np.stack([code + start, feature, hits]))
        yield np.concatenate(pairs, axis=1)


def _pairs(
    feature: Int[np.ndarray, " entry"], code: Int[np.ndarray, " entry"], codes: int
) -> tuple[Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"]]:
    """Pairs of feature and value that occur, and their number of rows."""
    known = code >= 0
    pair = feature[known].astype(np.int64) * codes + code[known]
    pair, hits = np.unique(pair, return_counts=True)
    return *np.divmod(pair, max(1, codes)), hits


def _k_best(
    candidates: Int64[np.ndarray, "3 pair"],
    tokens: Int[np.ndarray, " value"],
    active: Int[np.ndarray, " feature"],
    k: int,
) -> Int64[np.ndarray, "3 best"]:
    """The k pairs of each value with the best f1, best first, ties by feature, ordered by value."""
    value, feature, hits = candidates
    ordered = candidates[:, np.lexsort((feature, -hits / (active[feature] + tokens[value]), value))]
    starts = np.searchsorted(ordered[0], np.arange(len(tokens)))
    return ordered[:, np.arange(ordered.shape[1]) - starts[ordered[0]] < k]
