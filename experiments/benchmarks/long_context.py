"""One long sequence: memory against a plain forward pass, speed against TransformerBridge."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison, Memory, interleaved, peak_memory, per_second
from workbench.experiments.benchmarks.models import forward, gpt2, record, token_ids, tokenizer


@dataclass(frozen=True)
class LongContext:
    """A GPT-2 shape, float32 on the CPU, and resid_post of every layer in float16; one sequence in a batch."""

    layers: int = 4
    context: int = 4096
    sequences: int = 1
    repeats: int = 2

    def run(self, folder: Path) -> list[Comparison]:
        """Measures memory and speed of recording one long sequence."""
        return [*self._memory(folder), *self._speed(folder)]

    def _memory(self, folder: Path) -> list[Comparison]:
        shape = {"layers": self.layers, "context": self.context, "sequences": self.sequences}
        plain = peak_memory(plain_pass, **shape, body=False)
        body = peak_memory(plain_pass, **shape, body=True)
        recording = peak_memory(recording_work, **shape, folder=str(folder))
        bridge = peak_memory(bridge_pass, **shape)
        return [
            _peaks("peak memory", "plain forward pass, with logits", recording, plain, at_most=1.3),
            _rises("memory added to what was loaded", "plain forward pass, with logits", recording, plain),
            _peaks("peak memory", "its body only, without logits", recording, body),
            _rises("memory added to what was loaded", "its body only, without logits", recording, body),
            _peaks("peak memory", "TransformerBridge", recording, bridge),
        ]

    def _speed(self, folder: Path) -> list[Comparison]:
        model = wb.load_model(gpt2(self.layers, self.context))
        bridge = boot_bridge(gpt2(self.layers, self.context))
        ids = token_ids(self.sequences, self.context)
        whole_calls: list[float] = []

        def recording_rate() -> float:
            shutil.rmtree(folder / "long.acts", ignore_errors=True)
            speed = record(model, ids, folder / "long.acts", sites=["resid_post"], batch_tokens=self.context)
            whole_calls.append(speed[1].clock)
            return speed[0].clock

        record(model, ids[:, :256], folder / "warm.acts", sites=["resid_post"])
        cache_residuals(bridge, ids[:, :256])
        speeds = interleaved(
            self.repeats,
            {"workbench": recording_rate, "bridge": per_second(ids.size, lambda: cache_residuals(bridge, ids))},
        )
        return [
            Comparison("recording", "TransformerBridge", speeds["workbench"], speeds["bridge"], "rows/s", at_least=3.0),
            Comparison(
                "recording, the whole call", "TransformerBridge", tuple(whole_calls), speeds["bridge"], "rows/s"
            ),
        ]


def plain_pass(layers: int, context: int, sequences: int, body: bool) -> Callable[[], Any]:
    """Returns a function that runs one forward pass of a random GPT-2, of its body alone if `body`."""
    module = gpt2(layers, context)
    return lambda: forward(module.transformer if body else module, token_ids(sequences, context), 1)


def recording_work(layers: int, context: int, sequences: int, folder: str) -> Callable[[], Any]:
    """Returns a function that records the residual streams of a random GPT-2."""
    model = wb.load_model(gpt2(layers, context))
    ids = token_ids(sequences, context)

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            record(model, ids, Path(out), sites=["resid_post"], batch_tokens=context)

    return work


def bridge_pass(layers: int, context: int, sequences: int) -> Callable[[], Any]:
    """Returns a function that runs TransformerBridge over a random GPT-2 and caches its residual streams."""
    bridge = boot_bridge(gpt2(layers, context))
    return lambda: cache_residuals(bridge, token_ids(sequences, context))


def boot_bridge(module: torch.nn.Module) -> Any:
    """Returns TransformerBridge booted on the module."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers("gpt2", hf_model=module, tokenizer=tokenizer())


def cache_residuals(bridge: Any, ids: np.ndarray) -> None:
    """Computes the same activations, one sequence at a time, in memory."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    with torch.inference_mode():
        for row in torch.from_numpy(ids).split(1):
            _, cache = bridge.run_with_cache(row, names_filter=names)
            if missing := set(names) - set(cache):  # an unknown name is not refused there
                raise RuntimeError(f"TransformerBridge did not give {sorted(missing)}")


def _peaks(subject: str, reference: str, memory: Memory, baseline: Memory, at_most: float | None = None) -> Comparison:
    return Comparison(subject, reference, (memory.peak,), (baseline.peak,), "MB", at_most=at_most)


def _rises(subject: str, reference: str, memory: Memory, baseline: Memory) -> Comparison:
    return Comparison(subject, reference, (memory.rise,), (baseline.rise,), "MB")


FULL = LongContext()
QUICK = LongContext(layers=2, context=256, repeats=2)
