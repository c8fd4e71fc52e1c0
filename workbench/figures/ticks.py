"""Tick spacing of axes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def integer_step(values: Iterable[Any]) -> int | None:
    """Returns a whole tick distance for layers, offsets or horizons that gives about a dozen ticks.

    None lets plotly choose: for fractions, strings, and numbers that span more than 100.
    """
    array = np.array(list(values))
    if not array.size or array.dtype.kind not in "iuf" or (array != array.round()).any():
        return None
    span = int(array.max() - array.min())
    return max(1, (span + 1) // 12) if span <= 100 else None
