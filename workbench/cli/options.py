"""Options of a command, read from the fields of its dataclass: names, types, defaults and meanings.

The fields of a nested dataclass are options of the command, too. One table serves parsing, help and completion.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from workbench.results.probe import setting_meanings

_Type = TypeVar("_Type")
_POSITIONAL = "positional"
Positional = Annotated[_Type, _POSITIONAL]
"""Type of an argument that has no name on the command line."""


@dataclass(frozen=True)
class Meaning:
    """Meaning of a field of a generated class, which has no docstring under it: `Annotated[Path, Meaning("...")]`."""

    text: str


@dataclass(frozen=True)
class Reader:
    """Reads the words after an option."""

    read: Callable[[str], Any]
    """Returns the value of one word. Raises ValueError with what is needed instead, such as "a whole number"."""
    metavar: str
    choices: tuple[str, ...] = ()
    several: bool = False
    """The option takes any number of words, and its value is a tuple."""
    flag: bool = False
    """The option takes no word, or one of the choices."""
    optional: bool = False
    """The word None stands for no value."""


@dataclass(frozen=True, eq=False)
class Option:
    """One option or positional argument of a command."""

    name: str
    """Name of the field: max_rows."""
    reader: Reader
    default: Any
    """MISSING: it must be given."""
    meaning: str
    positional: bool
    group: str
    """Field of the nested settings it belongs to; "" for a command's own."""

    @property
    def flag(self) -> str:
        """Its spelling in a shell: `--max-rows`; for a positional argument `MAX_ROWS`."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def required(self) -> bool:
        """True for an option without a default."""
        return self.default is MISSING

    @property
    def usage(self) -> str:
        """Its spelling with the words that follow: `--out PATH`."""
        if self.positional:
            return f"{self.flag} [...]" if self.reader.several else self.flag
        words = f"{self.reader.metavar} [...]" if self.reader.several else self.reader.metavar
        return f"{self.flag} {words}".strip()


def options_of(kind: type, group: str = "") -> Iterator[Option]:
    """Yields the options of a command in the order of its fields. A field of an unknown type keeps its default."""
    hints, meanings = get_type_hints(kind, include_extras=True), setting_meanings(kind)
    for field in fields(kind):
        hint, marks = _unwrapped(hints[field.name])
        if not field.init:
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            yield from options_of(hint, field.name)
        elif reader := _reader(hint):
            meaning = next((mark.text for mark in marks if isinstance(mark, Meaning)), meanings.get(field.name, ""))
            text = " ".join(meaning.split())
            yield Option(field.name, reader, _default(field), text, _POSITIONAL in marks, group)


def build(kind: type[_Type], values: dict[str, Any]) -> _Type:
    """Returns an instance of a command's class, its nested settings included, with `values` in place of defaults."""
    hints, arguments = get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):  # pyright: ignore[reportArgumentType]
        hint, _ = _unwrapped(hints[field.name])
        if isinstance(hint, type) and is_dataclass(hint) and field.init:
            arguments[field.name] = build(hint, values)
        elif field.name in values and field.init:
            arguments[field.name] = values[field.name]
    return kind(**arguments)


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations, and these."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        return inner, tuple(marks)
    return hint, ()


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


# ---- types ------------------------------------------------------------------------------------------------


def _reader(hint: Any) -> Reader | None:
    """The reader of a type; None for a type that no word can stand for."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if origin is Literal:
        named = {str(choice): choice for choice in inner}
        return Reader(_chooser(named), "|".join(named), choices=tuple(named))
    if origin is tuple and len(inner) == 2 and inner[1] is ...:
        reader = _reader(inner[0])
        return reader and Reader(reader.read, reader.metavar, reader.choices, several=True)
    if origin in (Union, types.UnionType):
        readers = [_reader(part) for part in inner if part is not type(None)]
        first = readers[0]
        if inner[0] is bool and len(readers) == 2 and readers[1] is not None and readers[1].choices:
            return Reader(readers[1].read, f"[{readers[1].metavar}]", readers[1].choices, flag=True)
        if len(readers) == 2 and first is not None and readers[1] is not None and readers[1].choices:
            return _either(first, readers[1])
        if len(readers) > 1 or first is None or first.flag:
            return None
        return Reader(first.read, first.metavar, first.choices, first.several, optional=True)
    return None


def _either(first: Reader, named: Reader) -> Reader:
    """Reads one of the names, or a value of the other kind."""

    def read(word: str) -> Any:
        return named.read(word) if word in named.choices else first.read(word)

    return Reader(read, f"{first.metavar}|{named.metavar}")


def _chooser(named: dict[str, Any]) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        if word not in named:
            raise ValueError(f"one of {', '.join(named)}" if len(named) > 1 else next(iter(named)))
        return named[word]

    return read


def _whole_number(word: str) -> int:
    """Reads 1000000, 1_000_000 and 1e6, each exactly."""
    try:
        value = Decimal(word)
        if not value.is_finite() or value.adjusted() > 18 or value != int(value):
            raise ValueError
    except (InvalidOperation, ValueError):
        raise ValueError("a whole number, such as 1000 or 1e6") from None
    return int(value)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError("a number, such as 0.1 or 1e-3") from None


def _path(word: str) -> Path:
    if not word.strip() or "\0" in word:
        raise ValueError("a path")
    return Path(word)


def _text(word: str) -> str:
    return word


_SCALARS: dict[Any, Reader] = {
    int: Reader(_whole_number, "INT"),
    float: Reader(_number, "NUMBER"),
    str: Reader(_text, "TEXT"),
    Path: Reader(_path, "PATH"),
    bool: Reader(_text, "", flag=True),
}
