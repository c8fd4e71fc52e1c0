"""Means with intervals over tokens that are not independent: what resamples is the document, never the token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the central 95 % of its bootstrap distribution; NaN where there was nothing to average."""

    mean: float
    low: float
    high: float


def clustered_means(
    values: Float[np.ndarray, "row statistic"],
    clusters: Shaped[np.ndarray, " row"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " statistic"], Float[np.ndarray, "resample statistic"]]:
    """Mean of each column over rows, and the same over `resamples` draws of whole clusters with replacement.

    Rows of one cluster (a document, a sequence) stay together, and columns share their draws, so that differences of
    columns can be taken resample by resample. NaN values do not count. Costs resamples x clusters x statistics. Source:
    the cluster bootstrap of Field & Welsh 2007.
    """
    counted = ~np.isnan(values)
    _, cluster = np.unique(clusters, return_inverse=True)
    number = int(cluster.max(initial=-1)) + 1
    totals, counts = (np.zeros((number, values.shape[1])) for _ in range(2))
    np.add.at(totals, cluster, np.where(counted, values, 0.0))
    np.add.at(counts, cluster, counted)
    draw = np.random.default_rng(seed)
    chances = np.full(number, 1 / max(number, 1))
    times = draw.multinomial(number, chances, size=resamples) if number else np.zeros((resamples, 0))
    with np.errstate(invalid="ignore"):  # the mean of nothing is NaN
        return totals.sum(0) / counts.sum(0), (times @ totals) / (times @ counts)


def clustered_interval(
    values: Float[np.ndarray, " row"],
    clusters: Shaped[np.ndarray, " row"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """`clustered_means` of one column, as mean, low and high."""
    mean, drawn = clustered_means(values[:, None], clusters, resamples=resamples, seed=seed)
    return Interval(float(mean[0]), *central(drawn[:, 0]))


def central(drawn: Float[np.ndarray, " resample"] | Sequence[float]) -> tuple[float, float]:
    """The central 95 % of a bootstrap distribution, draws that are NaN left out."""
    drawn = np.asarray(drawn, dtype=float)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
