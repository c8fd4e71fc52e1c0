"""Columns of the token table that the kind of a document gives: turns of a chat, steps of a generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int32

from workbench.corpus.document import Document
from workbench.corpus.tokenizer import Encoding

LABEL_COLUMNS = {
    "role": pa.dictionary(pa.int32(), pa.string()),
    "turn": pa.int32(),
    "generated": pa.bool_(),
    "step": pa.int32(),
}
"""Columns and their types: `role` and `turn` of the message whose content a token is part of, null in the template's
own text; `generated` and the `step` that made the token, null in the prompt."""

NONE = -1
"""In the arrays of planned tokens: no value."""


def piece_labels(
    document: Document, piece: Encoding, columns: Sequence[str], roles: dict[str, int]
) -> dict[str, Int32[np.ndarray, " position"]]:
    """Returns the labels of some tokens of a document, `NONE` where they have none.

    Args:
        document: The document.
        piece: Its tokens, all of them where it is given as token ids.
        columns: Columns of LABEL_COLUMNS to label.
        roles: Codes of the roles so far; new ones are added.
    """
    size = piece.ids.size
    labels = {name: np.full(size, NONE, np.int32) for name in columns}
    starts, ends = piece.char_start, piece.char_end
    for turn in document.turns or ():
        inside = slice(int(np.searchsorted(ends, turn.start, "right")), int(np.searchsorted(starts, turn.end, "left")))
        wide = ends[inside] > starts[inside]
        labels["role"][inside] = np.where(wide, roles.setdefault(turn.role, len(roles)), labels["role"][inside])
        labels["turn"][inside] = np.where(wide, turn.number, labels["turn"][inside])
    if document.prompt_tokens is not None:
        step = np.arange(size, dtype=np.int32) - document.prompt_tokens
        labels["step"] = np.where(step < 0, NONE, step).astype(np.int32)
        labels["generated"] = (step >= 0).astype(np.int32)
    return labels


def label_array(name: str, values: Int32[np.ndarray, " row"], roles: Sequence[str]) -> pa.Array:
    """Returns the column of the token table for labels of planned tokens."""
    column = pa.array(values, mask=np.asarray(values) == NONE)
    if name == "role":
        return pa.DictionaryArray.from_arrays(column, pa.array(list(roles), pa.string()))
    return column.cast(LABEL_COLUMNS[name])


def label_fields(columns: Mapping[str, object] | Sequence[str]) -> list[pa.Field]:
    """Returns the fields of these columns, in the order of LABEL_COLUMNS."""
    return [pa.field(name, kind) for name, kind in LABEL_COLUMNS.items() if name in columns]
