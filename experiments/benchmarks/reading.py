"""Reads of a store, against the same reads of np.memmap on the same file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison, interleaved, per_second
from workbench.experiments.benchmarks.models import gpt2, token_ids

Gathers = list[Int64[np.ndarray, " selected"]]


@dataclass(frozen=True)
class Reading:
    """Rows of 768 float16 values from a file in the page cache, each read into new memory."""

    rows: int = 131_072
    segments: int = 16
    gathers: tuple[int, ...] = (1000, 10_000)
    gathered: int = 100_000
    """Rows that one repeat reads, in gathers of the sizes above."""
    block: int = 8192
    repeats: int = 15

    def run(self, folder: Path) -> list[Comparison]:
        """Times reads of a store against reads of a NumPy memory map."""
        single, segmented = self._record(folder, self.rows), self._record(folder, self.rows // self.segments)
        if not torch.equal(single[:], segmented[:]):
            raise RuntimeError("one segment and many do not hold the same rows")
        raw = _memmap(single)
        comparisons = []
        rng = np.random.default_rng(0)
        for size in self.gathers:
            gathers = [rng.integers(0, self.rows, size) for _ in range(self.gathered // size)]
            comparisons += self._compare(
                f"{size:,} random rows at a time",
                size * len(gathers),
                {
                    "one": lambda gathers=gathers: _gather(single, gathers),
                    "memmap": lambda gathers=gathers: _gather(raw, gathers),
                    "many": lambda gathers=gathers: _gather(segmented, gathers),
                },
                at_least=0.7,
            )
        comparisons.append(self._compare_batches(segmented, raw))
        return comparisons + self._compare(
            f"all rows in order, {self.block:,} at a time",
            self.rows,
            {
                "one": lambda: _copy_all(single, self.block),
                "memmap": lambda: _copy_all(raw, self.block),
                "many": lambda: _copy_all(segmented, self.block),
            },
            at_least=0.8,
        )

    def _compare_batches(self, array: wb.ActivationArray, raw: np.memmap) -> Comparison:
        """Times batches for training, each row once in random order, from a store of many segments."""
        order = np.random.default_rng(0).permutation(self.rows)
        batches = np.array_split(order, -(-self.rows // self.block))
        dataset = wb.RowDataset(array, batch_rows=self.block, seed=0)
        speeds = interleaved(
            self.repeats,
            {
                "dataset": per_second(self.rows, lambda: sum(1 for _ in dataset)),
                "memmap": per_second(self.rows, lambda: _gather(raw, batches)),
            },
        )
        return Comparison(
            f"RowDataset: all rows once, shuffled, {self.block:,} at a time",
            "np.memmap at the same number of random rows",
            speeds["dataset"],
            speeds["memmap"],
            "rows/s",
            at_least=100_000,
            target_of="workbench",
        )

    def _record(self, folder: Path, segment_rows: int) -> wb.ActivationArray:
        context = 1024
        store = wb.record(
            wb.load_model(gpt2(layers=1)),
            token_ids(self.rows // context, context).tolist(),
            out=folder / f"segments_of_{segment_rows}.acts",
            sites=["embed"],
            context=context,
            segment_rows=segment_rows,
            show_progress=False,
        )
        return store["embed"]

    def _compare(
        self, subject: str, rows: int, sides: dict[str, Callable[[], None]], at_least: float
    ) -> list[Comparison]:
        for read in sides.values():
            read()
        speeds = interleaved(self.repeats, {name: per_second(rows, read) for name, read in sides.items()})
        return [
            Comparison(subject, "np.memmap", speeds["one"], speeds["memmap"], "rows/s", at_least=at_least),
            Comparison(
                f"the same out of {self.segments} segments",
                "np.memmap, one file",
                speeds["many"],
                speeds["memmap"],
                "rows/s",
            ),
        ]


def _memmap(array: wb.ActivationArray) -> np.memmap:
    """The tensor of a store of one segment, found as the safetensors format says and mapped by NumPy."""
    (path,) = array.store.path.glob(f"segments/*/{array.site.file}")
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return np.memmap(path, np.float16, mode="r", offset=8 + header, shape=array.shape)


def _gather(array: wb.ActivationArray | np.memmap, gathers: Gathers) -> None:
    for rows in gathers:
        array[rows]


def _copy_all(array: wb.ActivationArray | np.memmap, block: int) -> None:
    if isinstance(array, np.memmap):
        for start in range(0, len(array), block):
            np.array(array[start : start + block])
    else:
        for _ in array.blocks(block):
            pass


FULL = Reading()
QUICK = Reading(rows=8192, segments=4, gathered=20_000, block=1024, repeats=3)
