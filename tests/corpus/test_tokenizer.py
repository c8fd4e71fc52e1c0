"""Tests of the tokens that a tokenizer adds, and of the text of each token."""

from __future__ import annotations

import numpy as np
import pytest
from corpus_example import (
    APPENDS_EOS,
    BYTE_LEVEL,
    NOTHING,
    UNIGRAM,
    Letters,
    letters_as_bytes,
    two_words,
    word_pieces,
)
from refusals import refused
from tokenizers import normalizers

from workbench.corpus.tokenizer import AddedTokens, added_tokens, token_of_text, token_texts
from workbench.io.errors import RequestError


def test_added_tokens_are_found_by_behaviour(stories):
    assert added_tokens(BYTE_LEVEL, "model") == NOTHING
    assert added_tokens(APPENDS_EOS, "model") == AddedTokens((), (257,))
    assert added_tokens(UNIGRAM, "model") == AddedTokens((1,), (2,))
    assert added_tokens(Letters(), "model") == AddedTokens((0,), (1,))
    assert added_tokens(two_words(), "model") == NOTHING
    assert added_tokens(stories, "model") == AddedTokens((1,), ())


def test_bos_policies():
    assert added_tokens(BYTE_LEVEL, "always") == AddedTokens((260,), ())
    assert added_tokens(APPENDS_EOS, "always") == AddedTokens((256,), (257,))
    assert added_tokens(UNIGRAM, "always") == AddedTokens((1,), (2,)), "BOS must not be doubled"
    assert added_tokens(None, "always") == NOTHING
    for tokenizer in (BYTE_LEVEL, APPENDS_EOS, UNIGRAM, word_pieces()):
        assert added_tokens(tokenizer, "never") == NOTHING
    with pytest.raises(RequestError) as caught:
        added_tokens(word_pieces(), "always")
    assert str(caught.value) == "bos='always', but the tokenizer has no BOS token; use bos='model' or bos='never'"


def test_token_texts_of_real_tokenizers_join_to_the_text(stories, letters):
    text = "Once upon a time, Lily had a needle. It was sharp!"
    for tokenizer in (stories, letters):
        ids = tokenizer(text).input_ids
        assert "".join(token_texts(tokenizer, ids)) == "<s> " + text
        assert token_texts(tokenizer, [0, 1]) == ["<unk>", "<s>"]


def test_token_texts_by_kind_of_tokenizer(stories):
    grin = stories("\n\x00😀", add_special_tokens=False).input_ids
    assert token_texts(stories, grin) == [" ", "\n", "\x00", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    ids = BYTE_LEVEL(" the the\nsin é").input_ids
    assert token_texts(BYTE_LEVEL, ids) == [" the", " the", "\n", "s", "in", " ", "Ã", "©"]
    assert token_texts(BYTE_LEVEL, [260, 261]) == ["<|endoftext|>", "<261>"]
    assert token_texts(UNIGRAM, [1, 3, 4, 5, 6, 2, 0]) == ["<s>", " the", " ", "ing", "a", "</s>", "<unk>"]
    assert token_texts(letters_as_bytes(), [1 + 0x62, 1 + 0x0A, 1 + 0xE2, 257]) == ["b", "\n", "<0xE2>", " the"]
    assert token_texts(word_pieces(), [5, 3, 4, 6]) == [" the", " cat", "s", "."]
    assert token_texts(two_words(), [0, 1]) == [" hello", " world"]
    assert token_texts(Letters(), [0, 3, 11, 2]) == ["<", "a", " ", "?"]
    assert token_texts(None, np.array([7, 8])) == ["7", "8"]


def test_a_text_names_the_token_that_the_tokenizer_writes_for_it():
    assert token_of_text(BYTE_LEVEL, 261, " the") == BYTE_LEVEL(" the").input_ids[0]
    assert token_of_text(UNIGRAM, 32, "a") == 6  # encoded alone it is " " and "a"
    tokenizer = letters_as_bytes("b", "c")
    assert token_texts(tokenizer, [1 + 0x62, 258]) == ["b", "b"]
    assert token_of_text(tokenizer, 260, "b") == 258
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("b", "c")
    text = "answer: 2 tokens have the text 'b' (99, 258), and the tokenizer writes none of them; name another token"
    assert refused(RequestError, lambda: token_of_text(tokenizer, 260, "b", "answer")) == text
    text = "tokens: ' thx' is no single token of this model; nearest:  the"
    assert refused(RequestError, lambda: token_of_text(BYTE_LEVEL, 261, " thx")).startswith(text)
