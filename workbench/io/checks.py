"""Checks of settings: one sentence for every type, every range and every choice."""

from __future__ import annotations

import functools
import math
import operator
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from workbench.io.errors import RequestError, nearest, shown

_WORDS: Mapping[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("True or False", "True or False"),
}
"""Types that are checked, and what one and several values are called."""

SEEDS = 1 << 63
"""Random seeds are below this number: torch takes no larger ones."""

MOST = 100_000
"""Largest number of random draws of one kind, such as resamples; more would change no interval."""
_REPEATED = ("resamples", "permutations", "shuffles", "draws", "controls_drawn", "ablation_controls", "seeds", "random")
"""Settings of probes that are such numbers."""

_LONGEST_NAME = 255  # bytes, of all usual file systems


def check(
    name: str,
    value: Any,
    *,
    at_least: int | float | None = None,
    at_most: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
    one_of: Collection[Any] | None = None,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Refuses a value that is out of range or none of the choices, in one sentence that names it.

    Args:
        name: What the caller calls the value: `limit`.
        value: Number, or one of the choices. NaN is in no range.
        at_least: Smallest value allowed.
        at_most: Largest value allowed.
        above: The value must be larger than this.
        below: The value must be smaller than this; infinity: it must be finite.
        one_of: The choices, in the order in which they are shown.
        whole: The number must have no fraction.
        optional: None is allowed, too.

    Raises:
        RequestError: For example "limit must be at least 1, not 0".
    """
    if optional and value is None:
        return
    if one_of is not None:
        if value not in one_of:
            choices = [str(choice) for choice in one_of]
            close = nearest(value, choices) if isinstance(value, str) and len(choices) > 3 else ""
            raise RequestError(f"{name} must be {_one_of(choices)}, not {value!r}{close}")
        return
    limits = (
        (operator.ge, at_least),
        (operator.le, at_most),
        (operator.gt, above),
        (operator.lt, below),
    )
    try:
        inside = all(fits(value, limit) for fits, limit in limits if limit is not None)
        inside = inside and not (whole and value != int(value))
    except (TypeError, ValueError, OverflowError):  # no number, or none that could be a whole one
        inside = False
    if not inside:
        text = f"{value!r}" if isinstance(value, str) else f"{value}"
        kind = "a whole number, " if whole else ""
        raise RequestError(f"{name} must be {kind}{_range(at_least, at_most, above, below)}, not {text}")


def whole_number(name: str, value: Any, **limits: Any) -> int:
    """Returns a whole number that a caller gave, 2.0 as 2, so that it can count and slice.

    Args:
        name: What the caller calls it: `k`.
        value: The number.
        **limits: Its limits, as of `check`.

    Raises:
        RequestError: For example "k must be a whole number, at least 1, not 2.5".
    """
    check(name, value, whole=True, **limits)
    return int(value)


def check_resampling(resamples: int, seed: int) -> None:
    """Checks the settings of intervals: from 1 to `MOST` resamples, and a seed that NumPy and torch take."""
    check("resamples", resamples, at_least=1, at_most=MOST, whole=True)
    check("seed", seed, at_least=0, below=SEEDS, whole=True)


def check_settings(settings: Any) -> None:
    """Checks what the settings of every probe have in common: types, a usable seed, and at most `MOST` random draws."""
    check_types(settings)
    check("seed", getattr(settings, "seed", None), below=SEEDS, optional=True)
    for name in _REPEATED:
        if isinstance(value := getattr(settings, name, None), int):
            check(name, value, at_most=MOST)


def as_path(name: str, value: Any) -> Path:
    """Returns a path that a caller gave as a text or as a path object.

    Args:
        name: What the caller calls the path: `out`.
        value: What was given. An empty text is refused: it would be the current folder.

    Raises:
        RequestError: For example "out must be a path (a text or a pathlib.Path), not 3".
    """
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise RequestError(f"{name} must be a path (a text or a pathlib.Path), not {shown(value)}")
    if not text:
        raise RequestError(f"{name} is an empty text; give a path")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # half of a pair of surrogates
        encoded = b"\0"
    if b"\0" in encoded or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise RequestError(f"{name} is {shown(text)}, which cannot be the name of a file; give another path")
    return Path(text)


def check_kind(name: str, value: object, kind: type | tuple[type, ...], example: str) -> None:
    """Refuses a value of another type than a function takes, such as a name in place of a loaded model.

    Args:
        name: Name of the argument.
        value: Its value.
        kind: The type, or several.
        example: What is taken, in words: "a loaded model, such as wb.load_model('demo')".

    Raises:
        RequestError: For example "model must be a loaded model, such as wb.load_model('demo'), not 'demo'".
    """
    if not isinstance(value, kind):
        plain = value is None or isinstance(value, str | int | float | list | tuple | dict | os.PathLike)
        raise RequestError(f"{name} must be {example}, not {shown(value) if plain else type(value).__name__}")


def check_fields(record: object, *names: str, **limits: Any) -> None:
    """Checks fields of a settings record, all by the same `limits`, which are those of `check`."""
    for name in names:
        check(name, getattr(record, name), **limits)


def check_types(record: Any) -> None:
    """Refuses values of a frozen settings record that are not of the types of its fields.

    Numbers of NumPy become Python's, 2.0 becomes 2 where a whole number is meant, a path a text, and a list, or one
    value alone, a tuple where there may be several. Fields of other types than numbers, texts, truth values and tuples
    of them are left alone.

    Args:
        record: The record, which is changed in place.

    Raises:
        RequestError: For example "resamples must be a whole number, not 2.5".
    """
    hints = _hints(type(record))
    for name in (field.name for field in fields(record)):
        hint, value = hints.get(name), getattr(record, name)
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        known = [kind for kind in kinds if kind in _WORDS or typing.get_origin(kind) is tuple]
        if len(known) != 1 or (value is None and type(None) in kinds):
            continue
        object.__setattr__(record, name, _of_kind(name, known[0], value))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of the fields of a class; none where a name of them is not known when it runs."""
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return {}


def _of_kind(name: str, kind: Any, value: Any) -> Any:
    """A value as one of a type, or several in a tuple."""
    if typing.get_origin(kind) is not tuple:
        return _converted(name, kind, value, several=False)
    inner = typing.get_args(kind)[0]
    if inner not in _WORDS:
        return value
    single = isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)
    return tuple(_converted(name, inner, entry, several=True) for entry in ([value] if single else value))


def _converted(name: str, kind: type, value: Any, several: bool) -> Any:
    truth = isinstance(value, bool) or type(value).__name__ == "bool"  # NumPy's
    try:
        if kind is bool and truth:
            return bool(value)
        if kind is str and isinstance(value, str | os.PathLike):
            return os.fspath(value)
        if kind in (int, float) and not truth and not isinstance(value, str | bytes):
            number = float(value)
            if kind is float and not (several and math.isnan(number)):  # alone it is in no range
                return number
            if kind is int and number == math.floor(number):
                return int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # none, or several numbers
        pass
    raise RequestError(f"{name} must be {_WORDS[kind][several]}, not {shown(value)}")


def _one_of(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"


def _range(
    at_least: int | float | None, at_most: int | float | None, above: int | float | None, below: int | float | None
) -> str:
    """The range in words: "at least 1", "from 0 to 1", "above 0 and finite"."""
    if at_least is not None and at_most is not None:
        return f"from {at_least} to {at_most}"
    words = [
        f"{word} {limit}"
        for word, limit in (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
        if limit is not None and not math.isinf(limit)
    ]
    return " and ".join([*words, "finite"] if below == math.inf else words)
