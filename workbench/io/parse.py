"""JSON to frozen records and back: a key that a record does not declare is an error with file and key."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from workbench.io.errors import DataError
from workbench.io.files import sha256_bytes
from workbench.io.reading import read_file

T = TypeVar("T")

VERIFY_STORE = "run workbench verify on the store"
"""Advice in errors about a damaged record of a store."""

_DEEPEST = 64  # levels of nested lists and objects
_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def to_json(record: object, finite: bool = True) -> str:
    """Returns the canonical JSON of a record or dict: keys sorted, an entry a line, the same in every run.

    `finite`: ValueError for NaN and infinite numbers, which would not be JSON.
    """
    return _lines(record, 1, _strict if finite else _lenient) + "\n"


def checksum(record: object) -> str:
    """Returns the SHA-256 of the canonical JSON of a record or dict, without a key `checksum`."""
    entries = {key: value for key, value in _entries(record).items() if key != "checksum"}
    return sha256_bytes(to_json(entries, finite=False).encode())


def to_checked_json(record: object, finite: bool = True) -> str:
    """Returns `to_json` of a record or dict with one more key, its `checksum`."""
    return to_json({**_entries(record), "checksum": checksum(record)}, finite)


def check_checksum(value: dict[str, Any], source: object, advice: str) -> None:
    """Removes the key `checksum` of a parsed record. DataError where it is missing, or not that of the other keys."""
    if value.pop("checksum", None) != checksum(value):
        raise DataError(f"{source} is damaged or was edited: its checksum differs; {advice}")


def load_json(text: str | bytes, finite: bool = True) -> Any:
    """Returns the value of a JSON text from a file that may hold anything.

    Args:
        text: The text, bytes as UTF-8, UTF-16 or UTF-32.
        finite: Refuse NaN and infinite numbers, which JSON does not know and Python writes all the same, and integers
            beyond 64 bits.

    Raises:
        ValueError: The text is not JSON, is nested more than 64 levels deep, or has a number that is refused.
    """
    strict = {"parse_constant": _finite, "parse_float": _finite, "parse_int": _integer} if finite else {}
    try:
        value = json.loads(text, **strict)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _deeper(value, _DEEPEST):
        raise ValueError("nested too deeply")
    return value


def from_json(text: str | bytes, source: object, advice: str = VERIFY_STORE, finite: bool = True) -> dict[str, Any]:
    """Returns the object in `text`. DataError, with the name `source` and `advice`, where it is not a JSON object."""
    try:
        value = load_json(text, finite)
    except ValueError as error:
        raise DataError(f"{source} is not JSON ({error}); {advice}") from None
    return _expect(dict, value, str(source))


def read_json(path: str | os.PathLike[str], advice: str = VERIFY_STORE, finite: bool = True) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        path: The file.
        advice: Next step for the user, the end of the error.
        finite: Refuse NaN, infinite numbers and integers beyond 64 bits.

    Raises:
        DataError: The file is missing, no regular file, or holds no JSON object.
    """
    return from_json(read_file(path, advice), os.fspath(path), advice, finite)


def parse(kind: Any, value: object, where: str) -> Any:
    """Parses a JSON value as `kind`: a record, str, int, bool, tuple[X, ...], dict[str, X], X | None or Any.

    Raises:
        DataError: A key that is missing or unknown, or a value of another type. `where` is the file and the keys
            on the way to the value.
    """
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _parse_record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else parse(inner, value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        return tuple(parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        pairs = _expect(dict, value, where)
        return {key: parse(arguments[1], item, f"{where}.{key}") for key, item in pairs.items()}
    return _expect(kind, value, where)


def _parse_record(kind: type, value: object, where: str) -> Any:
    entries = _expect(dict, value, where)
    hints = _hints(kind)
    if unknown := sorted(entries.keys() - hints.keys()):
        raise DataError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(hints)}")
    if missing := [name for name in hints if name not in entries]:
        raise DataError(f"{where}: the key {missing[0]!r} is missing; found {', '.join(sorted(entries)) or 'none'}")
    parsed = {name: parse(hint, entries[name], f"{where}: {name}") for name, hint in hints.items()}
    try:
        return kind(**parsed)
    except ValueError as error:  # the record's check of a value of the right type
        raise DataError(f"{where}: {error}") from None


def _expect(kind: type[T], value: object, where: str) -> T:
    # bool is an int in Python, but `true` is not a number of rows
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise DataError(f"{where}: expected {_NAMES[kind]}, found {json.dumps(value, default=str)[:60]}")


def _integer(text: str) -> int:
    value = int(text)  # ValueError beyond some thousand digits
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"an integer of {len(text)} digits")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return value


def _deeper(value: object, levels: int) -> bool:
    """True if lists and objects are nested in more than `levels` levels."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (not levels and bool(entries)) or any(
        _deeper(entry, levels - 1) for entry in entries if isinstance(entry, dict | list)
    )


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _lines(value: object, depth: int, encode: Callable[[object], str]) -> str:
    """Two levels of the text, indented; deeper ones stay on one line, written by the C encoder."""
    value = _entries(value) if dataclasses.is_dataclass(value) else value
    if depth > 2 or not value or not isinstance(value, dict | list | tuple):
        return encode(value)
    if isinstance(value, dict):
        start, end = "{", "}"
        entries = [f"{encode(key)}: {_lines(item, depth + 1, encode)}" for key, item in sorted(value.items())]
    else:
        start, end = "[", "]"
        entries = [encode(item) for item in value]
    indent = "\n" + depth * " "
    return start + indent + f",{indent}".join(entries) + indent[:-1] + end


def _entries(record: Any) -> dict[str, Any]:
    if isinstance(record, dict):
        return record
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


_strict = json.JSONEncoder(sort_keys=True, allow_nan=False, default=_entries).encode
_lenient = json.JSONEncoder(sort_keys=True, default=_entries).encode
