"""Figures of estimates beside exact effects: patching by gradients, its correlation by layer, ablation of terms."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench.figures.error_bars import error_bars
from workbench.figures.safe_text import label, sentence
from workbench.figures.theme import CATEGORIES, MARKERS, NEUTRAL, colour_bar
from workbench.figures.themed import ThemedFigure
from workbench.figures.ticks import integer_step
from workbench.io.counted import counted
from workbench.results.result import Result

_SHOWN = 24  # terms in the bars


def estimate_scatter(data: Any, site: str) -> go.Figure:
    """Returns the estimated against the exact effect of every cell and sampled pair, coloured by layer."""
    exact, estimate = data["exact_by_pair"].to_numpy(), data["estimate_by_pair"].to_numpy()
    valid = ~(np.isnan(exact) | np.isnan(estimate) | ((exact == 0) & (estimate == 0)))
    pair, layer, place = np.nonzero(valid)
    layers, places = data["layer"].to_numpy(), data["place"].to_numpy()
    x, y = exact[valid], estimate[valid]
    ends = [float(min(x.min(initial=0.0), y.min(initial=0.0))), float(max(x.max(initial=0.0), y.max(initial=0.0)))]
    hover = [
        f"layer {layers[layer_index]}, {label(str(places[place_index]))}, "
        f"pair {data['exact_pair'].to_numpy()[pair_index]}"
        for pair_index, layer_index, place_index in zip(pair, layer, place, strict=True)
    ]
    figure = ThemedFigure(
        [
            go.Scatter(x=ends, y=ends, mode="lines", name="exact", line={"color": NEUTRAL, "dash": "dash"}),
            go.Scatter(
                x=x,
                y=y,
                mode="markers",
                name="a cell of a pair",
                customdata=hover,
                marker={
                    "size": 5,
                    "color": layers[layer],
                    "colorscale": MARKERS,
                    "colorbar": colour_bar("layer") | {"dtick": integer_step(layers.tolist())},
                },
                hovertemplate="%{customdata}: exact %{x:.2f}, estimated %{y:.2f}<extra></extra>",
            ),
        ]
    )
    units = sentence(str(data.attrs["metric_units"]))
    subtitle = f"{counted(len(x), 'cell')} of {counted(data.sizes['exact_pair'], 'pair')}; dashed: estimate = exact"
    figure.update_layout(
        title={"text": sentence(f"Estimated against exact patching: {site}"), "subtitle": {"text": subtitle}},
        width=680,
        height=560,
        showlegend=False,
    )
    figure.update_xaxes(title=f"exact effect ({units})")
    return figure.update_yaxes(title=f"estimated effect ({units})")


def correlation_lines(data: Any, site: str) -> go.Figure:
    """Returns the correlation of estimated and exact effects by layer, with the interval over pairs."""
    layers, mean = data["layer"].to_numpy(), data["correlation"].to_numpy()
    figure = ThemedFigure(
        go.Scatter(
            x=layers,
            y=mean,
            error_y=error_bars(mean, *(data[f"correlation_{end}"].to_numpy() for end in ("low", "high"))),
            mode="lines+markers",
            line={"color": CATEGORIES[0]},
            name=site,
            hovertemplate="layer %{x}: r %{y:.3f}<extra></extra>",
        )
    )
    figure.add_hline(y=1, line={"color": NEUTRAL, "dash": "dash"})
    figure.update_layout(
        title={
            "text": sentence(f"Estimated and exact patching of {site}, by layer"),
            "subtitle": {"text": f"correlation over cells, 95 % CI over {counted(data.sizes['exact_pair'], 'pair')}"},
        },
        width=760,
        height=420,
        showlegend=False,
    )
    figure.update_xaxes(title="layer", dtick=integer_step(layers.tolist()))
    low = float(np.nanmin(np.append(data["correlation_low"].to_numpy(), 0.0)))
    return figure.update_yaxes(title="Pearson's r", range=[max(-1.05, low - 0.05), 1.05])


def ablation_bars(result: Result, quantity: str) -> go.Figure:
    """Returns what the quantity loses without a term and what the term adds, for the 24 terms with the largest loss."""
    table = result.table.loc[result.table["ablated"].notna()]
    top_rows = np.sort(np.argsort(-np.abs(table["ablated"].to_numpy()), kind="stable")[:_SHOWN])
    top_terms = table.iloc[top_rows]
    names = [sentence(term) for term in top_terms["term"]]
    figure = ThemedFigure()
    figure.add_bar(
        y=names,
        x=top_terms["ablated"],
        error_x=error_bars(*(top_terms[name].to_numpy() for name in ("ablated", "ablated_low", "ablated_high"))),
        orientation="h",
        name="loss when ablated",
        marker={"color": CATEGORIES[0]},
        hovertemplate="%{y}, ablated: %{x:.3f}<extra></extra>",
    )
    figure.add_scatter(
        y=names,
        x=top_terms["direct"],
        mode="markers",
        name="direct contribution",
        marker={"color": CATEGORIES[1], "symbol": "diamond", "size": 9},
        hovertemplate="%{y}, direct: %{x:.3f}<extra></extra>",
    )
    tokens = result.data.sizes["ablated_token"]
    ends = "its mean" if result.provenance["settings"]["ablation"] == "mean" else "0"
    figure.update_layout(
        title={
            "text": sentence(f"Ablation and direct contribution: {quantity}"),
            "subtitle": {"text": f"each term set to {ends} at the token alone; mean over {tokens} tokens, 95 % CI"},
        },
        width=800,
        height=190 + 22 * len(top_terms),
        margin={"t": 115},
    )
    figure.update_xaxes(title="logits", zeroline=True)
    return figure.update_yaxes(type="category", categoryorder="array", categoryarray=names, dtick=1)
