"""Figures for print: width in inches, type in points, the title left to the caption."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportOperatorIssue=false, reportArgumentType=false
# plotly makes attributes at run time
from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from numbers import Real
from typing import Any

import plotly.graph_objects as go

from workbench.figures.category_names import name_ticks
from workbench.figures.safe_text import label, plain
from workbench.figures.theme import COLUMNS, INCH, PAPER, POINT, top_bar
from workbench.figures.token_grid import grid_of, rewrap
from workbench.figures.token_strip import is_strip, restrip
from workbench.io.errors import RequestError

_CHARACTER = 0.6  # width of a monospaced character, in type sizes
_CELL = 6 * POINT  # type in cells
_MIN_CHARACTERS = 3  # shorter texts in cells are dropped
_ROW, _MAX_ROWS = 9.5 * POINT, 60  # height of a labelled category, and how many fit on a page
_MAX_MATRIX_ROWS = 45.0  # of `_ROW` height
_TALL_ROW, _FEW_ROWS = 28 * POINT, 4  # matrices of few rows: the colour bar needs height
_GRID_MARGIN = 1.1 * INCH  # around the cells of a grid: titles, labels of layers, the colour bar
_PLOT_MARGIN = 0.75 * INCH  # the same without labels
_GRID_LINE, _BARE_LINE = {1: 7, 2: 15}, {1: 48, 2: 110}  # tokens of a line with and without text in its cells
_GRID_HEIGHT = 4.6 * INCH
_ASPECT = 0.68  # height by width of a plot without categories
_TITLE, _TICK = 8 * POINT, 7 * POINT


def to_paper(figure: go.Figure, columns: int = 1) -> tuple[go.Figure, list[str]]:
    """Returns a copy of `figure` for print, and one line for each thing that had to be left out.

    Axis titles are 8 pt, ticks and legend 7 pt. The title is removed and the legend moves below the plot. Text in cells
    is cut to what fits at 6 pt, and dropped below 3 characters; tick labels are thinned until they do not overlap. A
    menu is replaced by what it shows first.

    Args:
        figure: Figure in the screen theme; not changed.
        columns: 1 (3.25 in) or 2 (6.75 in).

    Raises:
        RequestError: For another number of columns.
    """
    if columns not in COLUMNS:
        raise RequestError(f"columns must be 1 or 2, not {columns!r}")
    if grid := grid_of(figure):
        return _grid_to_paper(figure, grid, columns)
    copy, width, omitted = go.Figure(figure), COLUMNS[columns] * INCH, []
    if is_strip(figure):
        copy, tokens = restrip(figure, _GRID_LINE[columns], _MAX_ROWS)
        total = len(figure.layout.meta["strip"]["positions"])
        omitted += [f"tokens after the first {tokens:,}"] if tokens < total else []
    copy.update_layout(template=PAPER, title=None, width=width, margin=PAPER.layout.margin)
    copy.layout.legend = {}
    _remove_small_pictures(copy)
    omitted += [*_remove_menus(copy), *_set_traces(copy, width)]
    copy.update_annotations(font={"size": _TICK})
    _wrap_panel_titles(copy, width)
    for axis in copy.select_xaxes(lambda axis: axis.type == "log"):
        axis.dtick = 1  # powers of ten: no room for ticks between them
    copy.update_xaxes(tickfont={"size": _TICK})
    copy.update_yaxes(tickfont={"size": _TICK})
    for axis in copy.select_xaxes():
        if axis.ticktext and max(len(plain(text)) for text in axis.ticktext) > _MIN_CHARACTERS:
            axis.tickangle = -90
    labels = max((_label_width(axis, copy, "y") for axis in copy.select_yaxes()), default=0)
    inner_width = width - max(_GRID_MARGIN, labels + _PLOT_MARGIN)
    for axis in copy.select_xaxes():
        _thin(axis, copy, inner_width)
        _fit_names(axis, copy, inner_width)
    return copy, [*omitted, *_thin_labels(copy, inner_width, _set_height(copy, width))]


def _grid_to_paper(figure: go.Figure, grid: Mapping[str, Any], columns: int) -> tuple[go.Figure, list[str]]:
    """A grid of tokens in lines that stay legible, as many as fit on half a page."""
    text = figure.data[0].text is not None
    line, row = (_GRID_LINE[columns], _ROW) if text else (_BARE_LINE[columns], 4 * POINT)
    lines = max(1, int(_GRID_HEIGHT // ((grid["rows"] + 3) * row)))
    tokens = min(grid["tokens"], lines * line)
    copy = rewrap(figure, min(line, tokens), tokens)
    width, left = COLUMNS[columns] * INCH, (max(map(len, [*grid["names"], "input"])) * _CHARACTER + 2.2) * _TICK
    copy.update_layout(template=PAPER, title=None, width=width)
    copy.layout.legend = {}
    cell = (width - left - 8) / min(line, tokens)
    omitted = [f"tokens after the first {tokens:,}"] if tokens < grid["tokens"] else []
    bar = PAPER.data.heatmap[0].colorbar.to_plotly_json()
    for trace in copy.data:
        if trace.meta["part"] == "cells":
            unit = {"text": trace.colorbar.title.text, "side": "top", "font": {"size": _TICK}}
            trace.colorbar = {**top_bar(""), **bar, "title": unit, "len": 110, "ypad": 3}
            omitted += _fit_cells(trace, cell)
        elif trace.meta["part"] in ("input", "next"):
            trace.textfont.size = _CELL
            trace.text = [label(plain(word), int((cell - 1) / (_CHARACTER * _CELL))) for word in trace.text]
        if trace.type == "heatmap":
            trace.xgap = trace.ygap = 0.5 if trace.ygap else 0
    copy.update_xaxes(tickfont={"size": _TICK}).update_yaxes(tickfont={"size": _TICK})
    top, legend = 4.2 * _TICK, _legend_height(copy, width)
    bottom = 0.4 * _TITLE + legend
    height = -(-tokens // line) * (grid["rows"] + 3) * row + top + bottom
    margin = {"t": top, "b": bottom, "l": left, "r": 8}
    return copy.update_layout(height=4 * math.ceil(height / 4), margin=margin), omitted


def _set_traces(figure: go.Figure, width: float) -> list[str]:
    """Sizes of cells, markers and colour bars; the text in cells that was cut."""
    omitted = []
    for trace in figure.data:
        if trace.type == "heatmap" and trace.z is not None:
            trace.colorbar = _bar_title(trace.colorbar)
            domain = figure.layout[f"xaxis{(trace.xaxis or 'x')[1:]}"].domain or (0, 1)
            cell = (width - _GRID_MARGIN) * (domain[1] - domain[0]) / max(1, len(trace.z[0]))
            trace.xgap = trace.ygap = min(trace.xgap or 0, cell / 8)
            omitted += _fit_cells(trace, cell)
        elif trace.type == "scatter" and isinstance(trace.marker.size, Real):
            trace.marker.size = None
            trace.marker.line.width = POINT if trace.marker.line.width else None
        if trace.type in ("bar", "scatter") and trace.marker.showscale:
            trace.marker.colorbar = _bar_title(trace.marker.colorbar, PAPER.data.heatmap[0].colorbar.to_plotly_json())
    return omitted


def _remove_menus(figure: go.Figure) -> list[str]:
    """Removes menus and the traces they hide at first; names of these."""
    figure.layout.updatemenus = ()
    hidden = [plain(trace.name or "") for trace in figure.data if trace.visible is False and trace.name]
    figure.data = [trace for trace in figure.data if trace.visible is not False]
    return [f"other entries of the menu: {', '.join(hidden)}"] if hidden else []


def _remove_small_pictures(figure: go.Figure) -> None:
    """Removes the small pictures of heads, which switch the large one."""
    parts = [trace for trace in figure.data if isinstance(trace.meta, Mapping) and trace.xaxis == "x2"]
    small = [trace for trace in parts if trace.meta.get("part") in ("heads", "masked")]
    if small:
        figure.data = [trace for trace in figure.data if trace not in small]
        figure.layout.xaxis2 = figure.layout.yaxis2 = figure.layout.yaxis.domain = None


def _bar_title(bar: Any, style: dict[str, Any] | None = None) -> dict[str, Any]:
    """A colour bar in `style` or the template's, with the title of `bar`."""
    style = style or {}
    return {**style, "title": {**style.get("title", {}), "text": bar.title.text, "side": "right"}}


def _thin_labels(figure: go.Figure, width: float, height: float) -> list[str]:
    """Thins labels of categories that would overlap; which ones."""
    omitted = []
    for name, axes, room in (("x", figure.select_xaxes(), width), ("y", figure.select_yaxes(), height)):
        for axis in axes:
            length = room * (axis.domain[1] - axis.domain[0] if axis.domain else 1)
            step = math.ceil(len(axis.ticktext or ()) * 0.97 * _TICK / length)
            if step > 1:
                axis.tickvals, axis.ticktext = axis.tickvals[::step], axis.ticktext[::step]
                omitted.append(f"labels of the {name} axis, all but one in {step}")
    return omitted


def _set_height(figure: go.Figure, width: float) -> float:
    """Sets a height with room for rows, stacked panels, axis titles and the legend; the height left for rows."""
    rows = max((_row_count(trace, width) for trace in figure.data), default=0)
    panels = len({axis.domain for axis in figure.select_yaxes() if axis.domain}) or 1
    height = max(_ASPECT * width * (1 + 0.6 * (panels - 1)), _GRID_MARGIN + _ROW * rows)
    if rows and panels == 1 and all(trace.type == "heatmap" for trace in figure.data):
        height = min(height, _GRID_MARGIN + _TALL_ROW * max(rows, _FEW_ROWS))
    left, below = (
        max((_label_width(axis, figure, name) for axis in axes), default=0)
        for name, axes in (("y", figure.select_yaxes()), ("x", figure.select_xaxes()))
    )
    for axes, room in (
        (figure.select_xaxes(), width - left - 3 * _TITLE),
        (figure.select_yaxes(), height - 4 * _TITLE),
    ):
        for axis in axes:
            _wrap(axis, room * (axis.domain[1] - axis.domain[0] if axis.domain else 1))
    lines = max((axis.title.text.count("<br>") + 1 for axis in figure.select_xaxes() if axis.title.text), default=0)
    total = height + _legend_height(figure, width) + below + 1.3 * _TITLE * max(0, lines - 1)
    figure.update_layout(height=4 * math.ceil(total / 4))  # whole points, to which Chrome rounds a page's size
    # plotly's automatic margin ends at the base line of the title
    figure.layout.margin.b = (below or 1.4 * _TICK) + (1.3 * lines + 0.7) * _TITLE
    if figure.layout.annotations:
        titles = max(str(part.text).count("<br>") for part in figure.layout.annotations)
        figure.layout.margin.t = (1.6 + 1.3 * titles) * _TICK
    return float(height - _GRID_MARGIN)


def _label_width(axis: go.layout.XAxis | go.layout.YAxis, figure: go.Figure, name: str) -> float:
    """Extent of category labels away from their axis; 0 for none, and for labels of one line along an x axis."""
    if name == "x" and axis.tickangle != -90:
        lines = max((text.count("<br>") for text in axis.ticktext or ()), default=0)
        return 1.3 * _TICK * (lines + 1) if lines else 0.0
    bars = [t for t in figure.data if t.type == "bar" and t.orientation == "h"] if name == "y" else []
    texts = axis.ticktext or [value for trace in bars for value in trace.y]
    lines = [plain(line) for text in texts for line in str(text).split("<br>")]
    return max(map(len, lines), default=0) * _CHARACTER * _TICK


def _thin(axis: go.layout.XAxis, figure: go.Figure, width: float) -> None:
    """Thins numeric ticks that would overlap."""
    if axis.type in (None, "-", "linear") and isinstance(axis.dtick, int):
        parts = (trace.x for trace in figure.data if "x" in trace and trace.x is not None)
        values = [float(x) for part in parts for x in part if isinstance(x, Real)]
        room = width * (axis.domain[1] - axis.domain[0] if axis.domain else 1) / (3 * _TICK)
        steps = (max(values, default=0) - min(values, default=0)) / axis.dtick
        axis.dtick *= max(1, math.ceil(steps / room))
        axis.tickangle = 0


def _fit_names(axis: go.layout.XAxis, figure: go.Figure, width: float) -> None:
    """Wraps or turns the names of categories that would overlap."""
    number = (axis.plotly_name or "xaxis").removeprefix("xaxis")
    traces = [trace for trace in figure.data if trace.type in ("bar", "scatter") and trace.x is not None]
    drawn = [trace.x for trace in traces if (trace.xaxis or "x")[1:] == number]
    names = {value: value for values in drawn for value in values if isinstance(value, str)}
    if axis.ticktext:
        places: Any = axis.tickvals
        ticks = {} if places is None else dict(zip(places, axis.ticktext, strict=True))
        names = ticks if {*ticks} <= {*names} else {}
    length = width * (axis.domain[1] - axis.domain[0] if axis.domain else 1)
    if names:
        axis.tickangle = None
        axis.update(name_ticks(names, float(length), _TICK))


def _wrap(axis: go.layout.XAxis | go.layout.YAxis, room: float) -> None:
    """Wraps the axis title into lines of `room` pixels."""
    if axis.title.text:
        lines = textwrap.wrap(
            axis.title.text, max(12, int(room / (0.5 * _TITLE))), break_long_words=False, break_on_hyphens=False
        )
        axis.title.text = "<br>".join(lines)


def _wrap_panel_titles(figure: go.Figure, width: float) -> None:
    """Wraps the titles above panels to the width of these."""
    domains = {axis.domain for axis in figure.select_xaxes() if axis.domain}
    for title in figure.layout.annotations if domains else ():
        if title.xref == title.yref == "paper" and not title.showarrow:
            left, right = min(domains, key=lambda ends: abs(sum(ends) / 2 - title.x))
            room = int((width - _PLOT_MARGIN) * (right - left) / (0.52 * _TICK))
            title.text = "<br>".join(textwrap.wrap(title.text, max(8, room), break_long_words=False))


def _row_count(trace: Any, width: float) -> float:
    """Lines of text that the stacked categories of a trace need; fewer for cells without text."""
    stacked = trace.type == "heatmap" or (trace.type == "bar" and trace.orientation == "h")
    number = len(trace.y) if stacked and trace.y is not None else 0
    if trace.type == "heatmap" and trace.text is None:
        return min(float(number), 1.5 * (width - _GRID_MARGIN) / _ROW, _MAX_MATRIX_ROWS)
    return float(number if number <= _MAX_ROWS else 0)


def _legend_height(figure: go.Figure, width: float) -> float:
    """Height of the legend below the plot, its entries flowing over lines of this width."""
    names = [plain(t.name or "") for t in figure.data if t.showlegend is not False and t.name]
    if len(names) < 2 and not figure.layout.showlegend:
        return 0.0
    longest = max((len(name) for name in names), default=0) * 0.55 * 7 * POINT + 45
    lines = math.ceil(len(names) / max(1, int(width // longest)))
    return max(11 * POINT * lines, 19.0 * lines - 4)  # plotly draws lines of 19 pixels; the margin of few has room


def _fit_cells(trace: go.Heatmap, width: float) -> list[str]:
    """Cuts the texts of cells to `width` pixels; returns what was cut."""
    if trace.text is None:
        return []
    texts = [[plain(text) for text in row] for row in trace.text]
    room, longest = int((width - 2) / (_CHARACTER * _CELL)), max((len(t) for row in texts for t in row), default=0)
    trace.textfont.size = _CELL
    if longest <= room:
        return []
    if room < _MIN_CHARACTERS:
        trace.text, trace.texttemplate = None, None
        return ["the text in cells, which are too narrow"]
    trace.text = [[label(text, room) for text in row] for row in texts]
    return [f"the text in cells after {room} characters"]
