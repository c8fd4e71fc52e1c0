"""Token erasure: accuracy for preceding tokens by layer, at last tokens of words and at other tokens.

Reproduces a figure of arXiv 2406.20086 (Feucht et al. 2024): in early layers the last token of a multi-token word loses
the information about the tokens before it, faster than tokens outside of such words.

    python -m workbench.experiments.erasure_curves --model gpt2 --text stories.jsonl
    workbench sweep erasure-curves --model demo gpt2 --seed 0 1 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import workbench as wb
from workbench.experiments.inputs import Inputs, record_documents
from workbench.experiments.panels import curves
from workbench.probes import TokenErasure
from workbench.results.experiment import make_result

NAME = "erasure-curves"


@dataclass(frozen=True)
class Config(Inputs):
    """Linear probes on every layer for the tokens around each position."""

    offsets: tuple[int, ...] = (-2, -1, 0)
    """Tokens to predict from a state, as offsets from its own."""
    epochs: int = 4
    """Maximum number of epochs."""
    context: int = 256
    """Maximum tokens per sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        TokenErasure(offsets=self.offsets, epochs=self.epochs)


def run(config: Config) -> wb.Result:
    """Returns one line per group of tokens, offset and layer: accuracy, 0 to 1, with its 95 % CI over documents."""
    store = record_documents(config, ("resid_post",), context=config.context)
    settings = {"offsets": config.offsets, "epochs": config.epochs, "seed": config.seed, "device": config.device}
    result = TokenErasure(**settings).run(store)
    accuracy = result.data[["accuracy", "accuracy_low", "accuracy_high"]].to_dataframe().reset_index()
    tokens = result.data["tokens"].to_dataframe().reset_index()
    return make_result(NAME, config, accuracy.merge(tokens, on=["group", "offset"]), store, data=result.data)


def headline(result: wb.Result) -> str:
    """Returns the accuracy for the token before a word's last, at the first and the last layer, as a sentence."""
    known = result.table.dropna(subset=["accuracy"])  # else the training documents have no such token
    last = known[(known["group"] == "last") & (known["offset"] == -1)]
    if not len(last):
        return f"Accuracy at {result.table['offset'].nunique()} offsets over {result.table['layer'].nunique()} layers."
    first, deepest = (last[last["layer"] == layer]["accuracy"].mean() for layer in (0, last["layer"].max()))
    return f"Accuracy for the token before a word's last: {first:.2f} at layer 0, {deepest:.2f} at the last layer."


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "erasure": accuracy by layer, one colour per offset; solid at last tokens of words, dotted at others."""
    names = {"last": "last tokens of words", "control": "other tokens"}
    groups = [names[group] for group in result.table["group"]]
    table = result.table.assign(tokens_of=groups, offset=[f"{offset:+d}" for offset in result.table["offset"]])
    finite_result = wb.Result(result.probe, result.data, table.loc[np.isfinite(table["accuracy"])], result.provenance)
    figure = curves(
        finite_result,
        x="layer",
        y="accuracy",
        colour="offset",
        dash="tokens_of",
        interval=("accuracy_low", "accuracy_high"),
        title="Token erasure",
        subtitle="accuracy of a linear probe for the token at each offset, of tokens that the training documents have",
        x_title="layer",
        unit="accuracy",
        besides=("offsets",),
    )
    return {"erasure": figure}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
