"""Attention over a text: which token looks at which, a head at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.safe_text import label
from workbench.figures.theme import MONOSPACE, PROBABILITY, TEMPLATE, colour_bar

MAX_HEADS, MAX_TOKENS = 16, 160
"""What is drawn, so that a page stays under 10 MB; what is beyond is left out and said."""


def head_attention(
    patterns: Float[np.ndarray, "head query key"],
    *,
    heads: Sequence[str],
    tokens: Sequence[str],
    title: str,
    subtitle: str,
) -> go.Figure:
    """Tokens that attend (downward) by tokens attended to (rightward), coloured by attention; a menu picks the head.

    Each row sums to 1; a key after its query, which a causal model does not see, stays white. `heads`: their names,
    the one to show first first. `tokens` are model text and made safe here; `title`, `subtitle` and `heads` are
    markup: their maker has done so. Of more than 16 heads and 160 tokens the first are drawn, which the subtitle says.
    """
    number, length = len(patterns), len(tokens)
    patterns, heads = patterns[:MAX_HEADS, :MAX_TOKENS, :MAX_TOKENS], list(heads)[:MAX_HEADS]
    names = [label(token, 12) for token in tokens][:MAX_TOKENS]
    for shown, whole, kind in ((len(heads), number, "heads"), (len(names), length, "tokens")):
        if shown < whole:
            subtitle = f"{subtitle}; the first {shown} of {whole:,} {kind}"
    places = list(range(len(names)))
    seen = np.tril(np.ones((len(names), len(names)), bool))
    figure = go.Figure(
        [
            go.Heatmap(
                z=np.where(seen, pattern, np.nan).astype(np.float32),
                x=places,
                y=places,
                name=f"head {head}",
                visible=not at,
                hovertemplate="%{y} attends to %{x}: %{z:.3f}<extra></extra>",
                hoverongaps=False,
                colorscale=PROBABILITY,
                zmin=0,
                zmax=1,
                colorbar=colour_bar("attention"),
            )
            for at, (head, pattern) in enumerate(zip(heads, patterns, strict=True))
        ]
    )
    titles = [f"{title}, head {head}" for head in heads]
    menu = [
        {
            "label": trace.name,
            "method": "update",
            "args": [{"visible": [other is trace for other in figure.data]}, {"title.text": shown}],
        }
        for trace, shown in zip(figure.data, titles, strict=True)
    ]
    side = max(420, (15 if len(names) <= 64 else 12) * len(names))
    figure.update_layout(
        template=TEMPLATE,
        title={"text": titles[0], "subtitle": {"text": subtitle}},
        width=side + 260,
        height=side + 220,
        margin={"t": 110},
        updatemenus=[{"buttons": menu, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}],
    )
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": names, "showgrid": False}
    ticks |= {"tickfont": {"family": MONOSPACE, "size": 10}}
    figure.update_xaxes(title="token attended to", tickangle=-90, **ticks)
    return figure.update_yaxes(title="token that attends", autorange="reversed", **ticks)
