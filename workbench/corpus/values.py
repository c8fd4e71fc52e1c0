"""Values of metadata and of spans: one form for each kind of value, and one type for all values of a column."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from workbench.corpus.tokenizer import replace_surrogates
from workbench.io.errors import RequestError

Plain: TypeAlias = bool | int | float | str | Decimal | date | time | None
"""A value of a column; `datetime` is a `date`. NaN, NaT and the missing values of pandas are None."""

_EXACT = 2**53
"""Whole numbers up to this size are floats, too."""
_DIGITS = 38  # of Arrow's decimals
_LONGEST = 4000  # digits; Python refuses to print numbers of more than 4,300
_PANDAS_MISSING = ("NAType", "NaTType")
_NAMES = {int: "whole numbers", float: "floats", Decimal: "decimals"}


def plain_value(value: Any) -> Plain:
    """Returns a value in one of the forms of `Plain`; containers as compact JSON, anything else as its text.

    Raises:
        RequestError: A container that holds itself, or a number of more than 4,000 digits.
    """
    value = python_value(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | bytes):
        text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str.__str__(value)
        return replace_surrogates(text)[0]
    if isinstance(value, int):
        if value.bit_length() > 3 * _LONGEST:
            raise RequestError(f"a number of more than {_LONGEST:,} digits; give it as a string")
        return int(value)
    if isinstance(value, float):
        return None if value != value else float(value)
    if isinstance(value, Decimal):
        return value if value.is_finite() else plain_value(float(value))
    if isinstance(value, datetime) and not getattr(value, "nanosecond", 0):
        exact = datetime.combine(value.date(), value.timetz())  # without the subclass of pandas
        try:
            return exact if exact.tzinfo is None else exact.astimezone(UTC)
        except OverflowError:  # outside of the years 1 to 9999
            return str(value)
    if isinstance(value, date | time) and not isinstance(value, datetime):
        return str(value) if isinstance(value, time) and value.tzinfo else value
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        try:
            text = json.dumps(_nested(value), ensure_ascii=False, separators=(",", ":"))
        except RecursionError:
            raise RequestError("a value that is nested too deeply or holds itself; leave it out") from None
        return replace_surrogates(text)[0]
    return replace_surrogates(str(value))[0]


def python_value(value: Any) -> Any:
    """Returns a value of NumPy, pandas or torch as one of Python; missing values of pandas as None."""
    kind = type(value)
    if kind.__name__ in _PANDAS_MISSING and kind.__module__.startswith("pandas"):
        return None
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            return None
        exact = value if value.dtype == "datetime64[D]" else value.astype("datetime64[us]")
        return exact.item() if exact == value and isinstance(exact.item(), date) else str(value)
    if isinstance(value, np.timedelta64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, np.floating):
        return float(value)
    return value.tolist() if hasattr(value, "__array__") and hasattr(value, "tolist") else value


def _nested(value: Any) -> Any:
    """A container as JSON can hold it."""
    value = python_value(value)
    if isinstance(value, Mapping):
        return {str(name): _nested(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nested(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_nested(item) for item in value), key=str)
    if isinstance(value, float) and not np.isfinite(value):
        return None if value != value else str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else plain_value(value)


@dataclass
class ColumnType:
    """Type of a column, known after its last value: the narrowest that holds every value exactly.

    Whole numbers are int64, uint64 or a decimal; with floats among them they are float64, if each is a float exactly.
    Values of several kinds become text. A column without values has Arrow's type `null`.
    """

    name: str
    kinds: dict[type | str, str] = field(default_factory=dict)
    """Kinds of value, each with the place of its first."""
    low: int = 0
    high: int = 0
    """Extremes of the whole numbers, 0 included."""
    digits: int = 1
    """Digits before the point, of decimals."""
    scale: int = 0
    """Digits after the point."""

    def add(self, value: Plain, place: str) -> None:
        """Adds a value; `place` names its document.

        Raises:
            RequestError: A whole number that no float equals in a column that has floats, or a float among decimals.
        """
        if value is None:
            return
        kind = _kind(value)
        if kind not in self.kinds:
            self.kinds[kind] = place
        elif kind is not int and kind is not Decimal:
            return
        if isinstance(value, Decimal):
            _, digits, exponent = value.as_tuple()
            self.scale = max(self.scale, -int(exponent))
            self.digits = max(self.digits, len(digits) + int(exponent))
        elif kind is int and not self.low <= int(value) <= self.high:  # pyright: ignore[reportArgumentType]
            self.low, self.high = min(self.low, int(value)), max(self.high, int(value))  # pyright: ignore[reportArgumentType]
        self._check_numbers(place)

    def _check_numbers(self, place: str) -> None:
        if float not in self.kinds or not self.kinds.keys() <= {int, float, Decimal}:
            return
        inexact = Decimal in self.kinds or not -_EXACT <= self.low <= self.high <= _EXACT
        if inexact:
            kinds = " and ".join(_NAMES[kind] for kind in _NAMES if kind in self.kinds)
            example = "" if Decimal in self.kinds else f" such as {self.high if self.high > _EXACT else self.low}"
            raise RequestError(
                f"{place}: column {self.name!r} holds {kinds}{example}; no type of number holds both exactly: give all "
                "as one kind or as strings, or leave the column out in metadata="
            )

    @property
    def arrow(self) -> pa.DataType:
        """Arrow's type."""
        kinds = self.kinds.keys()
        if not kinds:
            return pa.null()
        if kinds == {int}:
            return self._whole()
        if kinds <= {int, float}:
            return pa.float64()
        if kinds <= {int, Decimal}:
            digits = max(self.digits, len(str(max(-self.low, self.high)))) + self.scale
            return pa.decimal128(digits, self.scale) if digits <= _DIGITS else pa.string()
        (kind, *other_kinds) = kinds
        return pa.string() if other_kinds else _ARROW.get(kind, pa.string())

    def _whole(self) -> pa.DataType:
        if self.low >= -(2**63) and self.high < 2**63:
            return pa.int64()
        if self.low >= 0 and self.high < 2**64:
            return pa.uint64()
        return pa.decimal128(_DIGITS, 0) if max(-self.low, self.high) < 10**_DIGITS else pa.string()


_AWARE = "datetime with a time zone"
_ARROW: dict[type | str, pa.DataType] = {
    bool: pa.bool_(),
    date: pa.date32(),
    datetime: pa.timestamp("us"),
    _AWARE: pa.timestamp("us", tz="UTC"),
    time: pa.time64("us"),
}


def _kind(value: Plain) -> type | str:
    return _AWARE if isinstance(value, datetime) and value.tzinfo else type(value)


def to_spool(value: Plain) -> bool | int | float | str | None:
    """Returns a value as JSON holds it; `from_spool` returns it as a value of its column."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def from_spool(value: bool | int | float | str | None, column: pa.DataType) -> Any:
    """Returns a value of a column of this type; in a column of text, what is no text becomes JSON."""
    if value is None or pa.types.is_null(column):
        return None
    if pa.types.is_string(column):
        return value if isinstance(value, str) else json.dumps(value)
    if pa.types.is_float64(column):
        return float(value)
    if pa.types.is_decimal(column):
        return Decimal(value)
    if not isinstance(value, str):
        return value
    kind = date if pa.types.is_date(column) else time if pa.types.is_time(column) else datetime
    return kind.fromisoformat(value)
