"""Tokens as people read them: characters that several tokens share, and text that runs from right to left.

Byte-level tokenizers cut a character of several bytes into tokens that have no text of their own. The vocabulary names
such a token by its bytes ("<0xE6>", "æĹ"), which nobody can read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

CONTINUED = "↪"
"""Mark of a token that continues the character of the token before."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def readable_tokens(tokens: Sequence[str]) -> list[str]:
    """Returns tokens with the characters that are split over several of them whole at the first, "↪" at the others.

    Tokens are parts of characters if, by their names in the vocabulary, they are bytes that only together are UTF-8.
    All other tokens are unchanged.
    """
    texts, place = list(tokens), 0
    while place < len(tokens):
        end, text = _joined(tokens, place)
        if text:
            texts[place:end] = [text, *[CONTINUED] * (end - place - 1)]
        place = max(end, place + 1)
    return texts


def visual_order(tokens: Sequence[str]) -> list[int]:
    """Returns the indices of tokens from left to right: runs from right to left (Arabic, Hebrew) are reversed."""
    order = list(range(len(tokens)))
    for run in right_to_left_runs(tokens):
        order[run] = reversed(order[run])
    return order


def right_to_left_runs(tokens: Sequence[str]) -> list[slice]:
    """Returns the runs of tokens that are read from right to left (Arabic, Hebrew).

    Tokens without letters (spaces, digits, punctuation) inside of a run belong to it, and "↪" to the token before.
    """
    directions = [_direction(token) for token in tokens]
    for place, token in enumerate(tokens[1:], 1):
        if token == CONTINUED:
            directions[place] = directions[place - 1]
    runs, place = [], 0
    while place < len(tokens):
        if directions[place] != "R":
            place += 1
            continue
        end = place
        while end < len(tokens) and directions[end] != "L":
            end += 1
        while directions[end - 1] != "R":
            end -= 1
        runs.append(slice(place, end))
        place = end
    return runs


def _joined(tokens: Sequence[str], first: int) -> tuple[int, str]:
    """End and text of the tokens from `first` on that share characters; no text for a token of whole characters."""
    data, end = _bytes(tokens[first]), first
    if data is None or _decoded(data) is not None:
        return first + 1, ""
    for end in range(first + 1, min(len(tokens), first + 8)):
        more = _bytes(tokens[end])
        if more is None:
            return first + 1, ""
        data += more
        text = _decoded(data)
        if text is not None:
            return end + 1, text
    return first + 1, ""


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _bytes(token: str) -> bytes | None:
    """The bytes that a token of the vocabulary stands for; None where it is no such name."""
    if match := _BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    values = [_BYTES.get(char) for char in token]
    return None if not values or None in values else bytes(value for value in values if value is not None)


def _byte_names() -> dict[str, int]:
    """Characters that stand for a byte in byte-level vocabularies: printable Latin-1 as it is, others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [value for value in range(256) if value not in plain]
    return {chr(value): value for value in plain} | {chr(256 + n): value for n, value in enumerate(unprintable)}


_BYTES = _byte_names() | {" ": 0x20}


def _direction(token: str) -> str:
    """ "R" or "L" by the first letter of a token, "" without one."""
    for char in token:
        kind = unicodedata.bidirectional(char)
        if kind in ("R", "AL"):
            return "R"
        if kind == "L":
            return "L"
    return ""
