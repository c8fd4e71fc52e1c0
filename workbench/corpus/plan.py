"""Documents cut into sequences, on disk and before any forward pass, so that rows, lengths and disk need are known."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int32, Int64

from workbench.corpus.sources import Document
from workbench.corpus.spans import label_tokens, span_type
from workbench.corpus.tokenizer import TOKEN_SCHEMA, AddedTokens, Encoding, encode, replace_surrogates, special_ids
from workbench.io.errors import RequestError

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000
_COLUMNS = {
    "token_ids": np.int32,
    "char_start": np.int32,
    "char_end": np.int32,
    "document": np.int64,
    "starts": np.int64,
}
_COUNTS = "counts.json"


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of token ids, ready for the model: arrays over rows, mapped from files, and one row of metadata and
    spans for each document."""

    token_ids: Int32[np.ndarray, " row"]
    char_start: Int32[np.ndarray, " row"]
    """First character of the token in its document; -1: the tokenizer does not tell. An added token stands, with
    no width, before the text token that follows it, or at the text's end."""
    char_end: Int32[np.ndarray, " row"]
    """One past the token's last character; -1: the tokenizer does not tell."""
    document: Int64[np.ndarray, " row"]
    """Index of the document in its source; documents without tokens leave a gap."""
    starts: Int64[np.ndarray, " sequences_plus_1"]
    """First row of each sequence, and the number of rows."""
    metadata: pa.Table
    """One row for each document read, skipped ones included; no columns where the texts have no metadata."""
    spans: pa.Table
    """The same for labelled spans: a column for each label, of `span_type`, empty lists where there is none."""
    special_ids: frozenset[int]
    """Ids of tokens that are not text."""
    documents: int
    """Documents read."""
    skipped_documents: int
    """Documents without a token of their own, such as empty texts."""
    cut_documents: int
    """Documents longer than the context, their added tokens included."""
    replaced_characters: int
    """Lone surrogates and invalid UTF-8 bytes, each tokenized as U+FFFD."""

    @property
    def lengths(self) -> Int64[np.ndarray, " sequence"]:
        """Rows of each sequence."""
        return np.diff(self.starts)


def plan_sequences(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    context: int,
    added: AddedTokens,
    packed: bool,
    max_rows: int | None,
    workdir: str | Path,
    vocab: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sequences:
    """Tokenize all documents, once, and lay them into sequences of at most `context` tokens.

    Documents are numbered from 0 without a gap, as `read_documents` does.
    Every sequence begins with `added.prefix`, the continuation of a long document too; `added.suffix` follows the
    last token of each document. Documents given as token ids get neither. Each document begins a sequence, or, if
    `packed`, follows the one before with its own prefix, and sequences are cut at exactly `context`.
    With `max_rows` no more is read than needed, and the last sequence is cut to give exactly that many rows.

    `vocab` is the number of ids the model knows; `progress` is called with how many more rows are planned.
    The arrays lie in files in `workdir`, which the caller removes when done: 20 bytes a row, 8 a sequence. Memory
    does not grow with the corpus, only with its longest document. The order of documents alone decides the result.
    Raises RequestError: no tokenizer for text, an id out of range, no room in the context, nothing to record.
    """
    if context <= len(added.prefix):
        raise RequestError(
            f"context={context} leaves no room for text, since added tokens ({len(added.prefix)}) begin each sequence; "
            f"use at least {len(added.prefix) + 1}, or bos='never'"
        )
    _check_ids(np.array(added.prefix + added.suffix, np.int64), vocab, "the tokenizer's special tokens")
    workdir = Path(workdir)
    max_rows = sys.maxsize if max_rows is None else max_rows
    stream = iter(documents)
    count = skipped = cut = replaced = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(workdir / f"{name}.bin", "wb")) for name in _COLUMNS}
        spools = {
            name: _Spool(stack.enter_context(open(workdir / f"{name}.jsonl", "w+", encoding="ascii")), name == "spans")
            for name in ("metadata", "spans")
        }
        layout = _Layout(files, context=context, packed=packed, max_rows=max_rows)
        while batch := _take(stream, min(_BATCH_CHARACTERS, max_rows - layout.rows), added):
            before = layout.rows
            for document, encoding, bad in _encode_batch(batch, tokenizer):
                if layout.rows == max_rows:
                    break
                count += 1
                replaced += bad
                spools["metadata"].add(document.metadata)
                spools["spans"].add(document.spans)
                _check_ids(encoding.ids, vocab, f"document {document.index}")
                if encoding.ids.size == 0:
                    skipped += 1
                    continue
                around = AddedTokens() if document.text is None else added
                body = _with_suffix(encoding, around.suffix, document.text)
                cut += len(around.prefix) + body.ids.size > context
                layout.add(document.index, body, np.array(around.prefix, np.int32))
            if progress is not None:
                progress(layout.rows - before)
        layout.finish()
        if layout.rows == 0:
            raise RequestError(
                f"texts: nothing to record; {count} documents were read and none has a token"
                if count
                else "texts: nothing to record; there are no documents"
            )
        for name, spool in spools.items():
            spool.write_table(workdir / f"{name}.arrow")
    counts = {
        "special_ids": sorted(special_ids(tokenizer, added)),
        "documents": count,
        "skipped_documents": skipped,
        "cut_documents": cut,
        "replaced_characters": replaced,
    }
    (workdir / _COUNTS).write_text(json.dumps(counts))
    return open_sequences(workdir)


def open_sequences(workdir: str | Path) -> Sequences:
    """What `plan_sequences` left in `workdir`; another process may open it too, for as long as the folder is there."""
    workdir = Path(workdir)
    counts = json.loads((workdir / _COUNTS).read_text())
    return Sequences(
        **{name: np.memmap(workdir / f"{name}.bin", dtype, mode="r") for name, dtype in _COLUMNS.items()},
        **{name: _open_table(workdir / f"{name}.arrow") for name in ("metadata", "spans")},
        **{**counts, "special_ids": frozenset(counts["special_ids"])},
    )


class _Layout:
    """Writes the rows of one document after another, opening a new sequence where one is full."""

    def __init__(self, files: Mapping[str, BinaryIO], *, context: int, packed: bool, max_rows: int) -> None:
        self.files, self.context, self.packed, self.max_rows = files, context, packed, max_rows
        self.rows = 0
        self.free = 0  # rows left in the open sequence

    def add(self, document: int, body: Encoding, prefix: np.ndarray) -> None:
        """Lay `body` down, with `prefix` where the document begins and wherever a sequence begins within it."""
        if not self.packed:
            self.free = 0
        done = 0
        while done < body.ids.size and self.rows < self.max_rows:
            if self.free == 0:
                self._write("starts", self.rows)
                self.free = min(self.context, self.max_rows - self.rows)
            # The prefix may fill what was left; the text then begins in the next sequence, after another one.
            lead = prefix[: self.free]
            part = slice(done, done + self.free - lead.size)
            offset = np.full(lead.size, body.char_start[done])
            self._write("token_ids", lead, body.ids[part])
            self._write("char_start", offset, body.char_start[part])
            self._write("char_end", offset, body.char_end[part])
            written = lead.size + body.ids[part].size
            self._write("document", np.full(written, document))
            self.rows += written
            self.free -= written
            done = part.stop

    def finish(self) -> None:
        self._write("starts", self.rows)

    def _write(self, name: str, *values: Any) -> None:
        for part in values:
            self.files[name].write(np.asarray(part, _COLUMNS[name]).tobytes())


def _take(stream: Iterator[Document], rows: int, added: AddedTokens) -> list[Document]:
    """The next batch: documents that may fill `rows`, so that a document nobody needs is hardly ever asked for.

    A token is seldom shorter than a character; where it is, one batch reads a little too far.
    """
    batch: list[Document] = []
    while rows > 0 and len(batch) < _BATCH_DOCUMENTS and (document := next(stream, None)) is not None:
        batch.append(document)
        rows -= len(document.token_ids if document.text is None else document.text)
        rows -= len(added.prefix) + len(added.suffix)
    return batch


def _encode_batch(batch: list[Document], tokenizer: Any) -> Iterator[tuple[Document, Encoding, int]]:
    """Each document with its tokens and the number of its characters that had to be replaced."""
    cleaned = [replace_surrogates(document.text) for document in batch if document.text is not None]
    if cleaned and tokenizer is None:
        raise RequestError("the model has no tokenizer; pass tokenizer= or give lists of token ids")
    encoded = zip(encode(tokenizer, [text for text, _ in cleaned]) if cleaned else [], cleaned, strict=True)
    for document in batch:
        if document.text is None:
            yield document, _given(document), 0
        else:
            encoding, (_, replaced) = next(encoded)
            yield document, encoding, replaced


def _given(document: Document) -> Encoding:
    ids = np.array(document.token_ids, dtype=object)  # object: an id beyond 64 bits must be named, not overflow
    _check_ids(ids, None, f"document {document.index}")
    unknown = np.full(ids.size, -1, np.int32)
    return Encoding(ids.astype(np.int32), unknown, unknown)


def _check_ids(ids: np.ndarray, vocab: int | None, whose: str) -> None:
    limit = 2**31 if vocab is None else vocab
    if ids.size and not (ids.min() >= 0 and ids.max() < limit):
        wrong = next(token_id for token_id in ids.tolist() if not 0 <= token_id < limit)
        raise RequestError(
            f"{whose}: token id {wrong} is not one of the model's, 0 to {limit - 1}; was another tokenizer used?"
        )


def _with_suffix(encoding: Encoding, suffix: tuple[int, ...], text: str | None) -> Encoding:
    if not suffix:
        return encoding
    end = np.full(len(suffix), -1 if encoding.char_end[-1] < 0 else len(text), np.int32)
    return Encoding(
        np.concatenate([encoding.ids, np.array(suffix, np.int32)]),
        np.concatenate([encoding.char_start, end]),
        np.concatenate([encoding.char_end, end]),
    )


class _Spool:
    """Metadata, or spans, on their way to a table: the type of a column is known only when the last document has been
    read."""

    def __init__(self, lines: Any, spans: bool) -> None:
        self.lines, self.spans = lines, spans
        self.kinds: dict[str, set[str]] = {}  # column -> kinds of value seen, columns in order of appearance

    def add(self, columns: Mapping[str, Any]) -> None:
        """What is known of the next document: column to value, or label to spans."""
        for name, value in columns.items():
            values = [span.value for span in value] if self.spans else [value]
            self.kinds.setdefault(name, set()).update(*map(_kind, values))
        # Starts, ends and values: JSON reads three lists faster than many small ones
        line = {label: list(zip(*spans, strict=True)) for label, spans in columns.items()} if self.spans else columns
        self.lines.write(json.dumps(dict(line)) + "\n")

    def write_table(self, path: Path) -> None:
        """A row for each document, in Arrow's file format; no file where there are no columns."""
        types = {name: _column_type(kinds) for name, kinds in self.kinds.items()}
        schema = pa.schema([(name, span_type(type) if self.spans else type) for name, type in types.items()])
        if not schema.names:
            return
        self.lines.seek(0)
        with pa.ipc.new_file(path, schema) as sink:
            while records := [json.loads(line) for line in islice(self.lines, _BATCH_DOCUMENTS)]:
                arrays = [_array([record.get(field.name) for record in records], field.type) for field in schema]
                sink.write_batch(pa.record_batch(arrays, schema=schema))


def _open_table(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all() if path.exists() else pa.schema([]).empty_table()


def _array(values: list[Any], column_type: pa.DataType) -> pa.Array:
    """What a spool's lines hold of one column; of a label, the starts, ends and values of each document's spans."""
    if not pa.types.is_list(column_type):
        return pa.array([_cast(value, column_type) for value in values], column_type)
    fields = list(column_type.value_type)
    parts = [list(chain.from_iterable(spans[i] for spans in values if spans)) for i in range(len(fields))]
    spans = pa.StructArray.from_arrays(
        [_array(part, field.type) for part, field in zip(parts, fields, strict=True)], fields=fields
    )
    first = np.cumsum([0, *(len(spans[0]) if spans else 0 for spans in values)])
    return pa.ListArray.from_arrays(pa.array(first, pa.int32()), spans, type=column_type)


def _kind(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return ("beyond int64",)
    return (type(value).__name__,)


def _column_type(kinds: set[str]) -> pa.DataType:
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int"}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {"int", "float"} else pa.string()


def _cast(value: Any, column_type: pa.DataType) -> Any:
    """`value` in a column of `column_type`; in a column of mixed types everything but strings is JSON text."""
    if value is None or isinstance(value, str):
        return value
    if column_type == pa.string():
        return json.dumps(value)
    return float(value) if column_type == pa.float64() else value


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
    """The token table of sequences `first` to `last` (exclusive): TOKEN_SCHEMA, then the columns of metadata, then for
    each label of spans `<label>`, the value of the span that the token lies in, and `<label>_span`, its number.

    The offsets are what the store held before these sequences were planned: row i of the plan is row
    `row_offset + i` of the store, and so for sequences and documents. `text_of` gives the texts of an array of
    unique token ids. Texts, also those of metadata and spans, are dictionary-encoded. Cost: about 50 ns a row and
    column.
    """
    starts = np.asarray(sequences.starts[first : last + 1])
    rows = slice(int(starts[0]), int(starts[-1]))
    lengths = np.diff(starts)
    row = np.arange(rows.start, rows.stop)
    document = np.asarray(sequences.document[rows])
    ids, where = np.unique(sequences.token_ids[rows], return_inverse=True)
    char_start, char_end = np.asarray(sequences.char_start[rows]), np.asarray(sequences.char_end[rows])
    own = [
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
        for values, column in zip(own, TOKEN_SCHEMA, strict=True)
    ]
    schema = TOKEN_SCHEMA
    present, inverse = np.unique(document, return_inverse=True)
    for name, column in _columns_of(present, sequences.metadata):
        column = column.dictionary_encode() if pa.types.is_string(column.type) else column
        schema = schema.append(pa.field(name, column.type))
        arrays.append(column.take(pa.array(inverse)))
    for label, spans in _columns_of(present, sequences.spans):
        value, number = label_tokens(spans, inverse, char_start, char_end)
        value = value.dictionary_encode() if pa.types.is_string(value.type) else value
        schema = schema.append(pa.field(label, value.type)).append(pa.field(f"{label}_span", number.type))
        arrays += [value, number]
    return pa.Table.from_arrays(arrays, schema=schema)


def _columns_of(documents: np.ndarray, table: pa.Table) -> Iterator[tuple[str, pa.Array]]:
    """Each column of `table` with the entries of `documents`, which rise."""
    # Slice, then take: from a column of many chunks `take` would first copy the whole of it.
    part = table.slice(documents[0], documents[-1] - documents[0] + 1)
    for name in part.column_names:
        yield name, part[name].combine_chunks().take(pa.array(documents - documents[0]))


def _dictionary(texts: list[str], where: np.ndarray) -> pa.DictionaryArray:
    """`texts[where]`, dictionary-encoded; equal texts become one entry, as pandas' categories require."""
    place: dict[str, int] = {}
    merged = np.array([place.setdefault(text, len(place)) for text in texts], np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(merged[where], pa.int32()), pa.array(list(place), pa.string()))


def segment_plan(lengths: Int[np.ndarray, " sequence"], segment_rows: int) -> list[tuple[int, int]]:
    """Consecutive sequences, as (first, last exclusive), that make segments of at most `segment_rows` rows.

    A sequence longer than that has a segment of its own.
    """
    ends = np.cumsum(lengths)
    plan: list[tuple[int, int]] = []
    first = rows = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, rows + segment_rows, side="right")))
        plan.append((first, last))
        first, rows = last, int(ends[last - 1])
    return plan


def batch_plan(lengths: Int[np.ndarray, " sequence"], batch_tokens: int) -> list[Int64[np.ndarray, " batch"]]:
    """Every sequence once, in batches of similar length: sequences times the longest is at most `batch_tokens`.

    Longest first, so that what does not fit in memory fails at once; equal lengths in order. A sequence longer
    than `batch_tokens` has a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    plan: list[np.ndarray] = []
    first = 0
    while first < len(order):
        size = max(1, batch_tokens // int(lengths[order[first]]))
        plan.append(order[first : first + size])
        first += size
    return plan


def digest(token_ids: Int[np.ndarray, " row"], lengths: Int[np.ndarray, " sequence"]) -> str:
    """SHA-256, in hex, of what the model is given: the sequences' lengths and token ids, on any machine the same."""
    state = hashlib.sha256(len(lengths).to_bytes(8, "little"))
    state.update(np.ascontiguousarray(lengths, "<i8"))
    state.update(np.ascontiguousarray(token_ids, "<i4"))
    return state.hexdigest()
