"""A text in lines, each token coloured by a value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.safe_text import label
from workbench.figures.theme import MONOSPACE, PROBABILITY, SIGNED, TEMPLATE, colour_bar

MAX_STRIP_TOKENS = 2_048
"""Maximum tokens that are drawn; the subtitle reports what is left out."""

_LINE = 12  # tokens


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
    """Draws the text in lines of `line` tokens, each token coloured by its value.

    Args:
        values: Value of each token; NaN stays white. Only the first 2,048 tokens are drawn, and the subtitle says so.
        tokens: Model text, escaped here.
        positions: Position of each token in its sequence.
        title: Plotly markup, already safe, as are `subtitle` and `unit`.
        subtitle: As `title`.
        unit: Title of the colour bar.
        limits: Values at the ends of the palette. None: 0, or the minimum if negative, and the maximum; with `SIGNED`
            symmetric around 0.
        palette: `PROBABILITY` or `SIGNED`.
        line: Tokens per line.
    """
    total = len(values)
    values, tokens, positions = (
        np.asarray(values, float)[:MAX_STRIP_TOKENS],
        list(tokens)[:MAX_STRIP_TOKENS],
        list(positions)[:MAX_STRIP_TOKENS],
    )
    if total > MAX_STRIP_TOKENS:
        subtitle = f"{subtitle}; the first {MAX_STRIP_TOKENS:,} of {total:,} tokens"
    hover = [
        f"position {position}, {label(token)}: {value:.4g}"
        for position, token, value in zip(positions, tokens, values, strict=True)
    ]
    lines = -(-len(values) // line)
    low, high = limits or _limits(values, palette)
    figure = go.Figure(
        go.Heatmap(
            z=np.pad(values, (0, lines * line - len(values)), constant_values=np.nan).reshape(lines, line),
            x=list(range(line)),
            y=list(range(lines)),
            text=_lines([label(token, 9) for token in tokens], line),
            texttemplate="%{text}",
            textfont={"family": MONOSPACE, "size": 11},
            customdata=_lines(hover, line),
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=palette,
            zmin=low,
            zmax=high,
            xgap=1,
            ygap=1,
            colorbar=colour_bar(unit),
        )
    )
    return _lay_out(figure, title, subtitle, [str(position) for position in positions[::line]], line)


def _lay_out(figure: go.Figure, title: str, subtitle: str, row_labels: Sequence[str], line: int) -> go.Figure:
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}},
        width=190 + 66 * line,
        height=max(220, 130 + 26 * len(row_labels)),
    )
    figure.update_xaxes(visible=False)
    ticks = {"tickmode": "array", "tickvals": list(range(len(row_labels))), "ticktext": row_labels}
    return figure.update_yaxes(title="position", autorange="reversed", showgrid=False, **ticks)


def _lines(texts: Sequence[str], line: int) -> list[list[str]]:
    return [list(part) for part in zip_longest(*[iter(texts)] * line, fillvalue="")]


def _limits(values: Float[np.ndarray, " token"], palette: Sequence[Sequence[object]]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = finite.min(initial=0), finite.max(initial=0)
    if palette is SIGNED:
        low, high = -max(-low, high), max(-low, high)
    return float(low), float(high if high > low else low + 1)
