"""SQL queries of the token table: DuckDB reads the committed segments' Parquet files, and nothing else."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from workbench.corpus.places import LENGTH, PLACE_SCHEMA, with_places
from workbench.io.errors import DataError, RequestError, nearest, shown
from workbench.store.groups import GROUPS, segment_tables, token_files
from workbench.store.manifest import SEGMENTS, Manifest
from workbench.store.new_columns import common_columns, part_columns, store_columns
from workbench.store.sql_names import SqlNames, quote
from workbench.store.sql_tree import (
    TABLE,
    Parameters,
    allowed_clause,
    check_placeholders,
    check_repeatable,
    parameter_values,
    parse_condition,
)
from workbench.store.token_table import read_schema, take_tokens

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


def select_rows(
    path: str | os.PathLike[str], manifest: Manifest, predicate: str, parameters: Parameters = ()
) -> Int64[np.ndarray, " row"]:
    """Returns the row ids, ascending, of the committed tokens for which the SQL condition `predicate` is true.

    The condition may use the token table's columns, metadata included: "token = ' Monday' AND position > 0". A name
    that is a reserved word or no plain word stands in double quotes: '"group" = 1'. Reads only the columns it names.
    It may use window functions, and subqueries of the table `tokens`.

    Args:
        path: The store.
        manifest: Its manifest.
        predicate: The condition.
        parameters: Values of its placeholders: a sequence for `?`, a mapping for `$name`.

    Raises:
        RequestError: A condition that DuckDB refuses: an unknown column, a wrong type, a syntax error.
        DataError: A token table that is missing or damaged.
    """
    if not isinstance(predicate, str):
        raise RequestError(f"query must be a text, such as \"token = ' Monday'\", not {shown(predicate)}")
    if not manifest.segments:
        return np.empty(0, np.int64)
    store = Path(path).absolute()
    schemas = part_columns(store, manifest)
    files = _Tokens(
        place=str(path),
        folders=(store / SEGMENTS, store / GROUPS),
        columns=common_columns(schemas.values(), path),
        files=tuple((file, schemas[part]) for file, part in token_files(store, manifest)),
        chosen=manifest.chosen,
    )
    return files.select(predicate, parameters)


def select_planned(file: Path, predicate: str) -> Int64[np.ndarray, " row"]:
    """Returns the row ids, ascending, of the tokens in one Parquet file for which `predicate` is true.

    Raises as `select_rows` does, and RequestError for a condition that may choose other tokens each time.
    """
    schema = read_schema(file).remove_metadata()
    files = _Tokens("the planned tokens", (file.parent,), schema, ((file, schema),), chosen=False, repeatable=True)
    return files.select(predicate, ())


def query_tokens(
    path: str | os.PathLike[str], manifest: Manifest, predicate: str, limit: int | None = None
) -> pa.Table:
    """Returns the rows of the token table for which `predicate` is true, in row order; at most `limit` of them.

    Raises as `select_rows` does.
    """
    return rows_of_tokens(Path(path), manifest, select_rows(path, manifest, predicate)[:limit])


def rows_of_tokens(path: Path, manifest: Manifest, ids: Int64[np.ndarray, " row"]) -> pa.Table:
    """Returns the token table of these rows, which ascend. Reads the tables of their segments."""
    starts = manifest.starts
    edges = np.searchsorted(ids, starts)
    touched = np.flatnonzero(np.diff(edges)).tolist()
    files = segment_tables(path, [manifest.segments[segment] for segment in touched])
    rows = [ids[edges[segment] : edges[segment + 1]] - starts[segment] for segment in touched]
    return take_tokens(files, rows, store_columns(path, manifest), manifest.chosen)


@dataclass(frozen=True)
class _Tokens:
    """A token table in Parquet files that a condition may read, and nothing else."""

    place: str
    """Its name in errors."""
    folders: tuple[Path, ...]
    columns: pa.Schema
    files: tuple[tuple[Path, pa.Schema], ...]
    chosen: bool
    """True for chosen rows, which have the length of their sequence."""
    repeatable: bool = False
    """True if the same condition must choose the same rows again."""

    def select(self, predicate: str, parameters: Parameters) -> Int64[np.ndarray, " row"]:
        """Returns the ids of the rows for which the condition is true."""
        if not predicate.strip():
            raise RequestError("query is empty; give an SQL condition, for example \"token = ' Monday'\"")
        parameters = parameter_values(predicate, parameters)
        places = [place for folder in self.folders for place in (str(folder), _pattern(folder))]
        allowed = ", ".join("'" + place.replace("'", "''") + "'" for place in places)
        names = SqlNames(with_places(self.columns).names)
        condition = names.resolve(predicate)
        row = names.quoted("row")
        with duckdb.connect() as connection:
            tree = parse_condition(connection, condition)
            clause = allowed_clause(connection, tree, predicate, condition, bool(parameters))
            check_placeholders(tree, predicate, parameters)
            if self.repeatable:
                check_repeatable(connection, tree, predicate)
            connection.execute("; ".join((f"SET allowed_directories = [{allowed}]", *_SETTINGS)))
            try:
                tokens = self._relation(connection, names, condition)
            except duckdb.Error as error:
                raise _damaged(self.place, error) from None
            try:
                if clause is None:
                    # a relation's filter is parsed as one expression: a second statement or an ORDER BY is an error
                    selected = tokens.filter(condition).project(row)
                else:
                    tokens.create_view(TABLE)
                    selected = connection.execute(f"SELECT {row} FROM {TABLE} {clause}", parameters or None)
                (rows,) = selected.fetchnumpy().values()
            except duckdb.IOException as error:
                raise _damaged(self.place, error) from None
            except duckdb.Error as error:
                raise _refused(predicate, error, names) from None
        return np.sort(rows)

    def _relation(self, connection: Any, names: SqlNames, condition: str) -> Any:
        """The token table of all files, with the columns of `places` if the condition names one of them."""
        tokens = _relation(connection, self.files, self.columns, names)
        missing = [name for name in PLACE_SCHEMA.names if name not in self.columns.names]
        if not any(name in condition.lower() for name in missing):
            return tokens
        length = names.quoted(LENGTH)
        if LENGTH in missing:
            count = f"CAST(count(*) OVER (PARTITION BY {names.quoted('sequence')}) AS INTEGER)"
            tokens = tokens.project(f"*, {count} AS {length}")
        elif not self.chosen:  # a column of the texts: an older store
            return tokens
        from_end = f"{length} - 1 - {names.quoted('position')}"
        values = {"position_from_end": from_end, "is_last": f"{from_end} = 0"}
        more = [f"{value} AS {names.quoted(name)}" for name, value in values.items() if name in missing]
        return tokens.project(", ".join(["*", *more]))


def _relation(connection: Any, files: Sequence[tuple[Path, pa.Schema]], columns: pa.Schema, names: SqlNames) -> Any:
    """The token table of all files, those of parts with other columns brought to those of the store."""
    by_schema: dict[pa.Schema, list[str]] = {}
    for file, schema in files:
        by_schema.setdefault(schema, []).append(_pattern(file))
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
    return functools.reduce(lambda first, second: first.union(second), relations)


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


_TEXT_FOLLOWS = r"((?<![<>])=|<>|\blike\b|\bin\b\s*\(|,)\s*\"?"
"""Operators after which an unknown column is likely a text that lacks its quotes."""


def _refused(predicate: str, error: Exception, names: SqlNames) -> RequestError:
    reason = _first_line(error)
    unknown = reason.split('"')[1] if reason.startswith("Referenced column") else ""
    columns = ", ".join(name if name.isprintable() else repr(name) for name in names.names)
    compared = unknown and re.search(rf"{_TEXT_FOLLOWS}{re.escape(unknown)}", predicate, re.IGNORECASE)
    quotes = f"; a text stands in single quotes: '{unknown}'" if compared else ""
    hint = names.hint(predicate) or quotes or nearest(unknown, names.names)
    return RequestError(f"query {predicate!r}: {reason}; columns: {columns}{hint}")


def _damaged(path: str | os.PathLike[str], error: Exception) -> DataError:
    return DataError(f"the token table of {path} cannot be read ({_first_line(error)}); run workbench verify {path}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(" Error: ", 1)[-1].rstrip("!.")
