"""SQL queries of the token table: DuckDB reads the committed segments' Parquet files, and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
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
from workbench.store.token_table import COLUMNS

# The predicate may come from a stranger's notebook. It has access to the tokens of this store: to no other file, no
# variable of this process, no extension from the network.
_SETTINGS = ("SET temp_directory = ''", "SET enable_external_access = false", "SET lock_configuration = true")


def select_rows(path: str | os.PathLike[str], manifest: Manifest, predicate: str) -> Int64[np.ndarray, " selected"]:
    """Returns the row ids, ascending, of the committed tokens for which the SQL condition `predicate` is true.

    The condition may use the token table's columns, metadata included: "token = ' Monday' AND position > 0".
    Reads only the columns it names.

    Raises:
        RequestError: A condition that DuckDB refuses: an unknown column, a wrong type, a syntax error.
        DataError: A token table that is missing or damaged.
    """
    if not manifest.segments:
        return np.empty(0, np.int64)
    with _tokens_where(path, manifest, predicate) as relation:
        return np.sort(relation.project('"row"').fetchnumpy()["row"])


def query_tokens(
    path: str | os.PathLike[str], manifest: Manifest, predicate: str, limit: int | None = None
) -> pa.Table:
    """Returns the rows of the token table for which `predicate` is true, in row order; at most `limit` of them.

    Raises as `select_rows` does.
    """
    if not manifest.segments:
        return COLUMNS.empty_table()
    with _tokens_where(path, manifest, predicate) as relation:
        ordered = relation.order('"row"')
        return (ordered if limit is None else ordered.limit(limit)).to_arrow_table()


@contextmanager
def _tokens_where(path: str | os.PathLike[str], manifest: Manifest, predicate: str) -> Iterator[Any]:
    """The relation of the tokens for which `predicate` is true. Its type is not in the signature: DuckDB prints leaks
    when the process ends and a run-time type checker has kept its classes."""
    if not predicate.strip():
        raise RequestError("query is empty; give an SQL condition, for example \"token = ' Monday'\"")
    store = Path(path).absolute()
    names = [_pattern(file) for file in token_files(store, manifest)]
    folders = [store / SEGMENTS, store / GROUPS]
    places = [place for folder in folders for place in (str(folder), _pattern(folder))]
    allowed = ", ".join("'" + place.replace("'", "''") + "'" for place in places)
    with duckdb.connect() as connection:
        connection.execute("; ".join((f"SET allowed_directories = [{allowed}]", *_SETTINGS)))
        try:
            tokens = connection.read_parquet(names, hive_partitioning=False)
        except duckdb.Error as error:
            raise _damaged(path, error) from None
        try:
            # a relation's filter is parsed as one expression: a second statement or an ORDER BY is an error
            yield tokens.filter(predicate)
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            raise _damaged(path, error) from None
        except duckdb.Error as error:
            raise _refused(predicate, error, tokens.columns) from None


def _pattern(path: Path) -> str:
    """Escapes a path, which DuckDB reads as a glob."""
    return re.sub(r"([*?[])", r"[\1]", str(path))


def _refused(predicate: str, error: Exception, columns: list[str]) -> RequestError:
    reason = _first_line(error)
    unknown = reason.split('"')[1] if reason.startswith("Referenced column") else ""
    return RequestError(f"query {predicate!r}: {reason}; columns: {', '.join(columns)}{nearest(unknown, columns)}")


def _damaged(path: str | os.PathLike[str], error: Exception) -> DataError:
    return DataError(f"the token table of {path} cannot be read ({_first_line(error)}); run workbench verify {path}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(" Error: ", 1)[-1].rstrip("!.")
