"""Means of several groups side by side for each category, with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.category_names import name_ticks
from workbench.figures.error_bars import error_bars
from workbench.figures.themed import ThemedFigure

_WIDTH, _SIDES, _LEGEND = 960, 100, 150  # pixels


def group_intervals(
    groups: Mapping[str, Float[np.ndarray, "bound category"]],
    *,
    categories: Sequence[str],
    hover: str,
    title: str,
    subtitle: str,
) -> go.Figure:
    """Returns a dot for each group and category, with its interval.

    Args:
        groups: Name of a group, as plotly text, to its mean, low and high ends, one row each.
        categories: Names on the horizontal axis.
        hover: Text before the value when hovering, with `%{x}` for the category.
        title: Title, as plotly text.
        subtitle: Line below the title.
    """
    points = [
        go.Scatter(
            x=categories,
            y=mean,
            error_y=error_bars(mean, low, high),
            name=name,
            mode="markers",
            marker={"size": 8},
            hovertemplate=hover + ": %{y:.3f}",
        )
        for name, (mean, low, high) in groups.items()
    ]
    room = float(_WIDTH - _SIDES - _LEGEND * (len(groups) > 1))
    layout = {
        "title": {"text": title, "subtitle": {"text": subtitle}},
        "scattermode": "group",
        "height": 460,
        "width": _WIDTH,
        "legend": {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
        "xaxis": {"type": "category", **name_ticks({name: name for name in categories}, room, 13.0)},
        "yaxis": {"rangemode": "tozero"},
    }
    return ThemedFigure(points, layout)
