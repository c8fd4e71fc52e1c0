"""A bar for each position, in one of two colours."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from workbench.figures.theme import CATEGORIES, NEUTRAL, TEMPLATE


def position_bars(
    values: Float[np.ndarray, " position"],
    *,
    reliable: Bool[np.ndarray, " position"],
    names: tuple[str, str],
    title: str,
    subtitle: str,
    unit: str,
) -> go.Figure:
    """Returns a bar for each position from 0 on; unreliable ones are grey.

    Args:
        values: Height of each bar, in percent.
        reliable: Which bars are coloured.
        names: Names of coloured and of grey bars in the legend.
        title: Title, as plotly text.
        subtitle: Line below the title.
        unit: Title of the vertical axis.
    """
    figure = go.Figure()
    for mask, name, color in zip((reliable, ~reliable), names, (CATEGORIES[0], NEUTRAL), strict=True):
        figure.add_bar(
            x=np.flatnonzero(mask).tolist(),
            y=values[mask],
            name=name,
            marker={"color": color},
            hovertemplate="position %{x}: %{y:.2f} %",
        )
    figure.update_layout(
        template=TEMPLATE, title={"text": title, "subtitle": {"text": subtitle}}, height=420, width=760, showlegend=True
    )
    figure.update_xaxes(title="position, from 0")
    return figure.update_yaxes(title=unit, rangemode="tozero")
