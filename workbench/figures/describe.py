"""What a figure says in words and numbers: its data as a table, its caption, and a text for who cannot see it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.safe_text import plain

_NAMED = 8
"""Series that an alternative text tells one by one."""

COLUMNS = ("panel", "series", "x", "x_label", "y", "y_label", "value", "low", "high", "text")


def figure_data(figure: go.Figure) -> pd.DataFrame:
    """Everything that is drawn, tidy: one point, bar or cell a row.

    Columns, those that any row has: panel and series by name; x and y; x_label and y_label where ticks say otherwise;
    value, what a colour shows; low and high, the ends of an error bar; text in the cell. Text is plain, not markup.
    """
    parts = [_trace(figure, trace) for trace in figure.data]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["series"])
    for axis in ("x", "y"):
        if axis in table and not pd.api.types.is_numeric_dtype(table[axis]):  # Parquet has one type a column
            table[axis] = [None if value is None else plain(str(value)) for value in table[axis]]
    return table[[name for name in COLUMNS if name in table and (name == "series" or table[name].notna().any())]]


def caption(figure: go.Figure) -> str:
    """Title and subtitle as sentences; "" where there are none."""
    told = [figure.layout.title.text, figure.layout.title.subtitle.text]
    said = [plain(part).rstrip(".") for part in told if part]
    return " ".join(f"{part[:1].upper()}{part[1:]}." for part in said)


def alt_text(figure: go.Figure) -> str:
    """The kind of chart, its axes, and what its series go from and to: a text in place of the picture."""
    table = figure_data(figure)
    kinds = {"heatmap": "Heat map", "bar": "Bar chart", "scatter": "Line chart"}
    drawn = list(dict.fromkeys(kinds.get(trace.type, trace.type) for trace in figure.data))
    axes = " by ".join(_titles(figure))
    told = [" and ".join(drawn) or "Empty figure", *([f" of {axes}"] if axes else []), "."]
    if "value" in table and table["value"].notna().any():
        told.append(f" {table['value'].notna().sum():,} values{_range(table['value'])}.")
    key = ["panel", "series"] if "panel" in table else ["series"]
    shown = [t.showlegend is not False or t.type == "heatmap" for t in figure.data]
    series = [] if "value" in table or not any(shown) else list(table.groupby(key, sort=False, dropna=False))
    measure = "x" if any(t.type == "bar" and t.orientation == "h" for t in figure.data) else "y"
    for names, part in series[:_NAMED]:
        name = ", ".join(name for name in names if isinstance(name, str) and name)
        told.append(f" {name or 'values'}{_range(part[measure])};")
    if len(series) > _NAMED:
        told.append(f" and {len(series) - _NAMED} more;")
    return "".join(told).rstrip(";").rstrip(".") + "."


def _range(values: pd.Series) -> str:
    known = pd.to_numeric(values, errors="coerce").dropna()
    return f" from {known.min():.3g} to {known.max():.3g}" if len(known) else ", none known"


def _titles(figure: go.Figure) -> list[str]:
    """Of the y axes and of the x axes, those that have any."""
    sides = (figure.select_yaxes(), figure.select_xaxes())
    titles = [dict.fromkeys(plain(axis.title.text) for axis in axes if axis.title.text) for axes in sides]
    return [", ".join(known) for known in titles if known]


def _trace(figure: go.Figure, trace: Any) -> pd.DataFrame:
    columns = _heatmap(trace) if trace.type == "heatmap" else _points(trace)
    table = pd.DataFrame(columns).assign(series=plain(trace.name or ""), panel=_panel(figure, trace))
    for name in {"x", "y"} & {*columns}:
        axis = figure.layout[f"{name}axis{(getattr(trace, f'{name}axis') or name)[1:]}"]
        if axis.tickvals is not None and axis.ticktext is not None:
            shown = dict(zip(axis.tickvals, map(plain, axis.ticktext), strict=True))
            table[f"{name}_label"] = [shown.get(value) for value in columns[name]]
    return table


def _heatmap(trace: Any) -> dict[str, object]:
    values = np.asarray(trace.z, dtype=float)
    x, y = (np.arange(n) if given is None else np.asarray(given) for given, n in _sides(trace, values))
    columns = {"x": np.tile(x, len(y)), "y": np.repeat(y, len(x)), "value": values.ravel()}
    if trace.text is not None:
        columns["text"] = [plain(text) for row in trace.text for text in row]
    return columns


def _sides(trace: Any, values: np.ndarray) -> list[tuple[object, int]]:
    return [(trace.x, values.shape[1]), (trace.y, values.shape[0])]


def _points(trace: Any) -> dict[str, object]:
    """What a trace of one mark a point holds; of kinds without x and y, nothing."""
    given = {name: list(trace[name]) for name in ("x", "y") if name in trace and trace[name] is not None}
    number = max(map(len, given.values()), default=0)
    columns: dict[str, Any] = {name: [*part, *[None] * (number - len(part))] for name, part in given.items()}
    if given and len(given) < 2:  # plotly counts the other axis
        columns["y" if "x" in given else "x"] = list(range(number))
    if "error_y" in trace and trace.error_y.array is not None:
        up, y = np.asarray(trace.error_y.array, float), np.asarray(columns["y"], float)
        down = up if trace.error_y.arrayminus is None else np.asarray(trace.error_y.arrayminus, float)
        columns |= {"low": y - down, "high": y + up}
    colour = trace.marker.color if "marker" in trace and "color" in trace.marker else None
    if colour is not None and not isinstance(colour, str) and not any(isinstance(part, str) for part in colour):
        columns["value"] = np.asarray(colour, float)
    return columns


def _panel(figure: go.Figure, trace: Any) -> str | None:
    """The title above the panel that a trace is drawn in, where the figure has several."""
    titles = [part for part in figure.layout.annotations if part.xref == part.yref == "paper" and not part.showarrow]
    if not titles or "xaxis" not in trace:
        return None
    axis = {name: figure.layout[f"{name}axis{(trace[f'{name}axis'] or name)[1:]}"].domain for name in "xy"}
    middle, top = sum(axis["x"]) / 2, axis["y"][1]
    best = min(titles, key=lambda part: abs(part.x - middle) + abs(part.y - top))
    return plain(best.text)
