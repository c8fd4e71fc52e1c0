"""Rows of files of texts: each is a string, a mapping of columns, or token ids, with the name of its place."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from workbench.corpus.document import is_chat
from workbench.io.errors import DataError, RequestError, first_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES))
"""Endings of the names of files that are read."""

_PEEK = 100  # lines of a JSON file read to learn its columns before tokenizing
_BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"))
_ENCODINGS = (*_BOMS, (codecs.BOM_UTF16_BE, "UTF-16"))  # UTF-32 first: it begins as UTF-16 does
_LONGEST_CELL = 2**31 - 1
_MISSING = ("", "NaN", "nan", "NA", "null")

Row = tuple[str, Any]


@dataclass(frozen=True)
class Columns:
    """Columns of the texts that are read."""

    text: str = ""
    """Column of the text, which stays text in every format."""
    needed: frozenset[str | None] | None = None
    """All columns to read, where a format can leave others unread. None: all."""

    def reads(self, name: str) -> bool:
        """Returns True if a column is needed."""
        return self.needed is None or name in self.needed


def suffix(path: Path) -> str:
    """Returns the ending of a file's name that says what it holds: `.txt`, `.jsonl.gz`."""
    name = path.name.lower()
    return next((end for end in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(end)), path.suffix)


def file_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yields the rows of a file in their order, each with its place: `stories.jsonl:7`.

    Args:
        path: The file.
        columns: Columns to read.

    Raises:
        RequestError: A file of another encoding, or a row that is not of the format, with its line.
        DataError: A damaged file.
    """
    return _READERS[suffix(path).removesuffix(".gz")](path, columns)


def file_columns(path: Path) -> list[str]:
    """Returns the columns of a file as far as they are known before it is read; none for texts alone.

    Raises:
        RequestError: A file without rows, of another encoding, or with a wrong row among the first.
    """
    kind = suffix(path).removesuffix(".gz")
    if kind == ".parquet":
        with _open_parquet(path) as file:
            if file.metadata.num_rows == 0:
                raise RequestError(f"texts: {str(path)!r} is empty (0 rows); pass a file with text in it")
            return file.schema_arrow.names
    if kind in (".csv", ".tsv"):
        with _open_text(path) as file:
            return _header(path, csv.reader(file, delimiter=_delimiter(path)))
    if kind == ".txt":
        return []
    rows = [value for _, value in islice(file_rows(path, Columns()), _PEEK) if isinstance(value, dict)]
    return list(dict.fromkeys(name for row in rows for name in row))


# Text


@contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """The text of a file, unpacked where it is compressed; line ends as they are, invalid bytes as lone surrogates."""
    with open(path, "rb") as file, gzip.GzipFile(fileobj=file) as unpacked:
        buffered = io.BufferedReader(unpacked) if path.suffix.lower() == ".gz" else file  # pyright: ignore
        with _readable(path, lambda: 1):
            begin = buffered.peek(1024)[:1024]
        for mark, encoding in _ENCODINGS:
            if begin.startswith(mark):
                raise _other_encoding(path, encoding)
        if len(begin) >= 8 and begin.count(0) > len(begin) / 4:
            raise _other_encoding(path, "UTF-16 or UTF-32, or no text,")
        yield io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _other_encoding(path: Path, encoding: str) -> RequestError:
    return RequestError(
        f"texts: {str(path)!r} is {encoding} and only UTF-8 is read; convert it, as in "
        f"iconv -f UTF-16 -t UTF-8 {path.name}"
    )


@contextmanager
def _readable(path: Path, line: Callable[[], int]) -> Iterator[None]:
    """Inside, a damaged compressed file raises DataError with the line after which it cannot be read."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{line()}: damaged from here on ({error}); fetch it again") from None


def _text(path: Path, _columns: Columns) -> Iterator[Row]:
    with _open_text(path) as file, _readable(path, lambda: 1):
        yield str(path), file.read()


# JSON


def _json_lines(path: Path, _columns: Columns) -> Iterator[Row]:
    number = 0
    with _open_text(path) as opened, _readable(path, lambda: number + 1):
        opened.reconfigure(newline="\n")
        for number, line in enumerate(opened, start=1):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise RequestError(
                    f"{path}:{number}: not JSON ({reason}); each line must hold one JSON object or string"
                ) from None
            if not isinstance(value, str | dict | list):
                raise RequestError(
                    f"{path}:{number}: found {line.strip()[:40]}; each line must hold a JSON object or string"
                )
            yield f"{path}:{number}", value


def _json(path: Path, columns: Columns) -> Iterator[Row]:
    """A list of documents, or one object, over any number of lines; else JSON lines."""
    with _open_text(path) as file, _readable(path, lambda: 1):
        first, problem = _parsed(next((line for line in file if not line.isspace()), "null"))
        by_line = problem is None and not isinstance(first, list)
        file.seek(0)
        value, whole_problem = (None, None) if by_line else _parsed(file.read())
    if isinstance(value, dict) or is_chat(value, columns.text):
        yield str(path), value
    elif isinstance(value, list) and not all(isinstance(item, int | float) for item in value):
        for number, item in enumerate(value):
            if not isinstance(item, str | dict | list):
                excerpt = json.dumps(item)[:40]
                raise RequestError(f"{path}[{number}]: found {excerpt}; a list must hold JSON objects or strings")
            yield f"{path}[{number}]", item
    elif problem and whole_problem:
        raise RequestError(
            f"{path}:{whole_problem}; give a JSON list of objects or strings, or one of them on each line"
        )
    else:
        yield from _json_lines(path, columns)


def _parsed(text: str) -> tuple[Any, str | None]:
    """A JSON value, or None and the line and the reason why it is none."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, f"{error.lineno}: not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        return None, f"1: not JSON ({error})"


# Tables of text


def _table(path: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header. Read twice: a column is numbers only if all its cells are."""
    kinds: dict[str, _Cells] = {}
    for _, row in _cells(path):
        for name, cell in row.items():
            kinds.setdefault(name, _Cells()).add(cell)
    for place, row in _cells(path):
        yield (
            place,
            {n: cell if n == columns.text else kinds[n].value(cell) for n, cell in row.items() if columns.reads(n)},
        )


def _cells(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(_LONGEST_CELL)
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
        names = _header(path, reader)
        with _readable(path, lambda: reader.line_num + 1):
            try:
                for cells in reader:
                    if not cells:
                        continue
                    if len(cells) != len(names):
                        raise RequestError(
                            f"{path}:{reader.line_num}: {len(cells)} cells, and the header has {len(names)}; write a "
                            "cell that holds the separator or a line end in double quotes"
                        )
                    yield f"{path}:{reader.line_num}", dict(zip(names, cells, strict=True))
            except csv.Error as error:
                raise RequestError(
                    f"{path}:{reader.line_num}: not {suffix(path).split('.')[1].upper()} ({error})"
                ) from None


def _header(path: Path, reader: Any) -> list[str]:
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with _readable(path, lambda: 1):
            header = next(reader, [])
    except csv.Error as error:
        raise RequestError(f"{path}:1: no header ({error})") from None
    names = [name or f"column {number}" for number, name in enumerate(header, start=1)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"{path}:1: two columns are called {twice!r}; rename one")
    return names


def _delimiter(path: Path) -> str:
    return "\t" if suffix(path).startswith(".tsv") else ","


class _Cells:
    """Kind of the cells of one column: whole numbers, numbers, true and false, or text; empty cells are missing."""

    _KINDS = (
        (re.compile(r"0|-?[1-9]\d*"), int),
        (re.compile(r"[+-]?(\d|[1-9]\d+)(\.\d*)?([eE][+-]?\d+)?|[+-]?inf"), float),
        (re.compile(r"true|false", re.IGNORECASE), lambda cell: cell.lower() == "true"),
    )

    def __init__(self) -> None:
        self.possible = list(self._KINDS)
        self.empty = True

    def add(self, cell: str) -> None:
        if self.possible and cell not in _MISSING:
            self.empty = False
            self.possible = [kind for kind in self.possible if kind[0].fullmatch(cell)]

    def value(self, cell: str) -> Any:
        if not cell:
            return None
        if self.empty or not self.possible:
            return cell
        return None if cell in _MISSING else self.possible[0][1](cell)


# Parquet


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    with _open_parquet(path) as file:
        names = [str(name) for name in file.schema_arrow.names if columns.reads(str(name))]
        row = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=names):
                for values in zip(*map(values_of, batch.columns), strict=True):
                    yield f"{path}, row {row}", dict(zip(names, values, strict=True))
                    row += 1
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(f"{path}: damaged after row {row} ({first_line(error)}); fetch it again") from error


def _open_parquet(path: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq  # 0.1 s

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = str(error).split(". ")[0]
        raise RequestError(f"texts: {str(path)!r} is not a Parquet file ({reason}); pass one, or text") from None


def values_of(column: pa.Array) -> list[Any]:
    """Returns the values of a column as Python's; text that is not UTF-8 with lone surrogates."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # Parquet demands UTF-8, but not every writer obeys
        values = column.cast(pa.large_binary()).to_pylist()
        return [value if value is None else value.decode("utf-8", "surrogateescape") for value in values]


_READERS: dict[str, Callable[[Path, Columns], Iterator[Row]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet_rows,
}
