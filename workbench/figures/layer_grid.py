"""Heat map with one value for each pair of layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.theme import PROBABILITY, colour_bar
from workbench.figures.themed import ThemedFigure


def layer_grid(
    values: Float[np.ndarray, "layer other_layer"],
    *,
    layers: Sequence[int],
    other_layers: Sequence[int],
    names: tuple[str, str],
    title: str,
    subtitle: str,
    unit: str,
) -> go.Figure:
    """Draws layers (upward) by layers (rightward), coloured by `values` from 0 to 1.

    Args:
        values: One value for each pair; NaN stays white.
        layers: Layer numbers, from the bottom up.
        other_layers: Layer numbers, from left to right.
        names: Axis titles of both. These, `title` and `subtitle` are plotly markup, already safe.
        title: Title of the figure.
        subtitle: Subtitle of the figure.
        unit: Title of the colour bar.
    """
    cells = go.Heatmap(
        z=values,
        x=list(map(str, other_layers)),
        y=list(map(str, layers)),
        hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        colorscale=PROBABILITY,
        zmin=0,
        zmax=1,
        hoverongaps=False,
        colorbar=colour_bar(unit),
    )
    steps = [1 + len(numbers) // 16 for numbers in (layers, other_layers)]
    layout = {
        "title": {"text": title, "subtitle": {"text": subtitle}},
        "width": max(640, 260 + 16 * len(other_layers)),
        "height": max(480, 240 + 16 * len(layers)),
        "xaxis": {"title": {"text": names[1]}, "type": "category", "dtick": steps[1], "showgrid": False},
        "yaxis": {"title": {"text": names[0]}, "type": "category", "dtick": steps[0], "showgrid": False},
    }
    return ThemedFigure(cells, layout)
