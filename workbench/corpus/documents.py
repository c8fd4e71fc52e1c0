"""Documents made of the values of a source: strings, token ids, chats, pairs, and mappings that hold one of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from workbench.corpus.document import Document
from workbench.corpus.memory_tables import masked_ids
from workbench.corpus.names import refused_name
from workbench.corpus.spans import check_labels, read_spans
from workbench.corpus.tokenizer import replace_surrogates
from workbench.corpus.values import Plain, plain_value, python_value
from workbench.io.errors import RequestError, nearest
from workbench.sites.settings import Recording

TOKEN_IDS = "input_ids"
"""Name of a column of token ids, in the field."""
MESSAGES = "messages"
"""Name of a column of chats, in the field."""
SIDES = ("clean", "corrupt")
"""Columns of the two sides of a pair, and the values of the column `side`."""
_MASK = "attention_mask"
_GENERATED = ("prompt_tokens", "generation")  # beside token ids that a model generated
_PAIR = ("pair", "side")
_CONTENT = ("a chat", "a pair", "a generated text")
CONTENT_COLUMNS = frozenset({TOKEN_IDS, MESSAGES, *SIDES, _MASK, *_GENERATED})
"""Columns that may hold the content of documents, beside the text column."""


@dataclass
class DocumentReader:
    """Makes documents of the values of one source, and checks that they are of one kind."""

    text_column: str
    metadata: Sequence[str] | None
    span_column: str | None
    kind: str | None = None
    """A chat, a pair, ...; None before the first document."""
    documents: int = 0
    pairs: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    """Metadata columns so far."""
    labels: dict[str, Any] = field(default_factory=dict)

    def read(self, where: str, value: Any) -> Iterator[Document]:
        """Yields the documents of one value, two for a pair. RequestError for a value of another form."""
        place = f"document {self.documents} ({where})"
        record, labelled, generated = {}, None, {}
        if isinstance(value, Mapping):
            record = {replace_surrogates(str(name))[0]: item for name, item in value.items()}
            if len(record) < len(value):
                raise RequestError(f"{where}: two of the columns {str(list(value))[:80]} have one name; rename one")
            self.columns.update(dict.fromkeys(record))
            column = content_column(record, self.text_column, where)
            value = tuple(record.pop(side) for side in SIDES) if column == SIDES[0] else record.pop(column)
            if column == TOKEN_IDS != self.text_column:
                if isinstance(value, str):
                    raise RequestError(
                        f"{place}: column {column!r} holds text; name the one with the text in text_column="
                    )
                value = masked_ids(value, record.pop(_MASK, None), place)
                generated = _generated(record, place)
            labelled = None if self.span_column is None else _from_json(record.pop(self.span_column, None))
            if self.metadata is not None:
                record = {name: record[name] for name in self.metadata if name in record}
            check_reserved(record, where)
        values = {name: _metadata_value(item, name, place) for name, item in record.items()}
        content = _content(value)
        self._check_kind(_CONTENT[2] if generated else content, place)
        if content != _CONTENT[1]:
            yield self._document(value, values, labelled, where, generated)
            return
        if clash := [name for name in _PAIR if name in values]:
            raise RequestError(f"{place}: a pair has a column {clash[0]!r} already; rename that of the texts")
        for side, text in zip(SIDES, value, strict=True):
            labels = {"pair": self.pairs, "side": side}
            yield self._document(text, values | labels, labelled, where, {"pair": self.pairs})
        self.pairs += 1

    def finish(self) -> None:
        """Refuses columns of the settings that no document had."""
        check_known("metadata", self.metadata or (), self.columns, "the documents")
        check_known("span_column", expected_spans(self.span_column), self.columns, "the documents")

    def _document(
        self, value: Any, values: dict[str, Plain], labelled: Any, where: str, more: Mapping[str, Any]
    ) -> Document:
        place = f"document {self.documents} ({where})"
        value = None if _is_missing(value) else value
        text, ids, messages = None, None, None
        if value is None or isinstance(value, str):
            text = value or ""
        elif _content(value) == _CONTENT[0]:
            messages = _messages(value)
        else:
            ids = _token_ids(value, self.documents, where)
        if labelled is not None and (messages is not None or "pair" in more):
            raise RequestError(f"{place}: column {self.span_column!r} has spans, which belong to a text; leave it out")
        spans = {}
        if labelled is not None and self.span_column is not None:
            spans = read_spans(labelled, text, self.span_column, place)
        if not (spans.keys() <= self.labels.keys() and values.keys() <= self.names.keys()):
            self.labels.update(spans)
            self.names.update(values)
            check_labels(self.labels, self.names, place)
        document = Document(self.documents, text, ids, values, spans, messages, **more)
        self.documents += 1
        return document

    def _check_kind(self, content: str, place: str) -> None:
        kind = content if content in _CONTENT else "a text or token ids"
        self.kind = self.kind or kind
        if kind != self.kind:
            raise RequestError(
                f"{place} is {kind}, and each document before it {self.kind}; record them into stores of their own"
            )


def content_column(columns: Iterable[str], text_column: str, where: str) -> str:
    """Returns the column with the content of a document: text, a chat, token ids, or the clean side of a pair."""
    columns = list(columns)
    for name in (text_column, MESSAGES, TOKEN_IDS):
        if name in columns:
            return name
    if set(SIDES) <= set(columns):
        return SIDES[0]
    raise RequestError(
        f"{where}: no column {text_column!r}; its columns are {', '.join(columns) or 'none'}; "
        "name the one with the text in text_column="
    )


def check_reserved(columns: Iterable[str], where: str) -> None:
    """Raises RequestError for a name that no metadata column can have."""
    for name in columns:
        if reason := refused_name(name):
            raise RequestError(
                f"{where}: a metadata column cannot be called {name!r}, which is {reason}; "
                "rename it, or name the columns to keep in metadata=, as in metadata=['source'] ([] for none)"
            )


def check_known(setting: str, names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises RequestError for a name that is none of the known columns."""
    known = list(known)
    for name in names:
        if name not in known:
            raise RequestError(
                f"{setting} names {name!r}, but {where} have no such column{nearest(name, known)}; "
                f"the columns are {', '.join(known) or 'none'}"
            )


def expected_spans(span_column: str | None) -> tuple[str, ...]:
    """Returns the column of spans, if it must exist: the default one need not."""
    return () if span_column in (None, Recording.span_column) else (span_column,)


def _content(value: Any) -> str:
    """The kind of content of a value; "" for text and token ids."""
    if isinstance(value, tuple) and len(value) == 2 and not any(isinstance(side, Integral) for side in value):
        return _CONTENT[1]
    value = python_value(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        return _CONTENT[0]
    return ""


def _messages(value: Any) -> list[dict[str, Any]]:
    """Messages of a chat as a template takes them; keys that a table fills with nulls are left out."""
    return [
        {str(name): part for name, part in message.items() if part is not None or name == "content"}
        for message in python_value(value)
    ]


def _generated(record: dict[str, Any], place: str) -> dict[str, Any]:
    """Facts about generated token ids, taken out of their record; nothing where they are not generated."""
    if not (isinstance(record.get("generation"), Mapping) and "prompt_tokens" in record):
        return {}
    prompt, generation = (record.pop(name) for name in _GENERATED)
    if not isinstance(prompt, int) or prompt < 0:
        raise RequestError(f"{place}: prompt_tokens is {prompt!r}; the number of token ids before the generated ones")
    return {"prompt_tokens": prompt, "generation": dict(generation)}


def _metadata_value(value: Any, name: str, place: str) -> Plain:
    try:
        return plain_value(value)
    except RequestError as error:
        raise RequestError(f"{place}: column {name!r} holds {error}, or leave the column out in metadata=") from None


def _from_json(value: Any) -> Any:
    """Spans as a table of text holds them."""
    try:
        spans = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return spans if isinstance(spans, Mapping) else value


def _is_missing(value: Any) -> bool:
    """True for the missing values of pandas and for NaN, which stand where a text is missing."""
    value = python_value(value)
    return value is None or (isinstance(value, float) and value != value)


def _token_ids(value: Any, index: int, where: str) -> list[int]:
    ids = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(ids, list | tuple | range):
        raise RequestError(
            f"document {index} ({where}) is of type {type(value).__name__}; a string or a list of token ids is needed"
        )
    ids = list(ids)
    if not all(type(item) is int for item in ids):
        for place, item in enumerate(ids):
            if not isinstance(item, Integral) or isinstance(item, bool):
                raise RequestError(
                    f"document {index} ({where}) has {item!r} ({type(item).__name__}) at place {place}; "
                    "token ids are whole numbers in one flat list"
                )
    return [int(item) for item in ids]
