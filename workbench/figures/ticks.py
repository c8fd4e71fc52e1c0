"""Tick spacing of axes."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
import plotly.graph_objects as go


def integer_step(values: Iterable[Any], count: int = 12) -> int | None:
    """Returns a whole tick distance for layers, offsets or horizons that gives about `count` ticks.

    None lets plotly choose: for fractions, strings, and numbers that span more than 100.
    """
    array = np.array(list(values))
    if not array.size or array.dtype.kind not in "iuf" or (array != array.round()).any():
        return None
    span = int(array.max() - array.min())
    return max(1, (span + 1) // count) if span <= 100 else None


def log_ticks(low: float, high: float) -> list[float] | None:
    """Returns 1, 2 and 5 times powers of ten between `low` and `high`, both positive.

    None for more than two decades, where powers of ten alone are enough.
    """
    if not 0 < low <= high or np.log10(high / low) > 2:
        return None
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    values = [float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5)]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


def write_out_log_ticks(figure: go.Figure) -> None:
    """Writes ticks that lie between powers of ten as numbers: plotly rounds 16 to "2x10" where it writes powers."""
    axis: Any
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        if axis.type == "log" and isinstance(axis.dtick, Real) and axis.dtick % 1 and not axis.tickformat:
            axis.tickformat = "~g"
