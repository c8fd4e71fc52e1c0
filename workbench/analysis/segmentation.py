"""Segmentation of a text by scores of its spans: the erasure score psi of Feucht et al. (arXiv 2406.20086)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.analysis.words import Words
from workbench.store.reader import Store

SCORED = (0, -1, -2)
"""Offsets that the erasure score needs."""


def erasure_scores(
    current: Float[np.ndarray, " token"],
    previous: Float[np.ndarray, " token"],
    second: Float[np.ndarray, " token"],
    longest: int,
) -> Float[np.ndarray, "length token"]:
    """Returns psi of every span: row n - 1 has, at token q, the span of n tokens that ends at q, else NaN.

    Prefix sums give all spans of a length in one pass: the terms with s = -1 are those of the span's first two tokens.

    Args:
        current: delta(t, 0).
        previous: delta(t, -1), NaN where there is no such token.
        second: delta(t, -2), as `previous`.
        longest: Maximum length of a span.
    """
    n = len(current)
    sums, counts = (np.zeros(n + 1) for _ in range(2))
    for part in (previous, second):
        sums[1:] += np.cumsum(np.nan_to_num(part))
        counts[1:] += np.cumsum(~np.isnan(part))
    before = np.nan_to_num(previous) + np.nan_to_num(second)  # both lie outside for the first token
    after = np.append(np.nan_to_num(second)[1:], 0.0)  # offset -2 lies outside for the second token
    psi = np.full((longest, n), np.nan)
    for length in range(1, min(longest, n) + 1):
        last = np.arange(length - 1, n)
        first = last - length + 1
        total = sums[last + 1] - sums[first] - 2 * before[first]
        if length > 1:
            total -= 2 * after[first]
        terms = counts[last + 1] - counts[first]
        psi[length - 1, last] = (np.nan_to_num(current)[last] + total) / (1 + terms)
    return psi


def segment(psi: Float[np.ndarray, "length token"]) -> list[tuple[int, int]]:
    """Returns spans (first, last) that cover the text without overlap, chosen by psi; ties prefer shorter spans."""
    length, last = np.nonzero(~np.isnan(psi))
    order = np.lexsort((last, length, -psi[length, last]))
    free, spans = np.ones(psi.shape[1], bool), []
    for index in order:
        first = last[index] - length[index]
        if free[first : last[index] + 1].all():
            free[first : last[index] + 1] = False
            spans.append((int(first), int(last[index])))
    return sorted(spans)


def text_segments(
    store: Store,
    rows: Int[np.ndarray, " row"],
    delta: Mapping[int, Float[np.ndarray, " row"]],
    words: Words,
    longest: int,
) -> pd.DataFrame:
    """Returns one line per segment of each sequence of a document, in order: its text, psi, and whether it is a word.

    Args:
        store: The store of the texts.
        rows: Rows to segment, ascending.
        delta: Drop of the probability of the token at each of the offsets `SCORED`.
        words: Words of the store.
        longest: Maximum length of a segment in tokens.
    """
    tokens = store.tokens.take(rows)
    texts = np.array(tokens["token"].to_pylist(), dtype=object)
    sequence, document = tokens["sequence"].to_numpy(), tokens["document"].to_numpy()
    cuts = np.diff(sequence, prepend=-1) != 0
    cuts |= np.diff(document, prepend=-1) != 0
    cuts |= np.diff(rows, prepend=-1) != 1
    starts = np.flatnonzero(cuts)
    lines = []
    for start, end in zip(starts, np.append(starts[1:], len(rows)), strict=True):
        current, previous, second = (delta[offset][start:end].copy() for offset in SCORED)
        previous[:1] = second[:2] = np.nan  # these terms reach before the first token
        psi = erasure_scores(current, previous, second, longest)
        for first, last in segment(psi):
            first_row, length = int(rows[start + first]), last - first + 1
            lines.append(
                {
                    "sequence": int(sequence[start]),
                    "document": int(document[start]),
                    "first_row": first_row,
                    "text": "".join(texts[start + first : start + last + 1]),
                    "tokens": length,
                    "psi": psi[length - 1, last],
                    "is_span": words.is_word(first_row, length),
                    "cut": bool(words.cut[first_row : first_row + length].any()),
                }
            )
    return pd.DataFrame(lines)


def segment_agreement(table: pd.DataFrame, words: Words, rows: Int[np.ndarray, " row"]) -> dict[str, int | float]:
    """Returns precision and recall of the segments of several tokens against words of several tokens, all whole.

    Args:
        table: Segments from `text_segments`.
        words: Words of the store.
        rows: The rows that were segmented.
    """
    long_segments = table.loc[(table["tokens"] > 1) & ~table["cut"]]
    number = len(np.unique(words.first[rows[(words.length[rows] > 1) & ~words.cut[rows]]]))
    hits = int(long_segments["is_span"].sum())
    return {
        "segments": len(long_segments),
        "words": number,
        "precision": hits / len(long_segments) if len(long_segments) else np.nan,
        "recall": hits / number if number else np.nan,
    }
