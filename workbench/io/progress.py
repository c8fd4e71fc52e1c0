"""Progress of long work: a bar in terminals and notebooks, a plain line now and then everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from workbench.io.log import PROGRESS

EVERY = 10.0
"""Seconds between plain lines."""


@contextmanager
def progress(
    label: str, total: int | None, unit: str, *, show: bool = True, initial: int = 0
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of further units finished. `initial`: those finished before."""
    if not show:
        yield lambda _n: None
    elif sys.stderr.isatty() or _in_notebook():
        with _bar()(desc=label, total=total, initial=initial, unit=f" {unit}", unit_scale=True, leave=False) as bar:
            yield bar.update
    else:
        yield _Lines(label, total, unit, initial).advance


def _in_notebook() -> bool:
    """True in the process of a notebook's kernel; an imported IPython package alone does not show that."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def _bar() -> type:
    """tqdm's bar: a widget in a notebook that has ipywidgets, else characters."""
    if _in_notebook() and find_spec("ipywidgets"):
        from tqdm.notebook import tqdm
    else:
        from tqdm import tqdm
    return tqdm


class _Lines:
    """Logs a line every few seconds: `recording: 120,000 of 1,000,000 rows, 8,123 rows/s, 1 min 48 s left`."""

    def __init__(self, label: str, total: int | None, unit: str, done: int) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.began = self.last_line = time.monotonic()
        self.new = 0

    def advance(self, n: int) -> None:
        self.done, self.new = self.done + n, self.new + n
        now = time.monotonic()
        if now - self.last_line >= EVERY:
            self.last_line = now
            PROGRESS.info(self.line(now - self.began))

    def line(self, seconds: float) -> str:
        """Returns the line after `seconds` of work."""
        rate = self.new / seconds
        of = f" of {self.total:,}" if self.total else ""
        left = f", {duration((self.total - self.done) / rate)} left" if self.total and rate else ""
        return f"{self.label}: {self.done:,}{of} {self.unit}, {rate:,.0f} {self.unit}/s{left}"


def duration(seconds: float) -> str:
    """Returns "1 min 35 s" for 95."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
