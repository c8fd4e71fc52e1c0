"""Attention sinks by model and input: natural text, random tokens, one token repeated (Gu et al. 2024).

Reproduces a figure of arXiv 2410.10781. A sink at the first position also occurs on random tokens. With rotary
positions the first of equal tokens cannot be distinguished from the others, and repetition removes the sink.

    python -m workbench.experiments.sinks --model gpt2 --input random
    workbench sweep sinks --model demo gpt2 --input natural random repeated --seed 0 1 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from plotly.subplots import make_subplots

import workbench as wb
from workbench.demo.run import HEAD_SITES
from workbench.experiments.inputs import Inputs, model_of, record_documents, token_sequences
from workbench.experiments.panels import differing_settings, groups, setting_text
from workbench.figures.theme import CATEGORIES, TEMPLATE
from workbench.io.errors import RequestError
from workbench.probes import AttentionSinks
from workbench.recording.cache import record_once
from workbench.results.experiment import make_result

NAME = "sinks"


@dataclass(frozen=True)
class Config(Inputs):
    """Share of heads with a sink at the first position, by model and input."""

    input: Literal["natural", "random", "repeated"] = "natural"
    """natural: the text; random: tokens drawn uniformly from the vocabulary; repeated: one of them, repeated."""
    epsilon: float = 0.3
    """Threshold of alpha, the mean attention of later tokens to the first, above which a head has a sink."""
    length: int = 64
    """Tokens per sequence."""
    rows: int = 6400
    """Maximum number of tokens to record: length times the number of sequences."""
    bos: bool = False
    """Begin random and repeated sequences with the tokenizer's BOS; those of the paper have none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < self.length:
            raise RequestError(f"rows is {self.rows}, less than one sequence of length {self.length}; give more rows")
        AttentionSinks(epsilon=self.epsilon, length=self.length)  # checks the settings before anything runs


def run(config: Config) -> wb.Result:
    """Returns one line: Sink_1 in % of heads with its 95 % CI, the strongest head, and norms at the sink."""
    store = _store(config)
    result = AttentionSinks(epsilon=config.epsilon, length=config.length, seed=config.seed).run(store)
    best = result.table.nlargest(1, "alpha").iloc[0]
    residual = result.data.get("residual_norm_ratio")
    line = {
        **{name: float(result.data[name]) for name in ("sink", "sink_low", "sink_high")},
        "sequences": int(result.data["sequences"]),
        "strongest_layer": int(best["layer"]),
        "strongest_head": int(best["head"]),
        "strongest_alpha": float(best["alpha"]),
        "value_norm_ratio": float(best.get("value_norm_ratio", float("nan"))),
        "residual_norm_ratio": float("nan") if residual is None else float(residual.max()),
    }
    return make_result(NAME, config, pd.DataFrame([line]), store, data=result.data)


def _store(config: Config) -> wb.Store:
    if config.input == "natural":
        return record_documents(config, HEAD_SITES, context=config.length)
    model = model_of(config.model, config.weights, config.device)
    number = config.rows // config.length
    texts = token_sequences(model, config.input, number, config.length, bos=config.bos, seed=config.seed)
    return record_once(model, texts, folder=config.recordings, sites=HEAD_SITES, context=config.length)


def headline(result: wb.Result) -> str:
    """Returns Sink_1 of the run, or its range over runs, as a sentence."""
    low, high = result.table["sink"].min(), result.table["sink"].max()
    if len(result.table) > 1:
        return f"Sink_1 ranges from {low:.1f} % to {high:.1f} % of heads over {len(result.table)} runs."
    line = result.table.iloc[0]
    return (
        f"Sink_1: {line['sink']:.1f} % of heads, 95 % CI [{line['sink_low']:.1f}, {line['sink_high']:.1f}]; strongest "
        f"head L{line['strongest_layer']}H{line['strongest_head']}, alpha {line['strongest_alpha']:.2f}."
    )


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "sinks": Sink_1 by model, one bar per input, one panel per other setting that differs."""
    parts = groups(result, ("model", "input"))
    figure = make_subplots(
        1,
        len(parts),
        subplot_titles=[name for name, _ in parts],
        shared_yaxes="all",  # pyright: ignore[reportArgumentType]  # plotly
    )
    for place, (_, part) in enumerate(parts):
        for colour, (kind, bars) in enumerate(part.groupby("input", sort=False)):
            at = bars.groupby("model", sort=False).agg(
                mean=("sink", "mean"), low=("sink_low", "min"), high=("sink_high", "max")
            )
            above, below = at["high"] - at["mean"], at["mean"] - at["low"]
            figure.add_bar(
                x=[setting_text("model", name) for name in at.index],
                y=at["mean"].to_numpy(),
                name=kind,
                legendgroup=kind,
                showlegend=place == 0,
                marker_color=CATEGORIES[colour],
                error_y={"array": above.to_numpy(), "arrayminus": below.to_numpy(), "thickness": 1},
                hovertemplate="%{x}: %{y:.1f} %",
                row=1,
                col=place + 1,
            )
    seeds = "mean over seeds, " if "seed" in differing_settings(result) else ""
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "Share of heads with an attention sink at the first position",
            "subtitle": {"text": f"{seeds}error bars: 95 % CI over documents"},
        },
        width=max(700, 120 + 330 * len(parts)),
        height=460,
        margin={"t": 120, "b": 80},
        legend={"yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title="% of heads", col=1)
    return {"sinks": figure}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
