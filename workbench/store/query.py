"""SQL queries of the token table: DuckDB reads the committed segments' Parquet files, and nothing else."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from workbench.io.errors import DataError, RequestError, nearest
from workbench.store.groups import GROUPS, token_files
from workbench.store.manifest import SEGMENTS, Manifest
from workbench.store.new_columns import common_columns, part_columns
from workbench.store.sql_names import SqlNames, quote
from workbench.store.token_table import COLUMNS

_SQL_TYPES = {
    "bool": "BOOLEAN",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint64": "UBIGINT",
    "double": "DOUBLE",
    "date32[day]": "DATE",
    "time64[us]": "TIME",
    "timestamp[us]": "TIMESTAMP",
    "timestamp[us, tz=UTC]": "TIMESTAMPTZ",
}

# The predicate may come from a stranger's notebook. It has access to the tokens of this store: to no other file, no
# variable of this process, no extension from the network.
_SETTINGS = (
    "SET temp_directory = ''",
    "SET TimeZone = 'UTC'",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)


def select_rows(path: str | os.PathLike[str], manifest: Manifest, predicate: str) -> Int64[np.ndarray, " selected"]:
    """Returns the row ids, ascending, of the committed tokens for which the SQL condition `predicate` is true.

    The condition may use the token table's columns, metadata included: "token = ' Monday' AND position > 0". A name
    that is a reserved word or no plain word stands in double quotes: '"group" = 1'. Reads only the columns it names.

    Raises:
        RequestError: A condition that DuckDB refuses: an unknown column, a wrong type, a syntax error.
        DataError: A token table that is missing or damaged.
    """
    if not manifest.segments:
        return np.empty(0, np.int64)
    with _tokens_where(path, manifest, predicate) as (relation, names):
        (rows,) = relation.project(names.quoted("row")).fetchnumpy().values()
        return np.sort(rows)


def query_tokens(
    path: str | os.PathLike[str], manifest: Manifest, predicate: str, limit: int | None = None
) -> pa.Table:
    """Returns the rows of the token table for which `predicate` is true, in row order; at most `limit` of them.

    Raises as `select_rows` does.
    """
    if not manifest.segments:
        return COLUMNS.empty_table()
    with _tokens_where(path, manifest, predicate) as (relation, names):
        ordered = relation.order(names.quoted("row"))
        return (ordered if limit is None else ordered.limit(limit)).to_arrow_table().rename_columns(names.names)


@contextmanager
def _tokens_where(path: str | os.PathLike[str], manifest: Manifest, predicate: str) -> Iterator[tuple[Any, SqlNames]]:
    """The relation of the tokens for which `predicate` is true, and the names of its columns. Its type is not in the
    signature: DuckDB prints leaks when the process ends and a run-time type checker has kept its classes."""
    if not predicate.strip():
        raise RequestError("query is empty; give an SQL condition, for example \"token = ' Monday'\"")
    store = Path(path).absolute()
    folders = [store / SEGMENTS, store / GROUPS]
    places = [place for folder in folders for place in (str(folder), _pattern(folder))]
    allowed = ", ".join("'" + place.replace("'", "''") + "'" for place in places)
    schemas = part_columns(store, manifest)
    columns = common_columns(schemas.values(), path)
    names = SqlNames(columns.names)
    condition = names.resolve(predicate)
    with duckdb.connect() as connection:
        _refuse_subquery(connection, predicate, condition)
        connection.execute("; ".join((f"SET allowed_directories = [{allowed}]", *_SETTINGS)))
        try:
            tokens = _relation(connection, token_files(store, manifest), schemas, columns, names)
        except duckdb.Error as error:
            raise _damaged(path, error) from None
        try:
            # a relation's filter is parsed as one expression: a second statement or an ORDER BY is an error
            yield tokens.filter(condition), names
        except duckdb.IOException as error:
            raise _damaged(path, error) from None
        except duckdb.Error as error:
            raise _refused(predicate, error, names) from None


def _refuse_subquery(connection: Any, predicate: str, condition: str) -> None:
    """Refuses SELECT inside of the condition: it could only read the settings and tables of DuckDB itself."""
    (tree,) = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [f"SELECT 1 WHERE ({condition})"]).fetchone()
    if '"class":"SUBQUERY"' in tree:  # quotes within a text are escaped there
        raise RequestError(f"query {predicate!r}: a subquery; give a condition over the columns of the token table")


def _relation(
    connection: Any,
    files: Sequence[tuple[Path, int]],
    schemas: Mapping[int, pa.Schema],
    columns: pa.Schema,
    names: SqlNames,
) -> Any:
    """The token table of all files, those of parts with other columns brought to those of the store."""
    by_schema: dict[pa.Schema, list[str]] = {}
    for file, part in files:
        by_schema.setdefault(schemas[part], []).append(_pattern(file))
    relations = []
    for schema, patterns in by_schema.items():
        tokens = connection.read_parquet(patterns, hive_partitioning=False)
        if schema != columns or names.differ or pa.float64() in columns.types:
            read = dict(zip(schema.names, tokens.columns, strict=True))  # by place: DuckDB renames what differs by case
            values = [_value(schema, field, read) for field in columns]
            tokens = tokens.project(
                ", ".join(f"{value} AS {names.quoted(name)}" for value, name in zip(values, columns.names, strict=True))
            )
        relations.append(tokens)
    return functools.reduce(lambda one, other: one.union(other), relations)


def _value(schema: pa.Schema, field: pa.Field, read: Mapping[str, str]) -> str:
    """SQL of a column of the store in files with the columns `schema`, which DuckDB reads under the names `read`."""
    index = schema.get_field_index(field.name)
    kind = pa.null() if index < 0 else schema.field(index).type
    if pa.types.is_null(kind):
        return f"CAST(NULL AS {_sql_type(field.type)})"
    name = quote(read[field.name])
    if pa.types.is_floating(kind):  # stores of version 1 hold NaN, which Parquet's statistics leave out
        name = f"CASE WHEN isnan({name}) THEN NULL ELSE {name} END"
    return name if kind.equals(field.type) else f"CAST({name} AS {_sql_type(field.type)})"


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_decimal(kind):
        return f"DECIMAL({kind.precision}, {kind.scale})"
    return _SQL_TYPES.get(str(kind), "VARCHAR")


def _pattern(path: Path) -> str:
    """Escapes a path, which DuckDB reads as a glob."""
    return re.sub(r"([*?[])", r"[\1]", str(path))


def _refused(predicate: str, error: Exception, names: SqlNames) -> RequestError:
    reason = _first_line(error)
    unknown = reason.split('"')[1] if reason.startswith("Referenced column") else ""
    columns = ", ".join(name if name.isprintable() else repr(name) for name in names.names)
    hint = names.hint(predicate) or nearest(unknown, names.names)
    return RequestError(f"query {predicate!r}: {reason}; columns: {columns}{hint}")


def _damaged(path: str | os.PathLike[str], error: Exception) -> DataError:
    return DataError(f"the token table of {path} cannot be read ({_first_line(error)}); run workbench verify {path}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(" Error: ", 1)[-1].rstrip("!.")
