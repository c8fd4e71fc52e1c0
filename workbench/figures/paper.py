"""A figure set for print: width in inches, type in points, no title, which a paper has in its caption."""

from __future__ import annotations

import math
import textwrap
from numbers import Real
from typing import Any

import plotly.graph_objects as go

from workbench.figures.safe_text import label, plain
from workbench.figures.theme import COLUMNS, INCH, PAPER, POINT
from workbench.io.errors import RequestError

_WIDE = 0.6  # of the type size: one character of a monospaced face
_CELL = 6 * POINT  # type in cells
_LEAST = 3  # characters in a cell that still tell something
_ROW, _ROWS = 9.5 * POINT, 60  # of a labelled category, so that each keeps its label; more would not fit a page
_MATRIX = 45.0  # rows' height of a matrix, at most
_TALL, _FEW = 28 * POINT, 4  # a row of a matrix of few, and what counts as few: the colour bar needs room
_AROUND = 1.1 * INCH  # beside the cells of a grid: titles, labels of layers, the colour bar
_BESIDE = 0.75 * INCH  # the same but for the labels
_SHAPE = 0.68  # height by width of a plot without rows of its own
_TITLE, _TICK = 8 * POINT, 7 * POINT


def to_paper(figure: go.Figure, columns: int = 1) -> tuple[go.Figure, list[str]]:
    """A copy of `figure` as wide as `columns` of a paper, and what had to be left out, a line each.

    `columns`: 1, 3.25 in, or 2, 6.75 in. Axis titles are 8 pt, ticks and keys 7 pt. The title goes, the key
    stands below. Text in cells is cut to what fits at 6 pt, and left out where that is under 3 characters; labels of
    ticks stand as far apart as they need. Of what a menu picks from, what it shows first is drawn. Raises RequestError
    for another number of columns.
    """
    if columns not in COLUMNS:
        raise RequestError(f"columns must be 1 or 2, not {columns!r}")
    copy, width, cut = go.Figure(figure), COLUMNS[columns] * INCH, []
    copy.update_layout(template=PAPER, title=None, width=width, margin=PAPER.layout.margin)
    copy.layout.legend = {}
    cut += _without_menus(copy)
    for trace in copy.data:
        if trace.type == "heatmap" and trace.z is not None:
            trace.colorbar = _bar_title(trace.colorbar)
            domain = copy.layout[f"xaxis{(trace.xaxis or 'x')[1:]}"].domain or (0, 1)
            cell = (width - _AROUND) * (domain[1] - domain[0]) / max(1, len(trace.z[0]))
            trace.xgap = trace.ygap = min(trace.xgap or 0, cell / 8)
            cut += _fit_cells(trace, cell)
        elif trace.type == "scatter" and isinstance(trace.marker.size, Real):
            trace.marker.size = None
            trace.marker.line.width = POINT if trace.marker.line.width else None
        if trace.type in ("bar", "scatter") and trace.marker.showscale:
            trace.marker.colorbar = _bar_title(trace.marker.colorbar, PAPER.data.heatmap[0].colorbar.to_plotly_json())
    copy.update_annotations(font={"size": _TICK})
    for axis in copy.select_xaxes(lambda axis: axis.type == "log"):
        axis.dtick = 1  # powers of ten: no room for what lies between
    copy.update_xaxes(tickfont={"size": _TICK})
    copy.update_yaxes(tickfont={"size": _TICK})
    for axis in copy.select_xaxes():
        if axis.ticktext and max(len(plain(text)) for text in axis.ticktext) > _LEAST:
            axis.tickangle = -90
    labels = max((_reach(axis, copy, "y") for axis in copy.select_yaxes()), default=0)
    inside = width - max(_AROUND, labels + _BESIDE)
    for axis in copy.select_xaxes():
        _thin(axis, copy, inside)
    cut += _thin_labels(copy, inside, _set_height(copy, width))
    return copy, cut


def _without_menus(figure: go.Figure) -> list[str]:
    """Takes menus out, and what they do not show at first; what that is."""
    figure.layout.updatemenus = ()
    hidden = [plain(trace.name or "") for trace in figure.data if trace.visible is False]
    figure.data = [trace for trace in figure.data if trace.visible is not False]
    return [f"what the menu shows: {', '.join(hidden)}"] if hidden else []


def _bar_title(bar: Any, looks: dict[str, Any] | None = None) -> dict[str, Any]:
    """A colour bar as the template has it, with the title of `bar`."""
    looks = looks or {}
    return {**looks, "title": {**looks.get("title", {}), "text": bar.title.text, "side": "right"}}


def _thin_labels(figure: go.Figure, width: float, height: float) -> list[str]:
    """Fewer labels of categories, where each would not have the room of a line; what was left out."""
    cut = []
    for name, axes, room in (("x", figure.select_xaxes(), width), ("y", figure.select_yaxes(), height)):
        for axis in axes:
            length = room * (axis.domain[1] - axis.domain[0] if axis.domain else 1)
            step = math.ceil(len(axis.ticktext or ()) * 0.97 * _TICK / length)
            if step > 1:
                axis.tickvals, axis.ticktext = axis.tickvals[::step], axis.ticktext[::step]
                cut.append(f"labels of the {name} axis, all but one in {step}")
    return cut


def _set_height(figure: go.Figure, width: float) -> float:
    """Room for every label: rows, panels above each other, titles of panels, axis titles in lines, and the key. Gives
    the height that is left for rows."""
    rows = max((_rows(trace, width) for trace in figure.data), default=0)
    panels = len({axis.domain for axis in figure.select_yaxes() if axis.domain}) or 1
    height = max(_SHAPE * width * (1 + 0.6 * (panels - 1)), _AROUND + _ROW * rows)
    if rows and panels == 1 and all(trace.type == "heatmap" for trace in figure.data):
        height = min(height, _AROUND + _TALL * max(rows, _FEW))
    beside, below = (
        max((_reach(axis, figure, name) for axis in axes), default=0)
        for name, axes in (("y", figure.select_yaxes()), ("x", figure.select_xaxes()))
    )
    for axes, room in (
        (figure.select_xaxes(), width - beside - 3 * _TITLE),
        (figure.select_yaxes(), height - 4 * _TITLE),
    ):
        for axis in axes:
            _wrap(axis, room * (axis.domain[1] - axis.domain[0] if axis.domain else 1))
    lines = max((axis.title.text.count("<br>") + 1 for axis in figure.select_xaxes() if axis.title.text), default=0)
    whole = height + _key(figure, width) + below + 1.3 * _TITLE * max(0, lines - 1)
    figure.update_layout(height=4 * math.ceil(whole / 4))  # whole points: what Chrome makes of a page's size
    # the margin that plotly makes by itself ends at the base line of the title
    figure.layout.margin.b = (below or 1.4 * _TICK) + (1.3 * lines + 0.7) * _TITLE
    if figure.layout.annotations:
        figure.layout.margin.t = 1.6 * _TICK
    return float(height - _AROUND)


def _reach(axis: go.layout.XAxis | go.layout.YAxis, figure: go.Figure, name: str) -> float:
    """How far the labels of categories reach from an axis; 0 where there are none, or they are not turned."""
    if name == "x" and axis.tickangle != -90:
        return 0.0
    bars = [t for t in figure.data if t.type == "bar" and t.orientation == "h"] if name == "y" else []
    texts = axis.ticktext or [value for trace in bars for value in trace.y]
    lines = [plain(line) for text in texts for line in str(text).split("<br>")]
    return max(map(len, lines), default=0) * _WIDE * _TICK


def _thin(axis: go.layout.XAxis, figure: go.Figure, width: float) -> None:
    """Fewer ticks of numbers, where one at every step would not fit."""
    if axis.type in (None, "-", "linear") and isinstance(axis.dtick, int):
        given = (trace.x for trace in figure.data if "x" in trace and trace.x is not None)
        shown = [float(x) for part in given for x in part if isinstance(x, Real)]
        room = width * (axis.domain[1] - axis.domain[0] if axis.domain else 1) / (3 * _TICK)
        steps = (max(shown, default=0) - min(shown, default=0)) / axis.dtick
        axis.dtick *= max(1, math.ceil(steps / room))
        axis.tickangle = 0


def _wrap(axis: go.layout.XAxis | go.layout.YAxis, room: float) -> None:
    """The axis title in lines of `room` pixels."""
    if axis.title.text:
        lines = textwrap.wrap(
            axis.title.text, max(12, int(room / (0.5 * _TITLE))), break_long_words=False, break_on_hyphens=False
        )
        axis.title.text = "<br>".join(lines)


def _rows(trace: Any, width: float) -> float:
    """Lines of text that the categories a trace stacks up need; cells without text need no more than look well."""
    upward = trace.type == "heatmap" or (trace.type == "bar" and trace.orientation == "h")
    number = len(trace.y) if upward and trace.y is not None else 0
    if trace.type == "heatmap" and trace.text is None:
        return min(float(number), 1.5 * (width - _AROUND) / _ROW, _MATRIX)
    return float(number if number <= _ROWS else 0)


def _key(figure: go.Figure, width: float) -> float:
    """Height of the key below the plot, its entries flowing over lines of this width."""
    names = [plain(t.name or "") for t in figure.data if t.showlegend is not False and t.name]
    if len(names) < 2 and not figure.layout.showlegend:
        return 0.0
    longest = max((len(name) for name in names), default=0) * 0.55 * 7 * POINT + 45
    return 11 * POINT * math.ceil(len(names) / max(1, int(width // longest)))


def _fit_cells(trace: go.Heatmap, width: float) -> list[str]:
    """Cuts the texts of cells to what fits in `width` pixels; what was cut."""
    if trace.text is None:
        return []
    texts = [[plain(text) for text in row] for row in trace.text]
    room, longest = int((width - 2) / (_WIDE * _CELL)), max((len(t) for row in texts for t in row), default=0)
    trace.textfont.size = _CELL
    if longest <= room:
        return []
    if room < _LEAST:
        trace.text, trace.texttemplate = None, None
        return ["the text in cells, for which they are too narrow"]
    trace.text = [[label(text, room) for text in row] for row in texts]
    return [f"the text in cells after {room} characters"]
