"""Names of the token table's columns in SQL, which takes names that differ by case alone for one."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

import duckdb

from workbench.io.errors import RequestError

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # DuckDB folds no other letters
_WORDS = ("identifier", "keyword")


def quote(name: str) -> str:
    """Returns a name as SQL spells it whatever its characters."""
    return '"' + name.replace('"', '""') + '"'


class SqlNames:
    """Names of columns, each with one that no other has for DuckDB."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        counts = Counter(map(_folded, names))
        self._similar = {name for name, count in counts.items() if count > 1}
        used_names = set(counts)
        self._sql: dict[str, str] = {}
        for name in names:
            sql, number = name, 1
            while _folded(name) in self._similar and (number == 1 or _folded(sql) in used_names):
                number += 1
                sql = f"{name} {number}"
            used_names.add(_folded(sql))
            self._sql[name] = sql

    @property
    def differ(self) -> bool:
        """True if some columns have other names in SQL than in the token table."""
        return bool(self._similar)

    def quoted(self, name: str) -> str:
        """Returns the name of a column in SQL, in quotes."""
        return quote(self._sql[name])

    def resolve(self, condition: str) -> str:
        """Returns an SQL condition in which columns whose names differ by case alone are those that it spells.

        Raises:
            RequestError: A name that is none of several such columns.
        """
        if not self.differ:
            return condition
        text, end, parts = condition.encode(), 0, []
        for first, last, name, is_call in self._words(text):
            if is_call or _folded(name) not in self._similar:
                continue
            if name not in self._sql:
                similar = " and ".join(repr(column) for column in self.names if _folded(column) == _folded(name))
                raise RequestError(
                    f"query {condition!r}: {name!r} is neither of the columns {similar}; spell one of them"
                )
            parts += [text[end:first], self.quoted(name).encode()]
            end = last
        return b"".join([*parts, text[end:]]).decode()

    def hint(self, condition: str) -> str:
        """Returns the end of an error about names that a condition must write in quotes: "; write ..." or ""."""
        words = {_folded(name) for *_, name, _ in self._words(condition.encode())}
        names = [
            name
            for name in self.names
            if _folded(name) in words & self._reserved
            or (
                not re.fullmatch(r"[^\W\d]\w*", name)
                and name.strip()
                and name in condition
                and quote(name) not in condition
            )
        ]
        return f"; write {', '.join(map(quote, names))} in double quotes" if names else ""

    @cached_property
    def _reserved(self) -> set[str]:
        with duckdb.connect() as connection:
            words = connection.execute("SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category = 'reserved'")
            return {name for (name,) in words.fetchall()}

    @staticmethod
    def _words(text: bytes) -> Iterator[tuple[int, int, str, bool]]:
        """First and last byte of each name in a condition, the name, and whether it is that of a function."""
        tokens = duckdb.tokenize(text.decode())
        ends = [*(first for first, _ in tokens[1:]), len(text)]
        for (first, kind), end in zip(tokens, ends, strict=True):
            word = text[first:end].rstrip()
            if kind.name in _WORDS:
                name = word.decode()
                name = name[1:-1].replace('""', '"') if name.startswith('"') else name
                yield first, first + len(word), name, text[end:].startswith(b"(")


def _folded(name: str) -> str:
    return name.translate(_LOWER)
