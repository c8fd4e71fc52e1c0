"""Figures of questions about features: the effect of changing one, beside controls."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from workbench.figures.group_intervals import group_intervals

_SCOPES = {"changed": "tokens whose activation changes", "all": "all tokens"}
_MEASURES = {
    "loss_increase": "increase of the next-token loss (nats)",
    "kl": "KL(unchanged ‖ changed) (nats)",
    "top1_changed": "share of tokens with another top-1 prediction",
}


def effect_figure(table: pd.DataFrame, change: str, documents: int) -> go.Figure:
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
