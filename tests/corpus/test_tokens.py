"""Tests of the token table and of the types of its metadata columns."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
from corpus_example import (
    UNIGRAM,
    plan,
    table,
)

from workbench.corpus.tokenizer import TOKEN_SCHEMA
from workbench.corpus.tokens import token_table


def test_metadata_columns_have_one_type_over_the_whole_corpus():
    rows = [
        {"flag": True, "n": 1, "x": 1, "mixed": 1, "nested": {"a": [1, "é"]}, "big": 1, "none": None, "when": b"a"},
        {
            "flag": None,
            "n": -5,
            "x": 0.5,
            "mixed": "one",
            "nested": [1, 2],
            "big": 2**80,
            "none": None,
            "array": np.arange(2),
        },
        {
            "flag": False,
            "n": None,
            "x": None,
            "mixed": False,
            "nested": None,
            "big": None,
            "none": None,
            "late": np.int32(3),
        },
    ]
    metadata = plan([{"text": "a", **row} for row in rows]).metadata
    assert metadata.to_pydict() == {
        "flag": [True, None, False],
        "n": [1, -5, None],
        "x": [1.0, 0.5, None],
        "mixed": ["1", "one", "false"],
        "nested": ['{"a":[1,"é"]}', "[1,2]", None],
        "big": [1, 2**80, None],
        "none": [None, None, None],
        "when": ["a", None, None],
        "array": [None, "[0,1]", None],
        "late": [None, None, 3],
    }
    kinds = [str(column.type) for column in metadata.columns]
    big = "decimal128(38, 0)"
    assert kinds == ["bool", "int64", "double", "string", "string", big, "null", "string", "string", "int64"]


def test_metadata_of_many_documents_stays_with_its_document():
    texts = [{"text": "ab" if i % 3 else "", "i": i, "name": f"n{i}"} for i in range(3000)]
    frame = table(plan(texts)).to_pandas()
    assert frame.document.nunique() == 2000
    assert (frame.i == frame.document).all()
    assert (frame.name == "n" + frame.document.astype(str)).all()


def test_the_token_table():
    records = [{"text": "the", "tag": "x", "n": 1}, {"text": ""}, {"text": "a a", "tag": None, "n": 2}]
    sequences = plan(records, UNIGRAM, context=5)
    whole = table(sequences, UNIGRAM)
    assert whole.schema == TOKEN_SCHEMA.append(pa.field("tag", pa.dictionary(pa.int32(), pa.string()))).append(
        pa.field("n", pa.int64())
    )
    a, space = UNIGRAM.convert_tokens_to_ids(["a", "▁"])
    assert whole.to_pydict() == {
        "row": list(range(10)),
        "sequence": [0, 0, 0, 1, 1, 1, 1, 1, 2, 2],
        "position": [0, 1, 2, 0, 1, 2, 3, 4, 0, 1],
        "document": [0, 0, 0] + [2] * 7,
        "token_id": [1, 3, 2, 1, space, a, space, a, 1, 2],
        "token": ["<s>", " the", "</s>", "<s>", " ", "a", " ", "a", "<s>", "</s>"],
        "char_start": [0, 0, 3, 0, 0, 0, 1, 2, 3, 3],
        "char_end": [0, 3, 3, 0, 1, 1, 2, 3, 3, 3],
        "is_special": [True, False, True, True, False, False, False, False, True, True],
        "tag": ["x"] * 3 + [None] * 7,
        "n": [1] * 3 + [2] * 7,
    }


def test_parts_of_the_token_table_with_offsets_are_slices_of_the_whole():
    sequences = plan([{"text": f"the text {i}", "i": i} for i in range(20)], context=7)
    whole = table(sequences).to_pylist()
    parts = [table(sequences, first=first, last=last).to_pylist() for first, last in ((0, 3), (3, 4), (4, 40))]
    assert list(itertools.chain(*parts)) == whole
    shifted = table(sequences, first=3, last=4, row_offset=100, sequence_offset=10, document_offset=50).to_pylist()
    expected = [
        {**row, "row": row["row"] + 100, "sequence": row["sequence"] + 10, "document": row["document"] + 50}
        for row in parts[1]
    ]
    assert shifted == expected


def test_ids_with_one_text_share_a_dictionary_entry_so_that_pandas_can_read_it():
    sequences = plan([[1, 2, 3, 1]], None)
    tokens = token_table(
        sequences, 0, 1, row_offset=0, sequence_offset=0, document_offset=0, text_of=lambda ids: [" ", " ", "b"]
    )["token"]
    assert tokens.to_pylist() == [" ", " ", "b", " "]
    assert tokens.to_pandas().cat.categories.tolist() == [" ", "b"]
