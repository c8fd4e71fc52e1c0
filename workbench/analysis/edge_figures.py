"""Figures of edge attribution: the share of the gap that the best edges recover, and the strongest edges."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from workbench.figures.error_bars import error_bars
from workbench.figures.log_axis import log_axis
from workbench.figures.safe_text import sentence
from workbench.figures.theme import CATEGORIES, NEUTRAL
from workbench.figures.themed import ThemedFigure
from workbench.io.counted import counted

_SHOWN = 24
_ARROW = "\u2192"


def faithfulness_curve(data: Any) -> go.Figure:
    """Returns the share of the gap that kept edges recover, best edges first and edges at random, by their number."""
    sizes, figure = data["edges"].to_numpy(), ThemedFigure()
    for name, title, color, dash in (
        ("faithfulness", "largest scores", CATEGORIES[0], "solid"),
        ("random_faithfulness", "random edges", NEUTRAL, "dash"),
    ):
        mean = data[name].to_numpy()
        figure.add_scatter(
            x=sizes,
            y=mean,
            error_y=error_bars(mean, *(data[f"{name}_{end}"].to_numpy() for end in ("low", "high"))),
            name=title,
            mode="lines+markers",
            line={"color": color, "dash": dash},
            hovertemplate="%{x:,} edges: %{y:.3f}<extra></extra>",
        )
    figure.add_hline(y=1, line={"color": NEUTRAL, "dash": "dot"})
    total = int(data["total"])
    figure.update_layout(
        title={
            "text": "Faithfulness of the best edges",
            "subtitle": {
                "text": f"kept edges clean, others corrupt; {counted(total, 'edge')}, 95 % CI over "
                f"{counted(data.sizes['pair'], 'pair')}"
            },
        },
        width=760,
        height=460,
    )
    figure.update_xaxes(title="kept edges", **log_axis(sizes))
    return figure.update_yaxes(title="share of the gap that comes back")


def strongest_edges(table: Any, units: str) -> go.Figure:
    """Returns a bar for each of the 24 edges with the largest absolute scores."""
    top_edges = table.head(_SHOWN).iloc[::-1]
    names = [sentence(f"{line.sender} {_ARROW} {line.receiver}") for line in top_edges.itertuples()]
    figure = ThemedFigure(
        go.Bar(
            y=names,
            x=top_edges["score"],
            error_x=error_bars(*(top_edges[name].to_numpy() for name in ("score", "low", "high"))),
            orientation="h",
            marker={"color": CATEGORIES[0]},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )
    figure.update_layout(
        title={
            "text": "Strongest edges",
            "subtitle": {"text": "estimated effect of each edge, 95 % CI over pairs"},
        },
        width=760,
        height=180 + 22 * len(top_edges),
    )
    figure.update_xaxes(title=sentence(f"score ({units})"), zeroline=True)
    return figure.update_yaxes(type="category", dtick=1, showgrid=False)
