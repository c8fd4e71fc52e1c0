"""Attention sinks over models and kinds of input: natural text, random tokens, one token repeated (Gu et al. 2024).

The picture of arXiv 2410.10781: a sink that training made of the first position is there on random tokens too; where
nothing tells the first of equal tokens from the others, as with rotary positions, repetition makes it disappear.

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
from workbench.experiments.inputs import Inputs, model_of, recorded, token_sequences
from workbench.experiments.panels import differing, groups, named
from workbench.figures.theme import CATEGORIES, TEMPLATE
from workbench.io.errors import RequestError
from workbench.probes import AttentionSinks
from workbench.recording.cache import record_once
from workbench.results.experiment import make_result

NAME = "sinks"


@dataclass(frozen=True)
class Config(Inputs):
    """How many heads have the first position as a sink, by model and kind of input."""

    input: Literal["natural", "random", "repeated"] = "natural"
    """natural: the text; random: tokens drawn evenly from the vocabulary; repeated: one of them again and again."""
    epsilon: float = 0.3
    """A head has a sink in a sequence if its later tokens pay it more attention than this on average."""
    length: int = 64
    """Tokens in a sequence."""
    rows: int = 6400
    """Tokens recorded at most: length times the sequences."""
    bos: bool = False
    """Whether random and repeated sequences begin as the tokenizer begins a text; the paper's do not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < self.length:
            raise RequestError(f"rows is {self.rows}, less than one sequence of length {self.length}; give more rows")
        AttentionSinks(epsilon=self.epsilon, length=self.length)  # what it refuses is refused before anything runs


def run(config: Config) -> wb.Result:
    """One line: Sink_1 in % of heads with its interval over documents, the head that attends most, and its norms."""
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
        return recorded(config, HEAD_SITES, context=config.length)
    model = model_of(config.model, config.weights, config.device)
    number = config.rows // config.length
    texts = token_sequences(model, config.input, number, config.length, bos=config.bos, seed=config.seed)
    return record_once(model, texts, folder=config.recordings, sites=HEAD_SITES, context=config.length)


def headline(result: wb.Result) -> str:
    low, high = result.table["sink"].min(), result.table["sink"].max()
    if len(result.table) > 1:
        return f"Sink_1 from {low:.1f} to {high:.1f} % of heads over {len(result.table)} runs"
    line = result.table.iloc[0]
    return (
        f"Sink_1 = {line['sink']:.1f} % of heads ({line['sink_low']:.1f} to {line['sink_high']:.1f}), "
        f"strongest {line['strongest_layer']}.{line['strongest_head']} ({line['strongest_alpha']:.2f})"
    )


def figures(result: wb.Result) -> dict[str, Any]:
    """ "sinks": Sink_1 by model, a bar for each kind of input, a panel for each other setting that differs."""
    parts = groups(result, ("model", "input"))
    figure = make_subplots(1, len(parts), subplot_titles=[name for name, _ in parts], shared_yaxes="all")
    for place, (_, part) in enumerate(parts):
        for colour, (kind, bars) in enumerate(part.groupby("input", sort=False)):
            at = bars.groupby("model", sort=False)
            mean, low, high = at["sink"].mean(), at["sink_low"].min(), at["sink_high"].max()
            figure.add_bar(
                x=[named("model", name) for name in mean.index],
                y=mean.to_numpy(),
                name=kind,
                legendgroup=kind,
                showlegend=place == 0,
                marker_color=CATEGORIES[colour],
                error_y={"array": (high - mean).to_numpy(), "arrayminus": (mean - low).to_numpy(), "thickness": 1},
                hovertemplate="%{x}: %{y:.1f} %",
                row=1,
                col=place + 1,
            )
    seeds = "mean over seeds, " if "seed" in differing(result) else ""
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "Heads with a sink at the first position",
            "subtitle": {"text": f"{seeds}whiskers: 95 % interval over documents"},
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
