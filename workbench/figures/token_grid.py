"""Heat map of layers by tokens with text in its cells, in lines of tokens like a text.

A line has the tokens at its bottom, the layers above them, and on top the tokens that really follow. `rewrap` lays the
same grid out again with other lines: for print, for the width of a page, for its data as a table.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# plotly makes attributes at run time
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from workbench.figures.readable import readable_tokens
from workbench.figures.safe_text import label
from workbench.figures.theme import BELOW_TOP, CELLS, MARKS, MONOSPACE, TEXT, top_bar
from workbench.figures.themed import ThemedFigure

MAX_TOKENS = 1_024
"""Maximum tokens of one grid: more would be larger than 2 MB at 30 layers."""

CELL, NARROW = (66, 22), (14, 9)
"""Width and height of a cell in pixels, with and without text."""

_LINE = {CELL: 14, NARROW: 64}  # tokens of a line
_MAX_TEXTS = 6_000  # a browser lays out each one separately
_TITLED, _SIDES = 760, 100  # pixels that a title beside plotly's buttons needs, and beside the cells
_CHARACTER = 6.7  # width at 11 pixels
_AROUND = 3  # rows of a line besides layers: its tokens, the next tokens, a gap
_MARK = 0.16  # height of a mark, in cells
_NAMES = ("equals the model's prediction", "equals the next token of the text")


def count_shown(count: int, total: int) -> str:
    """Returns "20 of 1,024 tokens" for the subtitle of a figure that leaves some out, else ""."""
    return f"{count:,} of {total:,} tokens" if count < total else ""


@dataclass(frozen=True)
class Marks:
    """Cells of a grid that are marked below their text."""

    model: Bool[np.ndarray, "layer position"]
    """The cell's token is the model's top-1 prediction."""
    text: Bool[np.ndarray, "layer position"]
    """The cell's token is the next one of the text."""


def token_grid(
    values: Float[np.ndarray, "layer position"],
    *,
    cells: Sequence[Sequence[str]],
    hover: Sequence[Sequence[str]],
    tokens: Sequence[str],
    positions: Sequence[int],
    layers: Sequence[int],
    title: str,
    subtitle: str,
    unit: str,
    limits: tuple[float, float] = (0.0, 1.0),
    next_tokens: Sequence[str] = (),
    marks: Marks | None = None,
    rows: tuple[str, Sequence[str]] | None = None,
) -> go.Figure:
    """Draws layers (upward) by tokens (rightward), coloured by `values`, with a token in each cell.

    Lines have 14 tokens; of more than 6,000 cells they lose their text and lines have 64, which the subtitle reports.

    Args:
        values: Values that are encoded as colour.
        cells: Text of each cell; model text, escaped here, as are `tokens` and `next_tokens`.
        hover: Hover text of each cell; plotly markup, already safe.
        tokens: Input tokens, below their column.
        positions: Position of each token in its sequence.
        layers: Layer numbers, from the bottom up.
        title: Title of the figure; plotly markup, as is `subtitle`.
        subtitle: Subtitle of the figure.
        unit: Title of the colour bar.
        limits: Values at the two ends of the colour scale.
        next_tokens: The token that follows each input token in the text, drawn above its column.
        marks: Cells whose token is the model's prediction or the next one of the text.
        rows: Title of the vertical axis and the name of each row; None: "layer" and `layers`.
    """
    size = CELL if values.size <= _MAX_TEXTS else NARROW
    if size == NARROW:
        subtitle = f"{subtitle}; cells are too many for text: hover to read it"
    traces: list[Any] = [_cells(values, cells if size == CELL else None, hover, limits, unit)]
    if marks is not None:
        traces += [_mark_cells(marks), *_mark_names()]
    if size == CELL:
        following = readable_tokens([*tokens[:1], *next_tokens])[1:]  # the first may continue a token's character
        token_rows = {"input": readable_tokens(tokens), "next": following}
        traces += [_words(text, part) for part, text in token_rows.items() if text]
    axis, names = rows or ("layer", [str(layer) for layer in layers])
    shape = {"tokens": len(positions), "rows": len(layers), "line": len(positions), "cell": size, "names": list(names)}
    words = {-1: "input", len(layers): "next"} if size == CELL else {}
    shape["words"] = [[row, word] for row, word in words.items() if word == "input" or next_tokens]
    layout = {
        "title": {"text": title, "subtitle": {"text": subtitle}, **BELOW_TOP},
        "meta": {"grid": shape},
        "margin": {"t": 120, "b": 40},
        "legend": {"x": 0, "xanchor": "left", "y": 0, "yanchor": "bottom", "yref": "container"},
        "showlegend": marks is not None,
        "xaxis": {"showgrid": False, "ticks": "", "ticktext": [label(token) for token in tokens]},
        "yaxis": {"title": {"text": axis}, "showgrid": False, "ticks": ""},
    }
    return rewrap(_flat(ThemedFigure(traces, layout), tokens), min(len(positions), _LINE[size]))


def grid_of(figure: go.Figure) -> dict[str, Any] | None:
    """Returns the shape of a grid of tokens: tokens, rows, tokens of a line, cell; None for other figures."""
    meta = figure.layout.meta
    return dict(meta["grid"]) if isinstance(meta, Mapping) and "grid" in meta else None


def rewrap(figure: go.Figure, line: int, tokens: int | None = None) -> go.Figure:
    """Returns a copy of a grid of tokens in lines of `line` tokens; `tokens` keeps that many from the first on."""
    grid = grid_of(figure)
    assert grid is not None
    new = {**grid, "tokens": min(tokens or grid["tokens"], grid["tokens"]), "line": line}
    copy = ThemedFigure(figure.data, figure.layout.to_plotly_json())
    lines = -(-new["tokens"] // line)
    height = grid["rows"] + _AROUND
    trace: Any
    for trace in copy.data:
        part = trace.meta["part"] if isinstance(trace.meta, Mapping) else ""
        if part == "cells":
            for name, fill in (("z", np.nan), ("text", ""), ("customdata", "")):
                if trace[name] is not None:
                    trace[name] = _stack(_unstack(trace[name], grid), new, fill)
            trace.x, trace.y = list(range(line)), list(range(lines * height))
        elif part == "marks":
            stacked = _stack(_unstack(trace.z, grid, 2), new, 0, 2)
            trace.z = stacked.astype(np.int8)
            trace.x = (np.arange(2 * line + 1) / 2 - 0.5).tolist()
            edges = np.arange(lines * height)[:, None] + [-0.5, -0.5 + _MARK]
            trace.y = [*edges.ravel().tolist(), lines * height - 0.5]
        elif part in ("input", "next"):
            trace.text = list(trace.text)[: new["tokens"]]
            places = np.arange(new["tokens"])
            below = 0 if part == "input" else grid["rows"] + 1
            trace.x = (places % line).tolist()
            trace.y = ((lines - 1 - places // line) * height + below).tolist()
    return _lay_out(copy, new, lines, height)


def _lay_out(figure: go.Figure, grid: dict[str, Any], lines: int, height: int) -> go.Figure:
    width, row = grid["cell"]
    figure.layout.meta = {**figure.layout.meta, "grid": grid}
    starts = [line * height + 1 for line in reversed(range(lines))]
    step = max(1, round(16 / row))  # labels need the height of a line of text
    numbers = list(range(0, grid["rows"], step))
    rows = {number: grid["names"][number] for number in numbers} | dict(grid["words"])
    figure.update_yaxes(
        range=[-0.6, lines * height - 1.4],
        tickvals=[start + number for start in starts for number in rows],
        ticktext=[name for _ in starts for name in rows.values()],
    )
    inner = max(_TITLED - _SIDES, grid["line"] * width)
    figure.update_xaxes(range=[-0.5, inner / width - 0.5], showticklabels=False, tickvals=list(range(grid["tokens"])))
    names = list(figure.layout.xaxis.ticktext or ())[: grid["tokens"]]
    figure.layout.xaxis.ticktext = names
    drawn = lines * height * row
    return figure.update_layout(width=inner + _SIDES, height=drawn + 160)


def _flat(figure: go.Figure, tokens: Sequence[str]) -> go.Figure:
    """The grid in one line, with empty rows around its layers, as `rewrap` expects it."""
    trace: Any
    for trace in figure.data:
        if isinstance(trace.meta, Mapping) and trace.meta["part"] in ("cells", "marks"):
            rows = 2 if trace.meta["part"] == "marks" else 1
            grid = dict(grid_of(figure) or {}) | {"tokens": len(tokens)}
            for name, fill in (("z", np.nan if rows == 1 else 0), ("text", ""), ("customdata", "")):
                if trace[name] is not None:
                    trace[name] = _stack(np.asarray(trace[name], None if name == "z" else object), grid, fill, rows)
    return figure


def _stack(flat: np.ndarray, grid: Mapping[str, Any], fill: Any, fine: int = 1) -> np.ndarray:
    """Cuts rows of all tokens into lines and stacks them, the first on top; a cell is `fine` values wide and high."""
    line, tokens = grid["line"] * fine, grid["tokens"] * fine
    lines = -(-tokens // line)
    flat = flat[:, :tokens]
    padded = np.full((len(flat), lines * line), fill, flat.dtype)
    padded[:, :tokens] = flat
    parts = padded.reshape(len(flat), lines, line).transpose(1, 0, 2)[::-1]
    stacked = np.full((lines, len(flat) + _AROUND * fine, line), fill, flat.dtype)
    stacked[:, fine : fine + len(flat)] = parts
    return stacked.reshape(-1, line)


def _unstack(stacked: Any, grid: Mapping[str, Any], fine: int = 1) -> np.ndarray:
    """Reverses `_stack`."""
    stacked = np.asarray(stacked)
    height, rows = (grid["rows"] + _AROUND) * fine, grid["rows"] * fine
    lines = stacked.reshape(-1, height, stacked.shape[1])[::-1, fine : fine + rows]
    return lines.transpose(1, 0, 2).reshape(rows, -1)[:, : grid["tokens"] * fine]


def _cells(
    values: Float[np.ndarray, "layer position"],
    cells: Sequence[Sequence[str]] | None,
    hover: Sequence[Sequence[str]],
    limits: tuple[float, float],
    unit: str,
) -> go.Heatmap:
    room = int((CELL[0] - 4) / _CHARACTER)
    return go.Heatmap(
        z=values,
        text=None if cells is None else [[label(text, room) for text in row] for row in cells],
        texttemplate=None if cells is None else "%{text}",
        textfont={"family": MONOSPACE, "size": 11, "color": TEXT},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=CELLS,
        zmin=limits[0],
        zmax=limits[1],
        xgap=1,
        ygap=1,
        colorbar=top_bar(unit),
        meta={"part": "cells"},
    )


def _mark_cells(marks: Marks) -> go.Heatmap:
    """Two squares at the bottom of each cell: a heat map of a finer grid, which costs little at any size."""
    rows, columns = marks.model.shape
    fine = np.zeros((2 * rows, 2 * columns), np.int8)
    fine[::2, ::2], fine[::2, 1::2] = marks.model, 2 * marks.text
    return go.Heatmap(
        z=fine,
        colorscale=MARKS,
        zmin=0,
        zmax=2,
        xgap=1,
        ygap=0,
        showscale=False,
        hoverinfo="skip",
        meta={"part": "marks", "decoration": True},
    )


def _mark_names() -> list[go.Scatter]:
    """Entries of the legend."""
    return [
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=name,
            marker={"symbol": "square", "size": 9, "color": colour},
            hoverinfo="skip",
            meta={"part": "key", "decoration": True},
        )
        for name, colour in zip(_NAMES, (MARKS[1][1], MARKS[2][1]), strict=True)
    ]


def _words(tokens: Sequence[str], part: str) -> go.Scatter:
    room = int((CELL[0] - 2) / _CHARACTER)
    return go.Scatter(
        x=list(range(len(tokens))),
        y=[0] * len(tokens),
        mode="text",
        text=[label(token, room) for token in tokens],
        textfont={"family": MONOSPACE, "size": 11, "weight": 700 if part == "input" else 400},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
        meta={"part": part, "decoration": True},
    )
