"""Figures of token erasure: accuracy by layer, the implicit vocabulary, and the segments of a text."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.analysis.store_probe import model_label
from workbench.figures.error_bars import error_bars
from workbench.figures.safe_text import axis_title, label, sentence
from workbench.figures.theme import CATEGORIES, SIGNED
from workbench.figures.themed import ThemedFigure
from workbench.figures.ticks import integer_step
from workbench.io.counted import counted
from workbench.results.result import Result

_SHOWN = 40


def erasure_curves(result: Result) -> go.Figure:
    """Returns accuracy by layer, a colour per offset: last tokens solid, control tokens dotted."""
    data = result.data
    figure = ThemedFigure()
    layers = data["layer"].to_numpy().tolist()
    for index, offset in enumerate(data["offset"].to_numpy().tolist()):
        for group, dash in zip(("last", "control"), ("solid", "dot"), strict=True):
            curve = data.sel(offset=offset, group=group)
            mean, low, high = (curve[name].to_numpy() for name in ("accuracy", "accuracy_low", "accuracy_high"))
            figure.add_scatter(
                x=layers,
                y=mean,
                name=f"{offset:+d} {group}",
                mode="lines+markers",
                line={"dash": dash, "color": CATEGORIES[index % len(CATEGORIES)]},
                error_y=error_bars(mean, low, high),
                hovertemplate="layer %{x}: %{y:.3f}",
            )
    groups = (
        "solid: last tokens of words of several tokens; dotted: tokens outside of such words; 95 % CI over documents; "
        "targets that the training documents have"
    )
    figure.update_layout(
        title={"text": f"Token erasure in {model_label(result)}", "subtitle": {"text": groups}},
        width=800,
        height=500,
        margin={"t": 140},
    )
    figure.update_xaxes(title="layer", dtick=integer_step(layers))
    title = axis_title(data["accuracy"].attrs, "accuracy for the token at this offset")
    return figure.update_yaxes(title=title, rangemode="tozero")


def implicit_vocabulary(table: pd.DataFrame) -> pd.DataFrame:
    """Returns segments of several tokens by text, highest mean psi first, with counts and whether any is a word."""
    long_segments = table.loc[table["tokens"] > 1]
    grouped = long_segments.groupby("text").agg(psi=("psi", "mean"), times=("psi", "size"), is_span=("is_span", "any"))
    return grouped.sort_values(["psi", "times"], ascending=False).reset_index()


def vocabulary_bars(result: Result) -> go.Figure:
    """Returns the spans of several tokens with the highest mean psi, words and others in their own colours."""
    spans = implicit_vocabulary(result.table)
    best = spans.head(_SHOWN)
    names = [f"{label(text, 30)} ({times})" for text, times in zip(best["text"], best["times"], strict=True)]
    figure = ThemedFigure()
    for is_word, name in ((True, "word"), (False, "not a word")):
        of_kind = (best["is_span"] == is_word).to_numpy()
        labels = [name for name, keep in zip(names, of_kind, strict=True) if keep]
        figure.add_bar(x=best["psi"][of_kind], y=labels, name=name, orientation="h")
    shown = f"{len(best)} of {counted(len(spans), 'span')} of several tokens (occurrences)"
    subtitle = f"{shown}; {sentence(str(result.data.attrs['spans']))}"
    figure.update_layout(
        title={"text": f"Implicit vocabulary of {model_label(result)}", "subtitle": {"text": subtitle}},
        width=760,
        height=200 + 18 * len(best),
        margin={"t": 110},
    )
    figure.update_xaxes(title="erasure score psi, mean over the test documents")
    return figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)


def segment_bars(result: Result) -> go.Figure:
    """Returns segments of the first test sequence, one bar each: length in tokens, colour psi."""
    table = result.table
    segments = table.loc[table["sequence"] == table["sequence"].iloc[0]]
    total, segments = len(segments), segments.head(_SHOWN)
    colour = {"color": segments["psi"], "cmin": -1, "cmid": 0, "cmax": 1, "colorscale": SIGNED, "showscale": True}
    figure = ThemedFigure(
        go.Bar(
            x=segments["tokens"],
            y=[f"{place:>3} {label(text, 30)}" for place, text in enumerate(segments["text"])],
            orientation="h",
            marker={**colour, "colorbar": {"title": {"text": "erasure score psi", "side": "right"}}},
            customdata=np.stack([segments["psi"], segments["is_span"]], 1),
            hovertemplate="psi %{customdata[0]:.3f}, word: %{customdata[1]}<extra></extra>",
        )
    )
    figure.update_layout(
        title={
            "text": f"Segmentation of sequence {int(segments['sequence'].iloc[0])} by {model_label(result)}",
            "subtitle": {"text": f"the first {len(segments)} of {counted(total, 'segment')}"},
        },
        width=760,
        height=160 + 18 * len(segments),
        margin={"t": 110},
    )
    figure.update_xaxes(title="length (tokens)", dtick=1)
    return figure.update_yaxes(autorange="reversed")
