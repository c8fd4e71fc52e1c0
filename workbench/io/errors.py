"""Errors for users: each states in one line what was requested, what was found and what to do next.

There are two kinds, because a user can do two things about them: change the request, or repair the data. Both are also
the builtin that a caller would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkbenchError(Exception):
    """Base of all errors raised on purpose; the CLI prints its text and no traceback."""


class RequestError(WorkbenchError, ValueError):
    """A request that cannot be met: a wrong path, an unknown site, a setting out of range."""


class DataError(WorkbenchError, RuntimeError):
    """A problem of the data: a damaged store, a full disk, NaN from a model."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Returns the `n` known names that are most similar to `name`, as the end of an error: "; nearest: a, b" or ""."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""
