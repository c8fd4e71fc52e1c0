"""Descriptions of a figure: its data as a table, its caption, its alternative text."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false, reportCallIssue=false
# plotly makes attributes at run time
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType

from workbench.figures.safe_text import plain
from workbench.figures.token_grid import grid_of, rewrap

_MAX_SERIES = 8  # described one by one in an alternative text

COLUMNS = ("panel", "series", "x", "x_label", "y", "y_label", "value", "low", "high", "text")


def figure_data(figure: go.Figure) -> pd.DataFrame:
    """Returns everything that is drawn as a tidy table, one point, bar or cell per row.

    Columns (only those with any value): `panel` and `series` by name; `x` and `y`; `x_label` and `y_label` where tick
    labels differ from the coordinates; `value`, encoded as colour; `low` and `high`, the ends of an error bar; `text`
    of the cell. Text is plain, not markup.
    """
    figure = _unwrapped(figure)
    parts = [_trace_table(figure, trace) for trace in drawn_traces(figure)]
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
    return " ".join(f"{part[:1].upper()}{part[1:]}." for part in sentences)


def alt_text(figure: go.Figure) -> str:
    """Returns the alternative text: kind of chart, axes, and the ends and extremes of each series."""
    table = figure_data(figure)
    traces = drawn_traces(figure)
    drawn = list(dict.fromkeys(map(_kind, traces)))
    axes = " by ".join(_titles(_unwrapped(figure)))
    parts = [" and ".join(drawn) or "Empty figure", *([f" of {axes}"] if axes else []), "."]
    if "value" in table and table["value"].notna().any():
        largest = table.loc[table["value"].idxmax()]
        at = ", ".join(_place(largest, axis) for axis in "yx" if axis in table)
        parts.append(f" {table['value'].notna().sum():,} values{_range(table['value'])}, the largest at {at}.")
    key = ["panel", "series"] if "panel" in table else ["series"]
    visible = [t.showlegend is not False or t.type == "heatmap" for t in traces]
    series = [] if "value" in table or not any(visible) else list(table.groupby(key, sort=False, dropna=False))
    measure = "x" if any(t.type == "bar" and t.orientation == "h" for t in figure.data) else "y"
    for names, part in series[:_MAX_SERIES]:
        name = ", ".join(name for name in names if isinstance(name, str) and name)
        parts.append(f" {name or 'values'}{_course(part, measure)};")
    if len(series) > _MAX_SERIES:
        parts.append(f" and {len(series) - _MAX_SERIES} more;")
    return "".join(parts).rstrip(";").rstrip(".") + "."


def _kind(trace: BaseTraceType) -> str:
    if trace.type == "scatter":
        return "Line chart" if trace.mode is None or "lines" in trace.mode else "Dot plot"
    return {"heatmap": "Heat map", "bar": "Bar chart"}.get(trace.type, trace.type)


def _range(values: pd.Series) -> str:
    known = pd.to_numeric(values, errors="coerce").dropna()
    return f" from {known.min():.3g} to {known.max():.3g}" if len(known) else ", no values"


def _course(part: pd.DataFrame, measure: str) -> str:
    """First and last value of a series with their intervals, and its extremes where they lie between these."""
    part = part.assign(number=pd.to_numeric(part[measure], errors="coerce")).dropna(subset=["number"])
    if part.empty:
        return ", no values"
    along = "x" if measure == "y" else "y"
    ends = [part.iloc[0], part.iloc[-1]]
    text = " from " + " to ".join(f"{one['number']:.3g}{_interval(one)} at {_place(one, along)}" for one in ends)
    for word, place in (("largest", part["number"].idxmax()), ("smallest", part["number"].idxmin())):
        if part.loc[place, "number"] not in [one["number"] for one in ends]:
            text += f", {word} {part.loc[place, 'number']:.3g} at {_place(part.loc[place], along)}"
    return text


def _interval(row: pd.Series) -> str:
    """The ends of the error bar of a point, where it has one."""
    known = "low" in row and pd.notna(row["low"]) and row["low"] < row["high"]
    return f" [{row['low']:.3g}, {row['high']:.3g}]" if known else ""


def _place(row: pd.Series, axis: str) -> str:
    """Where a point lies on an axis: its label, or its coordinate."""
    named = row.get(f"{axis}_label")
    value = named if isinstance(named, str) and named else row[axis]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _titles(figure: go.Figure) -> list[str]:
    """Axis titles of the y axes and of the x axes, where there are any."""
    sides = (figure.select_yaxes(), figure.select_xaxes())
    titles = [dict.fromkeys(plain(axis.title.text) for axis in axes if axis.title.text) for axes in sides]
    return [", ".join(texts) for texts in titles if texts]


def _trace_table(figure: go.Figure, trace: BaseTraceType) -> pd.DataFrame:
    columns = _heatmap(trace) if trace.type == "heatmap" else _points(trace)
    table = pd.DataFrame(columns).assign(series=plain(trace.name or ""), panel=_panel(figure, trace))
    for name in {"x", "y"} & {*columns}:
        axis = figure.layout[f"{name}axis{(getattr(trace, f'{name}axis') or name)[1:]}"]
        if axis.tickvals is not None and axis.ticktext is not None:
            labels = dict(zip(axis.tickvals, map(plain, axis.ticktext), strict=True))
            table[f"{name}_label"] = [labels.get(value) for value in columns[name]]
    return table


def _heatmap(trace: BaseTraceType) -> dict[str, Any]:
    values = np.asarray(trace.z, dtype=float)
    sides = (trace.x, values.shape[1]), (trace.y, values.shape[0])
    x, y = (np.arange(size) if side is None else np.asarray(side) for side, size in sides)
    columns = {"x": np.tile(x, len(y)), "y": np.repeat(y, len(x)), "value": values.ravel()}
    if trace.text is not None:
        columns["text"] = [plain(text) for row in trace.text for text in row]
    return columns


def _points(trace: BaseTraceType) -> dict[str, Any]:
    """Columns of a trace with one mark per point; none for kinds without x and y."""
    axes = {name: list(trace[name]) for name in ("x", "y") if name in trace and trace[name] is not None}
    size = max(map(len, axes.values()), default=0)
    columns: dict[str, Any] = {name: [*part, *[None] * (size - len(part))] for name, part in axes.items()}
    if axes and len(axes) < 2:  # plotly counts along the missing axis
        columns["y" if "x" in axes else "x"] = list(range(size))
    for axis in ("x", "y"):
        name = f"error_{axis}"
        bars = getattr(trace, name, None)
        if bars is not None and bars.array is not None:
            up, middle = np.asarray(bars.array, float), np.asarray(columns[axis], float)
            down = up if bars.arrayminus is None else np.asarray(bars.arrayminus, float)
            columns |= {"low": middle - down, "high": middle + up}
    colour = trace.marker.color if "marker" in trace and "color" in trace.marker else None
    if colour is not None and not isinstance(colour, str) and not any(isinstance(part, str) for part in colour):
        columns["value"] = np.asarray(colour, float)
    return columns


def _panel(figure: go.Figure, trace: BaseTraceType) -> str | None:
    """Title above the panel of a trace, in a figure of several panels."""
    titles = [part for part in figure.layout.annotations if part.xref == part.yref == "paper" and not part.showarrow]
    if not titles or "xaxis" not in trace:
        return None
    axis = {name: figure.layout[f"{name}axis{(trace[f'{name}axis'] or name)[1:]}"].domain for name in "xy"}
    middle, top = sum(axis["x"]) / 2, axis["y"][1]
    closest = min(titles, key=lambda part: abs(part.x - middle) + abs(part.y - top))
    return plain(closest.text)
