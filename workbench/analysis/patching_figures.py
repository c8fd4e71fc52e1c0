"""Figures of patching: heat map of layer by place, lines by layer with controls, spread over the pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench.figures.error_bars import error_bars
from workbench.figures.head_grid import head_grid, head_name
from workbench.figures.safe_text import label, sentence
from workbench.figures.theme import CATEGORIES, NEUTRAL, SIGNED, colour_bar
from workbench.figures.themed import ThemedFigure
from workbench.figures.ticks import integer_step
from workbench.io.counted import counted

_LINES = 6  # places or heads with a line of their own
_MEANING = {
    "denoising": "corrupt run with clean activations: share of the gap that comes back",
    "noising": "clean run with corrupt activations: share of the gap that is lost",
    "estimate": "estimated from gradients: share of the gap",
    "exact": "exact patching of a sample: share of the gap",
}
_CONTROL_NAMES = {"random_donor": "random donor", "shuffled": "permuted positions", "same_answer": "same answer"}
_DASHES = {"random_donor": "dash", "shuffled": "dot", "same_answer": "dashdot"}


def patching_map(data: Any, name: str, site: str) -> go.Figure:
    """Returns layers by places, or by heads, coloured by the normalised effect."""
    values = data[name].to_numpy()
    layers, places = data["layer"].to_numpy().tolist(), data["place"].to_numpy().tolist()
    limit = max(1.0, float(np.nanmax(np.abs(values), initial=0.0)))
    title = sentence(f"{name.capitalize()} {site}")
    pairs = data.sizes.get("exact_pair" if name == "exact" else "pair", data.attrs.get("pairs"))
    subtitle = sentence(f"{_MEANING[name]}; {counted(pairs, 'pair')}")
    if data.attrs["heads"]:
        limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
        hover = [
            [f"{head_name(layer, int(place[1:]))}: {values[row, column]:z.3f}" for column, place in enumerate(places)]
            for row, layer in enumerate(layers)
        ]
        figure = head_grid(
            values,
            hover=hover,
            layers=layers,
            title=title,
            subtitle=subtitle,
            unit="share of the gap",
            limits=(-limit, limit),
        )
        return figure.update_traces(colorscale=SIGNED, zmid=0)
    figure = ThemedFigure(
        go.Heatmap(
            z=values,
            x=[label(place) for place in places],
            y=[str(layer) for layer in layers],
            hovertemplate="layer %{y}, %{x}: %{z:.3f}<extra></extra>",
            colorscale=SIGNED,
            zmin=-limit,
            zmax=limit,
            zmid=0,
            hoverongaps=False,
            colorbar=colour_bar("share of the gap"),
        )
    )
    figure.update_layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        width=max(640, 230 + 40 * len(places)),
        height=max(380, 210 + 16 * len(layers)),
    )
    figure.update_xaxes(title="place in the prompt", type="category", showgrid=False)
    return figure.update_yaxes(title="layer", type="category", dtick=integer_step(layers), showgrid=False)


def patching_lines(data: Any, site: str) -> go.Figure:
    """Returns denoising over layers for the strongest places (of heads: the layer's strongest), and the controls."""
    layers = data["layer"].to_numpy()
    figure = ThemedFigure()
    best, columns = _chosen_columns(data)
    for color, column in zip(CATEGORIES, columns, strict=False):
        name = "strongest head of each layer" if column is None else label(str(data["place"].to_numpy()[column]))
        mean, low, high = (_pick(data[f"denoising{end}"].to_numpy(), column, best) for end in ("", "_low", "_high"))
        hover = "layer %{x}: %{y:.3f}"
        figure.add_scatter(
            x=layers,
            y=mean,
            error_y=error_bars(mean, low, high),
            name=name,
            mode="lines+markers",
            line={"color": color},
            hovertemplate=hover,
        )
    strongest = columns[0]
    for control, name in _CONTROL_NAMES.items():
        if control not in data or bool(np.isnan(data[control].to_numpy()).all()):
            continue
        values = _pick(data[control].to_numpy(), strongest, best)
        of = "" if strongest is None else f", {label(str(data['place'].to_numpy()[strongest]))}"
        figure.add_scatter(
            x=layers,
            y=values,
            name=f"{name}{of}",
            mode="lines",
            line={"color": NEUTRAL, "dash": _DASHES[control]},
            hovertemplate="layer %{x}: %{y:.3f}",
        )
    figure.update_layout(
        title={
            "text": sentence(f"Denoising {site} by layer"),
            "subtitle": {
                "text": f"share of the gap, 95 % CI over {counted(data.sizes['pair'], 'pair')}; grey: controls"
            },
        },
        width=880,
        height=460,
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
    )
    figure.update_xaxes(title="layer", dtick=integer_step(layers))
    return figure.update_yaxes(title="share of the gap")


def patching_spread(data: Any, site: str) -> go.Figure:
    """Returns the effect of every pair against its gap at the strongest cell; the line is a share of 1."""
    values = data["denoising"].to_numpy()
    row, column = np.unravel_index(int(np.nan_to_num(values, nan=-np.inf).argmax()), values.shape)
    layer, place = int(data["layer"].to_numpy()[row]), str(data["place"].to_numpy()[column])
    where = head_name(layer, int(place[1:])) if data.attrs["heads"] else f"layer {layer}, {place}"
    gap = (data["clean_metric"] - data["corrupt_metric"]).to_numpy()
    effect = data["by_pair"].to_numpy()[:, row, column]
    ends = [0.0, float(gap.max(initial=0.0))]
    figure = ThemedFigure(
        [
            go.Scatter(x=ends, y=ends, mode="lines", name="all of the gap", line={"color": NEUTRAL, "dash": "dash"}),
            go.Scatter(
                x=gap,
                y=effect,
                mode="markers",
                name="a pair",
                marker={"size": 8, "color": CATEGORIES[0]},
                customdata=data["pair"].to_numpy(),
                hovertemplate="pair %{customdata}: gap %{x:.2f}, effect %{y:.2f}<extra></extra>",
            ),
        ]
    )
    units = sentence(str(data.attrs["metric_units"]))
    figure.update_layout(
        title={"text": sentence(f"Spread over pairs: {site}, {where}"), "subtitle": {"text": "denoising of each pair"}},
        width=640,
        height=480,
    )
    figure.update_xaxes(title=f"gap of the pair ({units})", rangemode="tozero")
    return figure.update_yaxes(title=f"effect of patching ({units})", rangemode="tozero")


def _chosen_columns(data: Any) -> tuple[np.ndarray, list[int | None]]:
    """The strongest column of each layer, and the columns that get a line; None stands for the strongest ones."""
    values = np.nan_to_num(data["denoising"].to_numpy(), nan=-np.inf)
    best = values.argmax(1)
    if data.attrs["heads"]:
        return best, [None]
    return best, np.argsort(-np.abs(np.where(np.isinf(values), 0, values)).max(0), kind="stable")[:_LINES].tolist()


def _pick(values: np.ndarray, column: int | None, best: np.ndarray) -> np.ndarray:
    return values[np.arange(len(values)), best] if column is None else values[:, column]
