"""Heat maps of several measures of the same heads, a panel each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from workbench.figures.head_grid import head_name
from workbench.figures.theme import PROBABILITY, SIGNED
from workbench.figures.themed import ThemedFigure

_ACROSS = 4


@dataclass(frozen=True)
class HeadPanel:
    """One measure of all heads."""

    title: str
    """Plotly markup, already safe."""
    values: Float[np.ndarray, "layer head"]
    """NaN, where there is no head or no value, stays white."""
    limits: tuple[float, float]
    """Values at both ends of the colours; with a negative end the middle is 0."""


def head_panels(panels: Sequence[HeadPanel], *, layers: Sequence[int], title: str, subtitle: str) -> go.Figure:
    """Draws layers (upward) by heads (rightward) for each measure; its range of colours stands in its title.

    Args:
        panels: The measures.
        layers: Layer numbers, from the bottom up.
        title: Title of the figure; plotly markup, as is `subtitle`.
        subtitle: Subtitle of the figure.
    """
    across = min(_ACROSS, len(panels))
    down = -(-len(panels) // across)
    heads = max(panel.values.shape[1] for panel in panels)
    wide, high = max(150, min(10 * heads, 320)), max(110, min(9 * len(layers), 420))
    height = 110 + down * (high + 50)
    figure = make_subplots(
        down,
        across,
        figure=ThemedFigure(),
        subplot_titles=[f"{panel.title}: {panel.limits[0]:.2g} to {panel.limits[1]:.2g}" for panel in panels],
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=46 / (height - 110) if down > 1 else 0.0,
    )
    for number, panel in enumerate(panels):
        low, high_end = panel.limits
        names = [[head_name(layer, head) for head in range(panel.values.shape[1])] for layer in layers]
        figure.add_trace(
            go.Heatmap(
                z=panel.values,
                x=list(range(panel.values.shape[1])),
                y=list(layers),
                customdata=names,
                hovertemplate=f"%{{customdata}}: {panel.title} %{{z:.3f}}<extra></extra>",
                colorscale=SIGNED if low < 0 else PROBABILITY,
                zmin=low,
                zmax=high_end,
                showscale=False,
                hoverongaps=False,
            ),
            row=1 + number // across,
            col=1 + number % across,
        )
    figure.update_annotations(font={"size": 12})
    figure.update_layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        width=110 + across * (wide + 24),
        height=height,
        margin={"t": 100, "b": 50},
    )
    figure.update_xaxes(showgrid=False, nticks=5)
    figure.update_xaxes(title="head", row=down)
    figure.update_yaxes(showgrid=False, nticks=7)
    return figure.update_yaxes(title="layer", col=1)
