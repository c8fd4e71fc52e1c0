"""Sources of documents: strings, files, datasets and lists of token ids, read as one stream.

Every source is first a stream of values, each a string, a mapping with a text column, or token ids, with a label of its
place (`stories.jsonl:7`); one function then makes documents of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import pyarrow as pa

from workbench.corpus.file_rows import SUFFIXES, Columns, file_columns, file_rows
from workbench.corpus.names import refused_name
from workbench.corpus.spans import Span, check_labels, read_spans
from workbench.corpus.tokenizer import replace_surrogates
from workbench.corpus.values import Plain, plain_value, python_value
from workbench.io.errors import RequestError, nearest
from workbench.sites.settings import Recording

if TYPE_CHECKING:
    Text: TypeAlias = str | Path | Mapping[str, Any] | Sequence[int] | np.ndarray
    Texts: TypeAlias = str | Path | Iterable[Text]
else:  # wrong texts are refused by name, not by the checks of types that the tests switch on
    Text = Texts = Any

_UNDERSTOOD = (
    "understood: files (.txt .json .jsonl .csv .tsv, also with .gz, and .parquet), hf:NAME[:SPLIT], lists of strings "
    "or of token id lists"
)
_TOKEN_IDS = "input_ids"  # the field's name for a column of token ids


@dataclass(frozen=True)
class Document:
    """One text, or one list of token ids, with its metadata and spans.

    The text is as read: it still contains lone surrogates, which also stand for invalid UTF-8 bytes of a file;
    `plan_sequences` replaces and counts them.
    """

    index: int
    """Index in the source, from 0."""
    text: str | None
    """The text, or None where the document is given as token ids."""
    token_ids: Sequence[int] | None
    """The token ids, or None where the document is given as text."""
    metadata: Mapping[str, Plain] = field(default_factory=dict)
    """Column name to value, in one of the forms of `Plain` (nested values as compact JSON)."""
    spans: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    """Label to spans of the text, in order of their start and without overlap."""


def check_source(texts: Texts) -> None:
    """Raises RequestError where `texts` is wrong, as far as can be seen without reading it or importing a library.

    Checks types, paths, suffixes and sizes, also of the paths inside a list. Generators are not read.
    """
    if _is_hub_name(texts):
        _hub_name(texts)
    elif isinstance(texts, str | Path):
        _resolve(texts)
    elif isinstance(texts, list | tuple):
        if not texts:
            raise RequestError(f"texts is an empty list; {_UNDERSTOOD}")
        for number, item in enumerate(texts):
            _check_item(item, number)
    elif hasattr(texts, "column_names") and not isinstance(texts, Mapping | pa.Table):
        return
    elif isinstance(texts, bytes | Mapping | pa.Table) or hasattr(texts, "columns") or not isinstance(texts, Iterable):
        hint = f"pass one of its entries: {', '.join(map(repr, texts))}" if isinstance(texts, Mapping) else _UNDERSTOOD
        raise RequestError(f"texts is of type {type(texts).__name__}, which is not read; {hint}")


def read_documents(
    texts: Texts,
    *,
    text_column: str = Recording.text_column,
    metadata: Sequence[str] | None = Recording.metadata,
    span_column: str | None = Recording.span_column,
) -> Iterator[Document]:
    """Reads `texts` as a stream of documents, numbered from 0.

    `texts` is one of
    - a list or any iterable of strings (a document each), Paths (files), mappings with a text column, and lists
      or 1-d arrays of token ids (used as they are); a generator may be endless;
    - a Path or a string naming a file: `.txt` (the whole file is one document), `.jsonl` (per line an object or a
      bare string), `.json` (a list of them, or lines), `.csv` and `.tsv` (with a header; empty cells are missing),
      these also with `.gz`, and `.parquet` (read by row group);
    - `"hf:NAME[:SPLIT]"`, a dataset of the Hugging Face hub, streamed; the split `train` by default;
    - a Hugging Face dataset object, whose `text_column` holds strings or token ids, or with an `input_ids` column;
    - a string with white space in it that names no file: one document.

    Args:
        texts: The source.
        text_column: Column of the text, in sources with columns.
        metadata: Columns to keep. None: all but those with the text and the spans.
        span_column: Column of labelled spans of the text, in the form of `read_spans`; a document may lack it.

    Raises:
        RequestError: Wrong paths, columns and hub ids, by the call itself; wrong documents, as they are read.
    """
    check_source(texts)
    source = _open_hub(texts) if _is_hub_name(texts) else _resolve(texts)
    _check_columns(source, text_column, metadata, span_column)
    return _documents(source, text_column, metadata, span_column)


def _documents(
    source: Iterable[Any], text_column: str, metadata: Sequence[str] | None, span_column: str | None
) -> Iterator[Document]:
    columns: dict[str, None] = {}
    names: dict[str, Any] = {}  # metadata columns so far
    labels: dict[str, Any] = {}
    needed = None if metadata is None else frozenset({text_column, _TOKEN_IDS, span_column, *metadata})
    for index, (where, value) in enumerate(_values(source, Columns(text_column, needed))):
        place = f"document {index} ({where})"
        record, labelled = {}, None
        if isinstance(value, Mapping):
            record = {replace_surrogates(str(name))[0]: item for name, item in value.items()}
            if len(record) < len(value):
                raise RequestError(f"{where}: two of the columns {str(list(value))[:80]} have one name; rename one")
            columns.update(dict.fromkeys(record))
            column = _content_column(record, text_column, where)
            value = record.pop(column)
            if column == _TOKEN_IDS != text_column and isinstance(value, str):
                raise RequestError(f"{place}: column {column!r} holds text; name the one with the text in text_column=")
            labelled = None if span_column is None else _from_json(record.pop(span_column, None))
            if metadata is not None:
                record = {name: record[name] for name in metadata if name in record}
            _check_reserved(record, where)
        values = {name: _metadata_value(item, name, place) for name, item in record.items()}
        value = None if _is_missing(value) else value
        if value is None or isinstance(value, str):
            text, ids = value or "", None
        else:
            text, ids = None, _token_ids(value, index, where)
        spans = {} if labelled is None or span_column is None else read_spans(labelled, text, span_column, place)
        if not (spans.keys() <= labels.keys() and values.keys() <= names.keys()):
            labels.update(spans)
            names.update(values)
            check_labels(labels, names, place)
        yield Document(index, text, ids, values, spans)
    _check_known("metadata", metadata or (), columns, "the documents")
    _check_known("span_column", _expected(span_column), columns, "the documents")


# Kinds of source


def _resolve(texts: Texts) -> Iterable[Any]:
    """The items of `texts`, files as Paths. RequestError for a wrong path."""
    if isinstance(texts, Path):
        _check_file(texts)
        return [texts]
    if not isinstance(texts, str):
        return texts
    if not texts:
        raise RequestError(f"texts is an empty string; {_UNDERSTOOD}")
    if os.path.exists(texts) or not any(map(str.isspace, texts)) or _names_file(texts):
        _check_file(Path(texts), hint=f"to record the string itself, pass [{texts!r}]; ")
        return [Path(texts)]
    return [texts]


def _names_file(text: str) -> bool:
    """True for a string that looks like the name of a file of a known kind."""
    return "\n" not in text and text.lower().endswith(SUFFIXES)


def _check_item(item: Any, number: int) -> None:
    if isinstance(item, Path):
        _check_file(item)
    elif isinstance(item, str) and _names_file(item) and os.path.isfile(item):
        raise RequestError(
            f"texts[{number}] is the string {item!r}, which is a file; "
            "strings in a list are the texts themselves: pass pathlib.Path, or the path alone without a list"
        )
    elif isinstance(item, int | float):
        raise RequestError(
            f"texts[{number}] is {item!r} ({type(item).__name__}), neither a string nor a list of token ids; "
            "token ids are given as one list for each document, as in [[1, 15, 7], [1, 9]]"
        )


def _check_file(path: Path, hint: str = "") -> None:
    name = str(path)
    if not os.path.exists(path):
        folder = path.parent
        if not os.path.isdir(folder):
            raise RequestError(f"texts: no file {name!r}, there is no folder {str(folder)!r}; {hint}{_UNDERSTOOD}")
        neighbours = islice(os.listdir(folder), 2000) if os.access(folder, os.R_OK) else ()
        raise RequestError(f"texts: no file {name!r}{nearest(path.name, neighbours)}; {hint}{_UNDERSTOOD}")
    if os.path.isdir(path):
        raise RequestError(f"texts: {name!r} is a folder; give the files in it")
    if not os.path.isfile(path):
        raise RequestError(f"texts: {name!r} is not a regular file; {_UNDERSTOOD}")
    if not path.name.lower().endswith(SUFFIXES):
        raise RequestError(f"texts: {name!r} has the suffix {path.suffix!r}, which is not read; {_UNDERSTOOD}")
    if not os.access(path, os.R_OK):
        raise RequestError(f"texts: no permission to read {name!r}; change its mode or run as its owner")
    if path.stat().st_size == 0:
        raise RequestError(f"texts: {name!r} is empty (0 bytes); pass a file with text in it")


def _is_hub_name(texts: Texts) -> TypeGuard[str]:
    return isinstance(texts, str) and texts.startswith("hf:")


def _hub_name(texts: str) -> tuple[str, str]:
    """Name and split of `hf:NAME[:SPLIT]`."""
    match = re.fullmatch(r"hf:([\w.-]+(?:/[\w.-]+)?)(?::(\S+))?", texts)
    if not match:
        raise RequestError(f"texts: {texts!r} is not of the form hf:NAME[:SPLIT], as in hf:user/dataset:train")
    return match[1], match[2] or "train"


def _open_hub(texts: str) -> Iterable[Mapping[str, Any]]:
    """The streamed dataset that `hf:NAME[:SPLIT]` names; the only function that uses the network."""
    import datasets  # seconds

    name, split = _hub_name(texts)
    try:
        return datasets.load_dataset(name, split=split, streaming=True, trust_remote_code=False)
    except Exception as error:  # the hub client, the readers and the builders each raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"texts: cannot open {texts!r}: {reason}; check its name, the split {split!r} and the network, "
            "or load it yourself and pass the dataset object"
        ) from error


# Values of a source, each with its place


def _values(source: Iterable[Any], columns: Columns) -> Iterator[tuple[str, Any]]:
    for number, item in enumerate(source):
        _check_item(item, number)
        if isinstance(item, Path):
            yield from file_rows(item, columns)
        else:
            yield f"texts[{number}]", item


# Columns


def _check_columns(source: Any, text_column: str, metadata: Sequence[str] | None, span_column: str | None) -> None:
    """Checks the columns that are known before reading: those of files and of dataset objects."""
    _check_reserved(metadata or (), "metadata")
    known: dict[str, None] = {}
    for where, columns in _known_columns(source):
        _content_column(columns, text_column, where)
        if metadata is None:
            _check_reserved([name for name in columns if name not in (text_column, span_column)], where)
        known.update(dict.fromkeys(columns))
    if known:
        _check_known("metadata", metadata or (), known, "the texts")
        _check_known("span_column", _expected(span_column), known, "the texts")


def _expected(span_column: str | None) -> tuple[str, ...]:
    """The column of spans, if it must exist: the default one need not."""
    return () if span_column in (None, Recording.span_column) else (span_column,)


def _known_columns(source: Any) -> Iterator[tuple[str, list[str]]]:
    if columns := getattr(source, "column_names", None):
        yield "the dataset", list(columns)
    for path in source if isinstance(source, list | tuple) else ():
        if isinstance(path, Path) and (names := file_columns(path)):
            yield str(path), names


def _content_column(columns: Iterable[str], text_column: str, where: str) -> str:
    """The column with the content of a document: the text column, else the one with token ids."""
    columns = list(columns)
    for name in (text_column, _TOKEN_IDS):
        if name in columns:
            return name
    raise RequestError(
        f"{where}: no column {text_column!r}; its columns are {', '.join(columns) or 'none'}; "
        "name the one with the text in text_column="
    )


def _check_reserved(columns: Iterable[str], where: str) -> None:
    for name in columns:
        if reason := refused_name(name):
            raise RequestError(
                f"{where}: a metadata column cannot be called {name!r}, which is {reason}; "
                "rename it, or name the columns to keep in metadata=, as in metadata=['source'] ([] for none)"
            )


def _check_known(setting: str, names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise RequestError(
                f"{setting} names {name!r}, but {where} have no such column{nearest(name, known)}; "
                f"the columns are {', '.join(known) or 'none'}"
            )


# Values


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
