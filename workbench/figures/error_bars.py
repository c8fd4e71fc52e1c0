"""Intervals of points: bars, and bands along lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float


def error_bars(
    values: Float[np.ndarray, " point"], low: Float[np.ndarray, " point"], high: Float[np.ndarray, " point"]
) -> dict[str, Any]:
    """Returns plotly's `error_x` or `error_y` of points from the two ends of their intervals."""
    return {"type": "data", "array": high - values, "arrayminus": values - low, "thickness": 1}


def band_traces(
    line: go.Scatter, ends: tuple[Float[np.ndarray, ...] | float, Float[np.ndarray, ...] | float] | None
) -> Sequence[go.Scatter]:
    """Returns a line with the band between the lower and upper ends of its interval behind it; without ends, the line.

    The ends are invisible error bars of the line, too, so that tables and texts of what is drawn have them.
    """
    x, values = np.asarray(line.x), np.asarray(line.y, float)
    low, high = (np.broadcast_to(np.asarray(end, float), len(x)) for end in ends or (np.nan, np.nan))
    known = np.flatnonzero(~np.isnan(low + high))  # a polygon with a gap is filled wrongly
    if not len(known):
        return [line]
    line.error_y = error_bars(values, low, high) | {"visible": False}
    style: Any = line.line
    band = go.Scatter(
        x=[*x[known], *x[known[::-1]]],
        y=np.concatenate([high[known], low[known[::-1]]]),
        mode="lines",
        fill="toself",
        fillcolor=style.color,
        opacity=0.15,
        line={"width": 0},
        hoverinfo="skip",
        legendgroup=line.legendgroup,
        showlegend=False,
        meta={"decoration": "band"},
    )
    return [band, line]
