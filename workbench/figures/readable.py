"""Tokens as people read them: characters that several tokens share, and text that runs from right to left.

Byte-level tokenizers cut a character of several bytes into tokens that have no text of their own. The vocabulary names
such a token by its bytes ("<0xE6>", "æĹ"), which nobody can read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

CONTINUED = "↪"
"""Mark of a token that continues the character of the token before."""

_WHOLE = rb"(?:[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})"
_BEGUN = rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})"
_PART = re.compile(rb"[\x80-\xbf]{0,3}" + _WHOLE + rb"*" + _BEGUN + rb"?")
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


def readable_window(tokens: Sequence[str]) -> list[str]:
    """Returns `readable_tokens` of a part of a text whose ends may cut characters, without bytes like letters.

    Bytes that continue a character from before the part are "↪", the first bytes of one at its end are named: "<0xD0>".
    A lone token may also be a letter of that name ("é"): it stays one where no character is split.
    """
    texts = readable_tokens(tokens)
    if CONTINUED not in texts:
        return texts
    for place, token in enumerate(tokens):
        data = _bytes(token)
        if data is None or texts[place] != token or any(not 0x80 <= value < 0xC0 for value in data):
            break
        texts[place] = CONTINUED
    for place in range(len(tokens) - 1, max(-1, len(tokens) - 4), -1):
        data = _bytes(tokens[place])
        if data is None or texts[place] != tokens[place] or _decoded(data) is not None:
            break
        texts[place] = byte_names(tokens[place])
    return texts


def byte_names(token: str) -> str:
    """Returns the bytes that a token of the vocabulary stands for, `<0xD0>`; a token that names none as it is."""
    data = _bytes(token)
    return token if data is None else "".join(f"<0x{value:02X}>" for value in data)


def may_be_bytes(token: str) -> bool:
    """Returns True for a text that is also the name of bytes that are no whole characters: "Ð", "é", "<0xD0>"."""
    data = None if token.isascii() and not _BYTE.fullmatch(token) else _bytes(token)
    return data is not None and _decoded(data) is None


def vocabulary_texts(vocabulary: tuple[str, ...], ids: Iterable[int], texts: Iterable[str]) -> list[str]:
    """Returns the texts of some tokens of a vocabulary, bytes in place of parts of characters: `<0xD0>`, not "Ð"."""
    parts = byte_tokens(vocabulary)
    return [byte_names(text) if number in parts else text for number, text in zip(ids, texts, strict=True)]


@lru_cache(maxsize=2)
def byte_tokens(vocabulary: tuple[str, ...]) -> frozenset[int]:
    """Returns the ids of tokens of a byte-level vocabulary that are parts of characters, whose text is a name.

    Such a vocabulary has a token for every byte, before those that were merged of them: of two entries "é", the first
    is a byte and the second the letter.
    """
    first = {token: number for number, token in reversed(list(enumerate(vocabulary)))}
    if not all(name in first for name, value in _BYTES.items() if value >= 0x80):
        return frozenset()
    single = {first[name] for name, value in _BYTES.items() if value >= 0x80}
    long = ((number, token) for number, token in enumerate(vocabulary) if len(token) > 1 and not token.isascii())
    parts = (number for number, token in long if _is_part(token))
    return frozenset(single.union(parts))


def _is_part(token: str) -> bool:
    """True for the name of bytes that begin or end within a character, and of nothing else but a space before them."""
    data = _bytes(token.removeprefix(" "))
    return data is not None and _decoded(data) is None and bool(_PART.fullmatch(data))


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
