"""Texts to sequences: what is read, what is planned, what the token table says, and how each refusal reads."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from workbench import corpus
from workbench.corpus import AddedTokens, Document, added_tokens, check_source, read_documents, token_texts
from workbench.io.errors import DataError, RequestError

NOTHING = AddedTokens()


# Tokenizers: two real ones, and one of each kind that behaves in its own way


@pytest.fixture(scope="module")
def stories(stories260k):
    """SentencePiece's kind of BPE with byte pieces; adds BOS."""
    return AutoTokenizer.from_pretrained(stories260k)


@pytest.fixture(scope="module")
def letters(babyllama):
    """Single characters; adds BOS; newline is <unk>."""
    return AutoTokenizer.from_pretrained(babyllama)


def byte_level():
    """As GPT-2's: adds nothing, and its one special token is BOS, EOS and <unk> at once."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]
    pieces = [*alphabet, *map("".join, merges), "<|endoftext|>"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)


def appends_eos():
    """Byte-level, "</s>" after each text, and a BOS token that it does not use by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, "<s>", "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 257)])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def unigram():
    """As SentencePiece's: leading spaces are part of the pieces; "<s> text </s>", so it has both added tokens."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("ing", -2.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def letters_as_bytes():
    """SentencePiece's byte fallback with a vocabulary that holds no letter: "a" is the byte 0x61."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def word_pieces():
    """As BERT's: lower case, pieces inside a word begin with ##."""
    pieces = ["[UNK]", "[CLS]", "a", "cat", "##s", "the", "."]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", unk_token="[UNK]")


def two_words():
    """Whole words only and no <unk>: it cannot encode most letters."""
    backend = Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Letters(PreTrainedTokenizer):
    """A tokenizer written in Python, as older models bring: no offsets. "<" before and ">" after each text."""

    def __init__(self, **kwargs):
        self.pieces = ["<", ">", "?", *"abcdefgh "]
        super().__init__(bos_token="<", eos_token=">", unk_token="?", **kwargs)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.pieces.index(token) if token in self.pieces else 2

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [0, *token_ids_0, 1]


BYTE_LEVEL, APPENDS_EOS, UNIGRAM = byte_level(), appends_eos(), unigram()


def plan(texts, tokenizer=BYTE_LEVEL, *, workdir=None, bos="model", context=16, packed=False, max_rows=None, **options):
    reading = {name: options.pop(name) for name in ("text_column", "metadata") if name in options}
    with tempfile.TemporaryDirectory() if workdir is None else tempfile.TemporaryDirectory(dir=workdir) as folder:
        return corpus.plan_sequences(
            read_documents(texts, **reading),
            tokenizer,
            context=context,
            added=added_tokens(tokenizer, bos),
            packed=packed,
            max_rows=max_rows,
            workdir=folder,
            **options,
        )


def lists(sequences):
    """The token ids of each sequence."""
    return [part.tolist() for part in np.split(sequences.token_ids, sequences.starts[1:-1])]


def table(sequences, tokenizer=BYTE_LEVEL, first=0, last=None, row_offset=0, sequence_offset=0, document_offset=0):
    return corpus.token_table(
        sequences,
        first,
        len(sequences.lengths) if last is None else last,
        row_offset=row_offset,
        sequence_offset=sequence_offset,
        document_offset=document_offset,
        text_of=lambda ids: token_texts(tokenizer, ids),
    )


def texts_of(texts, **options):
    return [document.text for document in read_documents(texts, **options)]


# Sources


def test_strings_are_documents_numbered_in_order(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("from a file")
    generated = (item for item in ["one", file, "", "two"])
    assert [(d.index, d.text, d.token_ids) for d in read_documents(generated)] == [
        (0, "one", None),
        (1, "from a file", None),
        (2, "", None),
        (3, "two", None),
    ]
    assert texts_of(("a", "b")) == ["a", "b"]
    assert texts_of(np.array(["a", "b"])) == ["a", "b"]


def test_a_text_file_is_one_document_and_keeps_its_line_ends(tmp_path):
    file = tmp_path / "my story.txt"
    file.write_bytes("\ufeffline 1\r\n\r\nline 2\n\u2028é\x00".encode())
    assert texts_of(str(file)) == texts_of(file) == texts_of([file]) == ["line 1\r\n\r\nline 2\n\u2028é\x00"]


def test_a_string_with_white_space_that_is_no_file_is_a_text():
    assert texts_of("Once upon a time") == ["Once upon a time"]
    assert texts_of("one\ntwo.txt") == ["one\ntwo.txt"]


def test_json_lines_hold_objects_strings_and_token_ids(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text(
        '\ufeff{"text": "one\\u2028", "tag": "wiki"}\r\n\n"two"\n{"text": null}\n[3, 4]\n{"input_ids": [5]}\n',
        encoding="utf-8",
    )
    documents = list(read_documents(file))
    assert [(d.index, d.text, d.token_ids) for d in documents] == [
        (0, "one\u2028", None),
        (1, "two", None),
        (2, "", None),
        (3, None, [3, 4]),
        (4, None, [5]),
    ]
    assert [d.metadata for d in documents] == [{"tag": "wiki"}, {}, {}, {}, {}]
    renamed = file.rename(tmp_path / "mixed.json")
    assert list(read_documents(renamed)) == documents


def test_parquet_is_read_across_row_groups_with_only_the_columns_asked_for(tmp_path):
    file = tmp_path / "stories.parquet"
    frame = pa.table({"story": [f"story {i}" for i in range(1000)], "n": range(1000), "other": ["x"] * 1000})
    pq.write_table(frame, file, row_group_size=300)
    documents = list(read_documents(file, text_column="story", metadata=["n"]))
    assert [d.text for d in documents] == frame["story"].to_pylist()
    assert [d.metadata for d in documents] == [{"n": i} for i in range(1000)]
    assert next(read_documents(file, text_column="story")).metadata == {"n": 0, "other": "x"}
    assert next(read_documents(file, text_column="story", metadata=())).metadata == {}
    chunk = pq.read_metadata(file).row_group(0).column(2)
    with file.open("r+b") as damaged:
        damaged.seek(chunk.dictionary_page_offset)
        damaged.write(b"\xff" * chunk.total_compressed_size)
    with pytest.raises(DataError, match=r"stories.parquet: damaged after row 0 .*; fetch it again"):
        list(read_documents(file, text_column="story"))
    assert list(read_documents(file, text_column="story", metadata=["n"])) == documents


def test_parquet_with_invalid_utf8_is_read(tmp_path):
    raw = pa.array([b"a\xffb", b"fine", None], pa.binary())
    broken = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(pa.table({"text": broken}), tmp_path / "broken.parquet")
    sequences = plan(tmp_path / "broken.parquet")
    assert sequences.replaced_characters == 1
    assert lists(sequences) == [BYTE_LEVEL("a\ufffdb").input_ids, BYTE_LEVEL("fine").input_ids]


def test_token_ids_are_taken_as_they_are():
    torch = pytest.importorskip("torch")
    expected = [[1, 2, 3], [4]]
    for texts in ([[1, 2, 3], [4]], [(1, 2, 3), range(4, 5)], [np.array([1, 2, 3]), torch.tensor([4])]):
        assert [d.token_ids for d in read_documents(texts)] == expected
        assert lists(plan(texts, UNIGRAM, bos="always")) == expected
        assert lists(plan(texts, None)) == expected
    assert lists(plan(np.array([[1, 2], [3, 4]]), None)) == [[1, 2], [3, 4]]


def test_dataset_objects_are_read_by_text_or_by_token_ids():
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["one", None], "tag": ["x", "y"]}
    held = datasets.Dataset.from_dict(rows)
    for dataset in (held, held.to_iterable_dataset()):
        assert [(d.text, d.metadata) for d in read_documents(dataset)] == [("one", {"tag": "x"}), ("", {"tag": "y"})]
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "source": ["a", "b"]})
    assert [(d.token_ids, d.metadata) for d in read_documents(ids)] == [
        ([1, 2], {"source": "a"}),
        ([3], {"source": "b"}),
    ]
    assert [d.token_ids for d in read_documents(ids.rename_column("input_ids", "t"), text_column="t")] == [[1, 2], [3]]
    with pytest.raises(RequestError, match=r"the dataset: no column 'body'; its columns are text, tag; name the one"):
        read_documents(held, text_column="body")
    with pytest.raises(RequestError, match="pass one of its entries: 'train'"):
        check_source(datasets.DatasetDict(train=held))


def test_a_hub_dataset_is_streamed_and_its_failure_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such dataset\n  on the hub")
        return [{"text": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of("hf:user/set") == texts_of("hf:set:test[:10%]") == ["one"]
    options = {"streaming": True, "trust_remote_code": False}
    assert asked == [("user/set", {"split": "train", **options}), ("set", {"split": "test[:10%]", **options})]
    check_source("hf:nobody/nothing")
    assert len(asked) == 2, "check_source must not touch the network"
    with pytest.raises(RequestError) as caught:
        read_documents("hf:nobody/nothing")
    assert str(caught.value) == (
        "texts: cannot open 'hf:nobody/nothing': no such dataset on the hub; check its name, the split 'train' and the "
        "network, or load it yourself and pass the dataset object"
    )


UNDERSTOOD = "understood: files (.txt .json .jsonl .parquet), hf:NAME[:SPLIT], lists of strings or of token id lists"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            "storis.jsonl",
            "texts: no file 'storis.jsonl'; nearest: stories.jsonl; to record the string itself, pass "
            f"['storis.jsonl']; {UNDERSTOOD}",
        ),
        (
            "my storis.jsonl",
            "texts: no file 'my storis.jsonl'; nearest: stories.jsonl; to record the string itself, pass "
            f"['my storis.jsonl']; {UNDERSTOOD}",
        ),
        (Path("away/a.txt"), f"texts: no file 'away/a.txt', there is no folder 'away'; {UNDERSTOOD}"),
        ([Path("storis.jsonl")], f"texts: no file 'storis.jsonl'; nearest: stories.jsonl; {UNDERSTOOD}"),
        (Path("folder"), "texts: 'folder' is a folder; pass its files, as in sorted(Path('folder').glob('*.jsonl'))"),
        ("table.csv", f"texts: 'table.csv' has the suffix '.csv', which is not read; {UNDERSTOOD}"),
        ("plain", f"texts: 'plain' has the suffix '', which is not read; {UNDERSTOOD}"),
        ("empty.txt", "texts: 'empty.txt' is empty (0 bytes); pass a file with text in it"),
        ("pipe.txt", f"texts: 'pipe.txt' is not a regular file; {UNDERSTOOD}"),
        (
            ["fine", "stories.jsonl"],
            "texts[1] is the string 'stories.jsonl', which is a file; strings in a list are the "
            "texts themselves: pass pathlib.Path, or the path alone without a list",
        ),
        (
            [1, 2, 3],
            "texts[0] is 1 (int), neither a string nor a list of token ids; token ids are given as one list for "
            "each document, as in [[1, 15, 7], [1, 9]]",
        ),
        ("", f"texts is an empty string; {UNDERSTOOD}"),
        ([], f"texts is an empty list; {UNDERSTOOD}"),
        (None, f"texts is of type NoneType, which is not read; {UNDERSTOOD}"),
        (b"bytes", f"texts is of type bytes, which is not read; {UNDERSTOOD}"),
        (pa.table({"text": ["a"]}), f"texts is of type Table, which is not read; {UNDERSTOOD}"),
        ({"train": 1, "test": 2}, "texts is of type dict, which is not read; pass one of its entries: 'train', 'test'"),
        ("hf:", "texts: 'hf:' is not of the form hf:NAME[:SPLIT], as in hf:user/dataset:train"),
        ("hf:a/b/c", "texts: 'hf:a/b/c' is not of the form hf:NAME[:SPLIT], as in hf:user/dataset:train"),
    ],
)
def test_a_wrong_source_is_refused_before_anything_is_read(texts, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("stories.jsonl", "table.csv", "plain"):
        Path(name).write_text('"text"')
    Path("folder").mkdir()
    Path("empty.txt").touch()
    Path("pipe.txt").symlink_to("/dev/null")
    for check in (check_source, read_documents):
        with pytest.raises(RequestError) as caught:
            check(texts)
        assert str(caught.value) == message


def test_a_frame_is_refused_and_its_column_is_read():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", "b"]})
    with pytest.raises(RequestError, match="texts is of type DataFrame, which is not read"):
        check_source(frame)
    assert texts_of(frame["text"]) == ["a", "b"]


@pytest.mark.skipif(sys.platform == "win32", reason="file modes mean something else there")
def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "secret.txt"
    file.write_text("x")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the test may run as root, who may read everything
    with pytest.raises(RequestError, match=r"no permission to read '.*secret.txt'; change its mode"):
        check_source(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\n{"text": "b"',
            "FILE:2: not JSON (Expecting ',' delimiter at column 13); each line must hold one JSON object or string",
        ),
        ('"a"\n\n17\n', "FILE:3: found 17; each line must hold a JSON object or string"),
        ("[" * 100_000, "FILE:1: not JSON (maximum recursion depth exceeded"),
        (
            '{"text": "a"}\n{"body": "b"}',
            "FILE:2: no column 'text'; its columns are body; name the one with the text in text_column=",
        ),
        (
            '{"body": "a", "tag": 1}',
            "FILE: no column 'text'; its columns are body, tag; name the one with the text in text_column=",
        ),
        ('"a"\n{"text": 5}', "document 1 (FILE:2) is of type int; a string or a list of token ids is needed"),
        (
            '{"text": [1, 2.5]}',
            "document 0 (FILE:1) has 2.5 (float) at place 1; token ids are whole numbers in one flat list",
        ),
        (
            '{"text": [[1]]}',
            "document 0 (FILE:1) has [1] (list) at place 0; token ids are whole numbers in one flat list",
        ),
        (
            '{"text": [1, true]}',
            "document 0 (FILE:1) has True (bool) at place 1; token ids are whole numbers in one flat",
        ),
        (
            '{"text": "a", "token": "x"}',
            "FILE: a metadata column cannot be called 'token', which is a column of the token "
            "table itself; rename it, or name the columns to keep in metadata=, as in "
            "metadata=['source'] ([] for none)",
        ),
    ],
)
def test_what_is_wrong_in_a_json_file_is_named_with_its_line(content, message, tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_text(content)
    with pytest.raises(RequestError) as caught:
        list(read_documents(file))
    assert str(caught.value).replace(str(file), "FILE").startswith(message)


def test_the_columns_of_files_are_checked_by_the_call_itself(tmp_path):
    file = tmp_path / "stories.parquet"
    pq.write_table(pa.table({"text": ["a"], "source": ["x"], "position": [1]}), file)
    lines = tmp_path / "stories.jsonl"
    lines.write_text('"bare"\n{"text": "a", "source": "x"}\n')
    for path in (file, lines):
        with pytest.raises(
            RequestError, match="metadata names 'sorce', but the texts have no such column; nearest: source"
        ):
            read_documents(path, metadata=["sorce"])
        with pytest.raises(RequestError, match="no column 'body'; its columns are text, source"):
            read_documents([path], text_column="body")
    with pytest.raises(RequestError, match="parquet: a metadata column cannot be called 'position'"):
        read_documents(file)
    with pytest.raises(RequestError, match="metadata: a metadata column cannot be called 'position'"):
        read_documents(file, metadata=["position"])
    assert next(read_documents(file, metadata=["source"])).metadata == {"source": "x"}


def test_a_metadata_column_that_no_document_has_is_refused_at_the_end():
    records = [{"text": "a", "source": "x"}, {"text": "b", "rare": 1}]
    assert [d.metadata for d in read_documents(records, metadata=["rare"])] == [{}, {"rare": 1}]
    with pytest.raises(
        RequestError, match=r"metadata names 'sorce', but the documents have no such column; nearest: source"
    ):
        list(read_documents(iter(records), metadata=["sorce"]))
    with pytest.raises(
        RequestError, match="metadata names 'source', but the documents have no such column; the columns are none"
    ):
        list(read_documents(["plain"], metadata=["source"]))


def test_damaged_and_empty_parquet_files_are_named(tmp_path):
    (tmp_path / "a.parquet").write_text("no Parquet at all")
    with pytest.raises(RequestError, match=r"a.parquet' is not a Parquet file \(Parquet magic bytes not found"):
        read_documents(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    with pytest.raises(RequestError, match=r"b.parquet' is empty \(0 rows\)"):
        read_documents(tmp_path / "b.parquet")


# What the tokenizer adds, and what a token stands for


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


# Sequences


def expected_sequences(bodies, prefix, context, *, packed, max_rows):
    """The plan told token by token. `bodies` are lists of tokens, the suffix included."""
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
    own = [tokenizer(text, add_special_tokens=False).input_ids for text in clean]
    bodies = [[*ids, *added.suffix] for ids in own if ids]
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
        assert sequences.skipped_documents == sum(not ids for ids in own)
        assert sequences.cut_documents == sum(len(added.prefix) + len(body) > context for body in bodies)
        assert sequences.replaced_characters == sum("\ud800" <= c <= "\udfff" for text in texts for c in text)
    else:
        assert rows <= max_rows
    check_offsets(sequences, clean, tokenizer, added)


def check_offsets(sequences, texts, tokenizer, added):
    """Rows of a document: its own tokens have the tokenizer's offsets, added ones stand where the next one begins."""
    for index, text in enumerate(texts):
        rows = np.flatnonzero(sequences.document == index)
        spans = list(zip(sequences.char_start[rows].tolist(), sequences.char_end[rows].tolist(), strict=True))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        own = iter(zip(encoded.input_ids, encoded.offset_mapping, strict=True))
        upcoming = next(own, None)
        for token_id, span in zip(sequences.token_ids[rows].tolist(), spans, strict=True):
            if upcoming and (token_id, span) == upcoming:
                upcoming = next(own, None)
            else:
                assert token_id in added.prefix + added.suffix
                at = upcoming[1][0] if upcoming else len(text)
                assert span == (at, at)


def test_offsets_point_at_the_characters_that_the_tokenizer_names(stories):
    text = "Lily said: “Ünder the 😀 tree”, and שלום.\x00 " + "And so on. " * 5
    sequences = plan([text], stories, context=10)
    frame = table(sequences, stories).to_pandas()
    own = frame[~frame.is_special]
    encoded = stories(text, add_special_tokens=False, return_offsets_mapping=True)
    assert own.token_id.tolist() == encoded.input_ids
    assert list(zip(own.char_start, own.char_end, strict=True)) == encoded.offset_mapping
    words = [(token, text[a:b]) for token, a, b in zip(own.token, own.char_start, own.char_end, strict=True)]
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
    together = plan(texts, UNIGRAM, context=5, packed=True)
    assert lists(together) == [
        [1, space, a, b, c],
        [1, d, e, f, 2],
        [7, 8, 9, 10, 1],
        [1, space, g, 2, 5],
    ]


def test_cut_documents_are_those_that_do_not_fit_with_what_is_added():
    fits = ["abc"]  # with "▁" and both added tokens, six
    assert [plan(fits, UNIGRAM, context=n).cut_documents for n in (5, 6)] == [1, 0]
    assert [plan(fits, UNIGRAM, context=n, packed=True).cut_documents for n in (5, 6)] == [1, 0]
    assert [plan(fits, UNIGRAM, context=n, bos="never").cut_documents for n in (3, 4)] == [1, 0]
    assert [plan([[1, 2, 3]], UNIGRAM, context=n).cut_documents for n in (2, 3)] == [1, 0]


def test_the_suffix_stands_at_the_end_of_the_text_not_of_its_last_token(tmp_path):
    sequences = corpus.plan_sequences(
        read_documents([" cat  "]),
        word_pieces(),
        context=8,
        added=AddedTokens((1,), (1,)),
        packed=False,
        max_rows=None,
        workdir=tmp_path,
    )
    assert sequences.char_start.tolist() == [1, 1, 6]
    assert sequences.char_end.tolist() == [1, 4, 6]


def test_a_prefix_that_fills_a_packed_sequence_is_begun_again():
    two = AddedTokens((90, 91), ())
    documents = [Document(0, "ab", None), Document(1, "cd", None)]
    with tempfile.TemporaryDirectory() as folder:
        sequences = corpus.plan_sequences(
            documents, APPENDS_EOS, context=5, added=two, packed=True, max_rows=None, workdir=folder
        )
        a, b, c, d = APPENDS_EOS("abcd", add_special_tokens=False).input_ids
        assert lists(sequences) == [[90, 91, a, b, 90], [90, 91, c, d]]
        assert sequences.special_ids == {90, 91, 256, 257}


@pytest.mark.parametrize("packed", [False, True])
def test_max_rows_is_exact_and_an_endless_generator_is_read_no_further_than_needed(packed):
    asked = []
    whole = plan([f"document {number}" for number in range(1000)], UNIGRAM, context=8, packed=packed)

    def endless():
        for number in itertools.count():
            asked.append(number)
            yield f"document {number}"

    for rows in (1, 2, 100, 5000):
        asked.clear()
        sequences = plan(endless(), UNIGRAM, context=8, packed=packed, max_rows=rows)
        assert sequences.token_ids.tolist() == whole.token_ids[:rows].tolist()
        assert sequences.starts.tolist() == [*whole.starts[whole.starts < rows].tolist(), rows]
        assert sequences.documents == sequences.document[-1] + 1
        assert len(asked) <= 1.25 * sequences.documents + 1


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
            "document 1: token id -2 is not one of the model's, 0 to 2147483647; was another tokenizer used?",
        ),
        ([[1, 2**31]], {}, "document 0: token id 2147483648 is not one of the model's, 0 to 2147483647; was another"),
        ([[1, 2**70]], {}, f"document 0: token id {2**70} is not one of the model's, 0 to 2147483647; was another"),
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
        (["", []], {}, "texts: nothing to record; 2 documents were read and none has a token"),
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
def test_what_cannot_be_planned_is_refused(texts, options, message):
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
    sequences = corpus.plan_sequences(
        read_documents(["abc"]), BYTE_LEVEL, context=8, added=NOTHING, packed=False, max_rows=None, workdir=tmp_path
    )
    for array in (sequences.token_ids, sequences.char_start, sequences.char_end, sequences.document, sequences.starts):
        assert isinstance(array, np.memmap)
        assert Path(array.filename).parent == tmp_path
        assert not array.flags.writeable


# Metadata and the token table


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
        "big": ["1", str(2**80), None],
        "none": [None, None, None],
        "when": ["a", None, None],
        "array": [None, "[0,1]", None],
        "late": [None, None, 3],
    }
    kinds = [str(column.type) for column in metadata.columns]
    assert kinds == ["bool", "int64", "double", "string", "string", "string", "string", "string", "string", "int64"]


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
    assert whole.schema == corpus.TOKEN_SCHEMA.append(pa.field("tag", pa.dictionary(pa.int32(), pa.string()))).append(
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
    tokens = corpus.token_table(
        sequences, 0, 1, row_offset=0, sequence_offset=0, document_offset=0, text_of=lambda ids: [" ", " ", "b"]
    )["token"]
    assert tokens.to_pylist() == [" ", " ", "b", " "]
    assert tokens.to_pandas().cat.categories.tolist() == [" ", "b"]


# Plans


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60).map(np.array),
    limit=st.integers(1, 120),
)
def test_segments_are_consecutive_and_as_full_as_the_limit_allows(lengths, limit):
    segments = corpus.segment_plan(lengths, limit)
    assert [i for first, last in segments for i in range(first, last)] == list(range(len(lengths)))
    for first, last in segments:
        assert lengths[first:last].sum() <= limit or last == first + 1
        assert last == len(lengths) or lengths[first : last + 1].sum() > limit


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60).map(np.array),
    limit=st.integers(1, 500),
)
def test_batches_hold_every_sequence_once_longest_first_within_the_limit(lengths, limit):
    batches = corpus.batch_plan(lengths, limit)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    ordered = lengths[np.concatenate(batches)]
    assert (np.diff(ordered) <= 0).all()
    for batch in batches:
        assert len(batch) * lengths[batch].max() <= limit or len(batch) == 1
    assert [b.tolist() for b in batches] == [b.tolist() for b in corpus.batch_plan(lengths.copy(), limit)]


def test_batches_of_equal_lengths_keep_their_order_and_little_is_padding():
    assert [b.tolist() for b in corpus.batch_plan(np.array([2, 3, 2, 3]), 6)] == [[1, 3], [0, 2]]
    lengths = np.random.default_rng(0).integers(1, 257, 2000)
    batches = corpus.batch_plan(lengths, 4096)
    assert sum(len(b) * lengths[b].max() for b in batches) < 1.05 * lengths.sum()


def test_the_digest_is_fixed_and_sees_ids_and_lengths():
    ids, lengths = np.array([1, 2, 3], np.int32), np.array([1, 2])
    assert corpus.digest(ids, lengths) == hashlib.sha256(struct.pack("<Q2q3i", 2, 1, 2, 1, 2, 3)).hexdigest()
    assert corpus.digest(ids.astype(np.int64), lengths.astype(np.int32)) == corpus.digest(ids, lengths)
    others = [
        corpus.digest(ids[::-1].copy(), lengths),
        corpus.digest(ids, lengths[::-1].copy()),
        corpus.digest(ids, np.array([3])),
    ]
    assert len({corpus.digest(ids, lengths), *others}) == 4


# The real thing, and what it costs to import


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
    assert corpus.digest(again.token_ids, again.lengths) == corpus.digest(sequences.token_ids, sequences.lengths)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys; from pathlib import Path; from workbench import corpus; corpus.check_source('two words');"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'datasets', 'plotly', 'pandas'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert re.sub(r"\s", "", done.stderr) == ""
    assert done.returncode == 0
