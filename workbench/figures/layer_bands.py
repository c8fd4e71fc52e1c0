"""Curves over layers with their intervals as bands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.error_bars import band_traces
from workbench.figures.themed import ThemedFigure
from workbench.figures.ticks import integer_step


@dataclass(frozen=True)
class Band:
    """One line over layers and the ends of its interval."""

    name: str
    """Plotly markup, already safe."""
    values: Float[np.ndarray, " layer"] | float
    """A float is a horizontal line: a baseline that does not depend on the layer."""
    ends: tuple[Float[np.ndarray, " layer"] | float, Float[np.ndarray, " layer"] | float] | None
    """Lower and upper end; None: no band."""
    colour: str
    dash: str = "solid"


def layer_bands(bands: Sequence[Band], *, layers: Sequence[int], title: str, subtitle: str, unit: str) -> go.Figure:
    """Draws one line over layers per entry of `bands`, all in the same unit, each with a band between its ends."""
    traces: list[go.Scatter] = []
    for band in bands:
        solid = band.dash == "solid"
        line = go.Scatter(
            x=list(layers),
            y=np.broadcast_to(np.asarray(band.values, float), len(layers)),
            name=band.name,
            mode="lines+markers" if solid else "lines",
            line={"color": band.colour, "dash": band.dash, "width": 2 if solid else 1.5},
            legendgroup=band.name,
            hovertemplate="layer %{x}: %{y:.3f}",
        )
        traces += band_traces(line, band.ends)
    layout = {
        "title": {"text": title, "subtitle": {"text": subtitle}},
        "height": 460,
        "width": 760,
        "margin": {"t": 110},
        "showlegend": True,
        "xaxis": {"title": {"text": "layer"}, "dtick": integer_step(layers)},
        "yaxis": {"title": {"text": unit}},
    }
    return ThemedFigure(traces, layout)
