"""Predictions of a future lens over a text, as a grid of tokens and horizons."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.safe_text import axis_title, label
from workbench.figures.token_grid import MAX_TOKENS, count_shown, token_grid
from workbench.io.errors import RequestError
from workbench.results.result import Result

GRID_TOKENS = 28


def tokens_ahead(horizon: int) -> str:
    """Returns the predicted token's place, t+2 for horizon 1."""
    return f"t+{horizon + 1}"


def future_title(result: Result) -> str:
    """Returns the beginning of a figure's title."""
    return f"Future lens of {label(str(result.provenance['model']), 60)}"


def future_view(result: Result, sequence: int | None = None, first: int = 0, tokens: int = GRID_TOKENS) -> go.Figure:
    """Draws the predicted token at each horizon for the tokens of a test sequence, by the best layer.

    Args:
        result: Result of `FutureLens`.
        sequence: One of `data["sequence"]`. None: the first.
        first: Position of the first token to show.
        tokens: Number of tokens, at most 1,024; the subtitle reports what is left out.

    Raises:
        RequestError: No prediction was kept for this part of the sequence.
    """
    data = result.data
    names = {int(token): text for token, text in json.loads(data.attrs["tokens"]).items()} | {-1: ""}
    sequence = int(data["sequence"][0]) if sequence is None else sequence
    detail_rows = np.flatnonzero((data["sequence"].to_numpy() == sequence) & (data["position"].to_numpy() >= first))
    if not len(detail_rows):
        raise RequestError(f"sequence {sequence} from position {first} was not kept; see result.data['sequence']")
    part = data.isel(row=detail_rows[: min(tokens, MAX_TOKENS)])
    horizons = part["horizon"].to_numpy().tolist()
    texts = {
        name: [[names[token] for token in line] for line in part[f"{name}_id"].to_numpy().tolist()]
        for name in ("top", "said", "text")
    }
    hover = [[_hover(data, part, texts, n, column) for column in range(part.sizes["row"])] for n in horizons]
    note = count_shown(part.sizes["row"], len(detail_rows))
    return token_grid(
        np.where(part["top_id"] < 0, np.nan, part["top_probability"]),
        cells=texts["top"],
        hover=hover,
        tokens=[names[token] for token in part["token_id"].to_numpy().tolist()],
        positions=part["position"].to_numpy().tolist(),
        layers=horizons,
        title=f"{future_title(result)}: predictions in sequence {sequence}",
        subtitle="; ".join(filter(None, ["cell: token predicted at this horizon from the input token's state", note])),
        unit=axis_title(data["top_probability"].attrs),
        rows=("predicted token", [tokens_ahead(horizon) for horizon in horizons]),
    )


def _hover(data: xr.Dataset, part: xr.Dataset, texts: Mapping[str, list[list[str]]], horizon: int, column: int) -> str:
    at = part.isel(horizon=horizon, row=column)
    if int(at["top_id"]) < 0:
        return "beyond the document or sequence"
    method = data["method"].to_numpy()[int(at["best_method"])]
    predicted, model, text = (label(texts[name][horizon][column]) for name in ("top", "said", "text"))
    lines = [
        f"<b>{tokens_ahead(horizon)}, {method} probe, layer {int(at['best_layer'])}</b>",
        f"predicted: {predicted}, probability {float(at['top_probability']):z.3f}",
        f"model: {model}",
        *([f"text: {text}"] if int(at["text_id"]) >= 0 else []),
    ]
    return "<br>".join(lines)
