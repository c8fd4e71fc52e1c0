"""Chosen rows of a recording: the model sees every token, and only the rows that a condition selects are stored."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, Int64

from workbench.corpus.layout import Sequences
from workbench.corpus.places import LENGTH, NEXT, add_places
from workbench.corpus.tokenizer import TOKEN_SCHEMA, token_texts
from workbench.corpus.tokens import token_table
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.sites.settings import Recording
from workbench.store.query import select_planned
from workbench.store.token_table import parquet_options

_FILE = "chosen.bin"
_BLOCK_ROWS = 1 << 16  # of the planned token table in memory
_SEGMENT_TOKENS = 1 << 20  # that the model sees for one segment: what an interrupted recording may lose


def choose_rows(settings: Recording, model: Model, sequences: Sequences, folder: Path) -> None:
    """Writes the planned rows that `where` and `keep` select into `folder`; nothing where both are None.

    Raises:
        RequestError: A condition that DuckDB refuses, or that selects no row.
    """
    condition = _condition(settings)
    if condition is None:
        return
    file = folder / "planned.parquet"
    _write_tokens(model, sequences, file)
    try:
        rows = select_planned(file, condition)
    finally:
        file.unlink()
    if not len(rows):
        chosen = " and ".join(f"{name}={value!r}" for name in ("where", "keep") if (value := getattr(settings, name)))
        raise RequestError(
            f"{chosen} selects none of the {len(sequences.token_ids):,} tokens of the texts; try the condition on a "
            "store of a few of them with store.where"
        )
    rows.astype(np.int64).tofile(folder / _FILE)


def chosen_rows(folder: Path) -> Int64[np.ndarray, " row"] | None:
    """Returns the planned rows that are stored, ascending; None: all."""
    file = folder / _FILE
    return np.memmap(file, np.int64, mode="r") if file.exists() else None


def chosen_segments(
    counts: Int[np.ndarray, " sequence"], lengths: Int[np.ndarray, " sequence"], segment_rows: int
) -> list[tuple[int, int]]:
    """Divides consecutive sequences into segments of at most `segment_rows` chosen rows, each with at least one.

    A segment takes about a million tokens of the model at most, whatever few of them are chosen.
    """
    starts: list[int] = []
    rows = tokens = 0
    for index in np.flatnonzero(counts).tolist():
        count, length = int(counts[index]), int(lengths[index])
        if not starts or rows + count > segment_rows or tokens + length > _SEGMENT_TOKENS:
            starts.append(index if starts else 0)
            rows = tokens = 0
        rows, tokens = rows + count, tokens + length
    return list(zip(starts, [*starts[1:], len(counts)], strict=True))


def chosen_digest(planned: str, rows: Int64[np.ndarray, " row"]) -> str:
    """Returns the SHA-256 of a segment's tokens, of which `planned` is the digest, and of its chosen rows."""
    return hashlib.sha256(planned.encode() + np.ascontiguousarray(rows, "<i8").tobytes()).hexdigest()


def chosen_table(table: pa.Table, rows: Int64[np.ndarray, " row"], first_row: int) -> pa.Table:
    """Returns the token table of chosen rows, with `sequence_length` and `next_token_id`.

    Args:
        table: Token table of whole sequences.
        rows: Chosen rows of it.
        first_row: Number in the store of the first chosen row.
    """
    ids, sequence, document = (table[name].to_numpy() for name in ("token_id", "sequence", "document"))
    following = np.append((sequence[1:] == sequence[:-1]) & (document[1:] == document[:-1]), False)
    after = pa.array(np.append(ids[1:], 0).astype(np.int32), mask=~following)
    at = len(TOKEN_SCHEMA)
    table = table.add_column(at, pa.field(LENGTH, pa.int32()), add_places(table)[LENGTH])
    table = table.add_column(at + 1, pa.field(NEXT, pa.int32()), after).take(pa.array(rows))
    table = table.set_column(0, table.schema.field("row"), pa.array(np.arange(first_row, first_row + len(rows))))
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # without the entries of other rows
            table = table.set_column(index, field, table[field.name].cast(pa.string()).dictionary_encode())
    return table


def _condition(settings: Recording) -> str | None:
    if settings.keep is None:
        return settings.where or None
    conditions = [settings.where] if settings.where else []
    from_start = [int(position) for position in settings.keep if int(position) >= 0]
    from_end = [-1 - int(position) for position in settings.keep if int(position) < 0]
    places = {"position": from_start, "position_from_end": from_end}
    inside = [f"{name} IN ({', '.join(map(str, places[name]))})" for name in places if places[name]]
    conditions.append(" OR ".join(inside))
    return " AND ".join(f"({condition}\n)" for condition in conditions)


def _write_tokens(model: Model, sequences: Sequences, file: Path) -> None:
    """The token table of all planned tokens as Parquet, a block of sequences at a time."""
    starts = np.asarray(sequences.starts)
    text_of = partial(token_texts, model.tokenizer)
    writer, first = None, 0
    try:
        while first < len(starts) - 1:
            last = max(first + 1, int(np.searchsorted(starts, starts[first] + _BLOCK_ROWS, side="right")) - 1)
            offsets = {"row_offset": 0, "sequence_offset": 0, "document_offset": 0}
            table = add_places(token_table(sequences, first, last, text_of=text_of, **offsets))
            writer = writer or pq.ParquetWriter(file, table.schema, **parquet_options(table.schema))
            writer.write_table(table.combine_chunks())
            first = last
    finally:
        if writer is not None:
            writer.close()
