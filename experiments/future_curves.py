"""Future lens: accuracy for the model's predictions N tokens after the next one, by layer and horizon.

Reproduces a figure of arXiv 2311.04897 (Pal et al. 2023): maps from a hidden state to later predictions, with the
bigram of the token as baseline.

    python -m workbench.experiments.future_curves --model gpt2 --text stories.jsonl
    workbench sweep future-curves --model demo gpt2 --seed 0 1 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

import workbench as wb
from workbench.experiments.inputs import Inputs, record_documents
from workbench.experiments.panels import curves
from workbench.probes import FutureLens
from workbench.results.experiment import make_result

NAME = "future-curves"


@dataclass(frozen=True)
class Config(Inputs):
    """The future lens at every layer."""

    horizons: int = 3
    """N = 0 (the next token) to horizons - 1."""
    epochs: int = 0
    """Epochs of the direct method, for small vocabularies; 0: the linear method alone."""
    context: int = 256
    """Maximum tokens per sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        FutureLens(horizons=self.horizons, epochs=self.epochs)


def run(config: Config) -> wb.Result:
    """Returns one line per method, layer and horizon: precision at 1, the bigram's, and the gain with its 95 % CI."""
    store = record_documents(config, ("resid_post",), context=config.context)
    settings = {"horizons": config.horizons, "epochs": config.epochs, "seed": config.seed, "device": config.device}
    if not config.epochs:
        settings["direct_vocab"] = 0
    result = FutureLens(**settings).run(store)
    data = result.data[["gain", "gain_low", "gain_high", "seen_precision", "surprisal"]].assign(
        precision=result.data["precision"].isel(k=0, drop=True)
    )
    table = data.to_dataframe().reset_index()
    bigram = (
        result.data[["bigram_precision", "bigram_seen", "bigram_seen_precision", "rows"]].to_dataframe().reset_index()
    )
    bigram = bigram.rename(columns={"rows": "tested_rows"})
    return make_result(NAME, config, table.merge(bigram, on="horizon"), store, data=result.data)


def headline(result: wb.Result) -> str:
    """Returns the best top-1 accuracy beyond the next token, and the bigram baseline, as a sentence."""
    far = result.table.loc[result.table["horizon"] == result.table["horizon"].clip(upper=1).max()]
    if not far["horizon"].max() and far["layer"].nunique() > 1:  # at t+1 the last layer's state is the model's output
        far = far.loc[far["layer"] < far["layer"].max()]
    best = far.loc[far["precision"].idxmax()]
    seen_note = f", which has seen {100 * best['bigram_seen']:.0f} % of the tokens" if "bigram_seen" in best else ""
    return (
        f"Top-1 accuracy at t+{best['horizon'] + 1}: {100 * best['precision']:.0f} % (layer {best['layer']}); "
        f"bigram baseline {100 * best['bigram_precision']:.0f} %{seen_note}."
    )


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "precision" by layer, one colour per horizon, the bigram dotted; and "gain", the difference."""
    known = result.table.assign(N=[f"N = {horizon}" for horizon in result.table["horizon"]])
    bigram = known.assign(method="bigram of the token", precision=known["bigram_precision"])
    table = pd.concat([known, bigram], ignore_index=True)
    shared = {"x": "layer", "x_title": "layer", "colour": "N", "dash": "method", "besides": ("horizons",)}
    precision = curves(
        wb.Result(result.probe, result.data, table, result.provenance),
        y="precision",
        title="Accuracy for the model's prediction N tokens after the next one",
        subtitle="top-1 accuracy from one state, on held-out documents",
        unit="share of tokens",
        **shared,
    )
    gain = curves(
        wb.Result(result.probe, result.data, known, result.provenance),
        y="gain",
        interval=("gain_low", "gain_high"),
        title="Gain over the bigram baseline",
        subtitle="top-1 accuracy minus that of the bigram",
        unit="share of tokens",
        **shared,
    )
    return {"precision": precision, "gain": gain}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
