"""Token table: a row for each token, the same columns in every segment, one Parquet file for each segment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from workbench.corpus.places import add_places, with_places
from workbench.corpus.tokenizer import TOKEN_SCHEMA as COLUMNS
from workbench.io.errors import RequestError
from workbench.io.parquet import read_table, read_table_schema
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
    """Refuses a table that does not fit its segment, or has other columns than `schema`, those of its part."""
    first = pa.schema(list(table.schema)[: len(COLUMNS)])
    check_columns(table.schema if schema else first, schema or COLUMNS)
    if table.num_rows != rows or not np.array_equal(table["row"], np.arange(first_row, first_row + rows)):
        raise RequestError(f"the token table must count its rows {first_row} to {first_row + rows - 1} without a gap")


def check_columns(schema: pa.Schema, expected: pa.Schema) -> None:
    """Refuses a token table of other columns than those of its part."""
    schema, expected = schema.remove_metadata(), expected.remove_metadata()
    if not schema.equals(expected):
        raise RequestError(
            f"the token table's columns are {_columns(schema)}; those of its part are {_columns(expected)}"
        )


def read_tokens(paths: Sequence[str | os.PathLike[str]], columns: pa.Schema | None = None) -> pa.Table:
    """Returns the token tables of several segments as one, with one dictionary for each column.

    Args:
        paths: Files of the segments.
        columns: Columns of the store. None: those of the files, which have the same.

    Raises:
        DataError: A file that is missing or damaged.
    """
    return _concatenate([_read(path) for path in paths], columns)


def take_tokens(
    paths: Sequence[str | os.PathLike[str]], rows: Sequence[np.ndarray], columns: pa.Schema | None, chosen: bool = False
) -> pa.Table:
    """Returns the given rows of each segment's table as one table, with the columns of `places`.

    Memory: one segment's table at a time.
    """
    tables = [add_places(_read(path), chosen).take(pa.array(ids)) for path, ids in zip(paths, rows, strict=True)]
    return _concatenate(tables, columns and with_places(columns))


def conform(table: pa.Table, columns: pa.Schema) -> pa.Table:
    """Returns a token table with the columns of the store: values in their types, null where it lacks a column."""
    if table.schema.remove_metadata().equals(columns):
        return table
    arrays = [
        _nulls(table.num_rows, field.type)
        if field.name not in table.column_names or pa.types.is_null(table.schema.field(field.name).type)
        else table[field.name].cast(field.type)
        for field in columns
    ]
    return pa.Table.from_arrays(arrays, schema=columns)


def without_nan(table: pa.Table) -> pa.Table:
    """Returns a table with null for NaN, which stores of version 1 hold where a number is missing."""
    for index, field in enumerate(table.schema):
        if pa.types.is_floating(field.type):
            values = table.column(index)
            missing = pc.is_nan(values)  # pyright: ignore[reportAttributeAccessIssue]  # made at import
            numbers = pc.if_else(missing, pa.scalar(None, field.type), values)  # pyright: ignore[reportAttributeAccessIssue]
            table = table.set_column(index, field, numbers)
    return table


def read_schema(path: str | os.PathLike[str]) -> pa.Schema:
    """Returns names and types of a segment's columns. DataError where the file is missing or damaged."""
    return read_table_schema(path, VERIFY)


def _read(path: str | os.PathLike[str]) -> pa.Table:
    return without_nan(read_table(path, VERIFY))


def _concatenate(tables: list[pa.Table], columns: pa.Schema | None) -> pa.Table:
    if not tables:
        return (columns or COLUMNS).empty_table()
    return pa.concat_tables([conform(table, columns or table.schema) for table in tables]).unify_dictionaries()


def _nulls(rows: int, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.nulls(rows, kind.index_type), pa.array([], kind.value_type))
    return pa.nulls(rows, kind)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
