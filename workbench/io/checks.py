"""Checks of settings: one sentence for every range and every choice."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

from workbench.io.errors import RequestError, nearest


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
        shown = f"{value!r}" if isinstance(value, str) else f"{value}"
        kind = "a whole number, " if whole else ""
        raise RequestError(f"{name} must be {kind}{_range(at_least, at_most, above, below)}, not {shown}")


def check_fields(record: object, *names: str, **limits: Any) -> None:
    """Checks fields of a settings record, all by the same `limits`, which are those of `check`."""
    for name in names:
        check(name, getattr(record, name), **limits)


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
        if limit is not None and limit != math.inf
    ]
    return " and ".join([*words, "finite"] if below == math.inf else words)
