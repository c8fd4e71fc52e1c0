"""A SIMULATION of scale: manifest and queries of a store of 100 million rows that no model has recorded.

Token tables are real: the columns, types and encodings of a recording of the embedded corpus, a file per segment,
all rows present, with their own row, sequence and document numbers, so `where` reads what it would read in a real
store. Only the texts repeat: each table is one of about a dozen of the corpus. Activations are sparse files of the true
size, so a gather touches as many files, maps and pages as it would, but no disk. Everything is in the page cache, as
far as it fits. Targets apply to the largest store; the reference is the smallest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison
from workbench.io.files import sha256_bytes
from workbench.io.parse import to_json
from workbench.io.tensors import TensorFile
from workbench.store.added_records import SEGMENT
from workbench.store.groups import SIZE, write_groups
from workbench.store.manifest import (
    SEGMENTS,
    TOKENS,
    FileRecord,
    Part,
    Segment,
    SegmentRecord,
    SiteRecord,
    read_manifest,
    write_manifest,
)
from workbench.store.token_table import encode_tokens

_SITE = SiteRecord("blocks.0.hook_resid_post", "resid_post.0", ("row", "d_model"), (768,), "float16")


@dataclass(frozen=True)
class Scale:
    """Stores of 10,000 rows a segment, one site of 768 float16 values."""

    rows: tuple[int, ...] = (1_000_000, 10_000_000, 100_000_000)
    segment_rows: int = 10_000
    tables: int = 16
    """Different token tables, dealt out in turn."""
    predicate: str = "token = ' Monday' AND position > 0"
    gathered: int = 1000
    repeats: int = 3

    def run(self, folder: Path) -> list[Comparison]:
        """Measures a store of synthetic segments."""
        corpus = wb.record(
            wb.load_model("demo"),
            wb.demo_corpus() * (1 + self.tables * self.segment_rows // 20_000),
            out=folder / "corpus",
            sites=["resid_post.0"],
            metadata=(),
            span_column=None,
            max_rows=self.tables * self.segment_rows,
            show_progress=False,
        )
        seconds_of: dict[str, list[tuple[float, ...]]] = {}
        for rows in self.rows:
            path = self._write(folder / f"{rows}", corpus, rows)
            for operation, seconds in self._measure(path, rows).items():
                seconds_of.setdefault(operation, []).append(seconds)
        targets = {"open": 1.0, "where": 2.0, "gather": 0.5}
        comparisons = []
        for operation, times in seconds_of.items():
            for rows, seconds in list(zip(self.rows, times, strict=True))[1:]:
                limit = next((limit for name, limit in targets.items() if operation.startswith(name)), None)
                comparisons.append(
                    Comparison(
                        f"{operation}: {rows:,} rows",
                        f"{self.rows[0]:,} rows",
                        seconds,
                        times[0],
                        "s",
                        at_most=limit if rows == self.rows[-1] else None,
                        target_of="workbench",
                    )
                )
        return comparisons

    def _measure(self, path: Path, rows: int) -> dict[str, tuple[float, ...]]:
        ids = np.random.default_rng(0).integers(0, rows, (self.repeats + 1, self.gathered))

        def first_gather(repeat: int) -> Callable[[], object]:
            store = wb.open_store(path)
            return lambda: store["resid_post", 0][ids[repeat]]

        store = wb.open_store(path)
        opened = store["resid_post", 0]
        opened[ids[-1]]
        return {
            "open": self._times(lambda _: lambda: wb.open_store(path)),
            "where, a token": self._times(lambda _: lambda: store.where(self.predicate)),
            f"gather {self.gathered:,} random rows, the first time": self._times(first_gather),
            f"gather {self.gathered:,} random rows, again": self._times(lambda _: lambda: opened[ids[-1]]),
        }

    def _times(self, prepare: Callable[[int], Callable[[], object]]) -> tuple[float, ...]:
        seconds = []
        for repeat in range(self.repeats):
            work = prepare(repeat)
            began = perf_counter()
            work()
            seconds.append(perf_counter() - began)
        return tuple(seconds)

    def _write(self, path: Path, corpus: wb.Store, rows: int) -> Path:
        tables = [corpus.tokens.slice(i * self.segment_rows, self.segment_rows) for i in range(self.tables)]
        tables = [_from_zero(table) for table in tables]
        sequences = [table["sequence"][-1].as_py() + 1 for table in tables]
        table_numbers = np.arange(rows // self.segment_rows) % self.tables
        first = np.cumsum([0, *(sequences[table] for table in table_numbers)])

        def write(index: int) -> Segment:
            name, table = f"{index:05d}", table_numbers[index]
            folder = path / SEGMENTS / name
            folder.mkdir(parents=True)
            shifts = {"row": index * self.segment_rows, "sequence": first[index], "document": first[index]}
            encoded = encode_tokens(_shifted(tables[table], shifts))
            (folder / TOKENS).write_bytes(encoded)
            tensor = TensorFile(folder / _SITE.file, _SITE.label, _SITE.dtype, (self.segment_rows, *_SITE.shape), {})
            os.truncate(tensor.path, tensor.path.stat().st_size + self.segment_rows * _SITE.row_bytes)
            file = FileRecord(len(encoded), sha256_bytes(encoded))
            record = to_json(SegmentRecord({TOKENS: file}, self.segment_rows, sequences[table], {}, {}, "")).encode()
            (folder / SEGMENT).write_bytes(record)
            return Segment(name, self.segment_rows, sequences[table], 0, "", sha256_bytes(record))

        with ThreadPoolExecutor() as pool:
            segments = list(pool.map(write, range(len(table_numbers))))
        manifest = read_manifest(corpus.path)
        part = Part(rows, int(first[-1]), int(first[-1]), 0, 0)
        manifest = replace(manifest, sites=(_SITE,), parts=(part,), segments=tuple(segments), unembed=None)
        for group in range(SIZE, len(segments) + 1, SIZE):  # as commits do, one after another
            write_groups(path, replace(manifest, segments=manifest.segments[:group]))
        write_manifest(path, manifest)
        return path


def _from_zero(table: pa.Table) -> pa.Table:
    return _shifted(table, {name: -table[name][0].as_py() for name in ("row", "sequence", "document")})


def _shifted(table: pa.Table, by: dict[str, int]) -> pa.Table:
    for name, shift in by.items():
        where = table.column_names.index(name)
        table = table.set_column(where, table.field(where), pa.array(table[name].to_numpy() + shift))
    return table


FULL = Scale()
QUICK = Scale(rows=(10_000, 100_000), segment_rows=1000, tables=4, repeats=2)
