"""Memory of a growing recording."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison, Memory, peak_memory
from workbench.experiments.benchmarks.models import SHARED


@dataclass(frozen=True)
class GrowingMemory:
    """One site of stories260K, recorded from a text file; each size in a separate process."""

    few: int = 100_000
    many: int = 1_000_000
    site: str = "resid_post.2"

    def run(self, folder: Path) -> list[Comparison]:
        """Measures the peak memory of recordings of two sizes."""
        corpus = SHARED / "corpora" / "tinystories_1000.jsonl"
        if not corpus.is_file():
            return []
        stories = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
        text = folder / "stories.jsonl"
        with open(text, "w") as file:  # a token of stories260K is 1.5 characters or more; what is too much is not read
            file.writelines(json.dumps({"text": story}) + "\n" for story in islice(cycle(stories), self.many // 50))

        def memory(rows: int) -> Memory:
            return peak_memory(
                recording_work, site=self.site, text=str(text), out=str(folder / f"{rows}.acts"), rows=rows
            )

        few, many = memory(self.few), memory(self.many)
        subject, reference = (f"peak memory at {rows:,} rows" for rows in (self.many, self.few))
        return [Comparison(subject, reference, (many.peak,), (few.peak,), "MB", by="difference", at_most=150)]


def recording_work(site: str, text: str, out: str, rows: int) -> Callable[[], Any]:
    """Returns a function that records `rows` tokens of a text at one site."""
    model = wb.load_model(SHARED / "models" / "stories260K")

    def work() -> None:
        store = wb.record(model, text, out=out, sites=[site], max_rows=rows, show_progress=False)
        if len(store) != rows:
            raise RuntimeError(f"{len(store)} rows were recorded of {rows}")

    return work


FULL = GrowingMemory()
QUICK = GrowingMemory(few=5_000, many=20_000)
