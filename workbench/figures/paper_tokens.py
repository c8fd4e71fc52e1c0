"""Grids and strips of tokens for print: cells of one size, in lines that stay legible."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportOperatorIssue=false, reportArgumentType=false
# plotly makes attributes at run time
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from workbench.figures.paper_sizes import (
    CELL,
    CHARACTER,
    MAX_ROWS,
    ROW,
    TICK,
    TITLE,
    bar_above,
    fit_cells,
    legend_height,
)
from workbench.figures.safe_text import label, plain
from workbench.figures.theme import COLUMNS, INCH, PAPER
from workbench.figures.token_grid import grid_of, rewrap
from workbench.figures.token_strip import is_strip, restrip

_LINE, _BARE_LINE = {1: 7, 2: 15}, {1: 48, 2: 110}  # tokens of a line with and without text in its cells
_GRID_HEIGHT = 4.6 * INCH
_TOP, _KEY = 30, 14  # pixels of the colour bar with its ticks, and around the lines of the key
_RIGHT = 8
_TEXT_ROW, _BARE_ROW = math.ceil(ROW), 5  # whole pixels: the marks of all cells are equally high
_EDGES = 0.8  # of a row: what the axis of a grid leaves out at its ends


def has_tokens(figure: go.Figure) -> bool:
    """Returns True for a grid or a strip of tokens."""
    return grid_of(figure) is not None or is_strip(figure)


def tokens_to_paper(figure: go.Figure, columns: int) -> tuple[go.Figure, list[str]]:
    """Returns a copy of a grid or a strip for print, and one line for each thing that had to be left out.

    Args:
        figure: Grid or strip in the screen theme; not changed.
        columns: 1 (3.25 in) or 2 (6.75 in).
    """
    grid = grid_of(figure)
    return _strip_to_paper(figure, columns) if grid is None else _grid_to_paper(figure, grid, columns)


def _grid_to_paper(figure: go.Figure, grid: Mapping[str, Any], columns: int) -> tuple[go.Figure, list[str]]:
    """A grid of tokens, as many lines as fit on half a page."""
    text = figure.data[0].text is not None
    most, row = (_LINE[columns], _TEXT_ROW) if text else (_BARE_LINE[columns], _BARE_ROW)
    lines = max(1, int(_GRID_HEIGHT // ((grid["rows"] + 3) * row)))
    tokens = min(grid["tokens"], lines * most)
    line = _line(tokens, most)
    copy = rewrap(figure, line, tokens)
    rows = -(-tokens // line) * (grid["rows"] + 3) - _EDGES
    cell = _lay_out(copy, columns, line, rows * row, [*grid["names"], "input"])
    omitted = [f"tokens after the first {tokens:,}"] if tokens < grid["tokens"] else []
    for trace in copy.data:
        if trace.meta["part"] == "cells":
            trace.colorbar = bar_above(trace.colorbar)
            omitted += fit_cells(trace, cell)
        elif trace.meta["part"] in ("input", "next"):
            trace.textfont.size = CELL
            trace.text = [label(plain(word), int((cell - 1) / (CHARACTER * CELL))) for word in trace.text]
        if trace.type == "heatmap":
            trace.xgap = trace.ygap = 0.5 if trace.ygap else 0
    return copy, omitted


def _strip_to_paper(figure: go.Figure, columns: int) -> tuple[go.Figure, list[str]]:
    """A strip of at most as many lines as fit on a page."""
    whole = max(map(len, figure.layout.meta["strip"]["lines"]))
    line = _line(whole, _LINE[columns])
    copy, tokens = restrip(figure, line, MAX_ROWS)
    total = len(figure.layout.meta["strip"]["positions"])
    heat = copy.data[0]
    cell = _lay_out(copy, columns, line, float(len(heat.y) * _TEXT_ROW), copy.layout.yaxis.ticktext)
    heat.colorbar = bar_above(heat.colorbar)
    heat.xgap = heat.ygap = 0.5
    omitted = [f"tokens after the first {tokens:,}"] if tokens < total else []
    return copy, [*omitted, *fit_cells(heat, cell)]


def _line(tokens: int, most: int) -> int:
    """Tokens of a line; cells of few tokens are at most about twice as wide as those of many."""
    return min(most, max(tokens, -(-most // 2)))


def _lay_out(figure: go.Figure, columns: int, line: int, rows: float, names: Sequence[str]) -> float:
    """Sets the sizes of a figure whose cells are `rows` pixels high in all; returns the width of a cell."""
    width = COLUMNS[columns] * INCH
    left = math.ceil((max(map(len, names), default=0) * CHARACTER + 2.2) * TICK)
    figure.update_layout(template=PAPER, title=None, width=width)
    figure.layout.legend = {}
    axis = {"tickfont": {"size": TICK}, "automargin": False}  # the margins are exact: plotly would squeeze the rows
    figure.update_xaxes({**axis, "range": [-0.5, line - 0.5]}).update_yaxes(axis)
    title, key = 0.6 * TITLE * len(plain(figure.layout.yaxis.title.text or "")), legend_height(figure, width)
    below = max(key + _KEY if key else 0.4 * TITLE, (title - rows) / 2 + 2)
    height = 4 * math.ceil((rows + _TOP + below) / 4)  # whole points, to which Chrome rounds a page's size
    margin = {"t": _TOP, "b": height - _TOP - rows, "l": left, "r": _RIGHT}
    figure.update_layout(height=height, margin=margin)
    return (width - left - _RIGHT) / line
