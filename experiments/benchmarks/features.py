"""A store of sparse features: strongest rows, inverted index, size on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench.experiments.benchmarks.measure import Comparison, interleaved, peak_memory, per_second
from workbench.experiments.benchmarks.random_store import random_store
from workbench.features.feature_store import Features, open_features
from workbench.features.index import INDEX_MEMORY, entries_in_memory, invert
from workbench.features.records import (
    BY_FEATURE,
    BY_ROW,
    RECORD,
    FeaturesRecord,
    SaeRecord,
    SiteFeatures,
    by_feature_layout,
    by_row_layout,
)
from workbench.io.files import sha256_file, write_file
from workbench.io.parse import to_checked_json
from workbench.io.tensors import map_arrays, new_arrays, stream_arrays
from workbench.store.manifest import FileRecord

_BLOCK = 1 << 22
"""Bytes copied at a time."""


@dataclass(frozen=True)
class FeatureStore:
    """Features drawn at random, `active` a row in float16; a feature's frequency falls as a power of its rank, as those
    of autoencoders do. Nothing is encoded. `top` is called for features that are active at all, warm, 20 rows with
    context. A raw copy reads and writes the bytes of the index in blocks of 4 MiB and waits for the disk, as
    the index does.
    """

    rows: int = 1_000_000
    features: int = 16_384
    active: int = 32
    queried: int = 200
    repeats: int = 3

    def run(self, folder: Path) -> list[Comparison]:
        """Times queries, opening and export of a planted feature store."""
        features = self.make(folder)
        size = sum(file.bytes for file in features.record.files.values())
        index = features.record.files[BY_FEATURE].bytes
        rates = interleaved(
            self.repeats,
            {
                "workbench": per_second(index / 1e6, lambda: self._index(features, folder / "index")),
                "copy": per_second(index / 1e6, lambda: _copy(features.path / BY_FEATURE, folder / "copy")),
            },
        )
        memory = peak_memory(index_of, path=str(features.path), out=str(folder / "alone"))
        milliseconds = self._top(features)
        return [
            Comparison(
                "features.top, median of a call", "target", milliseconds, (5.0,) * self.repeats, "ms", at_most=1.0
            ),
            Comparison("index built", "raw copy", rates["workbench"], rates["copy"], "MB/s", at_least=0.33),
            Comparison(
                "peak memory of the index", "the setting", (memory.rise,), (float(INDEX_MEMORY),), "MB", at_most=1.0
            ),
            Comparison("disk a row, both orders", "target", (size / self.rows,), (400.0,), "bytes", at_most=1.0),
        ]

    def _top(self, features: Features) -> tuple[float, ...]:
        """Returns median milliseconds of a call per repeat, after one that warms the page cache."""
        queried = np.random.default_rng(1).choice(np.flatnonzero(features.counts), self.queried)
        milliseconds = []
        for _ in range(self.repeats + 1):
            calls = [_seconds(lambda feature=feature: features.top(feature)) for feature in queried]
            milliseconds.append(1e3 * float(np.median(calls)))
        return tuple(milliseconds[1:])

    def _index(self, features: Features, out: Path) -> None:
        index_of(str(features.path), str(out))()
        (out / BY_FEATURE).unlink()

    def make(self, folder: Path) -> Features:
        """Writes a store of `rows` tokens without activations, and returns features as an extraction writes them."""
        store = random_store(folder / "x.acts", self.rows)
        path = store.path / "features" / "drawn"
        path.mkdir(parents=True)
        entries = self.rows * self.active
        size = (self.rows, self.features, entries, "float16")
        layout = by_row_layout(*size)
        random, counts = np.random.default_rng(0), np.zeros(self.features, np.int64)
        weights = 1 / np.arange(1, self.features + 1) ** 0.7
        bounds = np.cumsum(weights) / weights.sum()
        names = random.permutation(self.features)
        with new_arrays(path / BY_ROW, layout) as file:
            file.append("indptr", np.arange(self.rows + 1, dtype=np.int64) * self.active)
            for start in range(0, self.rows, 1 << 16):
                rows = min(1 << 16, self.rows - start)
                drawn = names[np.searchsorted(bounds, random.random((rows, self.active)), side="right")]
                drawn.sort(axis=1)  # a feature may be drawn twice in a row: the index does not mind
                counts += np.bincount(drawn.reshape(-1), minlength=self.features)
                file.append("feature", drawn.reshape(-1).astype(layout["feature"][0]))
                file.append("value", random.exponential(2.0, rows * self.active).astype(np.float16))
        by_row = map_arrays(path / BY_ROW, layout)
        layout = by_feature_layout(*size)
        with new_arrays(path / BY_FEATURE, layout) as file:
            arguments = (by_row["indptr"], by_row["feature"], by_row["value"], counts)
            invert(*arguments, file, path / "dealt", layout["row"][0])
        record = FeaturesRecord(
            sae=SaeRecord("drawn", "0" * 64, {}),
            site="blocks.0.hook_resid_post",
            reads=(SiteFeatures("blocks.0.hook_resid_post", 0, self.features),),
            store="../..",
            store_fingerprint=store.manifest.fingerprint,
            rows=self.rows,
            features=self.features,
            entries=entries,
            dtype="float16",
            overflow=0,
            files=_sizes(path),
            environment={},
        )
        write_file(path / RECORD, to_checked_json(record).encode())
        return open_features(path)


def index_of(path: str, out: str) -> Callable[[], None]:
    """Returns the work of building the index of the features at `path` into the folder `out`."""
    features = open_features(path)
    record, counts = features.record, features.counts
    layout = by_feature_layout(record.rows, record.features, record.entries, record.dtype)
    Path(out).mkdir(exist_ok=True)

    def work() -> None:
        size = (record.rows, record.features, record.entries, record.dtype)
        by_row = stream_arrays(features.path / BY_ROW, by_row_layout(*size))
        with new_arrays(Path(out) / BY_FEATURE, layout) as file:
            arguments = (by_row["indptr"], by_row["feature"], by_row["value"], counts, file, Path(out) / "dealt")
            invert(*arguments, layout["row"][0], entries_in_memory(INDEX_MEMORY))

    return work


def _sizes(path: Path) -> dict[str, FileRecord]:
    return {file.name: FileRecord(file.stat().st_size, sha256_file(file)) for file in sorted(path.iterdir())}


def _copy(source: Path, target: Path) -> None:
    """Copies in blocks, and waits until the bytes are on disk."""
    with open(source, "rb") as file, open(target, "wb") as out:
        while block := file.read(_BLOCK):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    target.unlink()


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


FULL = FeatureStore()
QUICK = FeatureStore(rows=20_000, features=512, active=8, queried=20, repeats=2)
