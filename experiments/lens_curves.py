"""Lenses by layer: cross-entropy of the text and at the model's top token.

Reproduces figures of arXiv 2303.08112 (Belrose et al. 2023; loss of lenses by layer) and arXiv 2412.05768 (residual
cross-entropy, against the model's top token).

    python -m workbench.experiments.lens_curves --model gpt2 --text stories.jsonl --lens tuned
    workbench sweep lens-curves --model demo gpt2 --lens logit tuned --seed 0 1 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import workbench as wb
from workbench.experiments.inputs import Inputs, record_documents
from workbench.experiments.panels import curves
from workbench.io.checks import check_fields
from workbench.probes import LogitLens, TunedLens
from workbench.results.experiment import make_result

NAME = "lens-curves"

_MEANS = ("cross_entropy", "surprise", "kl", "entropy", "agreement", "accuracy")


@dataclass(frozen=True)
class Config(Inputs):
    """The logit or the tuned lens at every layer."""

    lens: Literal["logit", "tuned"] = "logit"
    """tuned: with a trained affine map per layer, evaluated on held-out documents."""
    epochs: int = 10
    """Maximum epochs of the tuned lens."""
    context: int = 256
    """Maximum tokens per sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "epochs", at_least=0)


def run(config: Config) -> wb.Result:
    """Returns one line per layer: means over tokens in nats, and shares of tokens."""
    store = record_documents(config, ("resid_post",), context=config.context)
    if config.lens == "logit":
        result = LogitLens(detail=0, device=config.device).run(store)
    else:
        result = TunedLens(detail=0, epochs=config.epochs, seed=config.seed, device=config.device).run(store)
    data = result.data[[f"mean_{name}" for name in _MEANS]].rename({f"mean_{name}": name for name in _MEANS})
    table = data.to_dataframe().reset_index()
    table["tokens"] = int(result.data["rows"])
    return make_result(NAME, config, table, store, data=data)


def headline(result: wb.Result) -> str:
    """Returns the cross-entropy at the first and the last layer as a sentence."""
    ends = result.table[result.table["layer"].isin([result.table["layer"].min(), result.table["layer"].max()])]
    first, last = (part["cross_entropy"].mean() for _, part in ends.groupby("layer"))
    return f"Cross-entropy of the text: {first:.2f} nats at the first layer, {last:.2f} at the last."


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "cross_entropy", of the text and at the model's top token, and "kl", KL(model || lens), by layer."""
    names = {"cross_entropy": "of the text", "surprise": "at the model's top token"}
    columns = [name for name in result.table.columns if name not in names]
    long = result.table.melt(id_vars=columns, value_vars=list(names), var_name="of", value_name="nats")
    long_result = wb.Result(
        result.probe, result.data, long.assign(of=[names[name] for name in long["of"]]), result.provenance
    )
    shared: dict[str, Any] = {"x": "layer", "x_title": "layer", "unit": "nats", "dash": "lens"}
    loss = curves(long_result, y="nats", colour="of", title="Cross-entropy of the lens by layer", **shared)
    kl = curves(result, y="kl", title="KL(model ‖ lens)", **shared)
    return {"cross_entropy": loss, "kl": kl}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
