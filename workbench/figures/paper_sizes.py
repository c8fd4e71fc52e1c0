"""Sizes in print that all figures share: type, rows of text, the legend, text in cells."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportOperatorIssue=false, reportArgumentType=false
# plotly makes attributes at run time
from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from workbench.figures.safe_text import label, plain
from workbench.figures.theme import PAPER, POINT, top_bar

CHARACTER = 0.6
"""Width of a monospaced character, in type sizes."""

TITLE, TICK, CELL = 8 * POINT, 7 * POINT, 6 * POINT
"""Type of axis titles, of ticks, and of text in cells, in pixels."""

ROW, MAX_ROWS = 9.5 * POINT, 60
"""Height of a labelled category, and how many fit on a page."""

_MIN_CHARACTERS = 3  # shorter texts in cells are dropped


def legend_height(figure: go.Figure, width: float) -> float:
    """Returns the height of the legend below the plot, its entries flowing over lines of `width` pixels."""
    names = [plain(t.name or "") for t in figure.data if t.showlegend is not False and t.name]
    if len(names) < 2 and not figure.layout.showlegend:
        return 0.0
    longest = max((len(name) for name in names), default=0) * 0.55 * 7 * POINT + 45
    lines = math.ceil(len(names) / max(1, int(width // longest)))
    return max(11 * POINT * lines, 19.0 * lines - 4)  # plotly draws lines of 19 pixels; the margin of few has room


def fit_cells(trace: go.Heatmap, width: float) -> list[str]:
    """Cuts the texts of cells to `width` pixels; returns what was cut."""
    if trace.text is None:
        return []
    texts = [[plain(text) for text in row] for row in trace.text]
    room, longest = int((width - 2) / (CHARACTER * CELL)), max((len(t) for row in texts for t in row), default=0)
    trace.textfont.size = CELL
    if longest <= room:
        return []
    if room < _MIN_CHARACTERS:
        trace.text, trace.texttemplate = None, None
        return ["the text in cells, which are too narrow"]
    trace.text = [[label(text, room) for text in row] for row in texts]
    return [f"the text in cells after {room} characters"]


def bar_above(bar: Any) -> dict[str, Any]:
    """Returns a colour bar above the cells, with the title and ticks of `bar`.

    It has its place in the figure, not beside the cells: only then plotly gives it the room it needs and no more.
    """
    style = PAPER.data.heatmap[0].colorbar.to_plotly_json()
    title = {"text": bar.title.text, "side": "right", "font": {"size": TICK}}
    ticks = {"tick0": bar.tick0, "dtick": bar.dtick}
    place = {"yref": "container", "y": 1, "yanchor": "top", "len": 110, "ypad": 3}
    return {**top_bar(""), **style, **ticks, **place, "title": title}
