"""Logistic regression of several classes against Newton's method in float64."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.analysis.logistic import fit_classes


def newton(x, codes, classes, penalty):
    """Log-probabilities at the minimum, with all classes' coefficients, by Newton's method with the pseudo-inverse."""
    x1 = np.column_stack([x, np.ones(len(x))])
    width = x1.shape[1]
    truth = np.eye(classes)[codes]
    ridge = penalty * np.diag([*[1.0] * (width - 1), 0.0])
    if classes == 2:  # the penalty is that of the difference: half of it in both together
        ridge = 2 * ridge
    beta = np.zeros((width, classes))
    for _ in range(60):
        scores = x1 @ beta
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = x1.T @ (p - truth) / len(x) + ridge @ beta
        hessian = np.zeros((classes, width, classes, width))
        for c in range(classes):
            for d in range(classes):
                weight = p[:, c] * ((c == d) - p[:, d]) / len(x)
                hessian[c, :, d] = (x1 * weight[:, None]).T @ x1 + (c == d) * ridge
        flat = hessian.reshape(classes * width, -1)
        beta -= (np.linalg.pinv(flat, rcond=1e-12) @ gradient.T.ravel()).reshape(classes, width).T
    return np.log(p)


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 6)) @ draw.normal(size=(6, 6)) * [1, 1, 1, 1, 0.1, 3]
    return x, draw


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("penalty", [0.3, 1e-3])
def test_it_equals_newtons_method(rows, classes, penalty):
    x, draw = rows
    codes = (x @ draw.normal(size=(6, classes)) * 0.3 + draw.gumbel(size=(300, classes))).argmax(1)
    expected = newton(x, codes, classes, penalty)
    fit = fit_classes(x, codes, classes, penalty)
    assert fit.converged
    np.testing.assert_allclose(fit.log_probabilities(x), expected, atol=1e-4)
    narrow = fit_classes(x.astype(np.float32), codes, classes, penalty, start=fit)
    np.testing.assert_allclose(narrow.log_probabilities(x.astype(np.float32)), expected, atol=3e-3)


def test_separable_classes_converge_to_a_small_loss(rows):
    x, _ = rows
    codes = np.digitize(x[:, 0], np.quantile(x[:, 0], [0.3, 0.8]))
    fit = fit_classes(x, codes, 3, 1e-5)
    assert fit.converged
    np.testing.assert_allclose(fit.log_probabilities(x), newton(x, codes, 3, 1e-5), rtol=1e-3, atol=0.01)


def test_a_class_without_rows_is_improbable_and_changes_nothing_else(rows):
    x, draw = rows
    codes = draw.integers(0, 2, 300)
    fit, alone = fit_classes(x, 2 * codes, 3, 0.01), fit_classes(x, codes, 2, 0.01)
    log = fit.log_probabilities(x)
    assert (log[:, 1] < -25).all()
    np.testing.assert_allclose(log[:, [0, 2]], alone.log_probabilities(x), atol=1e-6)
    single = fit_classes(x, np.full(300, 1), 3, 0.01)
    np.testing.assert_allclose(single.log_probabilities(x)[:, 1], 0, atol=1e-9)


def test_a_fit_that_is_cut_short_says_so(rows, monkeypatch):
    x, draw = rows
    monkeypatch.setattr("workbench.analysis.logistic._STEPS", 1)
    monkeypatch.setattr("workbench.analysis.logistic._ROUNDS", 1)
    assert not fit_classes(x, draw.integers(0, 3, 300), 3, 1e-4).converged
