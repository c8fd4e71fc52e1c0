"""Absorption on planted tokens, whose outcome follows from the definition by hand."""

import numpy as np
import pytest
from refusals import refused
from scipy.sparse import csr_array

import workbench as wb
from workbench.analysis.absorption import _Data
from workbench.io.errors import RequestError

UNIT = np.array([1.0, 0.0])
DIRECTIONS = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.2, 1.0], [0.01, 1.0]])
"""Feature 0 is the letter's own; 1 lies along the probe; 2 across; 3 and 4 have cosines 0.196 and 0.01 with it."""


def data(x, *active):
    """One token with activations of features (feature, activation)."""
    planted = object.__new__(_Data)
    row = np.zeros((1, len(DIRECTIONS)))
    for feature, activation in active:
        row[0, feature] = activation
    planted.x, planted.active, planted.scale = np.array([[x, 5.0]]), csr_array(row), np.ones(1)
    planted.used = np.arange(len(DIRECTIONS))
    planted.directions, planted.norms = DIRECTIONS, np.linalg.norm(DIRECTIONS, axis=1)
    return planted


@pytest.mark.parametrize(
    ("x", "active", "expected"),
    [
        (1.0, [(0, 1.0), (2, 3.0)], (False, 0.0, 0)),  # its own feature accounts for all
        (1.0, [(1, 1.0), (2, 3.0)], (True, 1.0, 1)),  # silent, another stands in
        (1.0, [(1, 0.39)], (False, 0.0, 1)),  # too small a share
        (1.0, [(0, 0.3), (1, 0.6)], (False, 0.6 / 0.9, 1)),  # in part
        (1.0, [(0, 0.3), (1, 5.0)], (False, 0.7, 1)),  # no more than what is left out
        (1.0, [(4, 60.0)], (False, 0.0, 4)),  # its cosine is below both thresholds
        (0.1, [(3, 1.0)], (True, 1.0, 3)),
        (-1.0, [(1, 1.0)], (False, 0.0, 1)),  # the probe is not active
        (1.0, [], (False, 0.0, -1)),
    ],
)
def test_absorption_follows_from_the_definition(x, active, expected):
    full, fraction, top = data(x, *active)._absorbed(0, UNIT, np.array([0]))
    assert (full, top) == (expected[0], expected[2])
    assert fraction == pytest.approx(expected[1])


def test_absorption_of_texts_has_one_line_per_letter(feature_stores):
    features, sae = feature_stores["middle"]
    table = wb.feature_absorption(features, sae, k=2, held_out=0.5, least=1)
    assert set(table["letter"]) <= set("abcdefghijklmnopqrstuvwxyz")
    assert ((table["full"].dropna() >= 0) & (table["fraction"].dropna() <= 1)).all()
    assert (table["true_positives"] <= table["tokens"]).all()
    message = refused(RequestError, lambda: wb.feature_absorption(features, sae))
    assert message.startswith("least is 10: no first letter has as many distinct training tokens")
