"""Scores as detectors of a class of rows: areas under the ROC curve, with intervals over documents."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Shaped

_WEIGHTS = 8_000_000  # resamples x rows in memory at a time


def clustered_auc(
    scores: Float[np.ndarray, "statistic row"],
    positive: Bool[np.ndarray, " row"],
    clusters: Shaped[np.ndarray, " row"],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " statistic"], Float[np.ndarray, "statistic resample"]]:
    """Returns the area under the ROC curve of each score, and its values over resamples of whole clusters.

    It is the probability that a positive row has a larger score than a negative one, ties counted half; 0.5 for a score
    that does not separate them. Scores share their resamples, so that differences can be taken resample by resample.
    NaN where one class is missing; resamples are NaN for a single cluster. Costs statistics x resamples x rows.

    Args:
        scores: One score a line, without NaN.
        positive: Rows of the class that large scores shall detect.
        clusters: The cluster of each row, such as its document.
        resamples: Number of resamples.
        seed: Random seed of the resamples.
    """
    cluster_ids, index = np.unique(clusters, return_inverse=True)
    if not len(index):
        return np.full(len(scores), np.nan), np.full((len(scores), resamples), np.nan)
    draw, chances = np.random.default_rng(seed), np.full(len(cluster_ids), 1 / len(cluster_ids))
    step = max(1, _WEIGHTS // len(index))
    orders = [np.argsort(score, kind="stable") for score in scores]
    edges = [
        np.flatnonzero(np.diff(score[order], prepend=-np.inf)) for score, order in zip(scores, orders, strict=True)
    ]
    parts = []
    for first in range(0, resamples, step):
        times = draw.multinomial(len(cluster_ids), chances, size=min(step, resamples - first))[:, index]
        parts.append([_auc(times[:, order], positive[order], edge) for order, edge in zip(orders, edges, strict=True)])
    resampled = np.concatenate([np.array(part) for part in parts], 1) if parts else np.zeros((len(scores), 0))
    if len(cluster_ids) < 2:
        resampled[:] = np.nan
    once = np.ones((1, len(index)), np.int64)
    whole = [_auc(once, positive[order], edge)[0] for order, edge in zip(orders, edges, strict=True)]
    return np.array(whole), resampled


def _auc(times: np.ndarray, positive: np.ndarray, edges: np.ndarray) -> Float[np.ndarray, " resample"]:
    """Areas where each row, in the order of its score, counts `times`; `edges` begin the groups of equal scores."""
    above = np.add.reduceat(times * positive, edges, axis=1).astype(float)
    below = np.add.reduceat(times * ~positive, edges, axis=1).astype(float)
    smaller = below.cumsum(1) - below / 2
    with np.errstate(invalid="ignore"):
        return (above * smaller).sum(1) / (above.sum(1) * below.sum(1))
