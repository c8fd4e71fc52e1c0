"""Attention pattern of one head at a time over a text."""

# pyright: reportAttributeAccessIssue=false
# plotly makes attributes at run time
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.safe_text import label
from workbench.figures.theme import MONOSPACE, PROBABILITY, TEMPLATE, colour_bar

MAX_HEADS, MAX_TOKENS = 16, 160
"""Limits that keep a page under 10 MB; the subtitle reports what is left out."""


def head_attention(
    patterns: Float[np.ndarray, "head query key"],
    *,
    heads: Sequence[str],
    tokens: Sequence[str],
    title: str,
    subtitle: str,
) -> go.Figure:
    """Draws query tokens (downward) by key tokens (rightward), coloured by attention weight, with a menu of heads.

    Each row sums to 1. Keys after their query, which a causal model masks, stay white.

    Args:
        patterns: Attention weights; only the first 16 heads and 160 tokens are drawn, and the subtitle says so.
        heads: Names of the heads, `L2H3`; the first is shown first.
        tokens: Model text, escaped here.
        title: Plotly markup, already safe, as are `subtitle` and `heads`.
        subtitle: As `title`.
    """
    n_heads, n_tokens = len(patterns), len(tokens)
    patterns, heads = patterns[:MAX_HEADS, :MAX_TOKENS, :MAX_TOKENS], list(heads)[:MAX_HEADS]
    names = [label(token, 12) for token in tokens][:MAX_TOKENS]
    for shown, total, kind in ((len(heads), n_heads, "heads"), (len(names), n_tokens, "tokens")):
        if shown < total:
            subtitle = f"{subtitle}; the first {shown} of {total:,} {kind}"
    indices = list(range(len(names)))
    causal = np.tril(np.ones((len(names), len(names)), bool))
    figure = go.Figure(
        [
            go.Heatmap(
                z=np.where(causal, pattern, np.nan).astype(np.float32),
                x=indices,
                y=indices,
                name=head,
                visible=not index,
                hovertemplate="%{y} attends to %{x}: %{z:.3f}<extra></extra>",
                hoverongaps=False,
                colorscale=PROBABILITY,
                zmin=0,
                zmax=1,
                colorbar=colour_bar("attention weight"),
            )
            for index, (head, pattern) in enumerate(zip(heads, patterns, strict=True))
        ]
    )
    side = max(420, (15 if len(names) <= 64 else 12) * len(names))
    figure.update_layout(
        template=TEMPLATE,
        title={"text": f"{title}, {heads[0]}", "subtitle": {"text": subtitle}},
        width=side + 260,
        height=side + 220,
        margin={"t": 110},
        updatemenus=[_menu(figure, title)],
    )
    return _label_axes(figure, names)


def _menu(figure: go.Figure, title: str) -> dict[str, object]:
    """A menu that shows one head and names it in the title."""
    buttons = [
        {
            "label": trace.name,
            "method": "update",
            "args": [{"visible": [other is trace for other in figure.data]}, {"title.text": f"{title}, {trace.name}"}],
        }
        for trace in figure.data
    ]
    return {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}


def _label_axes(figure: go.Figure, names: list[str]) -> go.Figure:
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names, "showgrid": False}
    ticks |= {"tickfont": {"family": MONOSPACE, "size": 10}}
    figure.update_xaxes(title="key token", tickangle=-90, **ticks)
    return figure.update_yaxes(title="query token", autorange="reversed", **ticks)
