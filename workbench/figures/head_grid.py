"""Heat map with one value per attention head, layers by heads."""

# pyright: reportAttributeAccessIssue=false
# plotly makes attributes at run time
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.theme import CATEGORIES, CELLS, PROBABILITY, TEXT, colour_bar
from workbench.figures.themed import ThemedFigure


def head_name(layer: int, head: int) -> str:
    """Returns the name of a head, `L2H3`."""
    return f"L{layer}H{head}"


def head_hover(line: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns the hover text of a head: each measure that is known, with the interval where there is one.

    Args:
        line: Line of a table: `layer`, `head`, and measures; the ends of an interval are `NAME_low` and `NAME_high`.
        names: Measures to show.
    """
    measures = [f"{name}: {line[name]:.3g}{_interval(line, name)}" for name in names if _known(line, name)]
    return "<br>".join([f"<b>{head_name(int(line['layer']), int(line['head']))}</b>", *measures])


def _interval(line: Mapping[str, Any], name: str) -> str:
    ends = [f"{name}_low", f"{name}_high"]
    known = all(_known(line, end) for end in ends)
    return f", 95 % CI [{', '.join(f'{line[end]:.3g}' for end in ends)}]" if known else ""


def _known(line: Mapping[str, Any], name: str) -> bool:
    return not np.isnan(line.get(name, np.nan))


def head_grid(
    values: Float[np.ndarray, "layer head"],
    *,
    hover: Sequence[Sequence[str]],
    cells: Sequence[Sequence[str]] | None = None,
    layers: Sequence[int],
    title: str,
    subtitle: str,
    unit: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> go.Figure:
    """Draws layers (upward) by heads (rightward), coloured by `values`.

    Args:
        values: One value per head; NaN, for a head that does not exist, stays white.
        hover: Hover text of each cell. `hover`, `cells`, `title` and `subtitle` are plotly markup, already safe.
        cells: Text in each cell.
        layers: Layer numbers, from the bottom up.
        title: Title of the figure.
        subtitle: Subtitle of the figure.
        unit: Title of the colour bar.
        limits: Values at the two ends of the colour scale.
    """
    layer_names, head_names = [str(layer) for layer in layers], [str(head) for head in range(values.shape[1])]
    heat = go.Heatmap(
        z=values,
        x=head_names,
        y=layer_names,
        text=cells,
        texttemplate=None if cells is None else "%{text}",
        textfont={"color": TEXT},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=PROBABILITY if cells is None else CELLS,
        zmin=limits[0],
        zmax=limits[1],
        xgap=1,
        ygap=1,
        hoverongaps=False,
        colorbar=colour_bar(unit),
    )
    layout = {
        "title": {"text": title, "subtitle": {"text": subtitle}},
        "width": max(640, 190 + 26 * len(head_names)),
        "height": 210 + 26 * len(layer_names),
        "xaxis": {"title": {"text": "head"}, "type": "category", "showgrid": False},
        "yaxis": {"title": {"text": "layer"}, "type": "category", "showgrid": False},
    }
    return ThemedFigure(heat, layout)


def with_side_panel(figure: go.Figure, curves: Mapping[str, Float[np.ndarray, " layer"]], *, unit: str) -> go.Figure:
    """Adds a panel to the right of a `head_grid`, one curve over its layers per entry of `curves`, on a log scale."""
    for (name, values), colour in zip(curves.items(), cycle(CATEGORIES), strict=False):
        figure.add_scatter(
            x=values,
            y=figure.data[0].y,
            xaxis="x2",
            name=name,
            mode="lines+markers",
            line={"color": colour},
            hovertemplate="layer %{y}: %{x:.4g}",
        )
    panel = {
        "domain": [0.77, 1],
        "anchor": "y",
        "type": "log",
        "title": {"text": unit},
        "nticks": 4,
        "tickformat": "~r",
    }
    figure.update_layout(xaxis={"domain": [0, 0.72]}, xaxis2=panel, width=figure.layout.width + 260, margin={"t": 110})
    return figure
