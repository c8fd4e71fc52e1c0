"""A bar for each position, in one of two colours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from workbench.figures.error_bars import error_bars
from workbench.figures.theme import CATEGORIES, NEUTRAL
from workbench.figures.themed import ThemedFigure


def position_bars(
    values: Float[np.ndarray, " position"],
    *,
    reliable: Bool[np.ndarray, " position"],
    names: tuple[str, str],
    title: str,
    subtitle: str,
    unit: str,
    ends: Mapping[int, tuple[float, float]] | None = None,
) -> go.Figure:
    """Returns a bar for each position from 0 on; unreliable ones are grey.

    Args:
        values: Height of each bar, in percent.
        reliable: Which bars are coloured.
        names: Names of coloured and of grey bars in the legend.
        title: Title, as plotly text.
        subtitle: Line below the title.
        unit: Title of the vertical axis.
        ends: Lower and upper end of the interval of the positions that have one.
    """
    low, high = np.full(len(values), np.nan), np.full(len(values), np.nan)
    for position, interval in (ends or {}).items():
        low[position], high[position] = interval
    bars = [
        go.Bar(
            x=np.flatnonzero(mask).tolist(),
            y=values[mask],
            error_y=error_bars(values[mask], low[mask], high[mask]) if ends else None,
            name=name,
            marker={"color": color},
            hovertemplate="position %{x}: %{y:.2f} %",
        )
        for mask, name, color in zip((reliable, ~reliable), names, (CATEGORIES[0], NEUTRAL), strict=True)
    ]
    layout = {
        "title": {"text": title, "subtitle": {"text": subtitle}},
        "height": 440,
        "width": 760,
        "margin": {"t": 110},
        "showlegend": True,
        "xaxis": {"title": {"text": "position, from 0"}},
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
    }
    return ThemedFigure(bars, layout)
