"""Columns of the token table in a store of several parts, each of which has the columns of its own texts.

A part's files keep the types of its texts. A store has the columns of all its parts, in the narrowest type that holds
the values of each exactly: whole numbers become floats beside floats, and rows of a part that lacks a column are null.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from workbench.corpus.layout import Sequences
from workbench.corpus.tokens import token_columns
from workbench.io.errors import DataError, RequestError
from workbench.store.groups import segment_tables
from workbench.store.manifest import Manifest, Segment
from workbench.store.token_table import read_schema

_Typed: TypeAlias = tuple[pa.DataType, str | os.PathLike[str]]
"""Type of a column, and the store that has it."""

_EXACT = 2**53  # whole numbers up to this size are floats, too
_DIGITS = {"int64": 19, "uint64": 20}
_MOST_DIGITS = 38
_WORDS = {
    "int64": "whole numbers",
    "uint64": "whole numbers above 2^63",
    "double": "floats",
    "string": "text",
    "bool": "true and false",
    "date32[day]": "dates",
    "time64[us]": "times",
    "timestamp[us]": "times of a date",
    "timestamp[us, tz=UTC]": "times of a date with a time zone",
}


def part_columns(path: str | os.PathLike[str], manifest: Manifest) -> dict[int, pa.Schema]:
    """Returns the columns of each part that has a committed segment. Opens one file for each part.

    Raises:
        DataError: A file that is missing or damaged.
    """
    first: dict[int, Segment] = {}
    for segment in manifest.segments:
        first.setdefault(segment.part, segment)
    tables = segment_tables(Path(path), first.values())
    return {part: read_schema(table).remove_metadata() for part, table in zip(first, tables, strict=True)}


def store_columns(path: str | os.PathLike[str], manifest: Manifest) -> pa.Schema | None:
    """Returns the columns of the store's token table; None for a store without segments. Opens a file for each part.

    Raises:
        DataError: A file that is missing or damaged, or parts that have no common columns.
    """
    schemas = list(part_columns(path, manifest).values())
    return common_columns(schemas, path) if schemas else None


def common_columns(schemas: Iterable[pa.Schema], path: str | os.PathLike[str]) -> pa.Schema:
    """Returns the columns of several parts. DataError, with the name `path`, where a column has no common type."""

    def conflict(name: str, first: _Typed, second: _Typed) -> DataError:
        return DataError(
            f"{path}: parts of the store have column {name!r} as {first[0]} and as {second[0]}; run workbench verify "
            "on it"
        )

    return _common_columns(((path, schema) for schema in schemas), conflict)


def _common_columns(
    schemas: Iterable[tuple[str | os.PathLike[str], pa.Schema]],
    conflict: Callable[[str, _Typed, _Typed], Exception],
) -> pa.Schema:
    """Columns of schemas with their places; `conflict` makes the error for a name of two types without a common one."""
    columns: dict[str, _Typed] = {}
    for place, schema in schemas:
        for field in schema:
            kind, first = columns.get(field.name, (pa.null(), place))
            common = _common_type(kind, field.type)
            if common is None:
                raise conflict(field.name, (kind, first), (field.type, place))
            columns[field.name] = (common, first if common.equals(kind) else place)
    return pa.schema([(name, kind) for name, (kind, _) in columns.items()])


def check_common_columns(stores: Sequence[tuple[Path, Manifest]]) -> pa.Schema:
    """Returns the columns that several stores have together.

    Raises:
        RequestError: A column that has no type which holds the values of all stores exactly.
    """
    recorded = [(path, manifest, part_columns(path, manifest)) for path, manifest in stores]

    def conflict(name: str, first: _Typed, second: _Typed) -> RequestError:
        found = " and ".join(f"{_words(kind)} in {place}" for kind, place in (first, second))
        return RequestError(f"stores: column {name!r} holds {found}; merge stores whose columns agree")

    columns = _common_columns(((path, schema) for path, _, parts in recorded for schema in parts.values()), conflict)
    for path, manifest, parts in recorded:
        for part, schema in parts.items():
            files = segment_tables(path, [segment for segment in manifest.segments if segment.part == part])
            for field in schema:
                rounded = pa.types.is_integer(field.type) and pa.types.is_floating(columns.field(field.name).type)
                if rounded and not all(_is_exact(low, high) for low, high in _ranges(files, field.name)):
                    raise RequestError(
                        f"column {field.name!r} holds whole numbers above 2^53 in {path} and floats in another store; "
                        "merge stores whose columns agree"
                    )
    return columns


def check_new_columns(path: str | os.PathLike[str], manifest: Manifest, part: int, sequences: Sequences) -> None:
    """Refuses a part whose columns do not fit the store's, before the model runs and before anything is written.

    They fit where each column has a type that holds the values of all parts exactly: equal types; whole numbers up to
    2^53 beside floats; whole numbers beside larger ones or decimals; a column that a part lacks or that has no values.

    Args:
        path: The store.
        manifest: Its manifest.
        part: Index of the part that the sequences belong to; if some of its segments are committed, their columns must
            be the same.
        sequences: Planned sequences of the part.

    Raises:
        RequestError: A column of another type, with its name, both types and the part that has the other one.
        DataError: A file of the store that is missing or damaged.
    """
    planned = token_columns(sequences, manifest.chosen)
    recorded = part_columns(path, manifest)
    resumed = part in recorded and sum(s.rows for s in manifest.segments if s.part == part) < manifest.parts[part].rows
    if resumed and not recorded[part].equals(planned):
        differing = sorted({*map(str, recorded[part])} ^ {*map(str, planned)})
        raise RequestError(
            f"the texts have other columns than those of {path} that they continue ({', '.join(differing)[:200]}); "
            "give the same texts, or choose another out"
        )
    for number, schema in recorded.items():
        for field in schema:
            index = planned.get_field_index(field.name)
            if number != part and index >= 0:
                files = segment_tables(Path(path), [segment for segment in manifest.segments if segment.part == number])
                _check_column(field, files, planned.field(index), sequences)


def _check_column(recorded: pa.Field, files: Sequence[Path], planned: pa.Field, sequences: Sequences) -> None:
    """Refuses a planned column that has no common type with the recorded one, or whole numbers that are no floats."""
    name, exact = recorded.name, _common_type(recorded.type, planned.type) is not None
    if pa.types.is_integer(recorded.type) and pa.types.is_floating(planned.type):
        exact = all(_is_exact(low, high) for low, high in _ranges(files, name))
    elif pa.types.is_floating(recorded.type) and pa.types.is_integer(planned.type):
        exact = _is_exact(*pc.min_max(_values(sequences, name)).as_py().values())  # pyright: ignore[reportAttributeAccessIssue]  # made at import
    if not exact:
        raise RequestError(
            f"append: column {name!r} holds {_words(planned.type)}, in the store {_words(recorded.type)}, and no type "
            "holds all of them exactly; give what the store has, or leave the column out in metadata="
        )


def _values(sequences: Sequences, name: str) -> pa.ChunkedArray:
    """Values of a column of whole numbers: of metadata, or of a label, whose other columns are never floats."""
    if name in sequences.metadata.column_names:
        return sequences.metadata[name]
    if name in sequences.labels:
        return pa.chunked_array([pa.array(sequences.labels[name])])
    return pc.struct_field(pc.list_flatten(sequences.spans[name]), "value")  # pyright: ignore[reportAttributeAccessIssue]


def _is_exact(low: int | None, high: int | None) -> bool:
    return low is None or high is None or -_EXACT <= low <= high <= _EXACT


def _ranges(files: Iterable[Path], name: str) -> Iterator[tuple[int, int]]:
    """Extremes of a column of whole numbers in each row group that has any."""
    for file in files:
        with pq.ParquetFile(file) as opened:
            metadata = opened.metadata
            index = opened.schema_arrow.get_field_index(name)
            for group in range(metadata.num_row_groups):
                statistics = metadata.row_group(group).column(index).statistics
                if statistics is not None and statistics.has_min_max:
                    yield statistics.min, statistics.max


def _common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both; None where there is none. Ranges are not looked at."""
    if first.equals(second) or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    kinds = {first, second}
    if kinds <= {pa.int64(), pa.uint64(), pa.float64()} and pa.float64() in kinds:
        return pa.float64()
    sizes = [size for kind in (first, second) if (size := _size(kind))]
    if len(sizes) < 2:
        return None
    whole, scale = (max(part) for part in zip(*sizes, strict=True))
    return pa.decimal128(whole + scale, scale) if whole + scale <= _MOST_DIGITS else None


def _size(kind: pa.DataType) -> tuple[int, int] | None:
    """Digits before and after the point."""
    if pa.types.is_decimal(kind):
        return kind.precision - kind.scale, kind.scale
    digits = _DIGITS.get(str(kind))
    return None if digits is None else (digits, 0)


def _words(kind: pa.DataType) -> str:
    """A column type in the words of its values."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _WORDS.get(str(kind), str(kind))
