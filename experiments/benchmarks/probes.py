"""Time and memory of the probes that read a store, and of learned prompts, against fixed limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workbench as wb
from workbench.demo.run import HEAD_SITES, SITES
from workbench.experiments.benchmarks.measure import Comparison, peak_memory
from workbench.experiments.demo_model.corpus import documents
from workbench.results.registry import find_probe

PROBES = ("attention-sinks", "future-lens", "future-prompts", "logit-lens", "token-erasure", "tuned-lens")
_SEED = 77  # documents that are neither in training nor in the shipped corpus


@dataclass(frozen=True)
class StoreProbes:
    """Each probe with its default settings, on the embedded model and texts of its corpus, in a separate process.
    The time is that of `run`, the memory the most of the whole process."""

    rows: int = 20_000
    seconds: float = 30.0
    prompts_seconds: float = 300.0
    megabytes: float = 2_000.0

    def run(self, folder: Path) -> list[Comparison]:
        """Measures time and memory of each probe."""
        model = wb.load_model("demo", device="cpu")
        texts = [document.record() for document in documents(self.rows // 100, _SEED)]
        stores = {}
        for name, sites, context in (("rows", SITES, None), ("heads", HEAD_SITES, 64)):
            stores[name] = str(folder / f"{name}.acts")
            wb.record(
                model, texts, out=stores[name], sites=sites, context=context, max_rows=self.rows, show_progress=False
            )
        comparisons = []
        for probe in PROBES:
            store = stores["heads" if probe == "attention-sinks" else "rows"]
            seconds, work = [], probe_run(probe, store)
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
            memory = peak_memory(probe_run, probe=probe, store=store)
            limit = self.prompts_seconds if probe == "future-prompts" else self.seconds
            allowed = f"the {limit:.0f} s allowed", f"the {self.megabytes:,.0f} MB allowed"
            comparisons.append(Comparison(probe, allowed[0], tuple(seconds), (limit,), "s", at_most=1))
            comparisons.append(Comparison(probe, allowed[1], (memory.peak,), (self.megabytes,), "MB", at_most=1))
        return comparisons


def probe_run(probe: str, store: str) -> Callable[[], Any]:
    """Returns a function that runs a probe with its default settings on a store."""
    opened, settings = wb.open_store(store), find_probe(probe)()
    return lambda: settings.run(opened)


FULL = StoreProbes()
QUICK = StoreProbes(rows=2_000)
