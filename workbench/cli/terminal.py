"""Text for a terminal: tables, and characters that cannot do harm."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from workbench.cli.options import Option
from workbench.cli.spelling import shell_spelling
from workbench.io.errors import escape

if TYPE_CHECKING:
    import pandas as pd


def plain(text: str) -> str:
    """Escapes what is not printable, so that text from a model or a file cannot move the cursor or change colours."""
    return escape(text, safe="\n")


def print_plain(text: str) -> None:
    """Prints text that may come from a model or a file, and flushes."""
    print(plain(text), flush=True)


def print_problem(text: str) -> None:
    """Prints one line on stderr, as `print_plain` does on stdout."""
    print(plain(text).replace("\n", "\\n"), file=sys.stderr, flush=True)


def print_table(heading: Sequence[str], lines: Sequence[Sequence[object]], limit: int = 40) -> None:
    """Prints aligned columns; a value longer than `limit` characters is cut.

    Texts are quoted, as tokens begin with spaces, except in a column in which all of them are plain names.
    """
    quoted = [not all(map(_is_name, column)) for column in zip(*lines, strict=True)]
    cells = [[_cell(value, limit, quote) for value, quote in zip(line, quoted, strict=True)] for line in lines]
    cells.insert(0, [str(name) for name in heading])
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_frame(table: pd.DataFrame, limit: int = 40) -> None:
    """Prints a table as `print_table` does, without its index."""
    print_table(list(table.columns), table.to_numpy(object).tolist(), limit)


def print_items(items: dict[str, str], column: int = 0) -> None:
    """Prints names with a description each, indented; `column` is the least width of the names.

    On a terminal descriptions are wrapped; elsewhere each stays one line, to be searched.
    """
    width = max([column, *map(len, items)])
    room = line_width() if on_terminal() else sys.maxsize
    for name, description in items.items():
        text = textwrap.wrap(plain(description), max(40, room - width - 4), break_on_hyphens=False)
        first, *other_lines = text or [""]
        print_plain(f"  {plain(name):<{width}}  {first}".rstrip())
        for line in other_lines:
            print_plain(f"{'':{width + 4}}{line}")


def on_terminal() -> bool:
    """Returns True if the output is read on a terminal, False for a pipe or a file."""
    return sys.stdout.isatty()


def line_width() -> int:
    """Returns the number of characters in a line of help: that of the terminal, 50 to 100."""
    return max(50, min(100, shutil.get_terminal_size().columns))


def _is_name(value: object) -> bool:
    """True for a text that reads the same without quotes, and for what is no text."""
    return not isinstance(value, str) or (value[:1].isalpha() and value == value.strip() and value.isprintable())


def _cell(value: object, limit: int, quote: bool) -> str:
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    text = plain(repr(value) if quote and isinstance(value, str) else text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Output(logging.Handler):
    """What a command prints on stderr, besides progress bars: errors, warnings, and the package's progress."""

    def __init__(self) -> None:
        super().__init__()
        self.options: tuple[Option, ...] = ()
        """Options of the command that runs, in whose spelling messages name arguments."""

    def error(self, message: str) -> None:
        """Prints the end of a command that failed, in one line."""
        print_problem(f"workbench: {message}")

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record of the log."""
        kind = "workbench: warning: " if record.levelno >= logging.WARNING else ""
        print_problem(f"{kind}{shell_spelling(record.getMessage(), self.options)}")

    def warn(self, message: Warning | str, *_args: object, **_kwargs: object) -> None:
        """Prints a warning of another library; replaces `warnings.showwarning`."""
        print_problem(f"workbench: warning: {message}")


@contextmanager
def terminal_output() -> Iterator[Output]:
    """Inside, messages go to stderr, one line each, and characters that the terminal lacks are escaped."""
    output, showwarning = Output(), warnings.showwarning
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    errors = {name: getattr(stream, "errors", None) for name, stream in streams.items()}
    for name, stream in streams.items():
        if stream is None:  # it was closed, as by `2>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = output.warn
    logging.getLogger("workbench").addHandler(output)
    try:
        yield output
    finally:
        logging.getLogger("workbench").removeHandler(output)
        warnings.showwarning = showwarning
        for name, stream in streams.items():
            if stream is not None and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=errors[name])
