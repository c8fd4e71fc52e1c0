"""Columns of metadata and of labelled spans, one row for each document, written as Arrow tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from workbench.corpus.spans import span_type
from workbench.corpus.values import ColumnType, from_spool, to_spool

_BATCH = 256  # documents in memory at a time


class ColumnSpool:
    """Metadata or spans of documents as JSON lines: the type of a column is known only after the last document."""

    def __init__(self, lines: TextIO, spans: bool) -> None:
        self.lines, self.spans = lines, spans
        self.types: dict[str, ColumnType] = {}  # columns in order of appearance

    def add(self, columns: Mapping[str, Any], place: str) -> None:
        """Adds a document: column to value, or label to spans; `place` names the document in errors."""
        line: dict[str, Any] = {}
        for name, value in columns.items():
            column = self.types.get(name) or self.types.setdefault(name, ColumnType(name))
            for item in [span.value for span in value] if self.spans else [value]:
                column.add(item, place)
            if self.spans:  # starts, ends and values: JSON reads three lists faster than many small ones
                starts, ends, values = zip(*value, strict=True) if value else ((), (), ())
                line[name] = [starts, ends, [to_spool(item) for item in values]]
            else:
                line[name] = to_spool(value)
        self.lines.write(json.dumps(line) + "\n")

    def write_table(self, path: Path) -> None:
        """Writes a row for each document in Arrow's file format; no file where there are no columns."""
        types = {name: column.arrow for name, column in self.types.items()}
        schema = pa.schema([(name, span_type(type) if self.spans else type) for name, type in types.items()])
        if not schema.names:
            return
        self.lines.seek(0)
        with pa.ipc.new_file(path, schema) as sink:
            while records := [json.loads(line) for line in islice(self.lines, _BATCH)]:
                arrays = [_array([record.get(field.name) for record in records], field.type) for field in schema]
                sink.write_batch(pa.record_batch(arrays, schema=schema))


def open_table(path: Path) -> pa.Table:
    """Returns what `write_table` wrote, mapped from the file; a table without columns where it wrote none."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all() if path.exists() else pa.schema([]).empty_table()


def _array(values: list[Any], column_type: pa.DataType) -> pa.Array:
    """Values of one column; for a label, the starts, ends and values of the spans of each document."""
    if not pa.types.is_list(column_type):
        return pa.array([from_spool(value, column_type) for value in values], column_type)
    fields = list(column_type.value_type)
    parts = [list(chain.from_iterable(spans[i] for spans in values if spans)) for i in range(len(fields))]
    spans = pa.StructArray.from_arrays(
        [_array(part, field.type) for part, field in zip(parts, fields, strict=True)], fields=fields
    )
    first = np.cumsum([0, *(len(spans[0]) if spans else 0 for spans in values)])
    return pa.ListArray.from_arrays(pa.array(first, pa.int32()), spans, type=column_type)
