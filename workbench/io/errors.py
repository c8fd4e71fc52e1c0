"""The errors a user can meet. Each says in one line what was asked, what was found and what to do next.

There are two kinds, because a user can do two things about them: change the request, or look after the
data. Both are also the builtin a caller would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkbenchError(Exception):
    """Base of all errors raised on purpose; the CLI prints its text and no traceback."""


class RequestError(WorkbenchError, ValueError):
    """What was asked cannot be done as asked: a wrong path, an unknown site, a setting out of range."""


class DataError(WorkbenchError, RuntimeError):
    """The data is not as it should be: a damaged store, a full disk, a model that answers NaN."""


def nearest(asked: str, known: Iterable[str], n: int = 3) -> str:
    """The `n` known names most like `asked`, as the tail of an error: "; nearest: a, b" or ""."""
    close = difflib.get_close_matches(asked, list(known), n=n, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""
