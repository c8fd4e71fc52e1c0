"""Tokens are not independent: documents are what is divided, and resampled for an interval, never single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from workbench.io.errors import RequestError

LEVEL = 0.95

ROWS_A_DIMENSION = 5
"""Training rows wanted for each dimension of a state; fewer leave a linear map badly determined."""


class Interval(NamedTuple):
    """A mean and the central 95 % of its bootstrap distribution; NaN where there was nothing to average."""

    mean: float
    low: float
    high: float


def divided(
    documents: Int[np.ndarray, " row"],
    held_out: float,
    validation: float | None = None,
    *,
    purpose: str,
    uses: str = "to train on, to stop by and to read",
    seed: int = 0,
) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """Which rows to train on, to stop training by, and to test on; no document is in two parts.

    `held_out` of the documents are tested on, `validation` of them (None: half as many) decide when training ends or
    what is chosen, at least one each. Raises RequestError where that leaves none to train on; `purpose` says what
    for, `uses` what the three parts are for.
    """
    known = np.random.default_rng(seed).permutation(np.unique(documents))
    tested = max(1, round(held_out * len(known)))
    validating = max(1, round(tested / 2 if validation is None else validation * len(known)))
    if len(known) < tested + validating + 1:
        raise RequestError(
            f"store has {len(known)} documents among the selected tokens; {purpose} needs three or more, {uses}"
        )
    parts = np.split(known, [tested, tested + validating])
    tested, validation, training = (np.isin(documents, part) for part in parts)
    return training, validation, tested


def few_rows(rows: int, d_model: int) -> str:
    """What to say of a d_model x d_model map fitted on so many rows; "" where they are enough."""
    wanted = ROWS_A_DIMENSION * d_model
    if rows >= wanted:
        return ""
    return f"{rows:,} training rows are few for {d_model} x {d_model} maps; {wanted:,} or more are wanted"


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
    """`clustered_means` of what is summed already: each cluster's sum of values and how many there were."""
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
    """`clustered_means` of one column, as mean, low and high."""
    mean, drawn = clustered_means(values[:, None], clusters, resamples=resamples, seed=seed)
    return Interval(float(mean[0]), *central(drawn[:, 0]))


def intervals(drawn: Float[np.ndarray, "resample ..."]) -> Float[np.ndarray, "bound ..."]:
    """`central` of every column of a bootstrap: [low or high, ...]."""
    flat = drawn.reshape(len(drawn), -1)
    return np.array([central(column) for column in flat.T]).T.reshape(2, *drawn.shape[1:])


def central(drawn: Float[np.ndarray, " resample"] | Sequence[float]) -> tuple[float, float]:
    """The central 95 % of a bootstrap distribution, draws that are NaN left out."""
    drawn = np.asarray(drawn, dtype=float)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
