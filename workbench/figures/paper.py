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
from workbench.figures.paper_sizes import CHARACTER, MAX_ROWS, ROW, TICK, TITLE, fit_cells, legend_height
from workbench.figures.paper_tokens import has_tokens, tokens_to_paper
from workbench.figures.safe_text import plain
from workbench.figures.theme import COLUMNS, INCH, PAPER, POINT
from workbench.figures.ticks import log_ticks, write_out_log_ticks
from workbench.io.errors import RequestError

_MAX_MATRIX_ROWS = 45.0  # of `ROW` height
_TALL_ROW, _FEW_ROWS = 28 * POINT, 4  # matrices of few rows: the colour bar needs height
_GRID_MARGIN = 1.1 * INCH  # around the cells of a matrix: titles, labels of layers, the colour bar
_PLOT_MARGIN = 0.75 * INCH  # the same without labels
_SHORT_LABEL = 3  # characters: labels of an x axis that need not be turned
_ASPECT = 0.68  # height by width of a plot without categories


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
    if has_tokens(figure):
        return tokens_to_paper(figure, columns)
    copy, width, omitted = go.Figure(figure), COLUMNS[columns] * INCH, []
    copy.update_layout(template=PAPER, title=None, width=width, margin=PAPER.layout.margin)
    copy.layout.legend = {}
    _remove_small_pictures(copy)
    omitted += [*_remove_menus(copy), *_set_traces(copy, width)]
    copy.update_annotations(font={"size": TICK})
    _wrap_panel_titles(copy, width)
    write_out_log_ticks(copy)
    copy.update_xaxes(tickfont={"size": TICK})
    copy.update_yaxes(tickfont={"size": TICK})
    for axis in copy.select_xaxes():
        if axis.ticktext and max(len(plain(text)) for text in axis.ticktext) > _SHORT_LABEL:
            axis.tickangle = -90
    labels = max((_label_width(axis, copy, "y") for axis in copy.select_yaxes()), default=0)
    inner_width = width - max(_GRID_MARGIN, labels + _PLOT_MARGIN)
    for axis in copy.select_xaxes():
        _tick_log(axis, copy, inner_width)
        _thin(axis, copy, inner_width)
        _fit_names(axis, copy, inner_width)
    return copy, [*omitted, *_thin_labels(copy, inner_width, _set_height(copy, width))]


def _set_traces(figure: go.Figure, width: float) -> list[str]:
    """Sizes of cells, markers and colour bars; the text in cells that was cut."""
    omitted = []
    for trace in figure.data:
        if trace.type == "heatmap" and trace.z is not None:
            trace.colorbar = _bar_title(trace.colorbar)
            domain = figure.layout[f"xaxis{(trace.xaxis or 'x')[1:]}"].domain or (0, 1)
            cell = (width - _GRID_MARGIN) * (domain[1] - domain[0]) / max(1, len(trace.z[0]))
            trace.xgap = trace.ygap = min(trace.xgap or 0, cell / 8)
            omitted += fit_cells(trace, cell)
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
    """Thins labels of categories that would overlap, which the title of the axis states; which ones."""
    omitted = []
    for name, axes, room in (("x", figure.select_xaxes(), width), ("y", figure.select_yaxes(), height)):
        for axis in axes:
            length = room * (axis.domain[1] - axis.domain[0] if axis.domain else 1)
            step = math.ceil(len(axis.ticktext or ()) * 0.97 * TICK / length)
            if step > 1:
                axis.tickvals, axis.ticktext = axis.tickvals[::step], axis.ticktext[::step]
                axis.title.text = f"{axis.title.text or ''} (1 in {step} labelled)".strip()
                omitted.append(f"labels of the {name} axis, all but one in {step}")
    return omitted


def _set_height(figure: go.Figure, width: float) -> float:
    """Sets a height with room for rows, stacked panels, axis titles and the legend; the height left for rows."""
    rows = max((_row_count(trace, width) for trace in figure.data), default=0)
    panels = len({axis.domain for axis in figure.select_yaxes() if axis.domain}) or 1
    height = max(_ASPECT * width * (1 + 0.6 * (panels - 1)), _GRID_MARGIN + ROW * rows)
    if rows and panels == 1 and all(trace.type == "heatmap" for trace in figure.data):
        height = min(height, _GRID_MARGIN + _TALL_ROW * max(rows, _FEW_ROWS))
    left, below = (
        max((_label_width(axis, figure, name) for axis in axes), default=0)
        for name, axes in (("y", figure.select_yaxes()), ("x", figure.select_xaxes()))
    )
    for axes, room in (
        (figure.select_xaxes(), width - left - 3 * TITLE),
        (figure.select_yaxes(), height - 4 * TITLE),
    ):
        for axis in axes:
            _wrap(axis, room * (axis.domain[1] - axis.domain[0] if axis.domain else 1))
    lines = max((axis.title.text.count("<br>") + 1 for axis in figure.select_xaxes() if axis.title.text), default=0)
    total = height + legend_height(figure, width) + below + 1.3 * TITLE * max(0, lines - 1)
    figure.update_layout(height=4 * math.ceil(total / 4))  # whole points, to which Chrome rounds a page's size
    # plotly's automatic margin ends at the base line of the title
    figure.layout.margin.b = (below or 1.4 * TICK) + (1.3 * lines + 0.7) * TITLE
    if figure.layout.annotations:
        titles = max(str(part.text).count("<br>") for part in figure.layout.annotations)
        figure.layout.margin.t = (1.6 + 1.3 * titles) * TICK
    return float(height - _GRID_MARGIN)


def _label_width(axis: go.layout.XAxis | go.layout.YAxis, figure: go.Figure, name: str) -> float:
    """Extent of category labels away from their axis; 0 for none, and for labels of one line along an x axis."""
    if name == "x" and axis.tickangle != -90:
        lines = max((text.count("<br>") for text in axis.ticktext or ()), default=0)
        return 1.3 * TICK * (lines + 1) if lines else 0.0
    bars = [t for t in figure.data if t.type == "bar" and t.orientation == "h"] if name == "y" else []
    texts = axis.ticktext or [value for trace in bars for value in trace.y]
    lines = [plain(line) for text in texts for line in str(text).split("<br>")]
    return max(map(len, lines), default=0) * CHARACTER * TICK


def _thin(axis: go.layout.XAxis, figure: go.Figure, width: float) -> None:
    """Thins numeric ticks that would overlap."""
    if axis.type in (None, "-", "linear") and isinstance(axis.dtick, int):
        values = _numbers(axis, figure)
        room = width * (axis.domain[1] - axis.domain[0] if axis.domain else 1) / (3 * TICK)
        steps = (max(values, default=0) - min(values, default=0)) / axis.dtick
        axis.dtick *= max(1, math.ceil(steps / room))
        axis.tickangle = 0


def _tick_log(axis: go.layout.XAxis, figure: go.Figure, width: float) -> None:
    """Ticks of the figure if they fit, else powers of ten, for less than two decades also 2 and 5 times these."""
    if axis.type != "log" or axis.tickvals is not None:
        return
    values = [x for x in _numbers(axis, figure) if x > 0]
    ends = [10.0**end for end in axis.range] if axis.range else [min(values, default=1), max(values, default=1)]
    low, high = float(min(ends)), float(max(ends))
    room = width * (axis.domain[1] - axis.domain[0] if axis.domain else 1)
    if isinstance(axis.dtick, Real) and math.log10(high / low) / axis.dtick * 3 * TICK <= room:
        return
    axis.dtick = 1
    if ticks := log_ticks(low, high):
        needed = sum(len(f"{value:,g}") * CHARACTER + 0.8 for value in ticks) * TICK
        ticks = ticks if needed <= room else [ticks[0], ticks[-1]]
        axis.update(tickmode="array", tickvals=ticks, ticktext=[f"{value:,g}" for value in ticks], dtick=None)


def _numbers(axis: go.layout.XAxis, figure: go.Figure) -> list[float]:
    """Places along an x axis of what is drawn on it."""
    name = (axis.plotly_name or "xaxis").replace("axis", "")
    parts = (t.x for t in figure.data if "x" in t and t.x is not None and (t.xaxis or "x") == name)
    return [float(x) for part in parts for x in part if isinstance(x, Real) and math.isfinite(x)]


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
        axis.update(name_ticks(names, float(length), TICK))


def _wrap(axis: go.layout.XAxis | go.layout.YAxis, room: float) -> None:
    """Wraps the axis title into lines of `room` pixels."""
    if axis.title.text:
        lines = textwrap.wrap(
            axis.title.text, max(12, int(room / (0.5 * TITLE))), break_long_words=False, break_on_hyphens=False
        )
        axis.title.text = "<br>".join(lines)


def _wrap_panel_titles(figure: go.Figure, width: float) -> None:
    """Wraps the titles above panels to the width of these."""
    domains = {axis.domain for axis in figure.select_xaxes() if axis.domain}
    for title in figure.layout.annotations if domains else ():
        if title.xref == title.yref == "paper" and not title.showarrow:
            left, right = min(domains, key=lambda ends: abs(sum(ends) / 2 - title.x))
            room = int((width - _PLOT_MARGIN) * (right - left) / (0.52 * TICK))
            title.text = "<br>".join(textwrap.wrap(title.text, max(8, room), break_long_words=False))


def _row_count(trace: Any, width: float) -> float:
    """Lines of text that the stacked categories of a trace need; fewer for cells without text."""
    stacked = trace.type == "heatmap" or (trace.type == "bar" and trace.orientation == "h")
    number = len(trace.y) if stacked and trace.y is not None else 0
    if trace.type == "heatmap" and trace.text is None:
        return min(float(number), 1.5 * (width - _GRID_MARGIN) / ROW, _MAX_MATRIX_ROWS)
    return float(number if number <= MAX_ROWS else 0)
