"""Errors for users: each states in one line what was requested, what was found and what to do next.

There are two kinds, because a user can do two things about them: change the request, or repair the data. Both are also
the builtin that a caller would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 2_000


def printable(text: str, longest: int = _LONGEST) -> str:
    """Returns `text` on one line: what is not printable escaped, the middle of a long text left out.

    Names in files may hold anything: a line break, a terminal's escape sequences, megabytes.
    """
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} ... {text[-longest // 4 :]}"
    return escape(text)


def escape(text: str, safe: str = "") -> str:
    """Returns `text` with what is not printable escaped, except the characters in `kept`."""
    return "".join(
        sign if sign in safe or sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text that is not blank, or the name of its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(value: object) -> str:
    """Returns a value as a message shows it: its repr, cut to 60 characters."""
    return repr(value)[:60]


class WorkbenchError(Exception):
    """Base of all errors raised on purpose; the CLI prints its text, which is one line, and no traceback."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(str(message)))


class RequestError(WorkbenchError, ValueError):
    """A request that cannot be met: a wrong path, an unknown site, a setting out of range."""


class DataError(WorkbenchError, RuntimeError):
    """A problem of the data: a damaged store, a full disk, NaN from a model."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Returns the `n` known names that are most similar to `name`, as the end of an error: "; nearest: a, b" or ""."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=n, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""
