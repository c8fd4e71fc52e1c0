"""Words of a store's texts, and those that the border of a sequence cuts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from workbench.analysis.words import words_of


def tokens_of(sequences, document, **columns):
    """Sequences of tokens; a token in angle brackets is special."""
    texts = [text for sequence in sequences for text in sequence]
    lengths = list(map(len, sequences))
    table = {
        "token": pa.array(texts).dictionary_encode(),
        "sequence": np.repeat(np.arange(len(lengths)), lengths),
        "document": np.repeat(document, lengths),
        "is_special": np.array([text.startswith("<") for text in texts]),
    }
    return pa.table(table | {name: pa.array(values) for name, values in columns.items()})


CUT = [["<s>", " the", " Mon"], ["<s>", "day", " it"], ["<s>", " was"]]
"""One document in three sequences: Monday is cut, "it was" is not."""


def test_a_word_that_goes_on_in_the_next_sequence_is_cut_on_both_sides():
    words, _ = words_of(tokens_of(CUT, [0, 0, 0]), "word")
    assert np.flatnonzero(words.cut).tolist() == [2, 4]
    last, control = words.groups(np.arange(8), (0, -1))
    assert not last.any()
    assert np.flatnonzero(control[0]).tolist() == [0, 1, 3, 5, 6, 7]
    assert not words.is_word(2, 1)
    assert words.is_word(1, 1)


def test_the_same_tokens_of_two_documents_are_whole():
    words, _ = words_of(tokens_of(CUT, [0, 1, 2]), "word")
    assert not words.cut.any()


def test_sequences_without_special_tokens():
    words, _ = words_of(tokens_of([[" a", " Mon", "da"], ["y", " b"]], [0, 0]), "word")
    assert np.flatnonzero(words.cut).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("mark", "cut"), [(None, [2, 4]), ([False] * 6 + [True, True], [2, 4, 6, 7])])
def test_labelled_spans_are_cut_by_their_number_and_their_mark(mark, cut):
    """The mark knows, too, of a span whose rest was not recorded."""
    columns = {"word_span": [None, 0, 1, None, 1, 2, None, 3]} | ({} if mark is None else {"word_cut": mark})
    words, source = words_of(tokens_of(CUT, [0, 0, 0], **columns), "word")
    assert source == "labelled spans of 'word'"
    assert np.flatnonzero(words.cut).tolist() == cut
