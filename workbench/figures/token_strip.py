"""A text, token by token, coloured by a number that each token has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.safe_text import label
from workbench.figures.theme import MONOSPACE, PROBABILITY, SIGNED, TEMPLATE, colour_bar

MOST = 2_048
"""Tokens that are drawn; what is beyond is left out and said."""

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
    """The text in lines of `line` tokens, read as a page is, each token coloured by its value; NaN, none, stays white.

    `limits`: values of the palette's ends, by default 0, or the least where that is negative, and the largest; with
    `SIGNED` as far from 0 on both sides.
    `tokens` are model text and made safe here; `title`, `subtitle` and `unit` are markup: their maker has done so. Of
    more than 2,048 tokens the first are drawn, which the subtitle says.
    """
    number = len(values)
    values, tokens, positions = np.asarray(values, float)[:MOST], list(tokens)[:MOST], list(positions)[:MOST]
    if number > MOST:
        subtitle = f"{subtitle}; the first {MOST:,} of {number:,} tokens"
    told = [
        f"position {position}, {label(token)}: {value:.4g}"
        for position, token, value in zip(positions, tokens, values, strict=True)
    ]
    lines = -(-len(values) // line)
    low, high = limits or _ends(values, palette)
    figure = go.Figure(
        go.Heatmap(
            z=np.pad(values, (0, lines * line - len(values)), constant_values=np.nan).reshape(lines, line),
            x=list(range(line)),
            y=list(range(lines)),
            text=_lines([label(token, 9) for token in tokens], line),
            texttemplate="%{text}",
            textfont={"family": MONOSPACE, "size": 11},
            customdata=_lines(told, line),
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
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}},
        width=190 + 66 * line,
        height=max(220, 130 + 26 * lines),
    )
    figure.update_xaxes(visible=False)
    return figure.update_yaxes(
        title="position",
        autorange="reversed",
        tickmode="array",
        tickvals=list(range(lines)),
        ticktext=[str(position) for position in positions[::line]],
        showgrid=False,
    )


def _lines(texts: Sequence[str], line: int) -> list[list[str]]:
    return [list(part) for part in zip_longest(*[iter(texts)] * line, fillvalue="")]


def _ends(values: Float[np.ndarray, " token"], palette: Sequence[Sequence[object]]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, high = known.min(initial=0), known.max(initial=0)
    if palette is SIGNED:
        low, high = -max(-low, high), max(-low, high)
    return float(low), float(high if high > low else low + 1)
