"""Reading of Parquet files: every problem is a DataError that names the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from workbench.io.errors import DataError, first_line
from workbench.io.reading import check_regular

T = TypeVar("T")


def read_table(path: str | os.PathLike[str], advice: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns the table in a Parquet file, or some of its columns.

    Args:
        path: The file.
        advice: Next step for the user, the end of the error.
        columns: Names of the columns to read. None: all.

    Raises:
        DataError: The file is missing, damaged, or no regular file.
    """
    chosen = None if columns is None else list(columns)
    return _read(path, advice, lambda file: file.read(columns=chosen))


def read_table_schema(path: str | os.PathLike[str], advice: str) -> pa.Schema:
    """Returns names and types of the columns of a Parquet file; raises as `read_table` does."""
    return _read(path, advice, lambda file: file.schema_arrow)


def _read(path: str | os.PathLike[str], advice: str, read: Callable[[pq.ParquetFile], T]) -> T:
    check_regular(path, advice)
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            return read(file)
    except Exception as error:  # Arrow raises a dozen kinds: its own, OSError, UnicodeDecodeError, MemoryError, ...
        raise DataError(f"{os.fspath(path)} cannot be read ({first_line(error)}); {advice}") from None
