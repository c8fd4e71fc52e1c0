"""Tests of long texts that are tokenized in pieces: the tokens are those of the whole, or the cuts are said."""

from __future__ import annotations

import numpy as np
import pytest
from corpus_example import APPENDS_EOS, BYTE_LEVEL, UNIGRAM, Letters, letters_as_bytes, lists, plan, word_pieces
from warned import warned

from workbench.corpus import layout, pieces
from workbench.corpus.pieces import encode_long
from workbench.corpus.tokenizer import Encoding, encode

PIECE = 2048


def in_pieces(tokenizer, text, piece=PIECE) -> tuple[Encoding, list[int], int]:
    """The tokens of all pieces, the places where the text was cut, and the number of pieces."""
    cuts: list[int] = []
    parts = list(encode_long(tokenizer, text, cuts.append, piece))
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "char_start", "char_end")]
    return Encoding(*joined), cuts, len(parts)


def equal_encodings(first: Encoding, second: Encoding) -> bool:
    return all(np.array_equal(getattr(first, n), getattr(second, n)) for n in ("ids", "char_start", "char_end"))


def texts(rng):
    letters = list("the in cat a.\n\té😀ש\u0301'")
    return {
        "words": "".join(rng.choice(letters, 9 * PIECE)),
        "one long word": "".join(rng.choice(list("ACGT"), 9 * PIECE)),
        "runs": "".join(
            c * int(n) for c, n in zip(rng.choice(list(" a=0\n-"), 300), rng.integers(1, 200, 300), strict=True)
        ),
        "one run": "a b " * 500 + "=" * 5 * PIECE + " the cat" * 500,
        "Chinese": "".join(map(chr, rng.integers(0x4E00, 0x9FFF, 5 * PIECE))),
    }


TOKENIZERS = {"byte": BYTE_LEVEL, "sentencepiece": UNIGRAM, "bytes": letters_as_bytes(), "pieces": word_pieces()}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_tokens_are_those_of_the_whole_unless_a_cut_is_said(name, seed):
    tokenizer = TOKENIZERS[name]
    for text in texts(np.random.default_rng(seed)).values():
        (whole,) = encode(tokenizer, [text])
        encoding, cuts, count = in_pieces(tokenizer, text)
        assert count >= 4
        assert cuts or equal_encodings(encoding, whole)
        if name == "byte":
            assert not cuts
        assert cuts == sorted(set(cuts))
        assert np.all(np.diff(encoding.char_start) >= 0)


def test_every_length_of_text_and_every_size_of_piece_gives_every_token_once():
    text = "the cat in the éàü 😀 hat\n" * 40
    for size in range(96, 130):
        for length in range(len(text) - 40, len(text), 7):
            (whole,) = encode(BYTE_LEVEL, [text[:length]])
            encoding, cuts, _ = in_pieces(BYTE_LEVEL, text[:length], size)
            assert cuts or equal_encodings(encoding, whole), (size, length)


def test_tokenizers_without_offsets_are_cut_at_spaces_and_lose_nothing():
    text = "abc de fgh " * 600
    encoding, cuts, count = in_pieces(Letters(), text)
    assert encoding.ids.tolist() == Letters()(text, add_special_tokens=False)["input_ids"]
    assert len(cuts) == count - 1
    assert all(text[cut] == " " for cut in cuts)
    assert set(encoding.char_start.tolist()) == {-1}


def test_a_plan_of_a_long_text_is_that_of_the_whole_and_says_where_it_is_not(monkeypatch):
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("the in cat a.\n"), 6 * PIECE))
    options = {"context": 50, "tokenizer": APPENDS_EOS, "bos": "always"}
    whole = plan([text, "a"], **options)
    monkeypatch.setattr(layout, "PIECE", PIECE)
    monkeypatch.setattr(layout, "encode_long", lambda *arguments: encode_long(*arguments, piece=PIECE))
    long = plan([text, "a"], **options)
    for name in ("token_ids", "char_start", "char_end", "document", "starts"):
        assert np.array_equal(getattr(long, name), getattr(whole, name)), name
    assert long.cut_documents == 1
    with warned(r"^document 0 \(12,288 characters\) was tokenized in pieces; \d of them begin at a cut, the first at"):
        plan(["x" * 6 * PIECE], word_pieces(), context=50, bos="never")


def test_reading_of_a_long_text_stops_with_max_rows(monkeypatch):
    calls = []

    def counted(tokenizer, parts):
        calls.append(sum(map(len, parts)))
        return encode(tokenizer, parts)

    monkeypatch.setattr(pieces, "encode", counted)
    text = "the cat " * 100_000
    first = plan([text], context=16, max_rows=100)
    assert sum(calls) < 3 * pieces.PIECE
    assert first.cut_at == int(first.char_end[-1])
    assert lists(first) == lists(plan([text[:2000]], context=16, max_rows=100))
