"""The rule of scores: its window, and what a damaged one is."""

import numpy as np
import pytest

from workbench.sites.score_rule import ScoreRule


def rule(window):
    return ScoreRule(layer=0, queries="rot_q.0", keys="rot_k.0", scale=0.5, softcap=None, window=window, biased=False)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_query_sees_the_keys_of_its_window(window):
    at = np.arange(6)
    visible = rule(window).visible(at[:, None], at)
    expected = [[k <= q and (window is None or q - k < window) for k in range(6)] for q in range(6)]
    assert visible.tolist() == expected


def test_a_window_without_keys_is_refused():
    with pytest.raises(ValueError, match="window of layer 0 is 0; at least 1 expected"):
        rule(0)
