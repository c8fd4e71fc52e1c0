"""Bootstrap over documents: tokens of one document are not independent, so whole documents are resampled."""

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
    """Returns the mean of each column over rows, and its means over resamples of whole clusters with replacement.

    Rows of one cluster (a document, a sequence) stay together, and columns share their resamples, so that differences
    of columns can be taken resample by resample. Costs resamples x clusters x statistics. Source: the cluster bootstrap
    of Field & Welsh 2007.

    Args:
        values: One statistic a column; NaN values do not count.
        clusters: The cluster of each row.
        resamples: Number of resamples.
        seed: Random seed of the resamples.
    """
    counted = ~np.isnan(values)
    _, cluster = np.unique(clusters, return_inverse=True)
    totals, counts = (np.zeros((int(cluster.max(initial=-1)) + 1, values.shape[1])) for _ in range(2))
    np.add.at(totals, cluster, np.where(counted, values, 0.0))
    np.add.at(counts, cluster, counted)
    return resampled_means(totals, counts, resamples=resamples, seed=seed)


def resampled_means(
    totals: Float[np.ndarray, "cluster statistic"],
    counts: Float[np.ndarray, "cluster statistic"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " statistic"], Float[np.ndarray, "resample statistic"]]:
    """Returns what `clustered_means` does, from each cluster's sum of values and their number."""
    number = len(totals)
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
    """Returns the mean of one column and its 95 % interval, by `clustered_means`."""
    mean, resampled = clustered_means(values[:, None], clusters, resamples=resamples, seed=seed)
    return Interval(float(mean[0]), *central(resampled[:, 0]))


def intervals(resampled: Float[np.ndarray, "resample ..."]) -> Float[np.ndarray, "bound ..."]:
    """Returns the `central` 95 % of every column of a bootstrap: [low or high, ...]."""
    flat = resampled.reshape(len(resampled), -1)
    return np.array([central(column) for column in flat.T]).T.reshape(2, *resampled.shape[1:])


def central(resampled: Float[np.ndarray, " resample"] | Sequence[float]) -> tuple[float, float]:
    """Returns the ends of the central 95 % of a bootstrap distribution; resamples that are NaN are left out."""
    values = np.asarray(resampled, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
