"""Memory of a growing recording, and of one long document."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import workbench as wb
from workbench.corpus.layout import Layout, plan_sequences
from workbench.corpus.sources import read_documents
from workbench.corpus.tokenizer import added_tokens
from workbench.experiments.benchmarks.measure import Comparison, Memory, peak_memory
from workbench.experiments.benchmarks.models import SHARED


@dataclass(frozen=True)
class GrowingMemory:
    """One site of stories260K, recorded from a text file; each size in a separate process.

    The long document is one text, tokenized into sequences for a recording; the model does not run.
    """

    few: int = 100_000
    many: int = 1_000_000
    site: str = "resid_post.2"
    document_mb: int = 50
    """Size of the long document in millions of characters."""

    def run(self, folder: Path) -> list[Comparison]:
        """Measures the peak memory of recordings of two sizes, and of the tokens of two documents."""
        return [*self._recordings(folder), self._documents(folder)]

    def _documents(self, folder: Path) -> Comparison:
        sizes = (self.document_mb, self.document_mb / 10)
        long, short = (peak_memory(document_work, folder=str(folder), millions=size).peak for size in sizes)
        subject, reference = (f"peak memory, one document of {size:g} MB" for size in sizes)
        return Comparison(subject, reference, (long,), (short,), "MB", by="difference", at_most=150)

    def _recordings(self, folder: Path) -> list[Comparison]:
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


def document_work(folder: str, millions: float) -> Callable[[], Any]:
    """Returns a function that tokenizes one document of `millions` of characters."""
    tokenizer = wb.load_model("demo").tokenizer
    if tokenizer is None:
        raise RuntimeError("the embedded model has lost its tokenizer")
    sentence = "Anna saw Rome on Monday, and the quick brown fox jumped over one lazy dog. "
    path = Path(folder) / f"document-{millions:g}.txt"
    with open(path, "w") as file:
        file.writelines(sentence for _ in range(int(millions * 1e6 / len(sentence))))
    layout = Layout(256, added_tokens(tokenizer, "model"))

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            plan_sequences(read_documents(path), tokenizer, layout, Path(place))

    return work


FULL = GrowingMemory()
QUICK = GrowingMemory(few=5_000, many=20_000, document_mb=2)
