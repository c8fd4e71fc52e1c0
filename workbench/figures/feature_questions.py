"""Figures of questions about features: effects beside controls, sparse probes, coactive pairs."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.error_bars import error_bars
from workbench.figures.group_intervals import group_intervals
from workbench.figures.safe_text import label as text_label
from workbench.figures.theme import CATEGORIES, PROBABILITY, SIGNED, colour_bar
from workbench.figures.themed import ThemedFigure

_SCOPES = {"changed": "tokens whose activation changes", "all": "all tokens"}
_MEASURES = {
    "loss_increase": "increase of the next-token loss (nats)",
    "kl": "KL(unchanged ‖ changed) (nats)",
    "top1_changed": "share of tokens with another top-1 prediction",
}


def effect_figure(table: Any, change: str, documents: int) -> go.Figure:
    """Returns one measure for a changed feature and for each control, with 95 % intervals.

    Args:
        table: Lines of one measure of `FeatureEffect.table`.
        change: What was done, as a title: "ablate feature 17".
        documents: Number of documents that the intervals are over.
    """
    measure = table["measure"].iloc[0]
    lines = table[table["change"] != "difference"]
    first = lines[lines["scope"] == "all"]
    categories = [f"{line.change} {line.feature}" for line in first.itertuples()]
    groups = {
        name: lines[lines["scope"] == scope][["value", "low", "high"]].to_numpy().T for scope, name in _SCOPES.items()
    }
    subtitle = f"controls: random features active on as many tokens; 95 % CI over {documents:,} documents"
    title = change[:1].upper() + change[1:]
    figure = group_intervals(groups, categories=categories, hover="%{x}", title=title, subtitle=subtitle)
    figure.update_layout(width=760)
    return figure.update_yaxes(title=_MEASURES[measure])


def sparse_probe_figure(table: Any, label: str, values: int, documents: int) -> go.Figure:
    """Returns F1 against k for the values of a label with the largest F1, and dashed that of shuffled labels.

    Args:
        table: Lines of one label of `SparseProbes.table`.
        label: Name of the label.
        values: Number of values to draw.
        documents: Number of test documents.
    """
    best = table.groupby("value", sort=False)["f1"].max().sort_values(ascending=False, kind="stable").index[:values]
    figure = ThemedFigure()
    for colour, value in zip(cycle(CATEGORIES), best, strict=False):
        lines = table[table["value"] == value].sort_values("k")
        figure.add_scatter(
            x=lines["k"],
            y=lines["f1"],
            error_y=error_bars(*(lines[name].to_numpy() for name in ("f1", "f1_low", "f1_high"))),
            name=text_label(str(value)),
            line={"color": colour},
            mode="lines+markers",
        )
        figure.add_scatter(
            x=lines["k"],
            y=lines["shuffled_f1"],
            line={"color": colour, "dash": "dash", "width": 1},
            name=f"{text_label(str(value))}, shuffled",
            showlegend=False,
            mode="lines",
        )
    subtitle = f"dashed: shuffled labels; 95 % CI over {documents:,} test documents"
    figure.update_layout(
        title={"text": f"F1 of probes on k features: {text_label(label)}", "subtitle": {"text": subtitle}},
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
        height=460,
        width=760,
    )
    figure.update_xaxes(title="features (k)", type="log", tickvals=sorted(set(table["k"])))
    return figure.update_yaxes(title="F1", range=[0, 1.02])


def pairs_figure(table: pd.DataFrame, by: str = "jaccard", features: int = 40) -> go.Figure:
    """Returns a heat map of the pairs of the features that come first in a table of `coactive_pairs`.

    Cells of pairs that are not in the table are empty.

    Args:
        table: The table, in its order.
        by: Column to show: jaccard, pmi or both.
        features: Largest number of features.
    """
    pairs = table[["feature", "other"]].to_numpy()
    chosen = list(dict.fromkeys(pairs.ravel().tolist()))[:features]
    place = {feature: index for index, feature in enumerate(chosen)}
    cells = np.full((len(chosen), len(chosen)), np.nan)
    for (first, second), value in zip(pairs, table[by], strict=True):
        if first in place and second in place:
            cells[place[first], place[second]] = cells[place[second], place[first]] = value
    names = [str(feature) for feature in chosen]
    units = {"jaccard": "Jaccard index", "pmi": "PMI (nats)", "both": "tokens"}[by]
    from_0 = {"zmin": 0, "zmax": float(table[by].to_numpy().max()) if len(table) else 1.0}  # plotly ignores zmin alone
    scale = {"colorscale": SIGNED, "zmid": 0} if by == "pmi" else {"colorscale": PROBABILITY, **from_0}
    hover = "features %{x} and %{y}: %{z:.3g}<extra></extra>"
    bar = colour_bar(units)
    figure = ThemedFigure(go.Heatmap(z=cells, x=names, y=names, colorbar=bar, hovertemplate=hover, **scale))
    subtitle = f"{len(table):,} pairs; empty: pairs that are not among them"
    title = {"text": "Features active on the same tokens", "subtitle": {"text": subtitle}}
    figure.update_layout(title=title, height=760, width=820)
    figure.update_xaxes(type="category", title="feature", showgrid=False)
    return figure.update_yaxes(type="category", title="feature", autorange="reversed", showgrid=False)
