"""Room for the lines of a legend between the title of a figure on screen and its plot."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from workbench.figures.safe_text import plain

_TITLE, _SUBTITLE, _LINE, _GAP = 38, 28, 19, 18  # pixels from the top
_CHARACTER, _KEY, _SIDES, _WIDTH = 6.6, 48, 100, 760


def with_legend_room(figure: go.Figure) -> go.Figure:
    """Makes a figure higher where the legend above its plot would lie on the title; returns the figure.

    The legend of the template stands above the plot, in as many lines as its entries need. Legends elsewhere, and
    figures without one, stay as they are.
    """
    layout, legend = figure.layout, figure.layout.legend
    traces: Any = figure.data
    names = [plain(trace.name) for trace in traces if trace.name and trace.showlegend is not False]
    has_legend = layout.showlegend if layout.showlegend is not None else len(names) > 1
    if not (has_legend and names) or legend.y is not None or legend.orientation == "v":
        return figure
    width = (layout.width or _WIDTH) - _SIDES
    widths = [_KEY + _CHARACTER * len(name) for name in names]
    columns = max(1, int(width // max(widths)))  # of several lines, whose entries stand in columns
    lines = 1 if sum(widths) <= width else -(-len(names) // columns)
    margin = layout.margin.t if layout.margin.t is not None else 70
    needed = _TITLE + _SUBTITLE * bool(layout.title.subtitle.text) + _LINE * lines + _GAP
    if layout.title.text and needed > margin:
        layout.margin.t, layout.height = needed, (layout.height or 450) + needed - margin
    return figure
