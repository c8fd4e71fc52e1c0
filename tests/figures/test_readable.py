"""Tokens as people read them: split characters of real byte-level vocabularies, runs from right to left."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workbench.figures.readable import (
    CONTINUED,
    byte_tokens,
    readable_tokens,
    readable_window,
    right_to_left_runs,
    vocabulary_texts,
)

BYTE_NAMES = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]


def byte_names(text: str) -> list[str]:
    """One token for each byte of `text`, by the names that GPT-2's vocabulary has for them."""
    printable = [ord(name) for name in BYTE_NAMES]
    unprintable = [value for value in range(256) if value not in printable]
    names = {value: chr(value) for value in printable} | {value: chr(256 + n) for n, value in enumerate(unprintable)}
    return [names[value] for value in text.encode()]


@pytest.mark.parametrize("text", ["日", "ж", "👩", "ก", "ש"])
def test_a_character_of_several_tokens_is_whole_at_the_first(text):
    rest = [CONTINUED] * (len(text.encode()) - 1)
    assert readable_tokens(["a", *byte_names(text), " b"]) == ["a", text, *rest, " b"]
    by_value = [f"<0x{value:02X}>" for value in text.encode()]
    assert readable_tokens(["a", *by_value, " b"]) == ["a", text, *rest, " b"]


def test_tokens_that_end_inside_of_a_character():
    first, second = "".join(byte_names(" 日本")[:6]), byte_names("本")[-1]
    assert readable_tokens([first, second]) == [" 日本", CONTINUED]


@given(st.lists(st.sampled_from(["a", " the", "日本", "é", "", "\n", "<s>", "â", "ж", "<0x41>"]), max_size=8))
def test_tokens_that_are_text_stay_as_they_are(tokens):
    assert readable_tokens(tokens) == tokens


@given(st.text(min_size=1, max_size=12), st.integers(1, 3))
@example("\u0e01", 3)
@example("жж日", 2)
def test_any_text_of_bytes_is_read_back(text, size):
    data = text.encode("utf-8", "replace")
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    names = byte_names(data.decode())
    parts = ["".join(names[at : at + size]) for at in range(0, len(names), size)]
    readable = readable_tokens(parts)
    assert len(readable) == len(parts)
    if all(unicodedata.category(char)[0] == "L" and ord(char) > 0x250 for char in text):
        whole = [piece.decode("utf-8", "ignore").encode() == piece for piece in pieces]  # these stay as they are
        read = ["" if part == CONTINUED else part for part in readable]
        texts = (
            piece.decode() if alone and part == name else part
            for piece, alone, part, name in zip(pieces, whole, read, parts, strict=True)
        )
        assert "".join(texts) == text


def test_runs_from_right_to_left():
    assert right_to_left_runs(["a", " ", "ש", "ל", " ", "ם", ".", "b"]) == [slice(2, 6)]
    assert right_to_left_runs(["مر", "حبا", " 12"]) == [slice(0, 2)]
    assert right_to_left_runs(["a", "b"]) == []
    assert right_to_left_runs(["a", "ש", CONTINUED, "ל", CONTINUED]) == [slice(1, 5)]  # its second half, too
    assert right_to_left_runs([]) == []


@pytest.mark.parametrize("first", range(1, 7))
@pytest.mark.parametrize("last", range(10, 16))
def test_a_part_of_a_text_shows_no_bytes_as_letters(first, last):
    text = "Привет日"
    shown = readable_window(byte_names(text)[first:last])
    assert set(shown) <= {*text, CONTINUED, "<0xD0>", "<0xD1>", "<0xE6>", "<0x97>"}
    assert (shown[0] == CONTINUED) == (first % 2 == 1)
    assert readable_window(["caf", "é"]) == ["caf", "é"]


def test_parts_of_characters_in_a_vocabulary_are_bytes():
    single = [byte_names(char)[0] for char in map(chr, range(33, 127))]
    every = [name for name in _all_byte_names() if name not in single]
    merged = [
        "né",
        "é",
        "Ð",
        " " + "".join(byte_names("日")[:2]),
        "".join(byte_names("日本")[:5]),
        "жук",
        "日",
        "naïve",
    ]
    vocabulary = (*single, *every, *merged)
    first = len(single) + len(every)
    high = {number for number, name in enumerate(vocabulary[:first]) if name in HIGH}
    assert len(high) == 128
    assert byte_tokens(vocabulary) == high | {first + 3, first + 4}
    ids = [vocabulary.index("é"), first + 1, first + 3]
    assert vocabulary_texts(vocabulary, ids, [vocabulary[n] for n in ids]) == ["<0xE9>", "é", "<0x20><0xE6><0x97>"]
    assert byte_tokens(("a", "é", "Ð")) == frozenset()  # no byte-level vocabulary


def _all_byte_names() -> list[str]:
    printable = [ord(name) for name in BYTE_NAMES]
    rest = [value for value in range(256) if value not in printable]
    return [*BYTE_NAMES, *(chr(256 + n) for n in range(len(rest)))]


# bytes from 128 on: those of Latin-1 that are printed keep their character; of the others, 33 are below 128
HIGH = {name for name in _all_byte_names() if 0xA1 <= ord(name) <= 0xFF or ord(name) > 0x100 + 33}
