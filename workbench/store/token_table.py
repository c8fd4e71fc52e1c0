"""Token table: a row for each token, the same columns in every segment, one Parquet file for each segment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.corpus.tokenizer import TOKEN_SCHEMA as COLUMNS
from workbench.io.errors import RequestError
from workbench.io.tables import read_table, read_table_schema
from workbench.io.tensors import VERIFY

ROW_BYTES = 24
"""Bytes of one row on the disk without metadata: an upper estimate (stories take about 10)."""

_ASCENDING = ("row", "position", "char_start", "char_end")  # differences compress better than a dictionary


def encode_tokens(table: pa.Table) -> memoryview:
    """Returns the table as Parquet: zstd, dictionaries for repeated values, byte-identical for equal tables."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(None).combine_chunks(), sink, **parquet_options(table.schema))
    return memoryview(sink.getvalue())


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Returns the options of the Parquet writer."""
    return {
        "compression": "zstd",
        "use_dictionary": [name for name in schema.names if name not in _ASCENDING],
        "column_encoding": dict.fromkeys(_ASCENDING, "DELTA_BINARY_PACKED"),
    }


def check_tokens(table: pa.Table, rows: int, first_row: int, schema: pa.Schema | None) -> None:
    """Refuses a table that does not fit its segment, or has other columns than `schema`, those of earlier segments."""
    first = pa.schema(list(table.schema)[: len(COLUMNS)])
    check_columns(table.schema if schema else first, schema or COLUMNS)
    if table.num_rows != rows or not np.array_equal(table["row"], np.arange(first_row, first_row + rows)):
        raise RequestError(f"the token table must count its rows {first_row} to {first_row + rows - 1} without a gap")


def check_columns(schema: pa.Schema, expected: pa.Schema) -> None:
    """Refuses a token table of other columns than the store's."""
    schema, expected = schema.remove_metadata(), expected.remove_metadata()
    if not schema.equals(expected):
        raise RequestError(f"the token table's columns are {_columns(schema)}; the store's are {_columns(expected)}")


def read_tokens(paths: Sequence[str | os.PathLike[str]]) -> pa.Table:
    """Returns the token tables of several segments as one, with one dictionary for each column.

    Raises:
        DataError: A file that is missing or damaged.
    """
    return _concatenate([read_table(path, VERIFY) for path in paths])


def take_tokens(paths: Sequence[str | os.PathLike[str]], rows: Sequence[np.ndarray]) -> pa.Table:
    """Returns the given rows of each segment's table as one table. Memory: one segment's table at a time."""
    return _concatenate([read_table(path, VERIFY).take(pa.array(ids)) for path, ids in zip(paths, rows, strict=True)])


def read_schema(path: str | os.PathLike[str]) -> pa.Schema:
    """Returns names and types of a segment's columns. DataError where the file is missing or damaged."""
    return read_table_schema(path, VERIFY)


def _concatenate(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).unify_dictionaries() if tables else COLUMNS.empty_table()


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
