"""Text for a terminal: tables, and characters that cannot do harm."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence


def plain(text: str) -> str:
    """Escapes what is not printable, so that text from a model or a file cannot move the cursor or change colours."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def print_plain(text: str) -> None:
    """Prints text that may come from a model or a file, and flushes."""
    print(plain(text), flush=True)


def print_table(heading: Sequence[str], lines: Sequence[Sequence[object]], limit: int = 40) -> None:
    """Prints aligned columns; a value longer than `limit` characters is cut."""
    cells = [[str(name) for name in heading], *([_cell(value, limit) for value in line] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_items(items: dict[str, str]) -> None:
    """Prints names with a description each, indented."""
    width = max((len(name) for name in items), default=0)
    for name, description in items.items():
        print_plain(f"  {name:<{width}}  {description}".rstrip())


def _cell(value: object, limit: int) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    text = plain(repr(value) if isinstance(value, str) else text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class StderrHandler(logging.Handler):
    """Prints the package's warnings and progress on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record of the log on stderr, without control characters."""
        kind = "workbench: warning: " if record.levelno >= logging.WARNING else ""
        print(f"{kind}{plain(record.getMessage())}", file=sys.stderr, flush=True)


def show_warning(message: Warning | str, *_args: object, **_kwargs: object) -> None:
    """Prints a warning of another library in one line; replaces `warnings.showwarning`."""
    print(f"workbench: warning: {plain(str(message))}", file=sys.stderr)
