"""Token table of planned sequences: a row for each token, with its document's metadata and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from workbench.corpus.layout import Sequences
from workbench.corpus.places import LENGTH, NEXT
from workbench.corpus.spans import label_columns, label_tokens
from workbench.corpus.token_labels import label_array, label_fields
from workbench.corpus.tokenizer import TOKEN_SCHEMA

_END = 2**31 - 1  # beyond the last character of any text


def token_table(
    sequences: Sequences,
    first: int,
    last: int,
    *,
    row_offset: int,
    sequence_offset: int,
    document_offset: int,
    text_of: Callable[[np.ndarray], list[str]],
) -> pa.Table:
    """Returns the token table of sequences `first` to `last` (exclusive).

    Its columns are TOKEN_SCHEMA, those of the documents' kind (`token_labels`), the metadata, and for each label of
    spans `<label>`, the value of the span that contains the token, `<label>_span`, the number of that span, and
    `<label>_cut`, true where other tokens of the span are in another sequence or beyond `max_rows`. Texts, also those
    of metadata and spans, are dictionary-encoded. Cost: about 50 ns a row and column.

    Args:
        sequences: Sequences from `plan_sequences`.
        first: Index of the first sequence.
        last: Index after the last sequence.
        row_offset: Rows that the store held before: row i of the plan is row `row_offset + i` of the store.
        sequence_offset: The same for sequences.
        document_offset: The same for documents.
        text_of: Returns the texts of an array of unique token ids.
    """
    starts = np.asarray(sequences.starts[first : last + 1])
    rows = slice(int(starts[0]), int(starts[-1]))
    lengths = np.diff(starts)
    row = np.arange(rows.start, rows.stop)
    document = np.asarray(sequences.document[rows])
    ids, where = np.unique(sequences.token_ids[rows], return_inverse=True)
    char_start, char_end = np.asarray(sequences.char_start[rows]), np.asarray(sequences.char_end[rows])
    columns = [
        row + row_offset,
        np.repeat(np.arange(first, last), lengths) + sequence_offset,
        row - np.repeat(starts[:-1], lengths),
        document + document_offset,
        sequences.token_ids[rows],
        _dictionary(text_of(ids), where),
        pa.array(char_start, mask=char_start < 0),
        pa.array(char_end, mask=char_end < 0),
        np.isin(ids, list(sequences.special_ids))[where],
    ]
    arrays = [
        values if isinstance(values, pa.Array) else pa.array(values, column.type)
        for values, column in zip(columns, TOKEN_SCHEMA, strict=True)
    ]
    fields = label_fields(sequences.labels)
    arrays += [label_array(field.name, sequences.labels[field.name][rows], sequences.roles) for field in fields]
    present, inverse = np.unique(document, return_inverse=True)
    for column in _columns_of(present, sequences.metadata):
        column = column.dictionary_encode() if pa.types.is_string(column.type) else column
        arrays.append(column.take(pa.array(inverse)))
    visible = _visible(sequences, starts, document)
    for spans in _columns_of(present, sequences.spans):
        value, number, cut = label_tokens(spans, inverse, char_start, char_end, visible)
        arrays += [value.dictionary_encode() if pa.types.is_string(value.type) else value, number, cut]
    return pa.Table.from_arrays(arrays, schema=token_columns(sequences))


def token_columns(sequences: Sequences, chosen: bool = False) -> pa.Schema:
    """Returns names and types of the columns of the token table of planned sequences, or of chosen rows of them."""
    places = [pa.field(LENGTH, pa.int32()), pa.field(NEXT, pa.int32())] if chosen else []
    fields = [*TOKEN_SCHEMA, *places, *label_fields(sequences.labels)]
    fields += [pa.field(field.name, _stored(field.type)) for field in sequences.metadata.schema]
    for field in sequences.spans.schema:
        value = field.type.value_type.field("value").type
        fields += map(pa.field, label_columns(field.name), (_stored(value), pa.int32(), pa.bool_()))
    return pa.schema(fields)


def _stored(column: pa.DataType) -> pa.DataType:
    """The type in the token table: text is dictionary-encoded."""
    return pa.dictionary(pa.int32(), pa.string()) if pa.types.is_string(column) else column


def _visible(
    sequences: Sequences, starts: Int64[np.ndarray, " sequence"], document: Int64[np.ndarray, " row"]
) -> tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " row"]]:
    """Characters that each row's sequence shows of its document, as `label_tokens` takes them."""
    first, last, total = int(starts[0]), int(starts[-1]), len(sequences.token_ids)
    begins = np.union1d(starts[:-1], first + 1 + np.flatnonzero(np.diff(document)))
    ends = np.append(begins[1:], last)
    previous, following = np.maximum(begins - 1, 0), np.minimum(ends, total - 1)
    continued = (begins > 0) & (sequences.document[previous] == sequences.document[begins])
    continues = (ends < total) & (sequences.document[following] == sequences.document[ends - 1])
    before = np.where(continued, sequences.char_end[previous], 0)
    # an added token stands where the text after it begins
    after = np.where(continues, sequences.char_start[following], _END)
    if last == total and sequences.cut_at is not None:
        after[-1] = sequences.cut_at
    lengths = ends - begins
    return np.repeat(before.astype(np.int64), lengths), np.repeat(after.astype(np.int64), lengths)


def _columns_of(documents: np.ndarray, table: pa.Table) -> Iterator[pa.Array]:
    """Columns of `table` with the entries of `documents`, which are in ascending order."""
    # Slice, then take: from a column of many chunks `take` would first copy the whole of it.
    part = table.slice(documents[0], documents[-1] - documents[0] + 1)
    for name in part.column_names:
        yield part[name].combine_chunks().take(pa.array(documents - documents[0]))


def _dictionary(texts: list[str], where: np.ndarray) -> pa.DictionaryArray:
    """`texts[where]`, dictionary-encoded; equal texts become one entry, as pandas' categories require."""
    place: dict[str, int] = {}
    merged = np.array([place.setdefault(text, len(place)) for text in texts], np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(merged[where], pa.int32()), pa.array(list(place), pa.string()))
