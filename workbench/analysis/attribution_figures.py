"""Figures of a logit as a sum of terms: the mean of each term, one cell a head, and terms by tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.error_bars import error_bars
from workbench.figures.head_grid import head_grid, head_name
from workbench.figures.safe_text import label, sentence
from workbench.figures.theme import CATEGORIES, NEUTRAL, SIGNED, colour_bar
from workbench.figures.themed import ThemedFigure
from workbench.io.counted import counted
from workbench.results.result import Result

_KINDS = {
    "attn_out": ("attention", CATEGORIES[0]),
    "head": ("head", CATEGORIES[0]),
    "attention": ("attention", CATEGORIES[0]),
    "mlp_out": ("MLP", CATEGORIES[1]),
    "MLP": ("MLP", CATEGORIES[1]),
    "block": ("block", CATEGORIES[2]),
    "neuron": ("neuron", CATEGORIES[1]),
}
_SHOWN = 24  # terms in the bars
_TOKENS = 32


def attribution_bars(result: Result, quantity: str) -> go.Figure:
    """Returns a bar for each of the 24 terms with the largest means, in the order of the forward pass."""
    table = result.table
    top_rows = np.sort(np.argsort(-table["contribution"].abs().to_numpy(), kind="stable")[:_SHOWN])
    top_terms = table.iloc[top_rows]
    figure = ThemedFigure()
    kinds = top_terms["kind"].map(lambda kind: _KINDS.get(kind, ("embedding, bias, rest", NEUTRAL)))
    for name, color in dict.fromkeys(kinds):
        part = top_terms[[kind[0] == name for kind in kinds]]
        figure.add_bar(
            y=[sentence(term) for term in part["term"]],
            x=part["contribution"],
            error_x=error_bars(*(part[name].to_numpy() for name in ("contribution", "low", "high"))),
            orientation="h",
            name=name,
            marker={"color": color},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    figure.add_scatter(
        y=[sentence(term) for term in top_terms["term"]],
        x=top_terms["control"],
        mode="markers",
        name="random tokens",
        marker={"color": NEUTRAL, "symbol": "line-ns-open", "size": 9},
        hovertemplate="%{y}, random tokens: %{x:.3f}<extra></extra>",
    )
    left_out = len(table) - len(top_terms)
    more = f"; {left_out} smaller terms not shown" if left_out else ""
    title = sentence(f"Direct logit attribution: {quantity}")
    subtitle = f"mean over tokens, 95 % CI over documents{more}; later parts lie above"
    figure.update_layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        width=800,
        height=190 + 22 * len(top_terms),
        margin={"t": 115},
    )
    figure.update_xaxes(title="contribution (logits)", zeroline=True)
    names = [sentence(term) for term in top_terms["term"]]
    return figure.update_yaxes(type="category", categoryorder="array", categoryarray=names, dtick=1)


def attribution_heads(result: Result, quantity: str) -> go.Figure:
    """Returns layers by heads, coloured by the mean contribution."""
    heads = result.table[result.table["kind"] == "head"]
    values = heads.pivot(index="layer", columns="index", values="contribution")
    limit = float(np.nanmax(np.abs(values.to_numpy(dtype=float)))) or 1.0
    hover = [
        [f"{head_name(int(layer), int(head))}: {values.loc[layer, head]:z.3f}" for head in values.columns]
        for layer in values.index
    ]
    figure = head_grid(
        values.to_numpy(dtype=float),
        hover=hover,
        layers=[int(layer) for layer in values.index],
        title=sentence(f"Heads: {quantity}"),
        subtitle="mean direct contribution over tokens",
        unit="logits",
        limits=(-limit, limit),
    )
    return figure.update_traces(colorscale=SIGNED, zmid=0)


def attribution_grid(result: Result, quantity: str) -> go.Figure:
    """Returns terms by tokens for the first 32 tokens: the 24 terms with the largest absolute values."""
    values = result.data["by_token"].to_numpy()[:_TOKENS]
    terms = result.table["term"].tolist()
    top_terms = np.sort(np.argsort(-np.abs(values).max(0), kind="stable")[:_SHOWN])
    texts, targets = (result.data[name].to_numpy()[:_TOKENS].tolist() for name in ("text", "target"))
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    frame = pd.DataFrame(values[:, top_terms].T)
    figure = ThemedFigure(
        go.Heatmap(
            z=frame.to_numpy(),
            x=list(range(len(texts))),
            y=[sentence(terms[index]) for index in top_terms],
            customdata=[[f"{label(a)} predicts {label(b)}" for a, b in zip(texts, targets, strict=True)]]
            * len(top_terms),
            hovertemplate="%{y}, %{customdata}: %{z:.3f}<extra></extra>",
            colorscale=SIGNED,
            zmin=-limit,
            zmax=limit,
            zmid=0,
            colorbar=colour_bar("logits"),
        )
    )
    all_terms, tokens = len(terms), result.data.sizes["token"]
    largest = f"the {len(top_terms)} of {all_terms:,} terms with the largest contribution to a token"
    subtitle = f"{largest if len(top_terms) < all_terms else 'all terms'}; {len(texts)} of {counted(tokens, 'token')}"
    figure.update_layout(
        title={"text": sentence(f"By token: {quantity}"), "subtitle": {"text": subtitle}},
        width=max(640, 260 + 26 * len(texts)),
        height=200 + 22 * len(top_terms),
    )
    ticks = [label(text, 12) for text in texts]
    figure.update_xaxes(title="token", tickvals=list(range(len(texts))), ticktext=ticks, tickangle=-60, showgrid=False)
    return figure.update_yaxes(type="category", dtick=1, showgrid=False)
