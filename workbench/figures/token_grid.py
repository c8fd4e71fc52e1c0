"""A grid of layers by tokens with text in its cells, and curves over layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.safe_text import label
from workbench.figures.theme import MONOSPACE, PROBABILITY, TEMPLATE, colour_bar

MAX_TOKENS = 1_024
"""In one grid: more would be wider than a browser can draw and larger than 10 MB at 48 layers."""

_WIDEST = 16_000  # pixels of all cells
_MOST_TEXTS = 6_000  # a browser lays out each by itself


def count_shown(shown: int, known: int) -> str:
    """What a figure leaves out, for its subtitle: "20 of 1,024 tokens", or "" where it leaves out nothing."""
    return f"{shown:,} of {known:,} tokens" if shown < known else ""


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
) -> go.Figure:
    """Layers (upward) by tokens (rightward), coloured by `values`, each cell holding a token of `cells`.

    `cells` and `tokens` are model text and made safe here; `hover` is markup, its maker has done so. A long text
    scrolls sideways rather than shrinking out of sight; from 258 tokens on cells grow narrower, and have no text where
    they are too narrow or too many, which the subtitle says.
    """
    columns = [str(position) for position in positions]
    cell = max(14, min(62, _WIDEST // len(columns)))
    room = int((cell - 2) / 6.6) if values.size <= _MOST_TEXTS else 0
    if room < 3:
        subtitle = f"{subtitle}; cells are too {'many' if not room else 'narrow'} for text, which hovering shows"
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=columns,
            y=[str(layer) for layer in layers],
            text=[[label(text, room) for text in row] for row in cells] if room >= 3 else None,
            texttemplate="%{text}" if room >= 3 else None,
            textfont={"family": MONOSPACE, "size": 11},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=PROBABILITY,
            zmin=limits[0],
            zmax=limits[1],
            xgap=1,
            ygap=1,
            colorbar=colour_bar(unit),
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}},
        width=max(640, 190 + cell * len(columns)),
        height=190 + 30 * len(layers),
    )
    figure.update_xaxes(
        title="input token",
        type="category",
        tickmode="array",
        tickvals=columns,
        ticktext=[label(token, 12) for token in tokens],
        tickangle=-45 if cell > 20 else -90,
        tickfont={"family": MONOSPACE},
        showgrid=False,
    )
    figure.update_yaxes(title="layer", type="category", showgrid=False)
    return figure
