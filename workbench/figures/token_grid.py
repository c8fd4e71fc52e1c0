"""Heat map of layers by tokens with text in its cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.safe_text import label
from workbench.figures.theme import MONOSPACE, PROBABILITY, TEMPLATE, colour_bar

MAX_TOKENS = 1_024
"""Maximum tokens of one grid: more would be wider than a browser can draw and larger than 10 MB at 48 layers."""

_MAX_WIDTH = 16_000  # pixels of all cells
_MAX_TEXTS = 6_000  # a browser lays out each one separately


def count_shown(shown: int, total: int) -> str:
    """Returns "20 of 1,024 tokens" for the subtitle of a figure that leaves some out, else ""."""
    return f"{shown:,} of {total:,} tokens" if shown < total else ""


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
    """Draws layers (upward) by tokens (rightward), coloured by `values`, with a token in each cell.

    The figure grows with the number of tokens; from 258 tokens on cells become narrower, and lose their text when they
    are too narrow or too many, which the subtitle reports.

    Args:
        values: Values that are encoded as colour.
        cells: Text of each cell; model text, escaped here, as is `tokens`.
        hover: Hover text of each cell; plotly markup, already safe.
        tokens: Input tokens, along the x axis.
        positions: Position of each token in its sequence.
        layers: Layer numbers, from the bottom up.
        title: Title of the figure; plotly markup, as is `subtitle`.
        subtitle: Subtitle of the figure.
        unit: Title of the colour bar.
        limits: Values at the two ends of the colour scale.
    """
    columns = [str(position) for position in positions]
    cell = max(14, min(62, _MAX_WIDTH // len(columns)))
    room = int((cell - 2) / 6.6) if values.size <= _MAX_TEXTS else 0
    if room < 3:
        subtitle = f"{subtitle}; cells are too {'many' if not room else 'narrow'} for text: hover to read it"
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
    return _label_axes(figure, columns, tokens, angle=-45 if cell > 20 else -90)


def _label_axes(figure: go.Figure, columns: list[str], tokens: Sequence[str], angle: int) -> go.Figure:
    figure.update_xaxes(
        title="input token",
        type="category",
        tickmode="array",
        tickvals=columns,
        ticktext=[label(token, 12) for token in tokens],
        tickangle=angle,
        tickfont={"family": MONOSPACE},
        showgrid=False,
    )
    return figure.update_yaxes(title="layer", type="category", showgrid=False)
