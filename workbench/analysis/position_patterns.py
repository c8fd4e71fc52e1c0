"""Position in scores beyond the distance of query and key, and what a causal mask alone gives without weights."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float

_RELIABLE = 0.1  # correlation of the halves from which on a share is given


def non_relative(
    scores: Float[np.ndarray, "*map query key"], seen: Bool[np.ndarray, "query key"]
) -> Float[np.ndarray, "*map query key"]:
    """Returns scores less the mean of their diagonal, over the pairs that are `seen`; NaN elsewhere.

    A score that depends on the distance of query and key alone gives 0 everywhere.
    """
    n = scores.shape[-1]
    rest = np.full(scores.shape, np.nan)
    for distance in range(1, n):
        query = np.arange(distance, n)
        query = query[seen[query, query - distance]]
        if len(query):
            values = scores[..., query, query - distance]
            rest[..., query, query - distance] = values - values.mean(-1, keepdims=True)
    return rest


def non_relative_share(
    one: Float[np.ndarray, "query key"], other: Float[np.ndarray, "query key"], seen: Bool[np.ndarray, "query key"]
) -> float:
    """Returns Cov(N, N') / Cov(S, S') over the seen pairs of two maps of scores; Var(N) / Var(S) for one map twice.

    Two halves of the texts have no noise in common, which one map has: its variance counts as non-relative. NaN where
    the scores do not vary, or where the halves correlate by less than 0.1: then they vary by noise alone.
    """
    parts = [(part[seen], non_relative(part, seen)[seen]) for part in (one, other)]
    if not seen.any():
        return float("nan")
    total = np.mean((parts[0][0] - parts[0][0].mean()) * (parts[1][0] - parts[1][0].mean()))
    if not total > _RELIABLE * np.sqrt(parts[0][0].var() * parts[1][0].var()):
        return float("nan")
    return float(np.mean((parts[0][1] - parts[0][1].mean()) * (parts[1][1] - parts[1][1].mean())) / total)


def slope_of_keys(scores: Float[np.ndarray, "query key"], seen: Bool[np.ndarray, "query key"]) -> float:
    """Returns the slope of N on j / i over the seen pairs, i and j the positions of query and key counted from 1."""
    query, key = np.nonzero(seen)
    if len(query) < 2:
        return float("nan")
    x, y = (key + 1) / (query + 1), non_relative(scores, seen)[seen]
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x)) if (x @ x) > 0 else float("nan")


def simulated_scores(n: int, blocks: int) -> Float[np.ndarray, "block query key"]:
    """Returns the scores of blocks without weights: Y = rows of X of unit norm, X + softmax(causal(Y Y^T)) Y.

    Inputs are orthonormal, so that nothing but the mask distinguishes positions. Scores are not scaled.

    Args:
        n: Positions.
        blocks: Number of blocks.
    """
    x, causal, parts = np.eye(n), np.tril(np.ones((n, n), bool)), []
    for _ in range(blocks):
        y = x / np.linalg.norm(x, axis=1, keepdims=True)
        scores = y @ y.T
        weights = np.where(causal, np.exp(scores), 0)
        parts.append(scores)
        x = weights / weights.sum(1, keepdims=True) @ y + x
    return np.stack(parts)


def second_block_scores(n: int) -> Float[np.ndarray, "query key"]:
    """Returns the closed form of `simulated_scores` at the second block, for keys before the query; NaN elsewhere."""
    place = np.arange(1, n + 1)
    z = math.e + place - 1
    h = np.sqrt((2 * math.e + place - 1) ** 2 + (place - 1)) / z
    scores = (2 / z)[:, None] / (h[:, None] * h)
    return np.where(np.tril(np.ones((n, n), bool), -1), scores, np.nan)
