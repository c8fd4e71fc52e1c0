"""Sources of documents: strings, files, datasets and lists of token ids, read as one stream.

Every source is first a stream of values, each a string, a mapping with a text column, or token ids, with a label of its
place (`stories.jsonl:7`); one function then makes documents of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np

from workbench.corpus.document import Document, is_chat
from workbench.corpus.documents import (
    CONTENT_COLUMNS,
    DocumentReader,
    check_known,
    check_reserved,
    content_column,
    expected_spans,
)
from workbench.corpus.file_rows import SUFFIXES, Columns, file_columns, file_rows
from workbench.corpus.memory_tables import is_table, table_rows
from workbench.io.errors import RequestError, nearest
from workbench.sites.settings import Recording

if TYPE_CHECKING:
    Chat: TypeAlias = Sequence[Mapping[str, Any]]
    Text: TypeAlias = str | Path | Mapping[str, Any] | Chat | tuple[str, str] | Sequence[int] | np.ndarray
    Texts: TypeAlias = str | Path | Mapping[str, Any] | Iterable[Text]
else:  # wrong texts are refused by name, not by the checks of types that the tests switch on
    Chat = Text = Texts = Any

_UNDERSTOOD = (
    "understood: files (.txt .json .jsonl .csv .tsv, also with .gz, and .parquet), hf:NAME[:SPLIT], a text with white "
    "space in it, tables of pandas, Arrow or polars, lists of strings, of token id lists, of chats or of (clean, "
    "corrupt) pairs"
)


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
    elif isinstance(texts, Mapping):
        _one_split(texts)
    elif isinstance(texts, bytes) or not (isinstance(texts, Iterable) or is_table(texts)):
        first = "call its collect() first; " if hasattr(texts, "collect") else ""
        raise RequestError(f"texts is of type {type(texts).__name__}, which is not read; {first}{_UNDERSTOOD}")


def _one_split(texts: Mapping[Any, Any]) -> Any:
    """The one entry of a mapping of datasets, such as a DatasetDict; the output of a tokenizer as it is."""
    if is_table(texts) or not texts:
        return texts
    (entry, *other_entries) = texts.values()
    if other_entries or not isinstance(entry, Iterable) or isinstance(entry, str):
        raise RequestError(
            f"texts is of type {type(texts).__name__}, which is not read; pass one of its entries: "
            f"{', '.join(map(repr, texts))}"
        )
    return entry


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
    - a table in memory: a pandas frame, an Arrow table, one of polars or any other library that exports to Arrow;
    - the output of a tokenizer: its `input_ids`, those that its `attention_mask` leaves, as they are;
    - a chat, `[{"role": "user", "content": "Hello"}, ...]`, a list of chats, or a column `messages` of chats;
    - pairs: a list of (clean, corrupt), or columns `clean` and `corrupt`; each gives two documents, one after the
      other, with metadata `pair` and `side`;
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
    source = _open_hub(texts) if _is_hub_name(texts) else _resolve(texts, text_column)
    _check_columns(source, text_column, metadata, span_column)
    return _documents(source, DocumentReader(text_column, metadata, span_column))


def _documents(source: Iterable[Any], reader: DocumentReader) -> Iterator[Document]:
    needed = None
    if reader.metadata is not None:
        needed = CONTENT_COLUMNS.union([reader.text_column, reader.span_column], reader.metadata)
    for where, value in _values(source, Columns(reader.text_column, needed)):
        yield from reader.read(where, value)
    reader.finish()


# Kinds of source


def _resolve(texts: Texts, text_column: str = "") -> Iterable[Any]:
    """The items of `texts`, files as Paths, the rows of a table. RequestError for a wrong path."""
    if isinstance(texts, Path):
        _check_file(texts)
        return [texts]
    if not isinstance(texts, str):
        items: Any = _unformatted(_one_split(texts) if isinstance(texts, Mapping) else texts)
        return table_rows(items) or ([items] if is_chat(items, text_column) else items)
    if not texts:
        raise RequestError(f"texts is an empty string; {_UNDERSTOOD}")
    if os.path.exists(texts) or not any(map(str.isspace, texts)) or _names_file(texts):
        _check_file(Path(texts), hint=f"to record the string itself, pass [{texts!r}]; ")
        return [Path(texts)]
    return [texts]


def _unformatted(source: Any) -> Any:
    """A dataset of Hugging Face whose rows are values of Python: a format of torch rounds them, one of pandas or Arrow
    gives frames."""
    if hasattr(source, "column_names") and isinstance(form := getattr(source, "format", None), Mapping):
        return source.with_format(None, columns=form["columns"])
    return source


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
    check_reserved(metadata or (), "metadata")
    known: dict[str, None] = {}
    for where, columns in _known_columns(source):
        content_column(columns, text_column, where)
        if metadata is None:
            check_reserved([name for name in columns if name not in (text_column, span_column)], where)
        known.update(dict.fromkeys(columns))
    if known:
        check_known("metadata", metadata or (), known, "the texts")
        check_known("span_column", expected_spans(span_column), known, "the texts")


def _known_columns(source: Any) -> Iterator[tuple[str, list[str]]]:
    if columns := getattr(source, "column_names", None):
        yield "the dataset", list(columns)
    for path in source if isinstance(source, list | tuple) else ():
        if isinstance(path, Path) and (names := file_columns(path)):
            yield str(path), names
