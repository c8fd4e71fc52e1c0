"""Comparisons: two sides run alternately, one line of a table each; peak memory in a separate process."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from statistics import median
from typing import Any, Literal, TypeVar

from scipy.stats import binom

T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """Repeated measurements of the workbench and of a reference, with a target."""

    subject: str
    reference: str
    values: tuple[float, ...]
    reference_values: tuple[float, ...]
    unit: str
    by: Literal["ratio", "difference"] = "ratio"
    """Comparison of the medians: ours / other or ours - other."""
    at_least: float | None = None
    at_most: float | None = None
    target_of: Literal["comparison", "workbench"] = "comparison"
    """Subject of the target: the comparison, or the workbench alone."""
    paired: bool = False
    """Compare each repeat with the reference beside it: median ratio and its 95 % interval."""

    @property
    def value(self) -> float:
        """Returns ratio or difference of the medians, or the median of those of each repeat."""
        if self.paired:
            return median(self._repeats)
        return self._compare(median(self.values), median(self.reference_values))

    @property
    def spread(self) -> tuple[float, float]:
        """Returns the lowest and highest value of a single repeat, or the interval of the median of paired repeats."""
        return median_interval(self._repeats) if self.paired else (min(self._repeats), max(self._repeats))

    @property
    def _repeats(self) -> list[float]:
        return [self._compare(*pair) for pair in zip(self.values, self.reference_values, strict=True)]

    @property
    def verdict(self) -> str:
        """Returns "met", "missed", or an empty text without a target."""
        if self.at_least is None and self.at_most is None:
            return ""
        value = self.value if self.target_of == "comparison" else median(self.values)
        in_range = (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)
        return "met" if in_range else "missed"

    def cells(self) -> tuple[str, ...]:
        """Returns the cells of `COLUMNS`."""
        low, high = self.spread
        return (
            self.subject,
            self.reference,
            f"{_number(median(self.values))} {self.unit}",
            f"{_number(median(self.reference_values))} {self.unit}",
            self._value(self.value),
            (f"95 % CI [{low:.2f}, {high:.2f}]" if self.paired else f"{_number(low)} to {_number(high)}")
            if len(self.values) > 1
            else "",
            "".join(
                f"{sign} {limit}" + (f" {self.unit}" if self.target_of == "workbench" else "")
                for sign, limit in (("≥", self.at_least), ("≤", self.at_most))
                if limit is not None
            ),
            self.verdict,
        )

    def _compare(self, value: float, reference: float) -> float:
        return value / reference if self.by == "ratio" else value - reference

    def _value(self, value: float) -> str:
        return f"{_number(value)} times" if self.by == "ratio" else f"{_number(value)} {self.unit} more"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the median, from order statistics (Conover 1999, section 3.2).

    Below six values no interval has this level; the whole range is returned.
    """
    ordered = sorted(values)
    below = int(binom.ppf(0.025, len(ordered), 0.5))
    return ordered[max(0, below - 1)], ordered[min(len(ordered) - 1, len(ordered) - below)]


def paired_until(
    width: float, most: int, side: Callable[[], float], reference: Callable[[], float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Calls both sides in turn until the interval of the median ratio is `width` of it wide, or `most` times.

    Returns:
        The values of the side, and those of the reference, by turn.
    """
    values, references = [], []
    while len(values) < most:
        gc.collect()
        references.append(reference())
        values.append(side())
        ratios = [value / baseline for value, baseline in zip(values, references, strict=True)]
        low, high = median_interval(ratios)
        if len(values) >= min(most, 9) and high - low <= width * median(ratios):
            break
    return tuple(values), tuple(references)


COLUMNS = ("", "compared with", "workbench", "reference", "comparison", "range over repeats", "target", "")


def table(comparisons: list[Comparison]) -> str:
    """Returns the comparisons as a Markdown table with aligned columns."""
    rows = [COLUMNS, *(comparison.cells() for comparison in comparisons)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(COLUMNS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def interleaved(repeats: int, sides: dict[str, Callable[[], float]]) -> dict[str, tuple[float, ...]]:
    """Calls all sides alternately, so that other load on the machine affects them equally."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            gc.collect()
            values[name].append(side())
    return {name: tuple(rates) for name, rates in values.items()}


def per_second(
    amount: int | float, work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """Returns a side that runs `work` once and gives `amount` per second of `clock`."""

    def side() -> float:
        began = clock()
        work()
        return amount / (clock() - began)

    return side


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process, in MB (10^6 bytes)."""

    loaded: float
    """After loading, before the work."""
    peak: float
    """Maximum during the work."""

    @property
    def rise(self) -> float:
        """Returns the memory that the work added."""
        return self.peak - self.loaded


def peak_memory(prepare: Callable[..., Callable[[], Any]], **arguments: Any) -> Memory:
    """Returns the memory of the work that `prepare(**arguments)` loads and returns, in a fresh process. Linux only.

    `prepare` is a function of a module, its arguments are JSON.
    """
    call = json.dumps([prepare.__module__, prepare.__qualname__, arguments])
    command = [sys.executable, "-m", "workbench.experiments.benchmarks.measure", call]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{prepare.__qualname__}({arguments}) failed in a separate process:\n{process.stderr}")
    return Memory(**json.loads(process.stdout.splitlines()[-1]))


def with_peak(work: Callable[[], T]) -> tuple[T, Memory]:
    """Returns what `work` returns, and the memory of this process meanwhile. Linux only."""
    gc.collect()
    loaded = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak, so that earlier work does not count
    result = work()
    return result, Memory(loaded, _resident("VmHWM"))


def _measure_here(call: str) -> None:
    module, name, arguments = json.loads(call)
    _, memory = with_peak(getattr(import_module(module), name)(**arguments))
    print(json.dumps(asdict(memory)))


def _resident(field: str) -> float:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def processor() -> str:
    """Returns the processor's name, as Linux reports it, and the instructions that torch is limited to."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    return (models[0] if models else platform.machine()) + (f" limited to {limit.upper()}" if limit else "")


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


if __name__ == "__main__":
    _measure_here(sys.argv[1])
