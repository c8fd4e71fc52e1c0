"""Warnings that the package logs, expected or collected."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warned_of() -> Iterator[list[logging.LogRecord]]:
    """Collects the package's warnings. Adds no handler, so they are shown as without it."""
    make, records = logging.getLogRecordFactory(), []

    def collect(*arguments, **options) -> logging.LogRecord:
        record = make(*arguments, **options)
        if record.levelno >= logging.WARNING and record.name.split(".")[0] == "workbench":
            records.append(record)
        return record

    logging.setLogRecordFactory(collect)
    try:
        yield records
    finally:
        logging.setLogRecordFactory(make)


@contextmanager
def warned(match: str) -> Iterator[list[logging.LogRecord]]:
    """Expects a warning that `match` is found in, as `pytest.warns` does; gives all that were logged inside."""
    with warned_of() as records:
        yield records
    expected = [record for record in records if re.search(match, record.getMessage())]
    assert expected, f"no warning matches {match!r}; logged: {[record.getMessage() for record in records]}"
    for record in expected:
        record.expected = True
