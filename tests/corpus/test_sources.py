"""Tests of the sources of documents, and of how each refusal reads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_example import (
    BYTE_LEVEL,
    UNIGRAM,
    lists,
    plan,
    texts_of,
)

from workbench.corpus.sources import check_source, read_documents
from workbench.io.errors import DataError, RequestError


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


def test_a_string_with_white_space_that_names_no_file_is_a_text():
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


def test_parquet_is_read_across_row_groups_with_only_the_requested_columns(tmp_path):
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


def test_token_ids_are_used_as_they_are():
    torch = pytest.importorskip("torch")
    expected = [[1, 2, 3], [4]]
    for texts in ([[1, 2, 3], [4]], [(1, 2, 3), range(4, 5)], [np.array([1, 2, 3]), torch.tensor([4])]):
        assert [d.token_ids for d in read_documents(texts)] == expected
        assert lists(plan(texts, UNIGRAM, bos="always")) == expected
        assert lists(plan(texts, None)) == expected
    assert lists(plan(np.array([[1, 2], [3, 4]]), None)) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("form", [None, "torch", "numpy", "pandas", "arrow"])
def test_the_format_of_a_dataset_changes_no_value(form):
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["one", "two"], "n": [1, 2], "share": [0.1, 0.25], "list": [[1, 2], [3]], "good": [True, False]}
    dataset = datasets.Dataset.from_dict(rows).with_format(form)
    assert [(d.text, d.metadata) for d in read_documents(dataset)] == [
        ("one", {"n": 1, "share": 0.1, "list": "[1,2]", "good": True}),
        ("two", {"n": 2, "share": 0.25, "list": "[3]", "good": False}),
    ]
    few = dataset.with_format(form, columns=["text", "n"])
    assert [d.metadata for d in read_documents(few)] == [{"n": 1}, {"n": 2}]


def test_values_of_arrays_are_values_of_python():
    torch = pytest.importorskip("torch")
    record = {"text": "one", "n": torch.tensor(3), "list": torch.tensor([1, 2]), "share": np.float32(0.5)}
    assert [d.metadata for d in read_documents([record])] == [{"n": 3, "list": "[1,2]", "share": 0.5}]


def test_dataset_objects_are_read_by_text_or_by_token_ids():
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["one", None], "tag": ["x", "y"]}
    dataset_in_memory = datasets.Dataset.from_dict(rows)
    for dataset in (dataset_in_memory, dataset_in_memory.to_iterable_dataset()):
        assert [(d.text, d.metadata) for d in read_documents(dataset)] == [("one", {"tag": "x"}), ("", {"tag": "y"})]
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "source": ["a", "b"]})
    assert [(d.token_ids, d.metadata) for d in read_documents(ids)] == [
        ([1, 2], {"source": "a"}),
        ([3], {"source": "b"}),
    ]
    assert [d.token_ids for d in read_documents(ids.rename_column("input_ids", "t"), text_column="t")] == [[1, 2], [3]]
    with pytest.raises(RequestError, match=r"the dataset: no column 'body'; its columns are text, tag; name the one"):
        read_documents(dataset_in_memory, text_column="body")
    with pytest.raises(RequestError, match="pass one of its entries: 'train'"):
        check_source(datasets.DatasetDict(train=dataset_in_memory, test=dataset_in_memory))
    assert texts_of(datasets.DatasetDict(train=dataset_in_memory)) == ["one", ""]


def test_a_hub_dataset_is_streamed_and_its_failure_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    requested = []

    def load_dataset(name, **options):
        requested.append((name, options))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such dataset\n  on the hub")
        return [{"text": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of("hf:user/set") == texts_of("hf:set:test[:10%]") == ["one"]
    options = {"streaming": True, "trust_remote_code": False}
    assert requested == [("user/set", {"split": "train", **options}), ("set", {"split": "test[:10%]", **options})]
    check_source("hf:nobody/nothing")
    assert len(requested) == 2, "check_source must not touch the network"
    with pytest.raises(RequestError) as caught:
        read_documents("hf:nobody/nothing")
    assert str(caught.value) == (
        "texts: cannot open 'hf:nobody/nothing': no such dataset on the hub; check its name, the split 'train' and the "
        "network, or load it yourself and pass the dataset object"
    )


UNDERSTOOD = (
    "understood: files (.txt .json .jsonl .csv .tsv, also with .gz, and .parquet), hf:NAME[:SPLIT], a text with white "
    "space in it, tables of pandas, Arrow or polars, lists of strings, of token id lists, of chats or of (clean, "
    "corrupt) pairs"
)


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
        (Path("folder"), "texts: 'folder' is a folder; give the files in it"),
        ("table.xlsx", f"texts: 'table.xlsx' has the suffix '.xlsx', which is not read; {UNDERSTOOD}"),
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
        ({"train": 1, "test": 2}, "texts is of type dict, which is not read; pass one of its entries: 'train', 'test'"),
        ("hf:", "texts: 'hf:' is not of the form hf:NAME[:SPLIT], as in hf:user/dataset:train"),
        ("hf:a/b/c", "texts: 'hf:a/b/c' is not of the form hf:NAME[:SPLIT], as in hf:user/dataset:train"),
    ],
)
def test_a_wrong_source_is_refused_before_anything_is_read(texts, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("stories.jsonl", "table.xlsx", "plain"):
        Path(name).write_text('"text"')
    Path("folder").mkdir()
    Path("empty.txt").touch()
    Path("pipe.txt").symlink_to("/dev/null")
    for check in (check_source, read_documents):
        with pytest.raises(RequestError) as caught:
            check(texts)
        assert str(caught.value) == message


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
            "table; rename it, or name the columns to keep in metadata=, as in "
            "metadata=['source'] ([] for none)",
        ),
    ],
)
def test_errors_in_a_json_file_name_the_line(content, message, tmp_path):
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


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys; from workbench.corpus.sources import check_source; check_source('two words');"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'datasets', 'plotly', 'pandas'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert re.sub(r"\s", "", answer.stderr) == ""
    assert answer.returncode == 0
