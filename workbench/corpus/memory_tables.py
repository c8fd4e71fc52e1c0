"""Tables in memory as rows: pandas, pyarrow, and whatever speaks one of the exchange protocols of data frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import pyarrow as pa

from workbench.corpus.file_rows import values_of
from workbench.io.errors import RequestError, first_line

_EXPORTS = ("__arrow_c_stream__", "__dataframe__")
_IDS, _MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class TableRows:
    """Rows of a table as mappings; like a dataset it names its columns before it is read."""

    table: Any
    column_names: list[str]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if isinstance(self.table, Mapping):
            yield from _encoded_rows(self.table)
            return
        if _is_pandas(self.table):
            columns = [self.table.iloc[:, place] for place in range(len(self.column_names))]
            yield from (dict(zip(self.column_names, row, strict=True)) for row in zip(*columns, strict=True))
            return
        for batch in _batches(self.table):
            for row in zip(*map(values_of, batch.columns), strict=True):
                yield dict(zip(self.column_names, row, strict=True))


def is_table(source: Any) -> bool:
    """Returns True for a table, without reading or exporting it."""
    if isinstance(source, Mapping):
        return _IDS in source
    if _is_pandas(source) or isinstance(source, pa.Table | pa.RecordBatch | pa.RecordBatchReader):
        return True
    return any(hasattr(source, method) for method in _EXPORTS) and hasattr(source, "columns")  # costly if lazy


def table_rows(source: Any) -> TableRows | None:
    """Returns the rows of a table in memory; None for what is no table.

    Tables are pandas frames, Arrow's tables, batches and readers, the output of a tokenizer (`BatchEncoding`), and
    objects with `__arrow_c_stream__` (polars, DuckDB) or `__dataframe__` (the interchange protocol).

    Raises:
        RequestError: Two columns of one name, or a table that its own library cannot export.
    """
    if not is_table(source):
        return None
    if isinstance(source, Mapping):
        return TableRows(source, [_IDS, *([_MASK] if _MASK in source else [])])
    if _is_pandas(source):
        return TableRows(source, _distinct(list(map(str, source.columns))))
    if isinstance(source, pa.Table | pa.RecordBatch | pa.RecordBatchReader):
        return TableRows(source, _distinct(source.schema.names))
    table = _exported(source)
    return TableRows(table, _distinct(table.schema.names))


def masked_ids(ids: Any, mask: Any, place: str) -> Any:
    """Returns the token ids without padding, which may be on either side.

    Raises:
        RequestError: A mask of another length, or with a hole.
    """
    if mask is None:
        return ids
    ids, mask = (value.tolist() if hasattr(value, "tolist") else list(value) for value in (ids, mask))
    first, last = (mask.index(1), len(mask) - mask[::-1].index(1)) if 1 in mask else (0, 0)
    if len(mask) != len(ids) or any(value != 1 for value in mask[first:last]) or any(mask[:first] + mask[last:]):
        raise RequestError(
            f"{place}: attention_mask must have a 1 for each token and a 0 for padding before or after all of them, as "
            "long as input_ids; give the ids without a mask to record all of them"
        )
    return ids[first:last]


def _is_pandas(source: Any) -> bool:
    return type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "iloc") and hasattr(source, "columns")


def _encoded_rows(encoding: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a tokenizer's output: lists or tensors of one text, or of several."""
    values: tuple[Any, Any] = encoding[_IDS], encoding.get(_MASK)
    ids, mask = (value.tolist() if hasattr(value, "tolist") else value for value in values)
    if not isinstance(ids, list | tuple):
        raise RequestError(
            f"texts: input_ids is of type {type(ids).__name__}; lists or tensors of token ids are needed"
        )
    if ids and isinstance(ids[0], int):
        ids, mask = [ids], None if mask is None else [mask]
    if mask is not None and len(mask) != len(ids):
        raise RequestError(f"texts: input_ids has {len(ids)} rows and attention_mask {len(mask)}; give one for each")
    for number, row in enumerate(ids):
        yield {_IDS: row} if mask is None else {_IDS: row, _MASK: mask[number]}


def _batches(table: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(table, pa.RecordBatch):
        yield table
        return
    batches = iter(table.to_batches(max_chunksize=256) if isinstance(table, pa.Table) else table)
    for number in count():
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"texts: batch {number} of the table cannot be read: {first_line(error)}") from None
        if batch is None:
            return
        yield batch


def _exported(source: Any) -> pa.RecordBatchReader | pa.Table:
    """A table of another library in Arrow's form, by the first protocol that it has."""
    try:
        if hasattr(source, _EXPORTS[0]):
            return pa.RecordBatchReader.from_stream(source)
        from pyarrow.interchange import from_dataframe

        return from_dataframe(source)
    except Exception as error:  # each library raises its own kinds
        raise RequestError(
            f"texts: the {type(source).__name__} cannot be exported to Arrow ({first_line(error)}); pass lists or "
            "an Arrow table"
        ) from error


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"texts: two columns of the table are called {twice!r}; rename one")
    return names
