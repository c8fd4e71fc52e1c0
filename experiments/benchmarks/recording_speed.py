"""Recording of all residual streams, against plain forward passes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from transformers import AutoModelForCausalLM, PreTrainedModel

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison, paired_until, per_second
from workbench.experiments.benchmarks.models import Rate, forward, gpt2, record, token_ids


@dataclass(frozen=True)
class RecordingSpeed:
    """resid_post of every layer in float16, over the same batches of a float32 model on the CPU: a random GPT-2 of 12
    layers, and SmolLM2-135M in sequences of 128 tokens where it was fetched. Seconds on the clock and of processor time
    (all threads, so that other work on the machine counts less), each beside a plain pass in the same turn; repeated
    until the 95 % interval of the median ratio is `width` of it wide."""

    layers: int = 12
    sequences: int = 24
    context: int = 256
    batch_tokens: int = 2048
    width: float = 0.05
    repeats: int = 12
    model: str = "models/smollm2-135m"

    def run(self, folder: Path) -> list[Comparison]:
        """Times recordings against plain forward passes."""
        ids = token_ids(self.sequences, self.context)
        lines = self._lines(f"GPT-2, {self.layers} layers", gpt2(self.layers), ids, folder)
        if not Path(self.model).is_dir():
            return lines
        trained = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        ids = ids.reshape(-1, 128) % trained.config.vocab_size
        return lines + self._lines("SmolLM2-135M, 30 layers", trained.eval(), ids, folder)

    def _lines(
        self, name: str, module: PreTrainedModel, ids: Int64[np.ndarray, "sequence position"], folder: Path
    ) -> list[Comparison]:
        model = wb.load_model(module)
        batch = self.batch_tokens // ids.shape[1]
        out = folder / "recorded.acts"
        rates: list[tuple[Rate, Rate]] = []

        def recording_rate() -> float:
            shutil.rmtree(out, ignore_errors=True)
            rates.append(record(model, ids, out, sites=["resid_post"], batch_tokens=self.batch_tokens))
            return rates[-1][0].processor

        def plain(part: torch.nn.Module) -> Callable[[], float]:
            def side() -> float:
                clock, processor = time.perf_counter(), time.process_time()
                forward(part, ids, batch)
                passes.append(ids.size / (time.perf_counter() - clock))
                return ids.size / (time.process_time() - processor)

            return side

        passes: list[float] = []
        forward(module, ids[:batch], batch)
        record(model, ids[:batch], folder / "warm.acts", sites=["resid_post"], batch_tokens=self.batch_tokens)
        shutil.rmtree(folder / "warm.acts")
        passes.clear()
        body = module.base_model
        processor = paired_until(self.width, self.repeats, recording_rate, plain(body))
        turns = f"its body without logits, {len(passes)} repeats"
        clock = tuple(recording.clock for recording, _ in rates), tuple(passes)
        whole = tuple(call.clock for _, call in rates), tuple(passes)
        logits = per_second(ids.size, lambda: forward(module, ids, batch), time.process_time)
        with_logits = paired_until(2 * self.width, 9, recording_rate, logits)
        return [
            Comparison(f"{name}: processor time", turns, *processor, "rows/s", at_least=0.95, paired=True),
            Comparison(f"{name}: clock", turns, *clock, "rows/s", at_least=0.95, paired=True),
            Comparison(f"{name}: clock, the whole call", turns, *whole, "rows/s", paired=True),
            Comparison(f"{name}: processor time", "the pass with logits", *with_logits, "rows/s", paired=True),
        ]


FULL = RecordingSpeed()
QUICK = RecordingSpeed(layers=2, sequences=4, context=128, batch_tokens=128, repeats=1, model="gpt2")
