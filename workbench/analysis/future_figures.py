"""Figures of the probes that predict the model's output some tokens ahead: precision of prompts, calibration."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.analysis.future_view import future_title, tokens_ahead
from workbench.analysis.recorded_intervals import error_bars_of, recorded_ends
from workbench.figures.error_bars import error_bars
from workbench.figures.layer_panels import Curve, Panel, layer_panels
from workbench.figures.safe_text import axis_title, label
from workbench.figures.theme import CATEGORIES, NEUTRAL
from workbench.figures.themed import ThemedFigure
from workbench.io.counted import counted
from workbench.results.bootstrap import wilson
from workbench.results.result import Result

LEARNED = "learned"
"""Name of the prompt that is trained."""


def future_calibration(result: Result) -> go.Figure:
    """Returns top-1 accuracy of the best map of each horizon by the probability it gives its prediction."""
    data = result.data
    diagonal = {"color": NEUTRAL, "dash": "dot"}
    figure = ThemedFigure(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="perfect calibration", line=diagonal))
    best = (data[name].to_numpy() for name in ("horizon", "best_method", "best_layer"))
    for horizon, method, layer in zip(*best, strict=True):
        at_horizon = data.isel(method=int(method)).sel(horizon=horizon, layer=layer)
        share, number = at_horizon["calibration"].to_numpy(), at_horizon["calibration_rows"].to_numpy()
        figure.add_scatter(
            x=at_horizon["bin"].to_numpy(),
            y=share,
            error_y=error_bars(share, *wilson(share, np.where(number > 0, number, np.nan))),
            customdata=number,
            name=f"{tokens_ahead(int(horizon))}, layer {layer}",
            mode="lines+markers",
            line={"color": CATEGORIES[int(horizon) % len(CATEGORIES)]},
            hovertemplate="%{y:.3f} of %{customdata:,} tokens",
        )
    figure.update_layout(
        title={
            "text": f"{future_title(result)}: calibration",
            "subtitle": {
                "text": "best layer and method of each horizon; bars: Wilson's 95 % interval of each bin's tokens"
            },
        },
        margin={"t": 110},
        height=520,
        width=680,
    )
    figure.update_xaxes(title="probability of the predicted token", range=[0, 1])
    return figure.update_yaxes(title=axis_title(data["calibration"].attrs, "top-1 accuracy"), range=[0, 1])


def prompt_precision(result: Result) -> go.Figure:
    """Returns top-1 accuracy by layer: a row for each regime, a column for each horizon; dotted: zero state."""
    data = result.data
    rows = []
    for regime in data["regime"].to_numpy().tolist():
        panels = []
        for horizon in data["horizon"].to_numpy().tolist():
            at_horizon, curves = data.sel(regime=regime, horizon=horizon), []
            for number, prompt in enumerate(data["prompt"].to_numpy().tolist()):
                name, colour, at = (
                    short_prompt(prompt),
                    CATEGORIES[number % len(CATEGORIES)],
                    at_horizon.sel(prompt=prompt),
                )
                zero = at["zero_precision"].to_numpy()
                ends = recorded_ends(at.sel(k=1), "precision")
                curves.append(Curve(name, at["precision"].sel(k=1).to_numpy(), colour, ends=ends))
                curves.append(Curve(f"{name}, zero state", zero, colour, dash="dot", group=name, legend=False))
            bigram, ends = float(at_horizon["bigram_precision"]), recorded_ends(at_horizon, "bigram_precision")
            curves.append(Curve("bigram baseline", bigram, NEUTRAL, dash="dash", ends=ends))
            panels.append(Panel(f"{regime_name(regime)}, t+{horizon + 1}", curves))
        rows.append(panels)
    return layer_panels(
        rows,
        layers=data["layer"].to_numpy().tolist(),
        title=f"{_title(result)}: top-1 accuracy",
        subtitle=f"{_tested(data)}; dotted: zeros for the state; dashed: bigram baseline",
        unit=axis_title(data["precision"].attrs, "top-1 accuracy"),
    )


def prompt_ranks(result: Result) -> go.Figure:
    """Returns precision at k of the best prompt and layer of each regime and horizon."""
    data = result.data
    figure = ThemedFigure()
    for regime, dash in zip(data["regime"].to_numpy().tolist(), ("solid", "dash"), strict=True):
        for horizon in data["horizon"].to_numpy().tolist():
            at = data.sel(regime=regime, horizon=horizon)
            layer = int(at["best_layer"])
            best = at.isel(prompt=int(at["best_prompt"])).sel(layer=layer)
            prompt = short_prompt(str(best["prompt"].item()))
            figure.add_scatter(
                x=data["k"].to_numpy().tolist(),
                y=best["precision"].to_numpy(),
                error_y=error_bars_of(best, "precision"),
                name=f"{regime_name(regime)}, t+{horizon + 1}: {prompt}, layer {layer}",
                mode="lines+markers",
                line={"color": CATEGORIES[horizon % len(CATEGORIES)], "dash": dash},
            )
    figure.update_layout(
        title={
            "text": f"{_title(result)}: precision at k",
            "subtitle": {"text": f"{_tested(data)}; best prompt and layer by validation tokens"},
        },
        margin={"t": 110},
        legend={"y": -0.22, "yanchor": "top"},
        height=520 + 12 * len(figure.data),  # pyright: ignore[reportArgumentType]  # plotly
        width=860,
    )
    figure.update_xaxes(title="k", dtick=1)
    return figure.update_yaxes(title=axis_title(data["precision"].attrs, "precision at k"), rangemode="tozero")


def _title(result: Result) -> str:
    return f"Future prompts of {label(str(result.provenance['model']), 60)}"


def short_prompt(prompt: str) -> str:
    """Returns a prompt as plotly text, shortened."""
    return prompt if prompt == LEARNED else label(prompt, 28)


def regime_name(name: str) -> str:
    """Returns the name of a regime, for results of earlier versions, too."""
    return {"fed": "teacher-forced", "blind": "free-running"}.get(name, name)


def _tested(data: xr.Dataset) -> str:
    size = f"{counted(data['rows'], 'test token')} of {counted(data['documents'], 'document')}"
    return size + ", 95 % intervals over documents" * (recorded_ends(data, "precision") is not None)
