"""Tests of labelled spans: the label of a token is that of its characters, in every kind of source."""

from __future__ import annotations

import gc
import json
import tempfile
from datetime import date
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from corpus_example import byte_level
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from labelled import SPANS, TEXT, by_character, source
from tokenizers import processors

from workbench.corpus.layout import Layout, plan_sequences
from workbench.corpus.sources import read_documents
from workbench.corpus.spans import Span
from workbench.corpus.tokenizer import TOKEN_SCHEMA, AddedTokens
from workbench.corpus.tokens import token_table
from workbench.io.errors import RequestError
from workbench.sites.settings import Recording

AROUND = AddedTokens((0,), (1,))  # <s> before, </s> after


def table(texts, tokenizer, *, context=64, packed=False, added=AROUND, cuts=(), max_rows=None, **reading):
    """The token table of `texts`, made in parts that begin at the sequences `cuts`."""
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(context, added, packed, max_rows)
        sequences = plan_sequences(read_documents(texts, **reading), tokenizer, layout, folder)
        borders = sorted({0, *(cut for cut in cuts if cut < len(sequences.lengths)), len(sequences.lengths)})
        parts = [
            token_table(
                sequences,
                first,
                last,
                row_offset=0,
                sequence_offset=0,
                document_offset=0,
                text_of=lambda ids: [str(token_id) for token_id in ids],
            )
            for first, last in pairwise(borders)
        ]
    assert len({str(part.schema) for part in parts}) == 1
    return pa.concat_tables(parts).unify_dictionaries()


def labelled(texts, values):
    """Documents with spans between some of the cuts of a text, in any order."""

    @st.composite
    def label(draw, length):
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=8)))
        spans = [
            {"start": start, "end": end, "value": draw(values)} for start, end in pairwise(cuts) if draw(st.booleans())
        ]
        return draw(st.permutations(spans))

    @st.composite
    def record(draw):
        text = draw(texts)
        names = draw(st.sets(st.sampled_from(["a", "b", "a b"])))
        return {"text": text, "spans": {name: draw(label(len(text))) for name in sorted(names)} or None}

    return st.lists(record(), min_size=1, max_size=6)


# ---- the law --------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    records=labelled(
        st.lists(st.sampled_from([" Monday", "Monday", " the", "x", "\n", "é", "日本", "🙂", " 🙂"]), max_size=9).map(
            "".join
        ),
        st.text(max_size=3),
    ),
    context=st.integers(2, 12),
    packed=st.booleans(),
    cuts=st.sets(st.integers(1, 9)),
)
@example([{"text": "the the", "spans": {"a": [{"start": 3, "end": 4, "value": ""}]}}], 9, False, {1})
@example([{"text": "", "spans": None}, {"text": "🙂", "spans": {"a": []}}], 2, True, {2})
def test_a_token_has_the_first_span_that_it_shares_a_character_with(tiny_tokenizer, records, context, packed, cuts):
    if not any(record["text"] for record in records):
        return
    tokens = table(records, tiny_tokenizer, context=context, packed=packed, cuts=cuts)
    expected = by_character(tokens.to_pylist(), records)
    assert {name: tokens[name].to_pylist() for name in tokens.column_names[len(TOKEN_SCHEMA) :]} == expected
    added = tokens.filter(tokens["is_special"]).select(list(expected))
    assert all(column.null_count == added.num_rows for column in added.columns)


@pytest.mark.parametrize("packed", [False, True])
def test_a_span_is_cut_where_max_rows_leaves_out_some_of_its_tokens(tiny_tokenizer, packed):
    record = {"text": TEXT, "spans": SPANS | {"all": [{"start": 0, "end": len(TEXT), "value": 1}]}}
    reading = {"context": 7, "packed": packed}
    whole = table([record] * 2, tiny_tokenizer, **reading).to_pylist()
    tokens = {label: {} for label in record["spans"]}  # by label and span: rows and their sequences
    for row in whole:
        for label, spans in tokens.items():
            spans.setdefault((row["document"], row[f"{label}_span"]), []).append((row["row"], row["sequence"]))
    for max_rows in range(1, len(whole)):
        for row in table([record] * 2, tiny_tokenizer, max_rows=max_rows, **reading).to_pylist():
            for label, spans in tokens.items():
                if row[label] is not None:
                    members = spans[row["document"], row[f"{label}_span"]]
                    is_complete = all(sequence == row["sequence"] and number < max_rows for number, sequence in members)
                    assert row[f"{label}_cut"] == (not is_complete), (label, row)


def test_white_space_has_labels_where_the_tokenizer_trims_its_offsets():
    """As RoBERTa's tokenizer: a token of white space alone then has no character of its own."""
    text = "if x:\n    return  the  in\n"
    spans = {"blank": [{"start": 6, "end": 10, "value": "indent"}, {"start": 16, "end": 18, "value": "gap"}]}
    records = [{"text": text, "spans": spans}]
    plain, trimming = byte_level(), byte_level()
    trimming.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True)])
    assert table(records, trimming, added=AddedTokens()).equals(table(records, plain, added=AddedTokens()))
    rows = table(records, trimming, added=AddedTokens()).to_pylist()
    assert {name: [row[name] for row in rows] for name in ("blank", "blank_span", "blank_cut")} == by_character(
        rows, records
    )
    offsets = trimming(text, return_offsets_mapping=True).offset_mapping
    assert any(start == end for start, end in offsets), "the caller's tokenizer trims as before"


def test_adjacent_spans_stay_two_and_a_token_in_both_has_the_first(tiny_tokenizer):
    text = " Monday Monday"
    spans = [{"start": start, "end": end, "value": value} for start, end, value in ((7, 9, 2), (3, 7, 2), (1, 3, 1))]
    tokens = table([{"text": text, "spans": {"a": spans}}], tiny_tokenizer)
    assert tokens.select(["char_start", "char_end", "a", "a_span"]).to_pylist() == [
        {"char_start": 0, "char_end": 0, "a": None, "a_span": None},
        {"char_start": 0, "char_end": 7, "a": 1, "a_span": 0},  # its leading space is in no span
        {"char_start": 7, "char_end": 14, "a": 2, "a_span": 2},
        {"char_start": 14, "char_end": 14, "a": None, "a_span": None},
    ]


def test_every_token_of_a_character_has_its_label(tiny_tokenizer):
    tokens = table([{"text": "a🙂b", "spans": {"face": [{"start": 1, "end": 2, "value": True}]}}], tiny_tokenizer)
    assert tokens["face"].to_pylist() == [None, None, True, True, True, True, None, None]


def test_an_added_token_inside_a_span_has_no_label(tiny_tokenizer):
    spans = {"a": [{"start": 0, "end": 6, "value": 1}]}
    tokens = table([{"text": "Monday", "spans": spans}], tiny_tokenizer, context=4)
    assert tokens["char_start"].to_pylist() == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6]  # cut inside the word
    assert tokens["a_span"].to_pylist() == [None, 0, 0, 0, None, 0, 0, 0, None, None]


def test_a_tokenizer_without_offsets_gives_nulls():
    def slow(texts, **_options):
        return {"input_ids": [[2 + len(word) for word in text.split()] for text in texts]}

    class Slow:
        special_tokens_map, all_special_ids = {}, []
        __call__ = staticmethod(slow)

    tokens = table([{"text": TEXT, "spans": SPANS}] * 2, Slow())
    assert tokens["char_start"].null_count == tokens["entity"].null_count == tokens["rank_span"].null_count == 22


def test_types_are_those_of_the_values_over_the_whole_corpus(tiny_tokenizer):
    values = {
        "flag": [True, False],
        "whole": [1, -5],
        "real": [1, 0.5],
        "word": ["x", "\ud800"],
        "mixed": ["x", 1],
        "big": [1, 2**70],
        "numpy": [np.int64(7), np.float32(0.5)],
        "missing": [float("nan"), 0.5],
        "day": [date(2020, 2, 29), None],
    }
    records = [
        {"text": "a", "spans": {label: [{"start": 0, "end": 1, "value": pair[i]}] for label, pair in values.items()}}
        for i in (0, 1)
    ]
    records[0]["spans"] |= {"none": None, "empty": []}
    tokens = table(records, tiny_tokenizer, added=AddedTokens())
    text = pa.dictionary(pa.int32(), pa.string())
    expected = {
        "flag": (pa.bool_(), [True, False]),
        "whole": (pa.int64(), [1, -5]),
        "real": (pa.float64(), [1.0, 0.5]),
        "word": (text, ["x", "\ufffd"]),
        "mixed": (text, ["x", "1"]),
        "big": (pa.decimal128(38, 0), [Decimal(1), Decimal(2**70)]),
        "numpy": (pa.float64(), [7.0, 0.5]),
        "missing": (pa.float64(), [None, 0.5]),
        "day": (pa.date32(), [date(2020, 2, 29), None]),
        "none": (pa.null(), [None, None]),
        "empty": (pa.null(), [None, None]),
    }
    columns = [name for label in expected for name in (label, f"{label}_span", f"{label}_cut")]
    assert tokens.column_names == [*TOKEN_SCHEMA.names, *columns]
    assert {label: (tokens[label].type, tokens[label].to_pylist()) for label in expected} == expected
    assert {tokens[f"{label}_span"].type for label in expected} == {pa.int32()}
    assert tokens["flag_span"].to_pylist() == [0, 0]


def test_replaced_characters_keep_the_offsets(tiny_tokenizer):
    record = {"text": "\ud800\udfff day", "spans": {"a": [{"start": 2, "end": 6, "value": "day"}]}}
    tokens = table([record], tiny_tokenizer, added=AddedTokens())
    assert tokens["a"].to_pylist() == [None] * 6 + ["day"]  # U+FFFD is three bytes
    assert tokens["char_end"].to_pylist() == [1, 1, 1, 2, 2, 2, 6]


def test_max_rows_reads_no_labels_beyond_its_documents(tiny_tokenizer):
    records = [{"text": "x" * 8, "spans": {f"l{i}": [{"start": 0, "end": 8, "value": i}]}} for i in range(9)]
    tokens = table(iter(records), tiny_tokenizer, max_rows=20, added=AddedTokens())
    assert tokens.column_names[len(TOKEN_SCHEMA) :] == [
        f"l{number}{suffix}" for number in range(3) for suffix in ("", "_span", "_cut")
    ]
    assert tokens["l2"].to_pylist() == [None] * 16 + [2] * 4


def test_many_documents_keep_their_own_spans(tiny_tokenizer):
    """More than one batch of the table on the disk, with documents in between that have no token or no span."""
    records = [
        {"text": "xy" if i % 3 else "", "spans": {"i": [{"start": 1, "end": 2, "value": i}]} if i % 3 == 1 else None}
        for i in range(1500)
    ]
    frame = table(records, tiny_tokenizer, added=AddedTokens(), cuts=range(0, 1000, 77)).to_pandas()
    inside = frame[frame.i.notna()]
    assert (inside.i == inside.document).all()
    assert inside.document.tolist() == list(range(1, 1500, 3))
    assert (inside.char_start == 1).all()


def test_spans_do_not_stay_in_memory(tiny_tokenizer, tmp_path):
    alive = []

    def records():
        for i in range(1500):
            if i % 700 == 699:
                alive.append(sum(type(value) is Span for value in gc.get_objects()))
            spans = [{"start": j, "end": j + 1, "value": "long" * 50} for j in range(8)]
            yield {"text": "x" * 8, "spans": {"a": spans}}

    before = pa.total_allocated_bytes()
    sequences = plan_sequences(read_documents(records()), tiny_tokenizer, Layout(64, AROUND), tmp_path)
    assert sequences.spans["a"].combine_chunks().flatten().nbytes > 12_000 * 200
    assert 0 < max(alive) <= 2 * 256 * 8, "two batches, where 1,400 documents have been read"
    assert pa.total_allocated_bytes() - before < 1_000_000, "the table lies in a file"


# ---- sources --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "jsonl", "parquet", "pandas", "dataset", "numpy dataset"])
@pytest.mark.parametrize("metadata", [None, (), ("tag",)])
def test_every_source_gives_the_same_spans(kind, metadata, tmp_path):
    records = [
        {"text": TEXT, "tag": "x", "other": 1, "spans": SPANS},
        {"text": "a time", "tag": "y", "other": 2, "spans": None},
        {"text": "the day", "tag": "z", "other": 3, "spans": {"rank": [{"start": 4, "end": 7, "value": 1}]}},
    ]
    documents = list(read_documents(source(kind, records, tmp_path), metadata=metadata))
    first, second, third = (dict(document.spans) for document in documents)
    assert first == {"entity": (Span(0, 4, "once"), Span(17, 23, "day")), "rank": (Span(24, 27, 3),)}
    assert second == {}
    assert {label: spans for label, spans in third.items() if spans} == {"rank": (Span(4, 7, 1),)}
    assert {type(part) for document in documents for spans in document.spans.values() for s in spans for part in s} == {
        int,
        str,
    }
    names = {None: ["tag", "other"], (): [], ("tag",): ["tag"]}[metadata]
    assert [list(document.metadata) for document in documents] == [names] * 3


def test_the_column_can_be_another_or_none():
    records = [{"text": TEXT, "words": SPANS, "spans": "since 1960"}]
    (document,) = read_documents(records, span_column="words")
    assert list(document.spans) == ["entity", "rank"]
    assert document.metadata == {"spans": "since 1960"}
    (document,) = read_documents([{"text": TEXT, "spans": SPANS}], span_column=None)
    assert document.spans == {}
    assert json.loads(document.metadata["spans"]) == SPANS


def test_a_column_may_be_named_as_one_of_the_token_table(tmp_path):
    file = source("parquet", [{"text": TEXT, "token": {"a": [{"start": 0, "end": 1, "value": 1}]}}], tmp_path)
    (document,) = read_documents(file, span_column="token")
    assert document.spans == {"a": (Span(0, 1, 1),)}
    assert document.metadata == {}


def test_token_ids_without_a_span_need_no_characters():
    documents = list(read_documents([{"input_ids": [1, 2], "spans": {"a": []}}, {"input_ids": [3], "spans": None}]))
    assert [(document.token_ids, document.spans) for document in documents] == [([1, 2], {"a": ()}), ([3], {})]


# ---- refusals -------------------------------------------------------------------------------------------

FORM = (
    "; spans are given as {'entity': [{'start': 0, 'end': 4, 'value': 'person'}]}: name the column that holds them "
    "in span_column=, or pass span_column=None to read no spans"
)
GOOD = {"start": 0, "end": 2, "value": 1}


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ("since 1960", "column 'spans' is 'since 1960'" + FORM),
        ([GOOD], f"column 'spans' is [{GOOD}]" + FORM),
        ("x" * 100, "column 'spans' is '" + "x" * 78 + "…" + FORM),
        ({"a": GOOD}, f"label 'a' of column 'spans' is {GOOD}" + FORM),
        ({"a": [GOOD, [2, 3, 1]]}, "span 1 of label 'a' is [2, 3, 1]" + FORM),
        ({"a": [{"start": 0, "end": 2}]}, "span 0 of label 'a' is {'start': 0, 'end': 2}" + FORM),
        ({"a": [GOOD | {"id": 7}]}, f"span 0 of label 'a' is {GOOD | {'id': 7}}" + FORM),
        ({"a": [GOOD | {"start": 0.0}]}, f"span 0 of label 'a' is {GOOD | {'start': 0.0}}" + FORM),
        ({"a": [GOOD | {"end": True}]}, f"span 0 of label 'a' is {GOOD | {'end': True}}" + FORM),
        ({"a": [GOOD | {"value": [1]}]}, f"span 0 of label 'a' is {GOOD | {'value': [1]}}" + FORM),
        (
            {"a": [GOOD | {"start": -1}]},
            "span 0 of label 'a' has start -1 and end 2; they must be characters of the text, 0 <= start < end <= 5",
        ),
        (
            {"a": [GOOD, GOOD | {"start": 3, "end": 3}]},
            "span 1 of label 'a' has start 3 and end 3; they must be characters of the text, 0 <= start < end <= 5",
        ),
        (
            {"a": [GOOD | {"end": 6}]},
            "span 0 of label 'a' has start 0 and end 6; they must be characters of the text, 0 <= start < end <= 5",
        ),
        (
            {"a": [GOOD | {"start": 1, "end": 4}, GOOD]},
            "spans 0 to 2 and 1 to 4 of label 'a' overlap; a character has one value, so leave one out or give it "
            "another label",
        ),
        ({"": [GOOD]}, "column 'spans' has a label ''; labels are strings, and not empty"),
        ({7: [GOOD]}, "column 'spans' has a label 7; labels are strings, and not empty"),
        (
            {"token": [GOOD]},
            "label 'token' needs a column 'token', which is a column of the token table; rename the label",
        ),
        ({"tag": []}, "label 'tag' needs a column 'tag', which is a metadata column; rename the label"),
        ({"kind": []}, "label 'kind' needs a column 'kind_span', which is a metadata column; rename the label"),
        ({"True": []}, "label 'True' needs a column 'True', which is a constant of SQL; rename the label"),
        (
            {"a": None, "a_span": None},
            "label 'a_span' needs a column 'a_span', which is made of label 'a'; rename the label",
        ),
        (
            {"a_span": None, "a": None},
            "label 'a' needs a column 'a_span', which is made of label 'a_span'; rename the label",
        ),
    ],
)
def test_errors_in_spans_name_document_and_label(spans, message):
    records = [{"text": "whole", "spans": {"whole": [{"start": 0, "end": 5, "value": 1}]}}]
    records += [{"text": "a day", "tag": 1, "kind_span": 2, "spans": spans}]
    with pytest.raises(RequestError) as caught:
        list(read_documents(records))
    assert str(caught.value) == f"document 1 (texts[1]): {message}"
    assert "\n" not in str(caught.value)


def test_a_metadata_column_that_appears_late_is_checked_too():
    records = [{"text": "a", "spans": {"tag": []}}, {"text": "b", "tag": 1}]
    with pytest.raises(
        RequestError, match=r"^document 1 \(texts\[1\]\): label 'tag' needs a column 'tag', which is a meta"
    ):
        list(read_documents(records))
    assert len(list(read_documents(records, metadata=()))) == 2


def test_spans_of_token_ids_are_refused(tmp_path):
    file = source("jsonl", [{"input_ids": [1, 2], "spans": {"a": [GOOD]}}], tmp_path)
    with pytest.raises(RequestError) as caught:
        list(read_documents(file))
    assert str(caught.value) == (
        f"document 0 ({file}:1) is given as token ids, which have no characters, and has spans of label 'a'; "
        "give its text instead, or pass span_column=None"
    )


def test_a_named_column_that_is_not_there_is_refused(tmp_path):
    records = [{"text": "a", "words": None}]
    message = "^span_column names 'word', but {} have no such column; nearest: words; the columns are text, words$"
    for kind in ("jsonl", "parquet", "dataset"):
        with pytest.raises(RequestError, match=message.format("the texts")):
            read_documents(source(kind, records, tmp_path), span_column="word")
    with pytest.raises(RequestError, match=message.format("the documents")):
        list(read_documents(records, span_column="word"))
    assert len(list(read_documents(["a"]))) == 1, "the default need not be there"


@pytest.mark.parametrize("options", [{"text_column": "spans"}, {"metadata": ("tag", "spans")}])
def test_a_column_has_one_use(options):
    with pytest.raises(RequestError) as caught:
        Recording(**options)
    assert str(caught.value) == (
        f"{next(iter(options))} names 'spans', which is the column of spans; name another in span_column=, or pass "
        "span_column=None to read no spans"
    )
    assert Recording(**options, span_column=None).span_column is None
