"""Labelled spans of texts: checked while documents are read, assigned to tokens when the token table is made."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64

from workbench.corpus.names import refused_name
from workbench.corpus.tokenizer import replace_surrogates
from workbench.corpus.values import Plain, plain_value, python_value
from workbench.io.errors import RequestError

_FORM = "{'entity': [{'start': 0, 'end': 4, 'value': 'person'}]}"
_KEYS = {"start", "end", "value"}
_CONTAINERS = (dict, list, tuple, set)
_MAPPING = (dict, Mapping)  # in this order: checking an abstract class takes five times as long


class Span(NamedTuple):
    """Characters of a text, `start` to `end` (exclusive), and their value under some label; None: it is missing."""

    start: int
    end: int
    value: Plain


def span_type(value: pa.DataType) -> pa.DataType:
    """Returns Arrow's type for the spans of one label in one document, with values of type `value`."""
    return pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32()), ("value", value)]))


def read_spans(value: object, text: str | None, column: str, where: str) -> dict[str, tuple[Span, ...]]:
    """Returns the spans of one document by label, those of each label in order of their start.

    Cost: about 3 us a span, and as much again to plan it.

    Args:
        value: Value of the document's `column`: a mapping of label to a list of {"start", "end", "value"}, or to None
            where the label has no span.
        text: Text of the document; None for a document given as token ids, which cannot have spans.
        column: Name of the column, for errors.
        where: Name of the document, with which errors begin.

    Raises:
        RequestError: Another form, a span that is empty or exceeds the text, overlapping spans of one label.
    """
    if not isinstance(value, Mapping):
        raise _malformed(f"{where}: column {column!r}", value)
    spans = {}
    for label, entries in value.items():
        if not isinstance(label, str) or not label:
            raise RequestError(f"{where}: column {column!r} has a label {label!r}; labels are strings, and not empty")
        entries = python_value(entries)
        if not isinstance(entries, list | tuple | None):
            raise _malformed(f"{where}: label {label!r} of column {column!r}", entries)
        if entries and text is None:
            raise RequestError(
                f"{where} is given as token ids, which have no characters, and has spans of label {label!r}; "
                "give its text instead, or pass span_column=None"
            )
        places = (f"{where}: span {number} of label {label!r}" for number in range(len(entries or ())))
        label_spans = [_span(entry, text or "", place) for entry, place in zip(entries or (), places, strict=True)]
        label_spans.sort(key=lambda span: span.start)
        for first, second in pairwise(label_spans):
            if second.start < first.end:
                raise RequestError(
                    f"{where}: spans {first.start} to {first.end} and {second.start} to {second.end} of "
                    f"label {label!r} overlap; a character has one value, so leave one out or give it another label"
                )
        spans[replace_surrogates(label)[0]] = tuple(label_spans)
    return spans


def check_labels(labels: Mapping[str, Any], metadata: Mapping[str, Any], where: str) -> None:
    """Raises RequestError where a column of a label cannot have its name, or has the name of another column."""
    origins = dict.fromkeys(metadata, "a metadata column")
    for label in labels:
        for name in label_columns(label):
            if reason := refused_name(name) or origins.get(name):
                raise RequestError(
                    f"{where}: label {label!r} needs a column {name!r}, which is {reason}; rename the label"
                )
            origins[name] = f"made of label {label!r}"


def label_columns(label: str) -> tuple[str, str, str]:
    """Returns the names of a label's columns: value, number of the span, and whether a sequence border cuts it."""
    return label, f"{label}_span", f"{label}_cut"


def label_tokens(
    spans: pa.ListArray,
    document: Int64[np.ndarray, " row"],
    char_start: Int32[np.ndarray, " row"],
    char_end: Int32[np.ndarray, " row"],
    visible: tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " row"]],
) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Returns, for each token, the value of the span that it shares a character with, its number, and if it is cut.

    A token in several spans has the first; one in no span, without width or without offsets has nulls. Spans are
    numbered from 0 in their document. Cost: a binary search for each row.

    Args:
        spans: Spans of one label: an entry, of `span_type`, for each document.
        document: Index into `spans` for each row.
        char_start: First character of each token.
        char_end: One past its last character.
        visible: Characters of the document that the row's sequence shows: where the text before it ends, and where the
            text after it begins. A span is cut if it reaches beyond.
    """
    first = spans.offsets.to_numpy()
    first = first - first[0]
    start, end, value = spans.flatten().flatten()  # lists to spans, spans to columns
    # All documents on one axis, each far from the next, so that ends ascend and one search serves all.
    owner = np.repeat(np.arange(len(spans)), np.diff(first)) << 32
    base = document << 32
    index = np.searchsorted(owner + end.to_numpy(), base + char_start, side="right")
    begins = np.append(owner + start.to_numpy(), np.iinfo(np.int64).max)[index]
    outside = (begins >= base + char_end) | (char_start == char_end)
    number = (index - first[document]).astype(np.int32)
    stops = np.append(owner + end.to_numpy(), 0)[index]
    cut = (begins < base + visible[0]) | (stops > base + visible[1])
    return value.take(pa.array(index, mask=outside)), pa.array(number, mask=outside), pa.array(cut, mask=outside)


def _span(entry: Any, text: str, place: str) -> Span:
    if not (isinstance(entry, _MAPPING) and entry.keys() == _KEYS):
        raise _malformed(place, entry)
    start, end, value = map(python_value, (entry["start"], entry["end"], entry["value"]))
    if not (type(start) is int and type(end) is int) or isinstance(value, _CONTAINERS):
        raise _malformed(place, entry)
    if not 0 <= start < end <= len(text):
        raise RequestError(
            f"{place} has start {start} and end {end}; they must be characters of the text, "
            f"0 <= start < end <= {len(text)}"
        )
    return Span(start, end, plain_value(value))


def _malformed(place: str, value: Any) -> RequestError:
    text = repr(value)
    return RequestError(
        f"{place} is {text if len(text) <= 80 else text[:79] + '…'}; spans are given as {_FORM}: name the column "
        "that holds them in span_column=, or pass span_column=None to read no spans"
    )
