"""Documents cut into sequences, on disk and before any forward pass, so that rows, lengths and disk need are known."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int32, Int64

from workbench.corpus.columns import ColumnSpool, open_table
from workbench.corpus.document import Document
from workbench.corpus.pieces import PIECE, encode_long
from workbench.corpus.spans import label_columns
from workbench.corpus.token_labels import LABEL_COLUMNS, NONE, piece_labels
from workbench.corpus.tokenizer import (
    AddedTokens,
    Encoding,
    encode,
    replace_surrogates,
    special_ids,
    with_whole_offsets,
)
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.files import sha256_bytes, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 18
_COLUMNS = {
    "token_ids": np.int32,
    "char_start": np.int32,
    "char_end": np.int32,
    "document": np.int64,
    "starts": np.int64,
}
_COUNTS = "counts.json"
_COUNTED = (
    "documents",
    "skipped_documents",
    "cut_documents",
    "documents_with_added_tokens",
    "replaced_characters",
)


@dataclass(frozen=True)
class Layout:
    """Settings that turn documents into sequences."""

    context: int
    """Longest sequence in tokens, added tokens included."""
    added: AddedTokens
    """Every sequence begins with the prefix, the continuation of a long document too; the suffix follows the last token
    of each document. Neither is added to a text that has it already, nor to documents given as token ids. A chat begins
    and ends as its template writes it; its continuation begins with the prefix if the chat does."""
    packed: bool = False
    """Each document follows the one before, with its own prefix, and sequences are cut at exactly `context`. Otherwise
    each document begins a sequence."""
    max_rows: int | None = None
    """Number of rows after which reading stops; the last sequence is cut to give exactly that many. None: no limit."""
    vocab: int | None = None
    """Number of token ids that the model has; others are refused. None: any id of 32 bits."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of token ids, ready for the model: arrays over rows, mapped from files, and one row of metadata and
    spans for each document."""

    token_ids: Int32[np.ndarray, " row"]
    char_start: Int32[np.ndarray, " row"]
    """First character of the token in its document; -1: the tokenizer has no offsets. An added token has no width and
    the position of the text token after it, or of the end of the text."""
    char_end: Int32[np.ndarray, " row"]
    """One past the token's last character; -1: the tokenizer has no offsets."""
    document: Int64[np.ndarray, " row"]
    """Index of the document in its source; documents without tokens leave a gap."""
    starts: Int64[np.ndarray, " sequences_plus_1"]
    """First row of each sequence, and the number of rows."""
    metadata: pa.Table
    """One row for each document read, skipped ones included; no columns where the texts have no metadata."""
    spans: pa.Table
    """The same for labelled spans: a column for each label, of `span_type`, empty lists where there is none."""
    labels: Mapping[str, Int32[np.ndarray, " row"]]
    """Columns of the kind of the documents, such as `turn` of chats: see `token_labels`; empty for plain texts."""
    roles: tuple[str, ...]
    """Roles of chats; the label `role` holds indices into them."""
    generation: tuple[dict[str, Any], ...]
    """Different settings with which documents were generated."""
    special_ids: frozenset[int]
    """Ids of tokens that are not text."""
    documents: int
    """Documents read."""
    skipped_documents: int
    """Documents without a token, such as empty texts."""
    cut_documents: int
    """Documents whose tokens are in several sequences."""
    documents_with_added_tokens: int
    """Texts that begin with the token that begins a sequence, as a chat template writes it, or end with the one that
    ends a text; it was not added again."""
    replaced_characters: int
    """Lone surrogates and invalid UTF-8 bytes, each tokenized as U+FFFD."""
    columns: str
    """SHA-256 over the metadata and spans of all documents."""
    cut_at: int | None
    """Character of the last document at which `max_rows` stopped; None: it is complete."""

    @property
    def lengths(self) -> Int64[np.ndarray, " sequence"]:
        """Rows of each sequence."""
        return np.diff(self.starts)


def plan_sequences(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase | None,
    layout: Layout,
    workdir: str | Path,
    progress: Callable[[int], None] | None = None,
) -> Sequences:
    """Tokenizes all documents, once, and divides them into sequences of at most `layout.context` tokens.

    The order of the documents alone determines the result. Memory does not grow with the corpus; of the longest
    document it holds the text, and the tokens of one piece.

    Args:
        documents: Numbered from 0 without a gap, as `read_documents` does.
        tokenizer: None if all documents are token ids.
        layout: How documents become sequences.
        workdir: Folder for the arrays, 20 bytes a row and 8 a sequence; the caller removes it when done.
        progress: Called with the number of further rows planned.

    Raises:
        RequestError: No tokenizer for text, an id out of range, no room in the context, nothing to record.
    """
    prefix = layout.added.prefix
    if layout.context <= len(prefix):
        raise RequestError(
            f"context={layout.context} leaves no room for text, since added tokens ({len(prefix)}) begin each "
            f"sequence; use at least {len(prefix) + 1}, or bos='never'"
        )
    _check_ids(np.array(prefix + layout.added.suffix, np.int64), layout.vocab, "the tokenizer's special tokens")
    workdir, stream = Path(workdir), iter(documents)
    encoder = tokenizer and with_whole_offsets(tokenizer)
    with ExitStack() as stack:
        writer = _SequenceWriter(workdir, layout, stack, progress)
        while batch := _take(stream, min(_BATCH_CHARACTERS, writer.rows_left), layout.added):
            for document, pieces, replaced in _encode_batch(batch, encoder):
                if not writer.rows_left:
                    break
                writer.add(document, pieces, replaced)
        writer.finish(special_ids(tokenizer, layout.added))
    return open_sequences(workdir)


def open_sequences(workdir: str | Path) -> Sequences:
    """Returns the sequences that `plan_sequences` wrote to `workdir`; other processes may open them, too."""
    workdir = Path(workdir)
    counts = json.loads((workdir / _COUNTS).read_text())
    labels = {name: np.memmap(workdir / f"{name}.bin", np.int32, mode="r") for name in counts.pop("labels")}
    lists = {name: tuple(counts.pop(name)) for name in ("roles", "generation")}
    return Sequences(
        labels=labels,
        **lists,
        **{name: np.memmap(workdir / f"{name}.bin", dtype, mode="r") for name, dtype in _COLUMNS.items()},
        **{name: open_table(workdir / f"{name}.arrow") for name in ("metadata", "spans")},
        **{**counts, "special_ids": frozenset(counts["special_ids"])},
    )


class _SequenceWriter:
    """Writes one document after another to the files of `workdir`, beginning a new sequence where one is full."""

    def __init__(self, workdir: Path, layout: Layout, stack: ExitStack, progress: Callable[[int], None] | None) -> None:
        self.workdir, self.layout, self.progress = workdir, layout, progress
        names = (*_COLUMNS, *LABEL_COLUMNS)
        self.files = {name: stack.enter_context(open(workdir / f"{name}.bin", "wb")) for name in names}  # noqa: SIM115
        self.spools = {
            name: ColumnSpool(stack.enter_context(open(workdir / f"{name}.jsonl", "w+", encoding="ascii")), spans)  # noqa: SIM115
            for name, spans in (("metadata", False), ("spans", True))
        }
        self.prefix = np.array(layout.added.prefix, np.int32)
        self.rows = self.sequences = 0
        self.free = 0  # rows left in the open sequence
        self.counts = dict.fromkeys(_COUNTED, 0)
        self.cut_at: int | None = None
        self.labels: tuple[str, ...] | None = None  # columns of the documents' kind, which the first one has
        self.roles: dict[str, int] = {}
        self.generation: list[dict[str, Any]] = []

    @property
    def rows_left(self) -> int:
        limit = sys.maxsize if self.layout.max_rows is None else self.layout.max_rows
        return limit - self.rows

    def add(self, document: Document, pieces: Iterable[Encoding], replaced: int) -> None:
        """Writes a document, whose tokens come in pieces; `replaced`: number of its characters that were replaced."""
        self.counts["documents"] += 1
        self.counts["replaced_characters"] += replaced
        place = f"document {document.index}"
        self.spools["metadata"].add(document.metadata, place)
        self.spools["spans"].add(document.spans, place)
        self._begin_labels(document, place)
        first, last = None, None
        begun, sequences = self.rows, set()
        for piece in pieces:
            if piece.ids.size == 0:
                continue
            _check_ids(piece.ids, self.layout.vocab, place)
            first = piece if first is None else first
            last = piece
            labels = piece_labels(document, piece, self.labels or (), self.roles) if self.labels else {}
            sequences |= self._lay(document, piece, self._prefix(document, first), labels, begins=piece is first)
            if not self.rows_left:
                break
        if first is None or last is None:
            self.counts["skipped_documents"] += 1
            return
        suffix = self.layout.added.suffix if document.with_added_tokens else ()
        prefix = self.prefix[:1] if document.with_added_tokens else ()
        has_prefix, has_suffix = first.ids[0] in prefix, last.ids[-1] in suffix[-1:]
        if suffix and not has_suffix:
            end = _suffix(suffix, last, document.text)
            sequences |= self._lay(document, end, self._prefix(document, first), {}, begins=False)
        self.counts["documents_with_added_tokens"] += has_prefix or has_suffix
        self.counts["cut_documents"] += len(sequences) > 1
        if self.progress is not None:
            self.progress(self.rows - begun)

    def finish(self, special_ids: Collection[int]) -> None:
        """Writes the end of the last sequence, the tables and the counts. RequestError where no token was added."""
        self._write("starts", self.rows)
        if self.rows == 0:
            raise RequestError(
                f"texts: nothing to record; {counted(count, 'document')}, none with a token"
                if (count := self.counts["documents"])
                else "texts: nothing to record; there are no documents"
            )
        for name, spool in self.spools.items():
            spool.write_table(self.workdir / f"{name}.arrow")
            spool.lines.flush()
        spooled = [sha256_file(self.workdir / f"{name}.jsonl") for name in self.spools]
        for name in self.labels or ():
            self.files[name].flush()
            spooled.append(sha256_file(self.workdir / f"{name}.bin"))
        counts = {
            "labels": self.labels or (),
            "roles": list(self.roles),
            "generation": self.generation,
            "special_ids": sorted(special_ids),
            "cut_at": self.cut_at,
            **self.counts,
            "columns": sha256_bytes("".join(spooled).encode()),
        }
        (self.workdir / _COUNTS).write_text(json.dumps(counts))

    def _begin_labels(self, document: Document, place: str) -> None:
        """Takes the columns of the first document's kind, and checks that this document is of that kind."""
        columns = document.token_columns
        if self.labels is None:
            self.labels = columns
        if columns != self.labels:
            raise RequestError(
                f"{place} has the columns {', '.join(columns) or 'of a plain text'}, and those before it "
                f"{', '.join(self.labels) or 'have none'}; record chats, generated and plain texts into several stores"
            )
        text_columns = {*document.metadata, *(name for label in document.spans for name in label_columns(label))}
        if clash := text_columns.intersection(columns):
            raise RequestError(
                f"{place} has a column {min(clash)!r}, which its tokens have, too; rename that of the texts, or name "
                "the columns to keep in metadata="
            )
        if document.generation is not None and document.generation not in self.generation:
            self.generation.append(dict(document.generation))
        if document.prompt_tokens is not None and document.token_ids is not None:
            _check_whole(document, self.layout, place)

    def _prefix(self, document: Document, first: Encoding) -> Int32[np.ndarray, " prefix"]:
        """Tokens before each sequence of a document that does not begin with them itself."""
        chat_begins = document.turns is not None and first.ids[0] in self.prefix[:1]
        return self.prefix if document.text is not None and (document.turns is None or chat_begins) else self.prefix[:0]

    def _lay(
        self,
        document: Document,
        body: Encoding,
        prefix: Int32[np.ndarray, " prefix"],
        labels: Mapping[str, Int32[np.ndarray, " position"]],
        begins: bool,
    ) -> set[int]:
        """Writes tokens of a document, with the prefix before them if it begins with them, and where a sequence begins.

        Returns the sequences that hold them.
        """
        sequences: set[int] = set()
        if begins and not self.layout.packed:
            self.free = 0
        start = 0
        while start < body.ids.size and self.rows_left:
            leads = begins or self.free == 0
            if self.free == 0:
                self._write("starts", self.rows)
                self.sequences += 1
                self.free = min(self.layout.context, self.rows_left)
            leads &= not (prefix.size and body.ids[start] == prefix[0])
            # The prefix may fill the rest of a sequence; the text then begins in the next one, after another prefix.
            lead = prefix[: self.free] if leads else prefix[:0]
            part = slice(start, start + self.free - lead.size)
            offset = np.full(lead.size, body.char_start[start])
            self._write("token_ids", lead, body.ids[part])
            self._write("char_start", offset, body.char_start[part])
            self._write("char_end", offset, body.char_end[part])
            written = lead.size + body.ids[part].size
            self._write("document", np.full(written, document.index))
            for name in self.labels or ():
                values = labels[name][part] if labels else np.full(body.ids[part].size, NONE)
                self._write(name, np.full(lead.size, NONE), values)
            if written > lead.size:
                sequences.add(self.sequences)
            self.rows += written
            self.free -= written
            start, begins = part.stop, False
        if not self.rows_left and self.cut_at is None:
            cut = body.char_start[start] if start < body.ids.size else body.char_end[-1]
            self.cut_at = int(cut) if cut >= 0 else None
        return sequences

    def _write(self, name: str, *values: int | np.ndarray) -> None:
        for part in values:
            self.files[name].write(np.asarray(part, _COLUMNS.get(name, np.int32)).tobytes())


def _take(stream: Iterator[Document], rows: int, added: AddedTokens) -> list[Document]:
    """The next batch: documents that may fill `rows`, so that few documents are read in vain.

    A token is seldom shorter than a character; where it is, one batch reads a little too far.
    """
    batch: list[Document] = []
    while rows > 0 and len(batch) < _BATCH_DOCUMENTS and (document := next(stream, None)) is not None:
        batch.append(document)
        rows -= len((document.token_ids or ()) if document.text is None else document.text)
        rows -= len(added.prefix) + len(added.suffix)
    return batch


def _encode_batch(
    batch: list[Document], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[Document, Iterable[Encoding], int]]:
    """Documents with their tokens, long ones in pieces, and the number of characters that were replaced."""
    texts = {d.index: replace_surrogates(d.text) for d in batch if d.text is not None}
    if tokenizer is None:
        if texts:
            raise RequestError("the model has no tokenizer; pass tokenizer= or give lists of token ids")
        yield from ((document, [_given_ids(document)], 0) for document in batch)
        return
    short = [index for index, (text, _) in texts.items() if len(text) <= PIECE]
    encoded = dict(zip(short, encode(tokenizer, [texts[i][0] for i in short]), strict=True)) if short else {}
    for document in batch:
        text, replaced = texts.get(document.index, ("", 0))
        if document.text is None:
            yield document, [_given_ids(document)], 0
        elif document.index in encoded:
            yield document, [encoded[document.index]], replaced
        else:
            yield document, _encode_long(tokenizer, text, document.index), replaced


def _encode_long(tokenizer: PreTrainedTokenizerBase, text: str, document: int) -> Iterator[Encoding]:
    cuts: list[int] = []
    try:
        yield from encode_long(tokenizer, text, cuts.append)
    finally:  # also where max_rows stops it
        if cuts:
            _LOG.warning(
                f"document {document} ({len(text):,} characters) was tokenized in pieces; {len(cuts)} of them begin "
                f"at a cut, the first at character {cuts[0]:,}: tokens beside a cut may differ from those of the whole"
            )


def _given_ids(document: Document) -> Encoding:
    ids = np.array(document.token_ids, dtype=object)  # object: an id beyond 64 bits must be named, not overflow
    _check_ids(ids, None, f"document {document.index}")
    unknown = np.full(ids.size, -1, np.int32)
    return Encoding(ids.astype(np.int32), unknown, unknown)


def _check_whole(document: Document, layout: Layout, place: str) -> None:
    """Refuses generated tokens that would not be in one sequence: the model would see other tokens before them."""
    count = len(document.token_ids or ())
    if count > layout.context or layout.packed:
        reason = "packed=True puts other texts before it" if layout.packed else f"context={layout.context} cuts it"
        raise RequestError(
            f"{place} is generated and has {count} tokens, and {reason}; "
            + ("record it with packed=False" if layout.packed else f"record it with context={count} or more")
        )


def _check_ids(ids: np.ndarray, vocab: int | None, source: str) -> None:
    limit = 2**31 if vocab is None else vocab
    if ids.size and not (ids.min() >= 0 and ids.max() < limit):
        wrong = next(token_id for token_id in ids.tolist() if not 0 <= token_id < limit)
        known = "" if vocab is None else f", 0 to {limit - 1}"
        raise RequestError(f"{source}: token id {wrong} is not one of the model's{known}; was another tokenizer used?")


def _suffix(suffix: tuple[int, ...], last: Encoding, text: str | None) -> Encoding:
    """The suffix as tokens at the end of the text, after its last ones."""
    end = np.full(len(suffix), -1 if text is None or last.char_end[-1] < 0 else len(text), np.int32)
    return Encoding(np.array(suffix, np.int32), end, end)


def segment_plan(lengths: Int[np.ndarray, " sequence"], segment_rows: int) -> list[tuple[int, int]]:
    """Divides consecutive sequences, as (first, last exclusive), into segments of at most `segment_rows` rows.

    A longer sequence has a segment to itself.
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
    """Divides sequences into batches of similar length: their number times the longest is at most `batch_tokens`.

    Longest first, so that a batch that does not fit in memory fails at once; equal lengths in order. A sequence longer
    than `batch_tokens` has a batch to itself.
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
    """Returns the SHA-256, in hex, of the sequences' lengths and token ids, the same on any machine."""
    state = hashlib.sha256(len(lengths).to_bytes(8, "little"))
    state.update(np.ascontiguousarray(lengths, "<i8").data)
    state.update(np.ascontiguousarray(token_ids, "<i4").data)
    return state.hexdigest()
