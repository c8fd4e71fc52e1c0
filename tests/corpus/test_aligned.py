"""Tests of pairs: two documents each, aligned by tokens, or refused with the pair's number, or dropped and counted."""

import tempfile

import pandas as pd
import pytest
from corpus_example import APPENDS_EOS, NOTHING, lists, table
from refusals import refused
from warned import warned

from workbench.corpus.aligned import aligned_pairs
from workbench.corpus.layout import Layout, plan_sequences
from workbench.corpus.sources import read_documents
from workbench.io.errors import RequestError

PAIRS = [("the cat", "the dog"), ("in", "inn"), ("a b", "c d")]


def plan(texts, unaligned="refuse"):
    with tempfile.TemporaryDirectory() as folder:
        documents = aligned_pairs(read_documents(texts), APPENDS_EOS, unaligned)
        return plan_sequences(documents, APPENDS_EOS, Layout(16, NOTHING), folder)


@pytest.mark.parametrize("form", ["tuples", "mappings", "frame", "ids"])
def test_a_pair_gives_two_documents_with_its_number_and_their_sides(form):
    pairs = [PAIRS[0], PAIRS[2]]
    columns = [{"clean": clean, "corrupt": corrupt, "task": "x"} for clean, corrupt in pairs]
    ids = [tuple(APPENDS_EOS(side, add_special_tokens=False)["input_ids"] for side in pair) for pair in pairs]
    sequences = plan({"tuples": pairs, "mappings": columns, "frame": pd.DataFrame(columns), "ids": ids}[form])
    assert lists(sequences) == [side for pair in ids for side in pair]
    frame = table(sequences, APPENDS_EOS).to_pandas().groupby("sequence").first()
    assert frame["pair"].tolist() == [0, 0, 1, 1]
    assert frame["side"].tolist() == ["clean", "corrupt"] * 2
    assert ("task" in frame) == (form in ("mappings", "frame"))
    assert sequences.lengths[::2].tolist() == sequences.lengths[1::2].tolist()


def test_an_unaligned_pair_is_refused_by_its_number_dropped_with_a_count_or_kept():
    assert refused(RequestError, lambda: plan(PAIRS)) == (
        "pair 1 is not aligned: its sides have different numbers of tokens, clean 2 and corrupt 3; change it, or pass "
        "unaligned_pairs='drop' or 'keep'"
    )
    with warned(r"1 of 3 pairs are not aligned and were dropped; the first is pair 1, clean 2 and corrupt 3 tokens"):
        sequences = plan(PAIRS, "drop")
    assert sequences.metadata["pair"].to_pylist() == [0, 0, 2, 2]
    assert sorted(set(sequences.document)) == [0, 1, 2, 3]
    assert plan(PAIRS, "keep").metadata["pair"].to_pylist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            [PAIRS[0], "text"],
            "document 2 (texts[1]) is a text or token ids, and each document before it a pair",
        ),
        (
            [{"clean": "a", "corrupt": "b", "pair": 1}],
            "document 0 (texts[0]): a pair has a column 'pair' already",
        ),
        (
            [{"clean": "a", "corrupt": "b", "spans": {}}],
            "document 0 (texts[0]): column 'spans' has spans, which",
        ),
    ],
)
def test_a_pair_that_cannot_be_recorded_is_refused_in_a_line(texts, message):
    assert refused(RequestError, lambda: plan(texts)).startswith(message)
