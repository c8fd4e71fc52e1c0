"""Attention pattern of one head at a time over a text, with small pictures of all of them."""

# pyright: reportAttributeAccessIssue=false
# plotly makes attributes at run time
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.readable import readable_tokens
from workbench.figures.safe_text import label
from workbench.figures.theme import GREY, MONOSPACE, PROBABILITY, colour_bar
from workbench.figures.themed import ThemedFigure

MAX_HEADS, MAX_TOKENS = 16, 160
"""Limits that keep a page under 10 MB; the subtitle reports what is left out."""

_SMALL = 24  # values of a small picture, in each direction
_STRIP = 84  # height of the small pictures, pixels
_TOP, _BOTTOM = 130, 110  # margins, pixels


def head_attention(
    patterns: Float[np.ndarray, "head query key"],
    *,
    heads: Sequence[str],
    tokens: Sequence[str],
    title: str,
    subtitle: str,
) -> go.Figure:
    """Draws query tokens (downward) by key tokens (rightward), coloured by attention weight, one head at a time.

    A menu selects the head; in reports, saved results and other HTML, so does the pointer on its small picture above
    the map, and a click keeps it. A second menu leaves out the first key, the usual attention sink, and scales the
    colours to the others. Each row sums to 1. Keys after their query, which a causal model masks, are grey.

    Args:
        patterns: Attention weights; only the first 16 heads and 160 tokens are drawn, and the subtitle says so.
        heads: Names of the heads, `L2H3`; the first is shown first.
        tokens: Model text, escaped here.
        title: Plotly markup, already safe, as are `subtitle` and `heads`.
        subtitle: As `title`.
    """
    n_heads, n_tokens = len(patterns), len(tokens)
    patterns, heads = patterns[:MAX_HEADS, :MAX_TOKENS, :MAX_TOKENS], list(heads)[:MAX_HEADS]
    names = [label(token, 12) for token in readable_tokens(tokens)][:MAX_TOKENS]
    for count, total, kind in ((len(heads), n_heads, "heads"), (len(names), n_tokens, "tokens")):
        if count < total:
            subtitle = f"{subtitle}; the first {count} of {total:,} {kind}"
    causal = np.tril(np.ones((len(names), len(names)), bool))
    weights = np.where(causal, patterns, np.nan).astype(np.float32)
    traces = [_map(pattern, head, index == 0) for index, (head, pattern) in enumerate(zip(heads, weights, strict=True))]
    traces.append(_masked(causal))
    side = max(420, 12 * len(names))
    height = side + _TOP + _BOTTOM
    if len(heads) > 1:
        traces += _small_pictures(weights, heads)
        height += _STRIP + 30
    layout = {
        "title": {"text": f"{title}, {heads[0]}", "subtitle": {"text": subtitle}},
        "width": side + 260,
        "height": height,
        "margin": {"t": _TOP, "b": _BOTTOM},
        "showlegend": False,
        "updatemenus": [_heads_menu(title, heads), _sink_menu(weights)],
        "meta": {"heads": len(heads), "title": title},
    }
    return ThemedFigure(traces, layout | _axes(names, heads, traces[-1], height - _TOP - _BOTTOM))


def _map(pattern: Float[np.ndarray, "query key"], head: str, visible: bool) -> go.Heatmap:
    indices = list(range(len(pattern)))
    return go.Heatmap(
        z=pattern,
        x=indices,
        y=indices,
        name=head,
        visible=visible,
        hovertemplate="%{y} attends to %{x}: %{z:.3f}<extra></extra>",
        hoverongaps=False,
        colorscale=PROBABILITY,
        zmin=0,
        zmax=1,
        colorbar=colour_bar("attention weight"),
    )


def _masked(causal: np.ndarray, **axes: str) -> go.Heatmap:
    across, down = (list(range(size)) for size in causal.shape[::-1])
    grey = np.where(causal, np.nan, 1).astype(np.float32)
    look = {"colorscale": GREY, "zmin": 0, "zmax": 1, "showscale": False, "hoverinfo": "skip", "hoverongaps": False}
    return go.Heatmap(z=grey, x=across, y=down, meta={"part": "masked", "decoration": True}, **look, **axes)


def _small_pictures(weights: Float[np.ndarray, "head query key"], heads: Sequence[str]) -> list[go.Heatmap]:
    """Every head beside the others: maxima of blocks, so that a narrow stripe is kept; masked keys before them."""
    step = -(-weights.shape[1] // _SMALL)
    size = -(-weights.shape[1] // step)
    padded = np.full((len(weights), size * step, size * step), np.nan, np.float32)
    padded[:, : weights.shape[1], : weights.shape[2]] = weights
    blocks = np.where(np.isnan(padded), -1, padded).reshape(len(weights), size, step, size, step).max((2, 4))
    small = np.where(blocks < 0, np.nan, blocks)
    gap = np.full((size, 1 + size // 12), np.nan, np.float32)
    visible = np.concatenate([~np.isnan(small[0]), np.ones(gap.shape, bool)], axis=1)
    masked = _masked(np.tile(visible, len(small)), xaxis="x2", yaxis="y2")
    pictures = go.Heatmap(
        z=np.concatenate([part for picture in small for part in (picture, gap)], axis=1).round(3),
        customdata=[[head for head in heads for _ in range(size + gap.shape[1])]] * size,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=PROBABILITY,
        zmin=0,
        zmax=1,
        showscale=False,
        xaxis="x2",
        yaxis="y2",
        meta={"part": "heads", "width": size + gap.shape[1], "decoration": True},
    )
    return [masked, pictures]


def _heads_menu(title: str, heads: Sequence[str]) -> dict[str, object]:
    """A menu that shows one head and names it in the title."""
    buttons = [
        {
            "label": head,
            "method": "update",
            "args": [
                {"visible": [name == head for name in heads]},
                {"title.text": f"{title}, {head}"},
                list(range(len(heads))),
            ],
        }
        for head in heads
    ]
    return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 8}}


def _sink_menu(weights: Float[np.ndarray, "head query key"]) -> dict[str, object]:
    """A menu that leaves out the first key, and scales each head's colours to the largest of the other weights."""
    maxima = [float(np.nanmax(pattern[1:, 1:], initial=0)) or 1.0 for pattern in weights]
    traces, end = list(range(len(weights))), weights.shape[2] - 0.5
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [{"zmax": limits}, {"xaxis.range": [first, end]}, traces],
        }
        for name, limits, first in (("all keys", [1.0] * len(weights), -0.5), ("without the first key", maxima, 0.5))
    ]
    return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 8, "l": 110}}


def _axes(names: list[str], heads: Sequence[str], last: Any, height: int) -> dict[str, Any]:
    """Axes of the map and, above it, of the small pictures of several heads, which are the last trace."""
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names, "showgrid": False}
    ticks |= {"tickfont": {"family": MONOSPACE, "size": 10}, "ticks": ""}
    top, end = 1 - (_STRIP + 30) / height if len(heads) > 1 else 1, len(names) - 0.5
    axes = {
        "xaxis": {"title": {"text": "key token"}, "tickangle": -90, "range": [-0.5, end], **ticks},
        "yaxis": {"title": {"text": "query token"}, "range": [end, -0.5], "domain": [0, top], **ticks},
    }
    if len(heads) < 2:
        return axes
    hidden = {"showticklabels": False, "ticks": "", "showgrid": False, "showline": False}
    middles = [last.meta["width"] * (head + 0.45) for head in range(len(heads))]
    labels = {"tickvals": middles, "ticktext": list(heads), "showticklabels": True, "tickfont": {"size": 10}}
    small = {"anchor": "y2", "fixedrange": True, "title": {"text": ""}, "tickangle": 0}
    high = {"domain": [1 - _STRIP * 0.75 / height, 1], "autorange": "reversed", "fixedrange": True}
    return {**axes, "xaxis2": {**hidden, **labels, **small}, "yaxis2": {**hidden, **high}}
