"""A grid of layers by tokens with text in its cells, and curves over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.text import label
from workbench.figures.theme import MONOSPACE, PROBABILITY, TEMPLATE


def token_grid(
    values: Float[np.ndarray, "layer position"],
    *,
    cells: Sequence[Sequence[str]],
    hover: Sequence[Sequence[str]],
    tokens: Sequence[str],
    positions: Sequence[int],
    layers: Sequence[int],
    title: str,
    subtitle: str,
    unit: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> go.Figure:
    """Layers (upward) by tokens (rightward), coloured by `values`, each cell holding a token of `cells`.

    `cells` and `tokens` are model text and made safe here; `hover` is markup, its maker has done so. Cells are
    40 pixels wide at least: a long text scrolls sideways rather than shrinking out of sight.
    """
    columns = [str(position) for position in positions]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=columns,
            y=[str(layer) for layer in layers],
            text=[[label(cell, 9) for cell in row] for row in cells],
            texttemplate="%{text}",
            textfont={"family": MONOSPACE, "size": 11},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=PROBABILITY,
            zmin=limits[0],
            zmax=limits[1],
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14, "outlinewidth": 0},
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}},
        width=max(640, 190 + 62 * len(columns)),
        height=190 + 30 * len(layers),
    )
    figure.update_xaxes(
        title="input token",
        type="category",
        tickmode="array",
        tickvals=columns,
        ticktext=[label(token, 12) for token in tokens],
        tickangle=-45,
        tickfont={"family": MONOSPACE},
        showgrid=False,
    )
    figure.update_yaxes(title="layer", type="category", showgrid=False)
    return figure


def layer_curves(
    curves: Mapping[str, Float[np.ndarray, " layer"]], *, layers: Sequence[int], title: str, unit: str
) -> go.Figure:
    """One line for each entry of `curves`, over layers, all in the same unit."""
    figure = go.Figure(
        [
            go.Scatter(x=list(layers), y=values, name=name, mode="lines+markers", hovertemplate="layer %{x}: %{y:.4g}")
            for name, values in curves.items()
        ]
    )
    figure.update_layout(template=TEMPLATE, title={"text": title}, height=420, width=760, hovermode="x unified")
    figure.update_xaxes(title="layer", dtick=max(1, len(layers) // 12))
    figure.update_yaxes(title=unit, rangemode="tozero")
    return figure
