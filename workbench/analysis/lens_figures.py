"""Figures of a lens: layers by tokens, the text coloured by prediction depth, means by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.analysis.recorded_intervals import recorded_ends
from workbench.analysis.store_probe import model_label
from workbench.figures.layer_bands import Band, layer_bands
from workbench.figures.safe_text import axis_title, label
from workbench.figures.theme import CATEGORIES
from workbench.figures.token_grid import MAX_TOKENS, Marks, count_shown, token_grid
from workbench.figures.token_strip import token_strip
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.results.result import Result

_GRID_TOKENS = 28  # two lines
_FULL_HOVER = 10_000  # cells with a full hover text; of more, hovering shows the top token alone: pages would be large


def lens_grid(result: Result, sequence: int | None = None, first: int = 0, tokens: int = _GRID_TOKENS) -> go.Figure:
    """Returns the grid of layers by tokens: in each cell the lens's top-1 token, coloured by its probability.

    Above each column stands the token that follows in the text. A black mark: the lens's token is the model's own
    prediction; a vermilion one: it is the token that follows.

    Args:
        result: The result of a lens.
        sequence: A sequence of the table; None: the first.
        first: Position to begin at.
        tokens: Number of tokens, 1,024 at most; the subtitle says how many are left out.

    Raises:
        RequestError: The table does not have this sequence and position.
    """
    sequence, sequence_rows = _of_sequence(result, sequence, first)
    row_ids = np.unique(sequence_rows["row"].to_numpy())
    rows = row_ids[: min(tokens, MAX_TOKENS)]
    sequence_rows = sequence_rows.loc[sequence_rows["row"].isin(rows.tolist())].sort_values(["layer", "row"])
    layers = sequence_rows["layer"].unique()
    shape = (len(layers), -1)
    line = sequence_rows.iloc[: len(sequence_rows) // len(layers)]
    subtitle = ["cell: the lens's top-1 token, coloured by its probability; above: the next token of the text"]
    subtitle += [part for part in [count_shown(len(rows), len(row_ids))] if part]
    hover = _hover
    if len(sequence_rows) > _FULL_HOVER:
        hover = _brief
        subtitle.append("hovering shows the top-1 token alone")
    site = result.provenance["settings"]["site"]
    return token_grid(
        sequence_rows["top_probability_1"].to_numpy().reshape(shape),
        cells=sequence_rows["top_token_1"].to_numpy().reshape(shape).tolist(),
        hover=np.array([hover(row) for row in sequence_rows.to_dict("records")], dtype=object).reshape(shape).tolist(),
        tokens=line["token"].tolist(),
        positions=line["position"].tolist(),
        layers=layers.tolist(),
        title=f"{_lens(result)} of {model_label(result)}, {label(site)}, sequence {sequence}",
        subtitle="; ".join(subtitle),
        unit=axis_title(result.data["top_probability"].attrs),
        next_tokens=line["next_token"].tolist(),
        marks=_marks(sequence_rows, shape),
    )


def _marks(table: pd.DataFrame, shape: tuple[int, int]) -> Marks | None:
    """Where the top-1 token is the model's: both have the same probability. None for results of earlier versions."""
    if "surprise" not in table:
        return None
    top, model = table["top_probability_1"].to_numpy(), np.exp(-table["surprise"].to_numpy())
    right = table["rank"].to_numpy() == 1
    return Marks(np.isclose(top, model, rtol=1e-4, atol=0).reshape(shape), right.reshape(shape))


def lens_depth(result: Result, sequence: int | None = None) -> go.Figure:
    """Returns a text with each token coloured by its prediction depth; white: lens and model differ at every layer.

    Args:
        result: The result of a lens.
        sequence: A sequence of the table; None: the first.

    Raises:
        RequestError: The table does not have this sequence.
    """
    sequence, sequence_rows = _of_sequence(result, sequence, 0)
    layers = result.data["layer"].to_numpy()
    line = sequence_rows.loc[sequence_rows["layer"] == layers[0]].sort_values("row")
    depth = result.data["prediction_depth"].sel(row=line["row"].to_numpy()).to_numpy()
    return token_strip(
        np.append(layers, np.nan)[depth],
        tokens=line["token"].tolist(),
        positions=line["position"].tolist(),
        title=f"Prediction depth: {_lens(result)} of {model_label(result)}, sequence {sequence}",
        subtitle="colour: earliest layer from which the lens's top-1 prediction equals the model's",
        unit="layer",
        limits=(float(layers[0]), float(layers[-1])),
    )


def _of_sequence(result: Result, sequence: int | None, first: int) -> tuple[int, pd.DataFrame]:
    """Lines of the table of one sequence, from a position on."""
    table = result.table
    sequence = table["sequence"].iloc[0] if sequence is None else sequence
    sequence_rows = table.loc[(table["sequence"] == sequence) & (table["position"] >= first)]
    if sequence_rows.empty:
        raise RequestError(
            f"sequence {sequence} from position {first} is not in the table; see result.table['sequence']"
        )
    return int(sequence), sequence_rows


def _lens(result: Result) -> str:
    """ "Logit lens" of the probe logit-lens."""
    return result.probe.replace("-", " ").capitalize()


def _hover(row: dict[str, Any]) -> str:
    """Hover text of one cell."""
    lines = [f"<b>layer {row['layer']}, position {row['position']}, token {label(row['token'])}</b>"]
    k = 1
    while f"top_token_{k}" in row:
        lines.append(f"{row[f'top_probability_{k}']:z.3f}  {label(row[f'top_token_{k}'])}")
        k += 1
    lines.append(f"entropy {row['entropy']:z.3f} nats, KL to output {row['kl']:z.3f} nats")
    if row["rank"]:
        lines.append(f"next {label(row['next_token'])}: rank {row['rank']}, {row['cross_entropy']:z.3f} nats")
    return "<br>".join(lines)


def _brief(row: dict[str, Any]) -> str:
    return f"{row['layer']}: {row['position']} {label(row['token'], 12)}: {label(row['top_token_1'], 12)}"


def lens_curves(result: Result) -> go.Figure:
    """Returns mean entropy, KL(model || lens) and cross-entropy of the text by layer."""
    names = {"entropy": "entropy of the lens", "kl": "KL(model ‖ lens)", "cross_entropy": "cross-entropy of the text"}
    curves = {f"mean_{name}": curve for name, curve in names.items()}
    return mean_curves(result, curves, title=f"{_lens(result)} of {model_label(result)}")


def mean_curves(result: Result, names: Mapping[str, str], *, title: str, tokens: str = "token") -> go.Figure:
    """Returns means over tokens by layer, with bands between the ends of their intervals.

    Args:
        result: The result of a lens.
        names: Variable over layers to the name of its curve, as plotly text.
        title: Title, as plotly text.
        tokens: Noun of the tokens that the means are over, in the singular.
    """
    data = result.data
    bands = [
        Band(name, data[variable].to_numpy(), recorded_ends(data, variable), colour)
        for (variable, name), colour in zip(names.items(), CATEGORIES, strict=False)
    ]
    drawn = any(band.ends is not None for band in bands)
    figure = layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=title,
        subtitle=f"mean over {counted(data['rows'], tokens)}" + "; bands: 95 % intervals over documents" * drawn,
        unit=axis_title(data[next(iter(names))].attrs),
    )
    return figure.update_yaxes(rangemode="tozero")
