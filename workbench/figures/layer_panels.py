"""Curves over layers in a grid of panels with one legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from workbench.figures.error_bars import band_traces
from workbench.figures.themed import ThemedFigure
from workbench.figures.ticks import integer_step


@dataclass(frozen=True)
class Curve:
    """One line over layers."""

    name: str
    """Plotly markup, already safe."""
    values: Float[np.ndarray, " layer"] | float
    """A float is a horizontal line: a baseline that does not depend on the layer."""
    colour: str
    dash: str = "solid"
    group: str = ""
    """Curves of a group are switched together by the legend. "": the name."""
    legend: bool = True
    """False for references that the subtitle explains."""
    ends: tuple[Float[np.ndarray, ...], Float[np.ndarray, ...]] | None = None
    """Lower and upper end of the interval, by layer or of all, drawn as a band. None: no band."""


@dataclass(frozen=True)
class Panel:
    """One panel: its title, plotly markup, and its curves."""

    title: str
    curves: Sequence[Curve]


def layer_panels(
    rows: Sequence[Sequence[Panel]], *, layers: Sequence[int], title: str, subtitle: str, unit: str
) -> go.Figure:
    """Draws rows of panels that share both axes; the legend has the curves of the first panel.

    Args:
        rows: Panels by row, as many in each row.
        layers: Layer numbers, the x axis.
        title: Title of the figure; plotly markup, as are `subtitle` and `unit`.
        subtitle: Subtitle of the figure.
        unit: Title of the y axis.
    """
    columns = len(rows[0])
    figure = make_subplots(
        len(rows),
        columns,
        figure=ThemedFigure(),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[panel.title for row in rows for panel in row],
        horizontal_spacing=0.08 / columns,
        vertical_spacing=0.09,
    )
    for row, panels in enumerate(rows, start=1):
        for column, panel in enumerate(panels, start=1):
            for curve in panel.curves:
                line = go.Scatter(
                    x=list(layers),
                    y=np.broadcast_to(np.asarray(curve.values, float), len(layers)),
                    name=curve.name,
                    mode="lines+markers" if curve.dash == "solid" else "lines",
                    line={"color": curve.colour, "dash": curve.dash, "width": 2 if curve.dash == "solid" else 1.5},
                    legendgroup=curve.group or curve.name,
                    showlegend=curve.legend and row == column == 1,
                    hovertemplate="layer %{x}: %{y:.3f}",
                )
                for trace in band_traces(line, curve.ends):
                    figure.add_trace(trace, row=row, col=column)
    height = 210 + 250 * len(rows)
    figure.update_layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        margin={"t": 110, "b": 100},
        legend={"y": -65 / (height - 210), "yanchor": "top"},
        height=height,
        width=max(640, 140 + (420 if columns < 3 else 260) * columns),
    )
    figure.update_xaxes(dtick=integer_step(layers))
    figure.update_xaxes(title="layer", row=len(rows))
    figure.update_yaxes(rangemode="tozero")
    return figure.update_yaxes(title=unit, col=1)
