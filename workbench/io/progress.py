"""Progress of long work: a bar in terminals and notebooks, a plain line now and then everywhere else."""

from __future__ import annotations

import html
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from workbench.io.log import PROGRESS

EVERY = 10.0
"""Seconds between plain lines."""

_REDRAW = 0.2

Item = TypeVar("Item")


@contextmanager
def progress(
    label: str, total: int | None, unit: str, *, show: bool = True, initial: int = 0
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of further units finished. `initial`: those finished before."""
    if not show or not PROGRESS.isEnabledFor(logging.INFO):
        yield lambda _n: None
    elif _in_notebook():
        with _Output(label, total, unit, initial) as output:
            yield output.advance
    elif sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=label, total=total, initial=initial, unit=f" {unit}", unit_scale=True, leave=False) as bar:
            yield bar.update  # pyright: ignore[reportReturnType]  # it returns whether it drew
    else:
        yield _Lines(label, total, unit, initial).advance


def with_progress(items: Sequence[Item], label: str, unit: str) -> Iterator[Item]:
    """Yields the items, and shows how many are finished."""
    with progress(label, len(items), unit) as tick:
        for item in items:
            yield item
            tick(1)


def _in_notebook() -> bool:
    """True in the process of a notebook's kernel; an imported IPython package alone does not show that."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class _Lines:
    """Logs a line every few seconds: `recording: 120,000 of 1,000,000 rows, 8,123 rows/s, 1 min 48 s left`."""

    def __init__(self, label: str, total: int | None, unit: str, initial: int, interval: float | None = None) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, initial
        self.every = EVERY if interval is None else interval
        self.began = self.last_line = time.monotonic()
        self.new = 0

    def advance(self, n: int) -> None:
        self.done, self.new = self.done + n, self.new + n
        moment = time.monotonic()
        if moment - self.last_line >= self.every:
            self.last_line = moment
            self.show(self.line(moment - self.began))

    def show(self, line: str) -> None:
        PROGRESS.info(line)

    def line(self, seconds: float) -> str:
        """Returns the line after `seconds` of work."""
        rate = self.new / seconds
        of = f" of {self.total:,}" if self.total else ""
        time_left = f", {duration((self.total - self.done) / rate)} left" if self.total and rate else ""
        speed = f"{duration(1 / rate)} each" if 0 < rate < 1 else f"{rate:,.0f} {self.unit}/s"
        return f"{self.label}: {self.done:,}{of} {self.unit}, {speed}{time_left}"


class _Output(_Lines):
    """A bar in the output of a notebook's cell. No widget: the file of the notebook keeps what it showed last."""

    def __init__(self, label: str, total: int | None, unit: str, initial: int) -> None:
        super().__init__(label, total, unit, initial, _REDRAW)
        self.handle: Any = None

    def __enter__(self) -> _Output:
        self.show(f"{self.label} ...")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        of = f" of {self.total:,}" if self.total else ""
        end = "stopped" if kind else f"done in {duration(time.monotonic() - self.began)}"
        self._display(f"{self.label}: {self.done:,}{of} {self.unit}, {end}")

    def show(self, line: str) -> None:
        share = f' value="{self.done}" max="{self.total}"' if self.total else ""
        self._display(line, f"<progress{share}></progress> ")

    def _display(self, line: str, bar: str = "") -> None:
        from IPython.display import display

        content = {"text/plain": line, "text/html": f"<div>{bar}{html.escape(line)}</div>"}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)


def duration(seconds: float) -> str:
    """Returns "1 min 35 s" for 95."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
