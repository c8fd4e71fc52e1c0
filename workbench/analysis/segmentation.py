"""Segmentation of a text by scores of its spans: the erasure score psi of Feucht et al. (arXiv 2406.20086)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

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
