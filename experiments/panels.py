"""Curves of one run or of a sweep: one panel per model and differing setting, one line per group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.safe_text import label
from workbench.figures.theme import CATEGORIES, TEMPLATE
from workbench.figures.ticks import integer_step
from workbench.results.result import Result

PLACES = ("model", "text", "sae")
"""Settings that can be paths."""

DASHES = ("solid", "dot", "dash", "dashdot")
_WIDE = 3  # panels in a row
_AVERAGED = "seed"


def differing_settings(result: Result) -> list[str]:
    """Returns the settings in which the runs of this result differ, in the order of the config."""
    settings = result.provenance["settings"]
    runs = settings.get("runs", [settings])
    return [name for name in runs[0] if any(run[name] != runs[0][name] for run in runs)]


def setting_text(name: str, value: Any) -> str:
    """Returns a setting as text of a figure, safe as plotly text."""
    return _value(value) if name in PLACES else f"{name} {_value(value)}"


def with_short_paths(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with models, texts and SAEs cut to the last path components that distinguish them."""
    names = [name for name in PLACES if name in table]
    return table.assign(**{name: pd.Series(table[name]).map(_short(table[name].unique().tolist())) for name in names})


def _short(places: Sequence[Any]) -> dict[Any, str]:
    paths = {place: Path(str(place)) for place in places}
    for parts in range(1, max(len(path.parts) for path in paths.values())):
        names = {place: str(Path(*path.parts[-parts:])) for place, path in paths.items()}
        if len({*names.values()}) == len(places):
            return names
    return {place: str(path) for place, path in paths.items()}


def groups(result: Result, besides: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Returns the parts of the table by all differing settings but `besides` and the seed, each with its name."""
    columns = [name for name in differing_settings(result) if name not in (*besides, _AVERAGED)]
    if "model" not in columns and "model" in result.table and "model" not in besides:
        columns.insert(0, "model")
    table = with_short_paths(result.table)
    return [(", ".join(starmap(setting_text, values.items())), part) for values, part in _parts(table, columns)]


def _parts(table: pd.DataFrame, columns: list[str]) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Returns the rows of each combination of values of the columns; of no columns, the table."""
    if not columns:
        return [({}, table)]
    parts = []
    for values, part in table.groupby(columns, sort=False, dropna=False):
        assert isinstance(values, tuple)  # always, of a list of columns
        parts.append((dict(zip(columns, values, strict=True)), part))
    return parts


def curves(
    result: Result,
    *,
    x: str,
    y: str,
    colour: str | None = None,
    dash: str | None = None,
    interval: tuple[str, str] | None = None,
    title: str,
    subtitle: str = "",
    x_title: str,
    unit: str,
    besides: Sequence[str] = (),
) -> go.Figure:
    """Returns `y` over `x`: one panel per model and differing setting, one line per `colour` and `dash`.

    Seeds are averaged. Text of the table is made safe here; `title` and `subtitle` are markup.

    Args:
        result: a run, or the summary of a sweep.
        x: column of the horizontal axis.
        y: column of the vertical axis.
        colour: column with one colour per value.
        dash: column with one dash per value.
        interval: columns of the lower and upper end, drawn as error bars; over several seeds from the lowest to the
            highest.
        title: title of the figure.
        subtitle: line below the title.
        x_title: title of the horizontal axis.
        unit: title of the vertical axis.
        besides: settings that get no panel.
    """
    lines = [name for name in (colour, dash) if name]
    parts = groups(result, (*lines, *besides))
    columns = min(_WIDE, len(parts))
    rows = -(-len(parts) // columns)
    same_x = len({tuple(sorted(part[x].unique())) for _, part in parts}) == 1
    figure = _panels([name for name, _ in parts], columns, same_x)
    palette = _scale(result.table[colour] if colour else [], CATEGORIES)
    dashes = _scale(result.table[dash] if dash else [], DASHES)
    in_legend = set()
    for place, (_, part) in enumerate(parts):
        row, column = place // columns + 1, place % columns + 1
        for values, line in _parts(part, lines):
            low, high = interval or (y, y)
            at = line.groupby(x, sort=True).agg(mean=(y, "mean"), low=(low, "min"), high=(high, "max"))
            name = ", ".join(_value(value) for key, value in values.items() if result.table.loc[:, key].nunique() > 1)
            style = {
                "color": palette.get(values[colour], CATEGORIES[0]) if colour else CATEGORIES[0],
                "dash": dashes.get(values[dash], "solid") if dash else "solid",
            }
            curve = _curve(at, name, style, interval is not None, f"{x_title} %{{x}}: %{{y:.4g}}")
            figure.add_trace(curve.update(showlegend=bool(name) and name not in in_legend), row=row, col=column)
            in_legend.add(name)
    averaged = "mean over seeds" if _AVERAGED in differing_settings(result) else ""
    _set_layout(figure, title, "; ".join(filter(None, [subtitle, averaged])), rows, columns)
    figure.update_xaxes(title=x_title, showticklabels=True, dtick=integer_step(result.table[x]))
    return figure.update_yaxes(title=unit, col=1)


def _curve(at: pd.DataFrame, name: str, style: dict[str, str], whiskers: bool, hover: str) -> go.Scatter:
    return go.Scatter(
        x=at.index.tolist(),
        y=at["mean"].to_numpy(),
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line=style,
        error_y=_whiskers(at) if whiskers else None,
        hovertemplate=hover,
    )


def _panels(names: Sequence[str], columns: int, same_x: bool) -> go.Figure:
    rows = -(-len(names) // columns)
    return make_subplots(
        rows,
        columns,
        subplot_titles=names,
        shared_yaxes="all",  # pyright: ignore[reportArgumentType]  # plotly
        shared_xaxes="all" if same_x else False,  # pyright: ignore[reportArgumentType]  # plotly
        vertical_spacing=0.16 / rows + 0.04,
        horizontal_spacing=0.03,
    )


def _set_layout(figure: go.Figure, title: str, subtitle: str, rows: int, columns: int) -> None:
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}, "y": 0.98, "yanchor": "top"},
        width=max(700, 120 + 300 * columns),
        height=190 + 290 * rows,
        margin={"t": 110, "b": 90},
        legend={"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    figure.update_annotations(font_size=13)


def _scale(values: Any, choices: Sequence[str]) -> dict[Any, str]:
    known = list(dict.fromkeys(values))
    return {value: choices[place % len(choices)] for place, value in enumerate(known)}


def _value(value: Any) -> str:
    text = label(f"{value:g}" if isinstance(value, float) else str(value), 40)
    return text.replace("·", " ")  # `label` marks spaces, for tokens


def _whiskers(at: pd.DataFrame) -> dict[str, Any]:
    above, below = at["high"] - at["mean"], at["mean"] - at["low"]
    return {"array": above.to_numpy(), "arrayminus": below.to_numpy(), "thickness": 1, "width": 3}
