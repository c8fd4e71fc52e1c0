"""Recording of all residual streams, against plain forward passes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison, interleaved, per_second
from workbench.experiments.benchmarks.models import forward, gpt2, record, token_ids


@dataclass(frozen=True)
class RecordingSpeed:
    """A GPT-2 shape, float32 on the CPU, and resid_post of every layer in float16, over the same batches."""

    layers: int = 12
    sequences: int = 24
    context: int = 256
    batch_tokens: int = 2048
    repeats: int = 3

    def run(self, folder: Path) -> list[Comparison]:
        """Times a recording against plain forward passes."""
        module = gpt2(self.layers)
        model = wb.load_model(module)
        ids = token_ids(self.sequences, self.context)
        batch = self.batch_tokens // self.context
        out = folder / "recorded.acts"
        whole_calls: list[float] = []

        def ours() -> float:
            shutil.rmtree(out, ignore_errors=True)
            speed = record(model, ids, out, sites=["resid_post"], batch_tokens=self.batch_tokens)
            whole_calls.append(speed.whole_call)
            return speed.recording

        forward(module, ids[:batch], batch)
        record(model, ids[:batch], folder / "warm.acts", sites=["resid_post"], batch_tokens=self.batch_tokens)
        speeds = interleaved(
            self.repeats,
            {
                "bare": per_second(ids.size, lambda: forward(module, ids, batch)),
                "body": per_second(ids.size, lambda: forward(module.transformer, ids, batch)),
                "workbench": ours,
            },
        )
        sites = f"{self.layers} resid_post sites"
        return [
            Comparison(
                sites, "bare forward pass, with logits", speeds["workbench"], speeds["bare"], "rows/s", at_least=1.3
            ),
            Comparison(
                sites, "its body only, without logits", speeds["workbench"], speeds["body"], "rows/s", at_least=0.9
            ),
            Comparison(
                f"{sites}, the whole call",
                "its body only, without logits",
                tuple(whole_calls),
                speeds["body"],
                "rows/s",
            ),
        ]


FULL = RecordingSpeed()
QUICK = RecordingSpeed(layers=2, sequences=4, context=64, batch_tokens=128, repeats=2)
