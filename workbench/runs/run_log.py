"""Log of a run: printed lines, warnings and the traceback of a failure, each with its time."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workbench.io.log import copy_warnings
from workbench.runs.environment import utc_now


@contextlib.contextmanager
def logged(path: Path, title: str) -> Iterator[Callable[[str], None]]:
    """Copies to `path` everything that is printed and warned in the block, and the traceback of an exception.

    Args:
        path: The log to write.
        title: Its first line.

    Yields:
        A function that writes one more line.
    """
    with path.open("wb", buffering=0) as file:  # a line that a full disk refuses must not be tried again at the end

        def log(text: str) -> None:
            file.write(f"{utc_now()}  {text.rstrip()}\n".encode("utf-8", "backslashreplace"))

        show = warnings.showwarning

        def show_and_log(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
            log(f"warning: {message}")
            show(message, category, *args, **kwargs)

        log(title)
        warnings.showwarning = show_and_log
        try:
            with contextlib.redirect_stdout(_Tee(sys.stdout, log)), copy_warnings(log):
                yield log
        except BaseException:
            with contextlib.suppress(OSError):  # the log of a full disk must not hide the failure itself
                log(traceback.format_exc())
            raise
        finally:
            warnings.showwarning = show


class _Tee(io.TextIOBase):
    """A stream that writes to the terminal (stdout, or what replaces it), and line by line to the log."""

    def __init__(self, terminal: Any, log: Callable[[str], None]) -> None:
        self.terminal, self.log, self.line = terminal, log, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.log(line)
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()
