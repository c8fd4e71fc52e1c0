"""Place of each token in its sequence, counted from the end: columns of every token table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from workbench.corpus.tokenizer import TOKEN_SCHEMA

PLACE_SCHEMA = pa.schema([("sequence_length", pa.int32()), ("position_from_end", pa.int32()), ("is_last", pa.bool_())])
"""Tokens of the row's sequence; tokens after it in the sequence; true for the last one.

They follow TOKEN_SCHEMA. Stores of whole sequences compute them from `sequence`; stores of chosen rows have the first.
"""

LENGTH = PLACE_SCHEMA.names[0]
NEXT = "next_token_id"
"""Column of a store of chosen rows: the id of the token after the row's in its sequence and document; null: none."""


def add_places(table: pa.Table, chosen: bool = False) -> pa.Table:
    """Returns a token table with the columns of PLACE_SCHEMA, except those that texts of an older store have.

    Args:
        table: Token table of whole sequences, or of chosen rows with their `sequence_length`.
        chosen: True for chosen rows.
    """
    position = table["position"].to_numpy()
    if chosen:
        length = table[LENGTH].to_numpy()
    else:
        sequence = table["sequence"].to_numpy()
        starts = np.flatnonzero(np.diff(sequence, prepend=-1))
        counts = np.diff(starts, append=len(sequence))
        length = np.repeat(counts, counts)
    from_end = (length - 1 - position).astype(np.int32)
    columns = (length.astype(np.int32), from_end, from_end == 0)
    at = len(TOKEN_SCHEMA) + chosen
    for field, values in zip(PLACE_SCHEMA, columns, strict=True):
        if field.name not in table.column_names:
            table = table.add_column(at, field, pa.array(values, field.type))
            at += 1
    return table


def with_places(schema: pa.Schema) -> pa.Schema:
    """Returns the columns of a token table after `add_places`."""
    at = len(TOKEN_SCHEMA)
    first, rest = list(schema)[:at], list(schema)[at:]
    if rest and rest[0].name == LENGTH:
        first, rest = [*first, rest[0]], rest[1:]
    return pa.schema([*first, *(field for field in PLACE_SCHEMA if field.name not in schema.names), *rest])
