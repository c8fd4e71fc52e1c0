"""Tests of the plan: every token once and in order, in sequences, segments and batches."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from corpus_example import (
    APPENDS_EOS,
    BYTE_LEVEL,
    NOTHING,
    UNIGRAM,
    Letters,
    lists,
    plan,
    table,
    two_words,
    word_pieces,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from workbench.corpus.layout import Layout, batch_plan, digest, plan_sequences, segment_plan
from workbench.corpus.sources import Document, read_documents
from workbench.corpus.tokenizer import AddedTokens, added_tokens
from workbench.io.errors import RequestError


def expected_sequences(bodies, prefix, context, *, packed, max_rows):
    """The plan, token by token. `bodies` are lists of tokens, the suffix included."""
    sequences, current = [], []
    for body in bodies:
        begins = True
        if current and not packed:
            sequences.append(current)
            current = []
        for token in body:
            if len(current) == context:
                sequences.append(current)
                current, begins = [], True
            for added in prefix if begins else []:
                if len(current) == context:
                    sequences.append(current)
                    current = [*prefix]
                    break
                current.append(added)
            if len(current) == context:
                sequences.append(current)
                current = [*prefix]
            current.append(token)
            begins = False
    if current:
        sequences.append(current)
    flat = list(itertools.chain(*sequences))[:max_rows]
    lengths = [len(sequence) for sequence in sequences]
    return [flat[end - n : end] for n, end in zip(lengths, np.cumsum(lengths), strict=True) if flat[end - n : end]]


characters = st.one_of(
    st.characters(),  # surrogates included
    st.sampled_from("the in\n\x00é😀שלום\ud800\u200f\ufffd"),
)
some_texts = st.lists(st.text(characters, max_size=30), max_size=8)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=some_texts,
    tokenizer=st.sampled_from([BYTE_LEVEL, APPENDS_EOS, UNIGRAM]),
    bos=st.sampled_from(["model", "always", "never"]),
    context=st.integers(2, 40),
    packed=st.booleans(),
    max_rows=st.none() | st.integers(1, 60),
)
@example(["the", "", "a"], UNIGRAM, "model", 2, True, 4)
def test_every_token_is_there_once_and_in_order(texts, tokenizer, bos, context, packed, max_rows):
    added = added_tokens(tokenizer, bos)
    clean = ["".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text) for text in texts]
    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in clean]
    bodies = [[*ids, *added.suffix] for ids in plain if ids]
    expected = expected_sequences(bodies, added.prefix, context, packed=packed, max_rows=max_rows)
    if not expected:
        with pytest.raises(RequestError, match="nothing to record"):
            plan(texts or iter(texts), tokenizer, bos=bos, context=context, packed=packed, max_rows=max_rows)
        return
    sequences = plan(texts, tokenizer, bos=bos, context=context, packed=packed, max_rows=max_rows)
    assert lists(sequences) == expected
    rows = sequences.starts[-1]
    assert max(sequences.lengths) <= context
    assert sequences.lengths.sum() == rows == len(sequences.token_ids)
    for sequence in lists(sequences):
        assert sequence[: len(added.prefix)] == list(added.prefix)[: len(sequence)]
    if packed:
        assert set(sequences.lengths[:-1].tolist()) <= {context}
    if max_rows is None:
        assert sequences.documents == len(texts)
        assert sequences.skipped_documents == sum(not ids for ids in plain)
        assert sequences.cut_documents == in_several_sequences(sequences)
        if not packed:
            assert sequences.cut_documents == sum(len(added.prefix) + len(body) > context for body in bodies)
        assert sequences.replaced_characters == sum("\ud800" <= c <= "\udfff" for text in texts for c in text)
    else:
        assert rows <= max_rows
    check_offsets(sequences, clean, tokenizer, added)


def in_several_sequences(sequences):
    """Number of documents whose tokens, prefixes left out, are in several sequences."""
    number = np.repeat(np.arange(len(sequences.lengths)), sequences.lengths)
    count = 0
    for document in np.unique(sequences.document):
        rows = np.flatnonzero(sequences.document == document)
        wide = rows[sequences.char_end[rows] > sequences.char_start[rows]]
        end = rows[-1:] if sequences.char_start[rows[-1]] == sequences.char_end[wide[-1]] else wide[-1:]  # a suffix
        count += number[wide[0]] != number[end[0]]
    return count


def check_offsets(sequences, texts, tokenizer, added):
    """Rows of a document: its own tokens have the tokenizer's offsets, added ones stand where the next one begins."""
    for index, text in enumerate(texts):
        rows = np.flatnonzero(sequences.document == index)
        spans = list(zip(sequences.char_start[rows].tolist(), sequences.char_end[rows].tolist(), strict=True))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        plain = iter(zip(encoded.input_ids, encoded.offset_mapping, strict=True))
        upcoming = next(plain, None)
        for token_id, span in zip(sequences.token_ids[rows].tolist(), spans, strict=True):
            if upcoming and (token_id, span) == upcoming:
                upcoming = next(plain, None)
            else:
                assert token_id in added.prefix + added.suffix
                at = upcoming[1][0] if upcoming else len(text)
                assert span == (at, at)


def test_offsets_point_at_the_characters_that_the_tokenizer_names(stories):
    text = "Lily said: “Ünder the 😀 tree”, and שלום.\x00 " + "And so on. " * 5
    sequences = plan([text], stories, context=10)
    frame = table(sequences, stories).to_pandas()
    plain = frame[~frame.is_special]
    encoded = stories(text, add_special_tokens=False, return_offsets_mapping=True)
    assert plain.token_id.tolist() == encoded.input_ids
    assert list(zip(plain.char_start, plain.char_end, strict=True)) == encoded.offset_mapping
    words = [(token, text[a:b]) for token, a, b in zip(plain.token, plain.char_start, plain.char_end, strict=True)]
    assert (" the", " the") in words
    assert ("<0xF0>", "😀") in words


def test_documents_of_several_kinds_and_lengths():
    texts = ["", "abcdef", [7, 8, 9, 10], "g", [], [5]]
    separate = plan(texts, UNIGRAM, context=5)
    space, a, b, c, d, e, f, g = UNIGRAM.convert_tokens_to_ids(list("▁abcdefg"))
    assert lists(separate) == [
        [1, space, a, b, c],
        [1, d, e, f, 2],
        [7, 8, 9, 10],
        [1, space, g, 2],
        [5],
    ]
    assert separate.document.tolist() == [1] * 10 + [2] * 4 + [3] * 4 + [5]
    assert separate.char_start[:10].tolist() == [0, 0, 0, 1, 2, 3, 3, 4, 5, 6]
    assert separate.char_end[:10].tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 6, 6]
    assert separate.char_start[10:14].tolist() == [-1] * 4
    assert (separate.documents, separate.skipped_documents, separate.cut_documents) == (6, 2, 1)
    packed_plan = plan(texts, UNIGRAM, context=5, packed=True)
    assert lists(packed_plan) == [
        [1, space, a, b, c],
        [1, d, e, f, 2],
        [7, 8, 9, 10, 1],
        [1, space, g, 2, 5],
    ]


def test_cut_documents_are_those_that_do_not_fit_with_their_added_tokens():
    fits = ["abc"]  # with "▁" and both added tokens, six
    assert [plan(fits, UNIGRAM, context=n).cut_documents for n in (5, 6)] == [1, 0]
    assert [plan(fits, UNIGRAM, context=n, packed=True).cut_documents for n in (5, 6)] == [1, 0]
    assert [plan(fits, UNIGRAM, context=n, bos="never").cut_documents for n in (3, 4)] == [1, 0]
    assert [plan([[1, 2, 3]], UNIGRAM, context=n).cut_documents for n in (2, 3)] == [1, 0]


def test_the_suffix_stands_at_the_end_of_the_text_not_of_its_last_token(tmp_path):
    layout = Layout(8, AddedTokens((1,), (1,)))
    sequences = plan_sequences(read_documents([" cat  "]), word_pieces(), layout, tmp_path)
    assert sequences.char_start.tolist() == [1, 1, 6]
    assert sequences.char_end.tolist() == [1, 4, 6]


def test_a_prefix_that_fills_a_packed_sequence_is_repeated_in_the_next():
    two = AddedTokens((90, 91), ())
    documents = [Document(0, "ab", None), Document(1, "cd", None)]
    with tempfile.TemporaryDirectory() as folder:
        sequences = plan_sequences(documents, APPENDS_EOS, Layout(5, two, packed=True), folder)
        a, b, c, d = APPENDS_EOS("abcd", add_special_tokens=False).input_ids
        assert lists(sequences) == [[90, 91, a, b, 90], [90, 91, c, d]]
        assert sequences.special_ids == {90, 91, 256, 257}


@pytest.mark.parametrize("packed", [False, True])
def test_max_rows_is_exact_and_an_endless_generator_is_read_only_as_far_as_needed(packed):
    requested = []
    whole = plan([f"document {number}" for number in range(1000)], UNIGRAM, context=8, packed=packed)

    def endless():
        for number in itertools.count():
            requested.append(number)
            yield f"document {number}"

    for rows in (1, 2, 100, 5000):
        requested.clear()
        sequences = plan(endless(), UNIGRAM, context=8, packed=packed, max_rows=rows)
        assert sequences.token_ids.tolist() == whole.token_ids[:rows].tolist()
        assert sequences.starts.tolist() == [*whole.starts[whole.starts < rows].tolist(), rows]
        assert sequences.documents == sequences.document[-1] + 1
        assert len(requested) <= 1.25 * sequences.documents + 1


def test_a_text_of_a_megabyte_is_one_document_without_a_warning(stories):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        text = "One day, a little girl named Lily found a needle in her room.\n" * 17_000
        sequences = plan([text], stories, context=256)
    finally:
        logger.removeHandler(handler)
    assert len(text) > 1_000_000
    assert records == []
    assert sequences.documents == sequences.cut_documents == 1
    assert sequences.char_end[-1] == len(text)
    assert (sequences.token_ids[sequences.starts[:-1]] == 1).all()
    assert len(sequences.token_ids) - len(sequences.lengths) == len(stories(text, verbose=False).input_ids) - 1


def test_lone_surrogates_and_invalid_bytes_are_replaced_counted_and_keep_offsets(tmp_path):
    escaped = tmp_path / "escaped.jsonl"
    escaped.write_text('{"text": "a\\ud800b \\ud83d\\ude00", "tag": "\\udfff"}\n')
    sequences = plan(escaped, context=64)
    assert sequences.replaced_characters == 1, "a pair of escapes is one character and fine"
    assert lists(sequences) == [BYTE_LEVEL("a\ufffdb 😀").input_ids]
    assert sequences.char_end[-1] == 5
    assert sequences.metadata["tag"].to_pylist() == ["\ufffd"]
    raw = tmp_path / "raw.txt"
    raw.write_bytes(b"caf\xe9 \xff\xfe x\x00y")
    sequences = plan(raw, context=64)
    assert sequences.replaced_characters == 3
    assert lists(sequences) == [BYTE_LEVEL("caf\ufffd \ufffd\ufffd x\x00y").input_ids]


def test_a_tokenizer_without_offsets_gives_nulls():
    sequences = plan(["abc", "hag"], Letters(), context=4)
    assert lists(sequences) == [[0, 3, 4, 5], [0, 1], [0, 10, 3, 9], [0, 1]]
    frame = table(sequences, Letters())
    assert frame["char_start"].null_count == frame["char_end"].null_count == 12
    assert frame["token"].to_pylist()[:4] == ["<", "a", "b", "c"]


def test_unknown_is_text_unless_it_is_bos_or_eos_as_well(letters):
    frame = table(plan(["a\nb"], letters), letters).to_pandas()
    assert frame.token.tolist() == ["<s>", " ", "a", "<unk>", "b"]
    assert frame.is_special.tolist() == [True, False, False, False, False]
    assert plan(["a"], BYTE_LEVEL).special_ids == {260}
    assert plan(["a"], UNIGRAM).special_ids == {1, 2}
    assert plan([[1]], None).special_ids == frozenset()


def test_memory_does_not_grow_with_the_corpus():
    def peak(documents):
        texts = ({"text": [1, 2, 3, 4] * 250, "source": f"page {i} " * 20} for i in range(documents))
        tracemalloc.start()
        try:
            sequences = plan(texts, None, context=600)
            assert len(sequences.token_ids) == 1000 * documents
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(1200) < peak(600) + 200_000, "600,000 more rows take 12 MB on the disk and none in memory"


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a"], {"tokenizer": None}, "the model has no tokenizer; pass tokenizer= or give lists of token ids"),
        (
            ["a"],
            {"context": 1},
            "context=1 leaves no room for text, since added tokens (1) begin each sequence; use at least "
            "2, or bos='never'",
        ),
        (
            [[1], [5, -2]],
            {},
            "document 1: token id -2 is not one of the model's; was another tokenizer used?",
        ),
        ([[1, 2**31]], {}, "document 0: token id 2147483648 is not one of the model's; was another"),
        ([[1, 2**70]], {}, f"document 0: token id {2**70} is not one of the model's; was another"),
        (
            [[1], [511, 512]],
            {"vocab": 512},
            "document 1: token id 512 is not one of the model's, 0 to 511; was another",
        ),
        (
            ["z"],
            {"vocab": 20},
            "document 0: token id 31 is not one of the model's, 0 to 19; was another tokenizer used?",
        ),
        (
            [[0]],
            {"vocab": 1},
            "the tokenizer's special tokens: token id 1 is not one of the model's, 0 to 0; was another",
        ),
        (["", []], {}, "texts: nothing to record; 2 documents, none with a token"),
        (iter([]), {}, "texts: nothing to record; there are no documents"),
        (
            ["hello you"],
            {"tokenizer": two_words()},
            "the tokenizer cannot encode the texts: WordLevel error: Missing [UNK]",
        ),
        (
            [{"text": object()}],
            {},
            "document 0 (texts[0]) is of type object; a string or a list of token ids is needed",
        ),
    ],
)
def test_impossible_plans_are_refused(texts, options, message):
    with pytest.raises(RequestError) as caught:
        plan(texts, **{"tokenizer": UNIGRAM, **options})
    assert str(caught.value).startswith(message)


def test_the_smallest_contexts_work():
    assert lists(plan([[1, 2]], None, context=1)) == [[1], [2]]
    assert [len(part) for part in lists(plan(["ab"], UNIGRAM, context=2))] == [2, 2, 2, 2]


def test_progress_adds_up_to_the_rows():
    steps = []
    sequences = plan([f"text {i}" for i in range(1000)], progress=steps.append)
    assert len(steps) > 1
    assert sum(steps) == len(sequences.token_ids)


def test_the_arrays_are_mapped_from_the_work_folder(tmp_path):
    sequences = plan_sequences(read_documents(["abc"]), BYTE_LEVEL, Layout(8, NOTHING), tmp_path)
    for array in (sequences.token_ids, sequences.char_start, sequences.char_end, sequences.document, sequences.starts):
        assert isinstance(array, np.memmap)
        assert Path(array.filename).parent == tmp_path
        assert not array.flags.writeable


# ---- segments, batches, digest -----------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60).map(np.array),
    limit=st.integers(1, 120),
)
def test_segments_are_consecutive_and_as_full_as_the_limit_allows(lengths, limit):
    segments = segment_plan(lengths, limit)
    assert [i for first, last in segments for i in range(first, last)] == list(range(len(lengths)))
    for first, last in segments:
        assert lengths[first:last].sum() <= limit or last == first + 1
        assert last == len(lengths) or lengths[first : last + 1].sum() > limit


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60).map(np.array),
    limit=st.integers(1, 500),
)
def test_batches_hold_every_sequence_once_longest_first_within_the_limit(lengths, limit):
    batches = batch_plan(lengths, limit)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    ordered = lengths[np.concatenate(batches)]
    assert (np.diff(ordered) <= 0).all()
    for batch in batches:
        assert len(batch) * lengths[batch].max() <= limit or len(batch) == 1
    assert [b.tolist() for b in batches] == [b.tolist() for b in batch_plan(lengths.copy(), limit)]


def test_batches_of_equal_lengths_keep_their_order_and_little_is_padding():
    assert [b.tolist() for b in batch_plan(np.array([2, 3, 2, 3]), 6)] == [[1, 3], [0, 2]]
    lengths = np.random.default_rng(0).integers(1, 257, 2000)
    batches = batch_plan(lengths, 4096)
    assert sum(len(b) * lengths[b].max() for b in batches) < 1.05 * lengths.sum()


def test_the_digest_is_fixed_and_depends_on_ids_and_lengths():
    ids, lengths = np.array([1, 2, 3], np.int32), np.array([1, 2])
    assert digest(ids, lengths) == hashlib.sha256(struct.pack("<Q2q3i", 2, 1, 2, 1, 2, 3)).hexdigest()
    assert digest(ids.astype(np.int64), lengths.astype(np.int32)) == digest(ids, lengths)
    digests = [
        digest(ids[::-1].copy(), lengths),
        digest(ids, lengths[::-1].copy()),
        digest(ids, np.array([3])),
    ]
    assert len({digest(ids, lengths), *digests}) == 4


def test_tinystories_with_a_real_tokenizer(stories, tinystories):
    sequences = plan(tinystories, stories, context=256)
    texts = [json.loads(line)["text"] for line in tinystories.read_text(encoding="utf-8").splitlines()]
    assert sequences.documents == 1000
    assert sequences.skipped_documents == sequences.replaced_characters == 0
    for index in (0, 499, 999):
        rows = sequences.token_ids[sequences.document == index]
        continuations = np.arange(256, len(rows), 256)
        assert np.delete(rows, continuations).tolist() == stories(texts[index], verbose=False).input_ids
    again = plan(tinystories, stories, context=256)
    assert digest(again.token_ids, again.lengths) == digest(sequences.token_ids, sequences.lengths)


def test_a_text_that_begins_with_bos_gets_no_other_and_is_counted(stories):
    """As a chat template renders it. BOS is found by its id, whatever the policy."""
    texts = ["<s>the cat", "the cat", "<s>", ""]
    for bos in ("model", "always", "never"):
        sequences = plan(texts, stories, bos=bos)
        assert [ids.count(1) for ids in lists(sequences)] == ([1, 0, 1] if bos == "never" else [1, 1, 1])
        assert sequences.documents_with_added_tokens == (0 if bos == "never" else 2)
    frame = table(plan(texts, stories), stories).to_pandas()
    first = frame[frame.position == 0]
    assert first.is_special.all()
    assert first.char_end.tolist() == [3, 0, 3], "the BOS of a text has its characters"
    packed = plan(texts, stories, packed=True, context=40)
    assert [ids.count(1) for ids in lists(packed)] == [3]


def test_a_bos_within_a_text_that_begins_a_sequence_is_not_doubled(stories):
    sequences = plan(["a b<s>c d"], stories, context=3)
    assert all(ids[:2] != [1, 1] for ids in lists(sequences))
    assert sum(ids.count(1) for ids in lists(sequences)) == len(sequences.lengths)


def test_a_text_that_ends_with_the_suffix_gets_no_other():
    sequences = plan(["ab</s>", "ab"], UNIGRAM)
    assert [ids.count(2) for ids in lists(sequences)] == [1, 1]
    assert sequences.documents_with_added_tokens == 1
