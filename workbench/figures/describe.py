"""Descriptions of a figure: its data as a table, its caption, its alternative text."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false, reportCallIssue=false
# plotly makes attributes at run time
from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType

from workbench.figures.safe_text import plain
from workbench.figures.token_grid import grid_of, rewrap
from workbench.io.counted import counted

_MAX_SERIES = 8  # described one by one in an alternative text

COLUMNS = ("panel", "series", "x", "x_label", "y", "y_label", "value", "low", "high", "text")


def figure_data(figure: go.Figure) -> pd.DataFrame:
    """Returns everything that is drawn as a tidy table, one point, bar or cell per row.

    Columns (only those with any value): `panel` and `series` by name; `x` and `y`; `x_label` and `y_label` where tick
    labels differ from the coordinates; `value`, encoded as colour; `low` and `high`, the ends of an error bar; `text`
    of the cell. Text is plain, not markup.
    """
    figure = _unwrapped(figure)
    layout = figure.layout.to_plotly_json()
    parts = [_trace_table(layout, trace) for trace in drawn_traces(figure)]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["series"])
    for axis in ("x", "y"):
        if axis in table and not pd.api.types.is_numeric_dtype(table[axis]):  # Parquet has one type per column
            table[axis] = [None if value is None else plain(str(value)) for value in table[axis]]
    return table[[name for name in COLUMNS if name in table and (name == "series" or table[name].notna().any())]]


def drawn_traces(figure: go.Figure) -> list[BaseTraceType]:
    """Returns the traces that hold data: all but keys, marks and labels, whose `meta` names them a decoration."""
    return [trace for trace in figure.data if not (isinstance(trace.meta, Mapping) and trace.meta.get("decoration"))]


def _unwrapped(figure: go.Figure) -> go.Figure:
    """A grid of tokens in one line, so that its columns are tokens; other figures as they are."""
    grid = grid_of(figure)
    if grid is None:
        return figure
    flat, rows = rewrap(figure, grid["tokens"]), slice(1, grid["rows"] + 1)
    cells = flat.data[0]
    for name in ("z", "y", "text"):
        cells[name] = None if cells[name] is None else cells[name][rows]
    return flat.update_yaxes(tickvals=cells.y, ticktext=grid["names"]).update_xaxes(title="input token")


def caption(figure: go.Figure) -> str:
    """Returns title and subtitle as sentences, or "" where there are none."""
    parts = [figure.layout.title.text, figure.layout.title.subtitle.text]
    sentences = [plain(part).rstrip(".") for part in parts if part]
    return " ".join(_capitalised(part) + "." * (part[-1:] not in ("?", "!", "…")) for part in sentences)


def _capitalised(text: str) -> str:
    """The text with a capital if it begins with a word; symbols (`a0`, `k`, `p(x)`) and names of sites stay."""
    word = re.match(r"[^\W\d_]+(?![\w(])", text)
    return text[:1].upper() + text[1:] if word and (len(word[0]) > 1 or word[0] == "a") else text


def alt_text(figure: go.Figure) -> str:
    """Returns the alternative text: kind of chart, axes, and what a reader without the picture needs of the values.

    For lines, bars and points these are the ends and extremes of each series; for values encoded as colour the rows and
    columns with their ends, the range, and where the smallest and the largest value are.
    """
    flat = _unwrapped(figure)
    traces, layout = drawn_traces(flat), flat.layout.to_plotly_json()
    drawn = list(dict.fromkeys(map(_kind, traces)))
    axes = " by ".join(_titles(layout))
    text = (" and ".join(drawn) or "Empty figure") + (f" of {axes}" if axes else "") + "."
    columns = [_trace_columns(layout, trace) | _about(layout, trace) for trace in traces]
    if coloured := _colours(columns, _unit(traces)):
        return text + coloured
    if not any(trace.showlegend is not False or trace.type == "heatmap" for trace in traces):
        return text
    measure = "x" if any(trace.type == "bar" and trace.orientation == "h" for trace in flat.data) else "y"
    series = _series(columns)
    parts = [f" {name or 'values'}{_course(points, measure)}" for name, points in series[:_MAX_SERIES]]
    if len(series) > _MAX_SERIES:
        parts.append(f" and {len(series) - _MAX_SERIES} more")
    return (text + ";".join(parts)).rstrip(".") + "."


def _kind(trace: BaseTraceType) -> str:
    if trace.type == "scatter":
        return "Line chart" if trace.mode is None or "lines" in trace.mode else "Dot plot"
    return {"heatmap": "Heat map", "bar": "Bar chart"}.get(trace.type, trace.type)


def _about(layout: Mapping[str, Any], trace: BaseTraceType) -> dict[str, Any]:
    """Whether a trace has rows and columns, and the titles of its axes; panels inside share those at the edge."""
    shared = dict(zip("yx", map(", ".join, _axis_titles(layout)), strict=True))
    own = {name: plain(_axis(layout, trace, name).get("title", {}).get("text") or "") for name in "yx"}
    return {"cells": trace.type == "heatmap", "titles": {name: own[name] or shared[name] for name in "yx"}}


def _colours(columns: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Rows, columns, count, range and extremes of the values that are encoded as colour; "" without any."""
    parts = [part for part in columns if "value" in part and np.isfinite(part["value"]).any()]
    if not parts:
        return ""
    count = sum(np.count_nonzero(~np.isnan(part["value"])) for part in parts)
    lowest = min(parts, key=lambda part: np.nanmin(part["value"]))
    highest = max(parts, key=lambda part: np.nanmax(part["value"]))
    names = {name for part in parts if (name := _name(part))}
    ends = []
    for part, index in ((lowest, np.nanargmin(lowest["value"])), (highest, np.nanargmax(highest["value"]))):
        place = [_name(part)] if len(names) > 1 else []
        for axis, title in part["titles"].items():
            place += [f"{title} {_place(part, axis, int(index))}".strip()] if axis in part else []
        ends.append(f"{part['value'][index]:.3g} at {', '.join(place)}")
    sides = [_side(parts[0], axis, title) for axis, title in parts[0]["titles"].items()]
    shape = f" {', '.join(sides)}." if all(sides) else ""
    values = f"{count:,} values{f' ({unit})' if unit else ''}"
    if np.nanmax(highest["value"]) == (only := np.nanmin(lowest["value"])):
        return f"{shape} {values}, all {only:.3g}."
    return f"{shape} {values} from {ends[0]} to {ends[1]}."


def _side(part: Mapping[str, Any], axis: str, title: str) -> str:
    """Number of the rows or columns of a heat map and the names of the first and the last; "" for points."""
    if not part["cells"]:
        return ""
    places = dict.fromkeys(_place(part, axis, index) for index in range(len(part[axis])))
    size = len(dict.fromkeys(part[axis]))
    number = counted(size, "row" if axis == "y" else "column")
    ends = list(places)[:: max(1, len(places) - 1)]
    return f"{number}{f' ({title})' if title else ''}: {' to '.join(ends)}"


def _unit(traces: Sequence[BaseTraceType]) -> str:
    """What colour stands for: the first title of a colour bar, as plain text."""
    marked = [trace if trace.type == "heatmap" else getattr(trace, "marker", None) for trace in traces]
    bars = [getattr(part, "colorbar", None) for part in marked]
    return next((plain(bar.title.text) for bar in bars if bar is not None and bar.title.text), "")


def _name(part: Mapping[str, Any]) -> str:
    """Panel and series of a trace."""
    return ", ".join(name for name in (part["panel"], part["series"]) if name)


def _series(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, list[Any]]]]:
    """Name and points of each series; traces of one name in one panel are one."""
    series: dict[str, dict[str, list[Any]]] = {}
    for part in columns:
        size = max((len(part[axis]) for axis in "xy" if axis in part), default=0)
        if not size:
            continue
        points = series.setdefault(_name(part), {axis: [] for axis in ("x", "x_label", "y", "y_label", "low", "high")})
        for axis, values in points.items():
            values += list(part.get(axis, [None] * size))
    return list(series.items())


def _course(points: Mapping[str, Sequence[Any]], measure: str) -> str:
    """First and last value of a series with their intervals, and its extremes where they lie between these."""
    values = np.array([_number(value) for value in points[measure]])
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return ", no values"
    along, ends = "x" if measure == "y" else "y", [int(known[0]), int(known[-1])]
    texts = [f"{values[index]:.3g}{_interval(points, index)} at {_place(points, along, index)}" for index in ends]
    text = " from " + " to ".join(texts)
    for word, place in (("largest", int(np.nanargmax(values))), ("smallest", int(np.nanargmin(values)))):
        if values[place] not in values[ends]:
            text += f", {word} {values[place]:.3g} at {_place(points, along, place)}"
    return text


def _interval(points: Mapping[str, Sequence[Any]], index: int) -> str:
    """The ends of the error bar of a point, where it has one."""
    low, high = (_number(points[end][index]) for end in ("low", "high"))
    return f" [{low:.3g}, {high:.3g}]" if low < high else ""


def _number(value: Any) -> float:
    """The value as a number; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _place(points: Mapping[str, Any], axis: str, index: int) -> str:
    """Where a point lies on an axis: its label, or its coordinate."""
    labels = points.get(f"{axis}_label")
    if labels and labels[index]:
        return labels[index]  # plain already
    value = points[axis][index]
    if isinstance(value, str):
        return plain(value)
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _titles(layout: Mapping[str, Any]) -> list[str]:
    """Axis titles of the y axes and of the x axes, where there are any."""
    return [", ".join(texts) for texts in _axis_titles(layout) if texts]


def _axis_titles(layout: Mapping[str, Any]) -> list[list[str]]:
    """Axis titles of the y axes and of the x axes, each once."""
    titles = []
    for name in ("yaxis", "xaxis"):
        numbers = sorted(int(key.removeprefix(name) or 1) for key in layout if key.startswith(name))
        axes = [layout[f"{name}{number if number > 1 else ''}"] for number in numbers]
        texts = [plain(text) for axis in axes if (text := axis.get("title", {}).get("text"))]
        titles.append(list(dict.fromkeys(texts)))
    return titles


def _axis(layout: Mapping[str, Any], trace: BaseTraceType, name: str) -> Mapping[str, Any]:
    """The axis of a trace in plotly's JSON form, which is read many times faster than its objects."""
    return layout.get(f"{name}axis{(getattr(trace, f'{name}axis', None) or name)[1:]}", {})


def _trace_table(layout: Mapping[str, Any], trace: BaseTraceType) -> pd.DataFrame:
    columns = _trace_columns(layout, trace)
    names = {name: columns.pop(name) for name in ("series", "panel")}
    if trace.type == "heatmap" and trace.text is not None:
        columns["text"] = [plain(text) for row in trace.text for text in row]
    return pd.DataFrame(columns).assign(**names)


def _trace_columns(layout: Mapping[str, Any], trace: BaseTraceType) -> dict[str, Any]:
    """Columns of a trace, of one length and without texts of cells; and its name and panel."""
    columns = _heatmap(trace) if trace.type == "heatmap" else _points(trace)
    for name in {"x", "y"} & {*columns}:
        axis = _axis(layout, trace, name)
        if axis.get("tickvals") is not None and axis.get("ticktext") is not None:
            texts = dict(zip(axis["tickvals"], axis["ticktext"], strict=True))
            labels = {value: plain(text) for value, text in texts.items()}
            if any(not isinstance(value, str) or _words(value) != _words(text) for value, text in texts.items()):
                columns[f"{name}_label"] = [labels.get(value) for value in columns[name]]
    return {**columns, "series": plain(trace.name or ""), "panel": _panel(layout, trace)}


def _words(markup: str) -> list[str]:
    return plain(markup.replace("<br>", " ")).split()


def _heatmap(trace: BaseTraceType) -> dict[str, Any]:
    values = np.asarray(trace.z, dtype=float)
    sides = (trace.x, values.shape[1]), (trace.y, values.shape[0])
    x, y = (np.arange(size) if side is None else np.asarray(side) for side, size in sides)
    return {"x": np.tile(x, len(y)), "y": np.repeat(y, len(x)), "value": values.ravel()}


def _points(trace: BaseTraceType) -> dict[str, Any]:
    """Columns of a trace with one mark per point; none for kinds without x and y."""
    known = trace.to_plotly_json()
    axes = {name: list(known[name]) for name in ("x", "y") if name in known}
    size = max(map(len, axes.values()), default=0)
    columns: dict[str, Any] = {name: [*part, *[None] * (size - len(part))] for name, part in axes.items()}
    if axes and len(axes) < 2:  # plotly counts along the missing axis
        columns["y" if "x" in axes else "x"] = list(range(size))
    for axis in ("x", "y"):
        name = f"error_{axis}"
        bars = known.get(name, {})
        if "array" in bars:
            up, middle = np.asarray(bars["array"], float), np.asarray(columns[axis], float)
            down = np.asarray(bars.get("arrayminus", up), float)
            columns |= {"low": middle - down, "high": middle + up}
    colour = known.get("marker", {}).get("color")
    if colour is not None and not isinstance(colour, str) and not any(isinstance(part, str) for part in colour):
        columns["value"] = np.asarray(colour, float)
    return columns


def _panel(layout: Mapping[str, Any], trace: BaseTraceType) -> str | None:
    """Title above the panel of a trace, in a figure of several panels."""
    titles = [
        part
        for part in layout.get("annotations", ())
        if part.get("xref") == part.get("yref") == "paper" and not part.get("showarrow")
    ]
    if not titles or "xaxis" not in trace:
        return None
    across, up = (_axis(layout, trace, name).get("domain", (0, 1)) for name in "xy")
    closest = min(titles, key=lambda part: abs(part.get("x", 0.5) - sum(across) / 2) + abs(part.get("y", 1) - up[1]))
    return plain(closest.get("text", ""))
