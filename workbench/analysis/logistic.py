"""Logistic regression on dense or sparse rows: two classes with balanced weights, or any number of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Real
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.sparse import issparse
from scipy.special import expit

TOLERANCE = 3e-4
"""Largest entry of the gradient of a converged fit, in coordinates of curvature about 1: its loss is 1e-7 or so above
the minimum. Sums in float32 reach about 1e-5."""

_ROUNDS, _STEPS = 10, 100  # of L-BFGS, and the steps of one
_ABSENT = 30.0


@dataclass(frozen=True)
class LogisticFit:
    """A fitted map from rows to scores; the softmax of the scores is the distribution over classes."""

    coefficients: Float[np.ndarray, "class feature"]
    intercept: Float[np.ndarray, " class"]
    converged: bool
    """False if the solver stopped before its gradient was below the tolerance."""

    def log_probabilities(self, x: Float[np.ndarray, "row feature"]) -> Float[np.ndarray, "row class"]:
        """Returns log-probabilities of the classes, in nats."""
        scores = (x @ self.coefficients.T.astype(x.dtype)).astype(np.float64) + self.intercept
        return _log_softmax(scores)


def second_moments(x: Any) -> Float[np.ndarray, "feature feature"]:
    """Returns the mean over rows of x xᵀ, which preconditions the fits."""
    product = x.T @ x
    return np.asarray(product.toarray() if issparse(product) else product, np.float64) / max(1, x.shape[0])


def fit_classes(
    x: Float[np.ndarray, "row feature"],
    codes: Int[np.ndarray, " row"],
    classes: int,
    penalty: float,
    *,
    moments: Float[np.ndarray, "feature feature"] | None = None,
    start: LogisticFit | None = None,
    tolerance: float = TOLERANCE,
) -> LogisticFit:
    """Returns the multinomial logistic regression: mean log-loss plus penalty / 2 · ‖coefficients‖², intercepts free.

    This is scikit-learn's LogisticRegression(C=1 / (rows · penalty)). Of two classes, the penalty is that of the
    difference of their coefficients, as there. Cost: some 10 to 50 products with `x`, in its type, and a Cholesky
    factor of feature x feature, which preconditions L-BFGS by the curvature at 0.

    Args:
        x: The rows.
        codes: Class of each row.
        classes: Number of classes; one without a row gets a probability of about e⁻³⁰.
        penalty: Strength of the penalty, above 0.
        moments: `second_moments` of these or similar rows. None: computed.
        start: A fit to begin at: that of a similar penalty saves steps.
        tolerance: Largest entry of the gradient that counts as converged.
    """
    share = np.bincount(codes, minlength=classes) / len(codes)
    if not share.all():
        return _present_alone(x, codes, share, penalty, moments, tolerance)
    loss = (
        _TwoClasses(codes == 1, np.full(len(codes), 1 / len(codes))) if classes == 2 else _ManyClasses(codes, classes)
    )
    begin = None
    if start is not None:
        begin = (np.linalg.pinv(loss.contrasts) @ np.column_stack([start.coefficients, start.intercept])).T
    parameters, converged = _minimise(x, loss, penalty, moments, begin, tolerance)
    solution = loss.contrasts @ parameters.T
    return LogisticFit(solution[:, :-1].copy(), solution[:, -1].copy(), converged)


def _present_alone(
    x: np.ndarray, codes: np.ndarray, share: np.ndarray, penalty: float, moments: np.ndarray | None, tolerance: float
) -> LogisticFit:
    """The fit of the classes that have rows: the intercept of another one has no minimum."""
    present = np.flatnonzero(share)
    coefficients, intercept = np.zeros((len(share), x.shape[1])), np.full(len(share), -_ABSENT)
    intercept[present] = 0.0
    if len(present) < 2:
        return LogisticFit(coefficients, intercept, True)
    number = np.cumsum(share > 0) - 1
    fit = fit_classes(x, number[codes], len(present), penalty, moments=moments, tolerance=tolerance)
    coefficients[present], intercept[present] = fit.coefficients, fit.intercept
    return LogisticFit(coefficients, intercept, fit.converged)


def fit_logistic(
    x: Any, positive: Bool[np.ndarray, " row"], weight: Real[np.ndarray, " row"] | None = None, penalty: float = 1.0
) -> tuple[Float[np.ndarray, " feature"], float]:
    """Returns coefficients and intercept that minimise the weighted log-loss plus penalty / 2 · ‖coefficients‖².

    Both classes get the same total weight, half of the rows each, so that a rare class is not ignored; the intercept is
    not penalised. This is scikit-learn's LogisticRegression(C=1 / penalty, class_weight="balanced"). Cost: some 10 to
    50 products with `x`.

    Args:
        x: Rows, axes (row, feature): an array or a SciPy sparse matrix.
        positive: True for rows of the class.
        weight: Number of times that each row counts. None: once.
        penalty: Strength of the penalty; 0 has no minimum where the classes are separable.
    """
    times = np.ones(len(positive)) if weight is None else np.asarray(weight, np.float64)
    total = times.sum()
    totals = np.array([times[~positive].sum(), times[positive].sum()])
    balanced = times * (total / (2 * np.maximum(totals, 1e-300)))[positive.astype(int)]
    parameters, _ = _minimise(x, _TwoClasses(positive, balanced / total), penalty / total)
    return parameters[:-1, 0], float(parameters[-1, 0])


class _TwoClasses:
    """Weighted log-loss of the score of the second class against the first."""

    contrasts = np.array([[-0.5], [0.5]])
    """From the score to those of both classes."""

    def __init__(self, positive: np.ndarray, weight: np.ndarray) -> None:
        self._sign, self._weight = np.where(positive, 1.0, -1.0), weight

    def __call__(self, scores: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns the loss and its slope [row, 1]."""
        margin = self._sign * scores[:, 0]
        slope = -self._weight * self._sign * expit(-margin)
        return float(self._weight @ np.logaddexp(0, -margin)), slope[:, None]

    def curvature(self, scores: np.ndarray) -> np.ndarray:
        """Returns the second derivative of each row [row, 1]."""
        return self._weight[:, None] * expit(scores) * expit(-scores)


class _ManyClasses:
    """Mean log-loss of the scores of contrasts of classes.

    The sum over classes changes no probability: without it, the problem has no flat direction. The contrasts are
    orthonormal, so that the penalty is that of the classes' coefficients.
    """

    def __init__(self, codes: np.ndarray, classes: int) -> None:
        self._codes, self._row = codes, np.arange(len(codes))
        basis = np.column_stack([np.ones(classes), np.eye(classes)[:, 1:]])
        self.contrasts = np.linalg.qr(basis)[0][:, 1:]

    def __call__(self, scores: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns the loss and its slope [row, contrast]."""
        log = _log_softmax(scores @ self.contrasts.T)
        slope = np.exp(log)
        slope[self._row, self._codes] -= 1
        return float(-log[self._row, self._codes].mean()), slope @ self.contrasts / len(log)

    def curvature(self, scores: np.ndarray) -> np.ndarray:
        """Returns the second derivative of each row and contrast."""
        p = np.exp(_log_softmax(scores @ self.contrasts.T))
        return (p @ self.contrasts**2 - (p @ self.contrasts) ** 2) / len(p)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(1, keepdims=True)  # SciPy's logsumexp takes ten times as long
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def _minimise(
    x: Any,
    loss: _TwoClasses | _ManyClasses,
    penalty: float,
    moments: np.ndarray | None = None,
    start: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Float[np.ndarray, "feature_plus_1 column"], bool]:
    """Coefficients over the intercepts, and True if the gradient is below `tolerance`.

    Rounds of L-BFGS, each in coordinates in which the curvature at its begin is about 1. A single round suffices for a
    rough fit; an exact one ends in coordinates of the minimum: near it, classes that are separable have little
    curvature.
    """
    rows, size = x.shape
    columns = loss.contrasts.shape[1]
    parameters = np.zeros((size + 1, columns)) if start is None else start
    curvature = loss.curvature(np.zeros((rows, columns)))
    scale = curvature.mean() * rows * (second_moments(x) if moments is None else moments)
    for number in range(_ROUNDS):
        if number:
            curvature = loss.curvature(_scores(x, parameters))
            weighted = (
                x.multiply(curvature.mean(1)[:, None]) if issparse(x) else x * _like(x, curvature.mean(1)[:, None])
            )
            product = weighted.T @ x
            scale = np.asarray(product.toarray() if issparse(product) else product, np.float64)
        roughly = tolerance if number or tolerance > TOLERANCE else 5 * tolerance
        parameters, gradient = _round(x, loss, penalty, scale, curvature.sum(0), parameters, roughly)
        if gradient <= tolerance and (number or tolerance > TOLERANCE):
            return parameters, True
    return parameters, False


def _round(
    x: Any,
    loss: _TwoClasses | _ManyClasses,
    penalty: float,
    moments: Float[np.ndarray, "feature feature"],
    curvature: Float[np.ndarray, " column"],
    start: Float[np.ndarray, "feature_plus_1 column"],
    tolerance: float,
) -> tuple[Float[np.ndarray, "feature_plus_1 column"], float]:
    """Parameters after some steps, and the largest entry of the gradient there."""
    ridge = penalty + 1e-12 * float(np.trace(moments)) / len(moments) + 1e-300
    factor = cholesky(moments + ridge * np.eye(len(moments)), lower=True)
    scale, bias_scale = np.sqrt(curvature / curvature.mean()), np.sqrt(curvature + 1e-12)
    shape = start.shape

    def outer(inner: np.ndarray) -> np.ndarray:
        weights = solve_triangular(factor, inner[:-1] / scale, lower=True, trans=1, check_finite=False)
        return np.concatenate([weights, inner[-1:] / bias_scale])

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = outer(flat.reshape(shape))
        mean, slope = loss(_scores(x, parameters))
        gradient = np.asarray(x.T @ _like(x, slope), np.float64) + penalty * parameters[:-1]
        gradient = solve_triangular(factor, gradient, lower=True, check_finite=False) / scale
        bias = slope.sum(0, keepdims=True) / bias_scale
        size = penalty / 2 * float(np.square(parameters[:-1]).sum())
        return mean + size, np.concatenate([gradient, bias]).ravel()

    begin = np.concatenate([(factor.T @ start[:-1]) * scale, start[-1:] * bias_scale])
    exactly = 1000 if x.dtype == np.float64 else 2
    options = {"maxiter": _STEPS, "maxfun": 2 * _STEPS, "ftol": 1e-14, "gtol": tolerance / exactly}
    best = minimize(value, begin.ravel(), jac=True, method="L-BFGS-B", options=options)
    return outer(best.x.reshape(shape)), float(np.abs(best.jac).max(initial=0))


def _scores(x: Any, parameters: np.ndarray) -> np.ndarray:
    return np.asarray(x @ _like(x, parameters[:-1]), np.float64) + parameters[-1]


def _like(x: Any, values: np.ndarray) -> np.ndarray:
    """Values in the type of `x`, so that products with it are not made in a wider one."""
    return values.astype(x.dtype, copy=False)
