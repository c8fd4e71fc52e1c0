"""Logging of the package: every module logs to a child of the logger `workbench`.

Warnings reach stderr through the last resort of the logging module, and progress through `PROGRESS`, as long as the
program configures no handler of its own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROOT = logging.getLogger("workbench")
PROGRESS = logging.getLogger("workbench.progress")
"""Lines about running work, of level INFO. `getLogger("workbench.progress").setLevel("WARNING")` turns them off."""


@contextmanager
def copy_warnings(write: Callable[[str], object]) -> Iterator[None]:
    """Calls `write` with each warning that the package logs inside; they are shown as they would be without."""
    handler = _Copy(write)
    ROOT.addHandler(handler)
    try:
        yield
    finally:
        ROOT.removeHandler(handler)


class _OnStderr(logging.Handler):
    """Prints a record on stderr where no other handler shows it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _shown_by_another(record.name):
            print(record.getMessage(), file=sys.stderr, flush=True)


class _Copy(_OnStderr):
    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        self.write(f"warning: {record.getMessage()}")
        super().emit(record)


def _shown_by_another(name: str) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(not isinstance(handler, _OnStderr) for handler in logger.handlers):
            return True
        logger = logger.parent
    return False


if not PROGRESS.handlers:
    PROGRESS.setLevel(logging.INFO)
    PROGRESS.addHandler(_OnStderr())
