"""Recording against SAELens' CacheActivationsRunner, which takes one site per pass."""

from __future__ import annotations

import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison, interleaved
from workbench.experiments.benchmarks.models import SHARED, gpt2, record, token_ids, tokenizer


@dataclass(frozen=True)
class SaeLens:
    """The same tokens and stored type (float16), each side with its default batch: 32 sequences for SAELens. Loading is
    not timed on either side, and SAELens does not shuffle. It also stops at the hooked layer: for all twelve sites it
    runs all blocks 6.5 times, which bounds the ratio for equal batches."""

    layers: int = 12
    sequences: int = 32
    context: int = 256
    batch_sequences: int = 32
    repeats: int = 1
    trained: str = "stories260K"
    trained_layer: int = 2
    trained_sequences: int = 800
    trained_repeats: int = 3

    def run(self, folder: Path) -> list[Comparison]:
        """Times a recording against SAELens' cache of activations."""
        gpt2(self.layers).save_pretrained(folder / "gpt2")
        tokenizer().save_pretrained(folder / "gpt2")
        ids = token_ids(self.sequences, self.context)
        sites = [f"transformer.h.{layer}" for layer in range(self.layers)]
        comparisons = self._compare(folder, folder / "gpt2", ids, ["resid_post"], sites, self.repeats, 8.0)
        trained = SHARED / "models" / self.trained
        if trained.is_dir():
            ids = token_ids(self.trained_sequences, self.context, vocab=512)
            site, hook = f"resid_post.{self.trained_layer}", f"model.layers.{self.trained_layer}"
            comparisons += self._compare(folder, trained, ids, [site], [hook], self.trained_repeats, 1.2)
        return comparisons

    def _compare(
        self,
        folder: Path,
        path: Path,
        ids: np.ndarray,
        sites: list[str],
        hooks: list[str],
        repeats: int,
        at_least: float,
    ) -> list[Comparison]:
        model = wb.load_model(path)
        runners = [Runner(path, hook, model.d_model, ids, self.batch_sequences, folder / "saelens") for hook in hooks]
        whole_calls: list[float] = []

        def recording_rate(ids: np.ndarray = ids) -> float:
            shutil.rmtree(folder / "ours.acts", ignore_errors=True)
            speed = record(model, ids, folder / "ours.acts", sites=sites)
            whole_calls.append(speed[1].clock)
            return speed[0].clock

        def runner_rate() -> float:
            return ids.size / sum(runner.seconds() for runner in runners)

        recording_rate(ids[: self.batch_sequences])
        whole_calls.clear()
        speeds = interleaved(repeats, {"workbench": recording_rate, "reference": runner_rate})
        subject = f"{path.name}, {len(hooks)} site{'s'[: len(hooks) > 1]}"
        return [
            Comparison(
                subject, "CacheActivationsRunner", speeds["workbench"], speeds["reference"], "rows/s", at_least=at_least
            ),
            Comparison(
                f"{subject}, the whole call",
                "CacheActivationsRunner",
                tuple(whole_calls),
                speeds["reference"],
                "rows/s",
            ),
        ]


@dataclass(frozen=True)
class Runner:
    """One site recorded with SAELens, from a local model, offline."""

    path: Path
    hook: str
    d_model: int
    ids: np.ndarray
    batch_sequences: int
    out: Path

    def seconds(self) -> float:
        """Returns the seconds of its `run()`, without loading and checks."""
        shutil.rmtree(self.out, ignore_errors=True)
        with warnings.catch_warnings(action="ignore"):
            runner = self._load()
            began = time.perf_counter()
            dataset = runner.run()
            seconds = time.perf_counter() - began
        if len(dataset) != len(self.ids):
            raise RuntimeError(f"SAELens recorded {len(dataset)} sequences of {len(self.ids)}")
        return seconds

    def _load(self) -> Any:
        import datasets
        from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

        context = self.ids.shape[1]
        settings = CacheActivationsRunnerConfig(
            dataset_path="token ids",
            model_name=str(self.path),
            model_class_name="AutoModelForCausalLM",
            hook_name=self.hook,
            d_in=self.d_model,
            context_size=context,
            training_tokens=self.ids.size,
            model_batch_size=self.batch_sequences,
            buffer_size_gb=(self.ids.size * self.d_model * 2 + 0.5) / 1e9,  # one shard of exactly these tokens
            dtype="float16",
            device="cpu",
            shuffle=False,
            prepend_bos=False,
            new_cached_activations_path=str(self.out),
        )
        return CacheActivationsRunner(settings, datasets.Dataset.from_dict({"input_ids": self.ids.tolist()}))


FULL = SaeLens()
QUICK = SaeLens(layers=2, sequences=4, context=64, batch_sequences=2, trained_sequences=20, trained_repeats=2)
