"""Emergence of attention sinks in training: Sink_1 and loss over the checkpoints of one model (Gu et al. 2024).

Checkpoints are folders, or revisions of a hub id; the step is the last number in the name.

    python -m workbench.experiments.sink_emergence --checkpoints EleutherAI/pythia-14m@step512 ...
    workbench sweep sink-emergence --checkpoints run/checkpoint-100 run/checkpoint-200 --seed 0 1 2
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import workbench as wb
from workbench.embedded import NAME as DEMO
from workbench.experiments.inputs import RECORDINGS, documents_of, model_of
from workbench.experiments.panels import curves
from workbench.io.checks import check_fields
from workbench.io.errors import RequestError
from workbench.probes import AttentionSinks, LogitLens
from workbench.recording.cache import record_once
from workbench.results.experiment import make_result

NAME = "sink-emergence"


@dataclass(frozen=True)
class Config:
    """Sink_1 and the mean loss of each checkpoint on the same texts."""

    checkpoints: tuple[str, ...] = (DEMO,)
    """Folders, or hub ids with @revision, in the order of training."""
    text: str = DEMO
    """File (.txt .json .jsonl .csv .tsv .parquet), hf:NAME of a dataset, or demo: the embedded corpus."""
    documents: int = 1000
    """Documents read from the beginning of the text; the seed orders them."""
    rows: int = 6400
    """Maximum number of tokens to record: length times the number of sequences."""
    epsilon: float = 0.3
    """Threshold of alpha, the mean attention of later tokens to the first, above which a head has a sink."""
    length: int = 64
    """Tokens per sequence."""
    seed: int = 0
    """Random seed, of the order of documents and of the bootstrap."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1. None: the GPU if there is one."""
    recordings: Path = field(default=RECORDINGS, compare=False)
    """Folder of the recordings that runs share. It does not affect results."""

    def __post_init__(self) -> None:
        check_fields(self, "documents", "rows", at_least=1)
        check_fields(self, "seed", at_least=0)
        if not self.checkpoints:
            raise RequestError("checkpoints is empty; name one or more folders, or hub ids with @revision")
        AttentionSinks(epsilon=self.epsilon, length=self.length)  # checks the settings before anything runs


def run(config: Config) -> wb.Result:
    """Returns one line per checkpoint: step, Sink_1 in % of heads with its 95 % CI, mean alpha, loss in nats."""
    texts = documents_of(config.text, config.documents, config.seed)
    steps = training_steps(config.checkpoints)
    lines, stores = [], []
    for checkpoint, step in zip(config.checkpoints, steps, strict=True):
        model = model_of(checkpoint, device=config.device)
        last = model.site_map.n_layers - 1
        store = record_once(
            model,
            texts,
            folder=config.recordings,
            sites=("attn_received", f"resid_post.{last}"),
            context=config.length,
            max_rows=config.rows,
        )
        sinks = AttentionSinks(epsilon=config.epsilon, length=config.length, seed=config.seed).run(store)
        lens = LogitLens(detail=0, device=config.device).run(store)
        lines.append(
            {
                "checkpoint": checkpoint,
                "step": step,
                **{name: float(sinks.data[name]) for name in ("sink", "sink_low", "sink_high")},
                "alpha": float(np.nanmean(sinks.data["alpha"].to_numpy()[..., 0])),
                "loss": float(lens.data["mean_cross_entropy"][-1]),
                "sequences": int(sinks.data["sequences"]),
            }
        )
        stores.append(store)
    return make_result(NAME, config, pd.DataFrame(lines), *stores)


def training_steps(checkpoints: tuple[str, ...]) -> list[int]:
    """Returns the last number in each name, 500 of "checkpoint-500"; indices if one is missing or two are equal."""
    numbers = [re.findall(r"\d+", name if "@" in name else Path(name).name) for name in checkpoints]
    steps = [int(each[-1]) if each else -1 for each in numbers]
    return steps if len({*steps}) == len(steps) and min(steps) >= 0 else list(range(len(steps)))


def headline(result: wb.Result) -> str:
    """Returns Sink_1 and the loss at the first and the last checkpoint as a sentence."""
    first, last = result.table.iloc[0], result.table.iloc[-1]
    return (
        f"Over {len(result.table)} checkpoints Sink_1 changes from {first['sink']:.1f} % to {last['sink']:.1f} % of "
        f"heads, the loss from {first['loss']:.2f} to {last['loss']:.2f} nats."
    )


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "emergence", Sink_1 by training step, and "loss", the mean loss."""
    shared = {"x": "step", "x_title": "training step", "besides": ("checkpoints",)}
    interval = ("sink_low", "sink_high")
    sink = curves(result, y="sink", interval=interval, title="Sinks by training step", unit="% of heads", **shared)
    loss = curves(result, y="loss", title="Loss by training step", unit="nats", **shared)
    return {"emergence": sink, "loss": loss}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
