"""Tests of tables in memory: each library's frame gives the documents that a list of its rows gives."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from corpus_example import BYTE_LEVEL, lists, plan, texts_of
from refusals import refused

from workbench.corpus.sources import check_source, read_documents
from workbench.io.errors import RequestError

ROWS = [{"text": "one", "n": 1, "tag": "x"}, {"text": None, "n": 2, "tag": None}, {"text": "three", "n": 3, "tag": "z"}]


class Exported:
    """A frame of another library: it has the one method of an exchange protocol, and columns."""

    def __init__(self, table, method):
        self.columns = table.column_names
        setattr(type(self), method, lambda _self, *arguments, **options: getattr(table, method)(*arguments, **options))


def tables():
    arrow = pa.Table.from_pylist(ROWS)
    yield arrow
    yield pa.concat_tables([arrow.slice(0, 1), arrow.slice(1)])
    yield arrow.to_batches()[0]
    yield arrow.to_reader()
    yield pd.DataFrame(ROWS)
    yield pd.DataFrame(ROWS, index=[7, 7, 9]).convert_dtypes()
    for method in ("__arrow_c_stream__", "__dataframe__"):
        yield type("Frame", (Exported,), {})(arrow, method)


def test_a_table_gives_the_documents_of_its_rows():
    expected = [("one", {"n": 1, "tag": "x"}), ("", {"n": 2, "tag": None}), ("three", {"n": 3, "tag": "z"})]
    count = 0
    for table in tables():
        check_source(table)
        assert [(d.text, d.metadata) for d in read_documents(table)] == expected, type(table)
        count += 1
    assert count == 8
    assert texts_of(pd.DataFrame({"text": ["a", "b"]})["text"]) == ["a", "b"]
    assert next(d.metadata for d in read_documents(pd.DataFrame(ROWS), metadata=["tag"])) == {"tag": "x"}


def test_the_columns_of_a_table_are_checked_before_it_is_read():
    assert "no column 'body'; its columns are text, n, tag" in refused(
        RequestError, lambda: read_documents(pa.Table.from_pylist(ROWS), text_column="body")
    )
    twice = pd.DataFrame([["a", "b"]], columns=["text", "text"])
    assert refused(RequestError, lambda: read_documents(twice)) == (
        "texts: two columns of the table are called 'text'; rename one"
    )


def encoded(texts, side, tensors):
    tokenizer = BYTE_LEVEL
    before, tokenizer.pad_token = tokenizer.pad_token, "<|endoftext|>"
    try:
        return tokenizer(texts, padding=True, padding_side=side, return_tensors=tensors)
    finally:
        tokenizer.pad_token = before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_the_output_of_a_tokenizer_is_recorded_without_its_padding(side, tensors):
    texts = ["the end", "in", "the thin <|endoftext|>"]
    encoding = encoded(texts, side, tensors)
    expected = [BYTE_LEVEL(text)["input_ids"] for text in texts]
    assert lists(plan(encoding)) == expected
    assert lists(plan(dict(encoding))) == expected
    assert (
        lists(plan([dict(zip(encoding, row, strict=True)) for row in zip(*encoding.values(), strict=True)])) == expected
    )
    assert plan(encoding).metadata.column_names == []


def test_one_encoded_text_is_one_document_and_a_mask_with_a_hole_is_refused():
    assert lists(plan(BYTE_LEVEL("the"))) == [BYTE_LEVEL("the")["input_ids"]]
    holed = {"input_ids": [[5, 6, 7]], "attention_mask": np.array([[1, 0, 1]])}
    assert refused(RequestError, lambda: plan(holed)).startswith(
        "document 0 (texts[0]): attention_mask must have a 1 for each token"
    )
    uneven = {"input_ids": [[5], [6]], "attention_mask": [[1]]}
    assert "input_ids has 2 rows and attention_mask 1" in refused(RequestError, lambda: plan(uneven))


class Lazy:
    """A lazy frame: its columns cost a pass over the data."""

    @property
    def columns(self):
        raise AssertionError("columns of a lazy frame were asked for")

    def collect(self):
        return pd.DataFrame({"text": ["a"]})


def test_a_lazy_frame_is_refused_with_the_call_that_helps_and_costs_no_pass():
    assert "call its collect() first" in refused(RequestError, lambda: check_source(Lazy()))
    check_source(Lazy().collect())
