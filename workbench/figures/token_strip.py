"""A text in lines, each token coloured by a value."""

# pyright: reportAttributeAccessIssue=false
# plotly makes attributes at run time
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.readable import readable_tokens, right_to_left_runs
from workbench.figures.safe_text import label
from workbench.figures.theme import (
    BELOW_TOP,
    CELLS,
    MONOSPACE,
    PROBABILITY,
    SIGNED,
    SIGNED_CELLS,
    TEXT,
    top_bar,
)
from workbench.figures.themed import ThemedFigure
from workbench.figures.ticks import integer_step
from workbench.io.counted import counted

MAX_STRIP_TOKENS = 2_048
"""Maximum tokens that are drawn; the subtitle reports what is left out."""

_BAR_TICKS = 4  # of the short colour bar above a strip: labels of more would turn
_LINE = 12  # tokens: as wide as a report on a small screen
_CELL = 66, 24  # pixels
_QUANTILE = 0.99  # of the absolute values: the end of the colours, so that one massive value does not bleach the others


def token_strip(
    values: Float[np.ndarray, " token"],
    *,
    tokens: Sequence[str],
    positions: Sequence[int],
    title: str,
    subtitle: str,
    unit: str,
    limits: tuple[float, float] | None = None,
    palette: Sequence[Sequence[object]] = PROBABILITY,
    line: int = _LINE,
) -> go.Figure:
    """Draws the text in lines of at most `line` tokens, each token coloured by its value.

    A newline ends a line. Runs of Arabic and Hebrew stand from right to left. A character that several tokens share
    stands at the first of them, "↪" at the others.

    Args:
        values: Value of each token; NaN stays white. Only the first 2,048 tokens are drawn, and the subtitle says so.
        tokens: Model text, escaped here.
        positions: Position of each token in its sequence.
        title: Plotly markup, already safe, as are `subtitle` and `unit`.
        subtitle: As `title`.
        unit: Title of the colour bar.
        limits: Values at the ends of the palette. None: 0, or the minimum if negative, and the 99 % quantile; the
            subtitle says how many tokens lie beyond. With `SIGNED` symmetric around 0.
        palette: `PROBABILITY`, or `SIGNED`: blue below 0, orange above; drawn in the lighter shades that text needs.
        line: Tokens per line.
    """
    total = len(values)
    values = np.asarray(values, float)[:MAX_STRIP_TOKENS]
    tokens, positions = list(tokens)[: len(values)], list(positions)[: len(values)]
    if total > MAX_STRIP_TOKENS:
        subtitle = f"{subtitle}; the first {MAX_STRIP_TOKENS:,} of {total:,} tokens"
    low, high = limits or _limits(values, palette is SIGNED)
    beyond = int((values > high).sum() + (values < low).sum())
    if beyond:
        subtitle = f"{subtitle}; {counted(beyond, 'token')} beyond the colours"
    readable = readable_tokens(tokens)
    texts = [label(token, 9) for token in readable]
    hover = [
        f"position {position}, {label(token)}: {value:.4g}"
        for position, token, value in zip(positions, tokens, values, strict=True)
    ]
    wrap = {
        "ends": [at for at, token in enumerate(readable) if token.endswith(("\n", "\r"))],
        "runs": [[run.start, run.stop] for run in right_to_left_runs(readable)],
    }
    lines = _lines(len(readable), line, **wrap)
    heat = _cells(values, texts, hover, lines, line)
    heat.update(colorscale=SIGNED_CELLS if palette is SIGNED else CELLS, zmin=low, zmax=high)
    heat.colorbar = {**top_bar(unit), "dtick": integer_step([*values[np.isfinite(values)], low, high], _BAR_TICKS)}
    layout = {
        "title": {"text": title, "subtitle": {"text": subtitle}, **BELOW_TOP},
        "margin": {"t": 115, "b": 20},
        "meta": {"strip": {"lines": lines, "positions": list(map(int, positions)), **wrap}},
        "xaxis": {"visible": False},
        "yaxis": {"title": {"text": "position"}, "autorange": "reversed", "showgrid": False},
    }
    return _lay_out(ThemedFigure(heat, layout), lines, positions, line)


def full_colour(values: Float[np.ndarray, " token"]) -> float:
    """Returns the absolute value from which on the colour of a token is full: the 99 % quantile.

    At most 100 values have no meaningful quantile: their maximum. Values that are not finite do not count.
    """
    size = np.abs(values[np.isfinite(values)])
    return float(np.quantile(size, _QUANTILE)) if len(size) > 100 else float(size.max(initial=0))


def is_strip(figure: go.Figure) -> bool:
    """Returns True for a figure that `token_strip` drew."""
    return isinstance(figure.layout.meta, Mapping) and "strip" in figure.layout.meta


def restrip(figure: go.Figure, line: int, most: int) -> tuple[go.Figure, int]:
    """Returns a copy of a strip in at most `most` lines of at most `line` tokens, and the number of tokens it holds."""
    copy, heat = ThemedFigure(figure.data, figure.layout.to_plotly_json()), figure.data[0]
    strip = figure.layout.meta["strip"]
    lines, positions = strip["lines"], strip["positions"]
    place = {index: (row, column) for row, part in enumerate(lines) for column, index in enumerate(part)}
    parts = _lines(len(positions), line, strip["ends"], strip["runs"])[:most]

    def moved(cells: Any, fill: Any) -> list[list[Any]]:
        return [[cells[place[i][0]][place[i][1]] for i in part] + [fill] * (line - len(part)) for part in parts]

    cells = copy.data[0]
    cells.z, cells.text, cells.customdata = moved(heat.z, np.nan), moved(heat.text, ""), moved(heat.customdata, "")
    cells.x, cells.y = list(range(line)), list(range(len(parts)))
    return _lay_out(copy, parts, positions, line), sum(map(len, parts))


def _cells(
    values: Float[np.ndarray, " token"],
    texts: Sequence[str],
    hover: Sequence[str],
    lines: Sequence[Sequence[int]],
    line: int,
) -> go.Heatmap:
    """The tokens of each line, filled up with empty cells."""

    def rows(parts: Any, fill: Any) -> list[list[Any]]:
        return [[parts[index] for index in part] + [fill] * (line - len(part)) for part in lines]

    return go.Heatmap(
        z=rows(values, np.nan),
        x=list(range(line)),
        y=list(range(len(lines))),
        text=rows(texts, ""),
        texttemplate="%{text}",
        textfont={"family": MONOSPACE, "size": 11, "color": TEXT},
        customdata=rows(hover, ""),
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
    )


def _lay_out(figure: go.Figure, lines: Sequence[Sequence[int]], positions: Sequence[int], line: int) -> go.Figure:
    """Sizes of a strip, and the position of the first token of each line."""
    figure.update_layout(width=110 + _CELL[0] * line, height=160 + _CELL[1] * max(2, len(lines)))
    names = [str(positions[min(part)]) if part else "" for part in lines]
    return figure.update_yaxes(tickmode="array", tickvals=list(range(len(lines))), ticktext=names, ticks="")


def _lines(tokens: int, line: int, ends: Sequence[int], runs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the tokens of each line from left to right; `wrapStrip` of figure.js does the same.

    Args:
        tokens: Number of tokens.
        line: Tokens per line at most.
        ends: Indices of tokens that are the last of their line.
        runs: First and last plus 1 of each run from right to left.
    """
    starts = [0, *(end + 1 for end in ends)]
    paragraphs = [range(first, last) for first, last in zip(starts, [*starts[1:], tokens], strict=True)]
    parts = [[*part[first : first + line]] for part in paragraphs for first in range(0, len(part), line)]
    for part in parts:
        for first, last in runs:
            inside = slice(max(first - part[0], 0), max(last - part[0], 0))
            part[inside] = reversed(part[inside])
    return parts or [[]]


def _limits(values: Float[np.ndarray, " token"], signed: bool) -> tuple[float, float]:
    """The ends of the colours."""
    finite, end = values[np.isfinite(values)], full_colour(values)
    low, high = max(-end, float(finite.min(initial=0))), min(end, float(finite.max(initial=0)))
    if signed:
        low, high = -max(-low, high), max(-low, high)
    return low, high if high > low else low + 1
