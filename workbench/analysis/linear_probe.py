"""Linear probes on one site: standardised states, the penalty chosen on other documents, baselines and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from workbench.analysis.logistic import LogisticFit, fit_classes, second_moments
from workbench.results.bootstrap import central, clustered_means, resampled_means

_ROUGHLY = 1e-3  # tolerance of the fits that only choose the penalty: their loss is within some 1e-6


@dataclass(frozen=True)
class ProbeFit:
    """A probe fitted on training and validation rows, with the penalty that the validation rows chose."""

    fit: LogisticFit
    penalty: float
    validation_loss: float
    """Mean log-loss on the validation rows, of the probe fitted on the training rows alone, in nats."""
    unconverged: int
    """Fits, of those on the way, that stopped before their minimum."""


@dataclass(frozen=True)
class Standardised:
    """States of rows with mean 0 and standard deviation 1 on the training part; a constant column stays constant."""

    x: Float32[np.ndarray, "row d_model"]
    mean: Float[np.ndarray, " d_model"]
    spread: Float[np.ndarray, " d_model"]

    @classmethod
    def of(cls, states: Float[np.ndarray, "row d_model"], training: int) -> Standardised:
        """Standardises by the first `training` rows."""
        mean = states[:training].mean(0, dtype=np.float64)
        spread = np.sqrt(np.square(states[:training] - mean.astype(np.float32)).mean(0, dtype=np.float64))
        spread[spread <= 1e-6 * np.abs(mean) + 1e-30] = 1.0
        return cls(((states - mean) / spread).astype(np.float32), mean, spread)

    def raw(self, fit: LogisticFit) -> tuple[Float[np.ndarray, "class d_model"], Float[np.ndarray, " class"]]:
        """Returns coefficients and intercept of a fit on `x`, for states as they were recorded."""
        weight = fit.coefficients / self.spread
        return weight, fit.intercept - weight @ self.mean


def fit_probe(
    x: Float32[np.ndarray, "row feature"],
    codes: Int[np.ndarray, " row"],
    classes: int,
    training: int,
    validation: int,
    penalties: Sequence[float],
    moments: Float[np.ndarray, "feature feature"] | None = None,
) -> ProbeFit:
    """Returns the probe whose penalty gives the least log-loss on the validation rows, fitted on both parts.

    Penalties are tried from the strongest on, until one is worse than the one before.

    Args:
        x: Standardised states: training rows first, then validation rows; later rows are not read.
        codes: Class of each row.
        classes: Number of classes.
        training: Number of training rows.
        validation: Number of validation rows, at least 1.
        penalties: Penalties to choose among, in `fit_classes`' units.
        moments: `second_moments` of the rows of both parts. None: computed.
    """
    fit_rows, validation_rows = training + validation, slice(training, training + validation)
    moments = second_moments(x[:fit_rows]) if moments is None else moments
    fits: list[LogisticFit] = []
    losses: list[float] = []
    falling = sorted(set(penalties), reverse=True)
    fit = partial(fit_classes, classes=classes, moments=moments)
    for penalty in falling:
        start = fits[-1] if fits else None
        fits.append(fit(x[:training], codes[:training], penalty=penalty, start=start, tolerance=_ROUGHLY))
        losses.append(-float(_at(fits[-1].log_probabilities(x[validation_rows]), codes[validation_rows]).mean()))
        if losses[-1] > min(losses):  # weaker penalties overfit more, and take most steps
            break
    best = int(np.argmin(losses))
    fits.append(fit(x[:fit_rows], codes[:fit_rows], penalty=falling[best], start=fits[best]))
    return ProbeFit(fits[-1], falling[best], losses[best], sum(not fit.converged for fit in fits))


def most_informative(
    x: Float32[np.ndarray, "row feature"], codes: Int[np.ndarray, " row"], classes: int, k: int
) -> Int64[np.ndarray, " k"]:
    """Returns the `k` features with the largest share of variance between classes, largest first, ties by feature.

    Of two classes this is the order of the standardised mean difference (Gurnee et al., arXiv 2305.01610).
    """
    share = np.bincount(codes, minlength=classes) / len(codes)
    sums = np.stack([x[codes == value].sum(0, dtype=np.float64) for value in range(classes)])
    with np.errstate(invalid="ignore"):  # a class without rows
        between = np.nan_to_num(np.square(sums / len(codes)) / share[:, None]).sum(0)
    return np.argsort(-between, kind="stable")[:k]


def majority(codes: Int[np.ndarray, " training_row"], classes: int) -> Float[np.ndarray, " class"]:
    """Returns the log-frequencies of the classes among training rows; of a class without rows, as if it had half."""
    counts = np.maximum(np.bincount(codes, minlength=classes), 0.5)
    return np.log(counts / counts.sum())


def token_identity(
    token_id: Int[np.ndarray, " row"], codes: Int[np.ndarray, " row"], classes: int, fitted: int
) -> Float[np.ndarray, "test_row class"]:
    """Returns the log-frequencies of the classes given the token id, counted on the first `fitted` rows.

    Each token id has one more row, divided as the classes are overall; an id without training rows has only that.
    """
    kinds, index = np.unique(token_id, return_inverse=True)
    counts = np.zeros((len(kinds), classes))
    np.add.at(counts, (index[:fitted], codes[:fitted]), 1)
    counts += np.exp(majority(codes[:fitted], classes))
    return np.log(counts / counts.sum(1, keepdims=True))[index[fitted:]]


@dataclass(frozen=True)
class Scored:
    """A reading of the test rows: right or wrong, and its log-loss."""

    right: Bool[np.ndarray, " test_row"]
    loss: Float[np.ndarray, " test_row"]

    @classmethod
    def of(cls, log: Float[np.ndarray, "test_row class"], codes: Int[np.ndarray, " test_row"]) -> Scored:
        """Compares log-probabilities with the classes."""
        return cls(log.argmax(1) == codes, -_at(log, codes))


def intervals_of(
    columns: Sequence[np.ndarray], document: Int[np.ndarray, " row"], resamples: int, seed: int
) -> Float[np.ndarray, "column 3"]:
    """Returns mean, lower and upper end of the 95 % interval over documents of each column, on shared resamples."""
    values = np.stack([np.asarray(column, np.float64) for column in columns], 1)
    mean, resampled = clustered_means(values, document, resamples=resamples, seed=seed)
    return np.array([(mean[c], *central(resampled[:, c])) for c in range(len(mean))])


def recalls(
    right: Bool[np.ndarray, " row"],
    codes: Int[np.ndarray, " row"],
    classes: int,
    document: Int[np.ndarray, " row"],
    resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, " class"], tuple[float, float, float]]:
    """Returns the recall of each class, and their mean (balanced accuracy) with its 95 % interval over documents."""
    number, index = np.unique(document, return_inverse=True)
    totals, counts = (np.zeros((len(number), classes)) for _ in range(2))
    np.add.at(totals, (index, codes), right)
    np.add.at(counts, (index, codes), 1)
    mean, resampled = resampled_means(totals, counts, resamples=resamples, seed=seed)
    balanced = resampled.mean(1)  # NaN where a resample lacks a class
    return mean, (float(mean.mean()), *central(balanced))


def _at(log: Float[np.ndarray, "row class"], codes: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    return np.take_along_axis(log, codes[:, None], 1)[:, 0]
