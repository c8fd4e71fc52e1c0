"""Curves over layers, one line per quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.themed import ThemedFigure
from workbench.figures.ticks import integer_step


def layer_curves(
    curves: Mapping[str, Float[np.ndarray, " layer"]], *, layers: Sequence[int], title: str, unit: str
) -> go.Figure:
    """Draws one line over layers per entry of `curves`, all in the same unit."""
    lines = [
        go.Scatter(x=list(layers), y=values, name=name, mode="lines+markers", hovertemplate="layer %{x}: %{y:.4g}")
        for name, values in curves.items()
    ]
    layout = {
        "title": {"text": title},
        "height": 420,
        "width": 760,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "layer"}, "dtick": integer_step(layers)},
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
    }
    return ThemedFigure(lines, layout)
