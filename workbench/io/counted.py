"""Numbers of things as text."""

from __future__ import annotations

from typing import SupportsInt


def counted(number: SupportsInt, noun: str) -> str:
    """Returns a number with its noun: "1 document", "1,234 documents".

    Args:
        number: A whole number.
        noun: The noun in the singular, whose plural has an s, or ies for y: "query", "test document".
    """
    count = int(number)
    plural = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
