"""When attention sinks emerge in training: Sink_1 and the loss over checkpoints of one model (Gu et al. 2024).

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
from workbench.experiments.inputs import RECORDINGS, check_counts, documents_of, model_of
from workbench.experiments.panels import curves
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
    """File (.txt, .jsonl, .parquet), hf:NAME of a dataset, or demo: the embedded corpus."""
    documents: int = 1000
    """Documents read from the text's beginning; the seed puts them in an order."""
    rows: int = 6400
    """Tokens recorded at most: length times the sequences."""
    epsilon: float = 0.3
    """A head has a sink in a sequence if its later tokens pay it more attention than this on average."""
    length: int = 64
    """Tokens in a sequence."""
    seed: int = 0
    """Of the order of documents and of the draws for the intervals."""
    device: str = "cpu"
    """Where it runs: cpu, cuda."""
    recordings: Path = field(default=RECORDINGS, compare=False)
    """Folder of the recordings that runs share. It changes no number."""

    def __post_init__(self) -> None:
        check_counts(self, ("documents", "rows", "seed"))
        if not self.checkpoints:
            raise RequestError("checkpoints is empty; name one or more folders, or hub ids with @revision")
        AttentionSinks(epsilon=self.epsilon, length=self.length)  # what it refuses is refused before anything runs


def run(config: Config) -> wb.Result:
    """A line for each checkpoint: step, Sink_1 in % of heads with its interval, mean alpha, loss in nats."""
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
    """The last number in each name, "checkpoint-500" -> 500; places in the list where one has none or two share one."""
    numbers = [re.findall(r"\d+", name if "@" in name else Path(name).name) for name in checkpoints]
    steps = [int(found[-1]) if found else -1 for found in numbers]
    return steps if len({*steps}) == len(steps) and min(steps) >= 0 else list(range(len(steps)))


def headline(result: wb.Result) -> str:
    first, last = result.table.iloc[0], result.table.iloc[-1]
    return (
        f"Sink_1 from {first['sink']:.1f} to {last['sink']:.1f} % of heads, loss from {first['loss']:.2f} to "
        f"{last['loss']:.2f} nats, over {len(result.table)} checkpoints"
    )


def figures(result: wb.Result) -> dict[str, Any]:
    """ "emergence": Sink_1 by training step; "loss": the mean loss beside it."""
    shared = {"x": "step", "x_title": "training step", "besides": ("checkpoints",)}
    interval = ("sink_low", "sink_high")
    sink = curves(result, y="sink", interval=interval, title="Attention sinks emerge", unit="% of heads", **shared)
    loss = curves(result, y="loss", title="Loss of the checkpoints", unit="nats", **shared)
    return {"emergence": sink, "loss": loss}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
