"""Tests of files of texts: JSON, tables of text, compressed files, encodings, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import os

import pandas as pd
import pytest

from workbench.corpus.sources import check_source, read_documents
from workbench.io.errors import DataError, RequestError

RECORDS = [
    {"text": 'a, "b"\nc', "n": 1413617112501850121, "x": 0.5, "zip": "00712", "flag": True, "tag": "é"},
    {"text": "1", "n": None, "x": 2.0, "zip": "90210", "flag": None, "tag": None},
    {"text": "", "n": 3, "x": None, "zip": None, "flag": False, "tag": "07"},
]
EXPECTED = [(row["text"], {name: row[name] for name in ("n", "x", "zip", "flag", "tag")}) for row in RECORDS]


def rows(path, **options):
    return [(document.text, dict(document.metadata)) for document in read_documents(path, **options)]


def written(kind, folder):
    path = folder / f"texts{kind}"
    if kind in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",")
            table.writerows([RECORDS[0], *(row.values() for row in RECORDS)])
    elif kind == ".json":
        path.write_text(json.dumps(RECORDS, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".json", ".jsonl"])
def test_every_format_gives_the_same_documents_compressed_or_not(kind, tmp_path):
    path = written(kind, tmp_path)
    packed = tmp_path / f"packed{kind}.GZ"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed, str(packed)):
        check_source(file)
        assert rows(file) == EXPECTED
        assert rows(file, metadata=["zip"]) == [(text, {"zip": row["zip"]}) for text, row in EXPECTED]


def test_compressed_text_and_lists_of_json(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("line 1\r\nline 2é".encode()))
    assert rows(tmp_path / "a.txt.gz") == [("line 1\r\nline 2é", {})]
    for content, expected in (
        ('["a", "b"]', [("a", {}), ("b", {})]),
        ('[\n "a",\n {"text": "b", "n": 1}\n]', [("a", {}), ("b", {"n": 1})]),
        ('{\n "text": "a"\n}', [("a", {})]),
        ('{"text": "a"}\n{"text": "b"}', [("a", {}), ("b", {})]),
        ('"a"\n"b"', [("a", {}), ("b", {})]),
    ):
        (tmp_path / "a.json").write_text(content)
        assert rows(tmp_path / "a.json") == expected
    for content, ids in (("[1, 2]\n[3]", [[1, 2], [3]]), ("[1, 2]", [[1, 2]]), ("[[1, 2], [3]]", [[1, 2], [3]])):
        (tmp_path / "a.json").write_text(content)
        assert [document.token_ids for document in read_documents(tmp_path / "a.json")] == ids


def test_spans_of_a_table_are_json_and_an_index_without_a_name_is_a_column(tmp_path):
    spans = {"a": [{"start": 0, "end": 1, "value": 7}]}
    path = tmp_path / "a.csv"
    pd.DataFrame({"text": ["xy", "z"], "spans": [json.dumps(spans), None]}).to_csv(path)
    first, second = read_documents(path)
    assert (first.spans["a"][0].value, second.spans) == (7, {})
    assert first.metadata == {"column 1": 0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,n\na,1\nb\n", "FILE:3: 1 cells, and the header has 2; write a cell that holds the separator"),
        ("a.csv", b'text,n\n"a,1\n', "FILE:2: not CSV (unexpected end of data)"),
        ("a.csv", b"text,text\na,b\n", "FILE:1: two columns are called 'text'; rename one"),
        ("a.csv", b"body;n\na;1\n", "FILE: no column 'text'; its columns are body;n; name the one with the text"),
        ("a.tsv", b"text\ttoken\na\tb\n", "FILE: a metadata column cannot be called 'token', which is a column of"),
        ("a.csv", b"input_ids\n\"[1, 2]\"\n", "document 0 (FILE:2): column 'input_ids' holds text; name the one with"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', "FILE:2: not JSON (Expecting value at column 11); give a"),
        ("a.json", b'["a", 5]', "FILE[1]: found 5; a list must hold JSON objects or strings"),
        ("a.json", b'{"data": [{"text": "a"}]}', "FILE: no column 'text'; its columns are data; name the one with"),
        ("a.txt", "Anna saw Rome".encode("utf-16"), "texts: 'FILE' is UTF-16 and only UTF-8 is read; convert it"),
        ("a.csv", "text\nAnna".encode("utf-16-be"), "texts: 'FILE' is UTF-16 or UTF-32, or no text, and only UTF-8 is"),
        ("a.jsonl", '"Anna"'.encode("utf-32"), "texts: 'FILE' is UTF-32 and only UTF-8 is read; convert it"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_a_line_that_names_it(name, content, message, tmp_path):
    for file, packed in ((tmp_path / name, content), (tmp_path / f"{name}.gz", gzip.compress(content))):
        file.write_bytes(packed)
        with pytest.raises(RequestError) as caught:
            list(read_documents(file))
        assert str(caught.value).replace(str(file), "FILE").startswith(message)


def test_a_damaged_compressed_file_is_named(tmp_path):
    whole = gzip.compress("".join(f'"{i * 7919 % 1000}"\n' for i in range(5000)).encode())
    for name, content in (
        ("cut.jsonl.gz", whole[: len(whole) // 2]),
        ("no.jsonl.gz", b"plain"),
        ("a.txt.gz", whole[:40]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}:\d+: damaged from here on \(.*\); fetch it again"):
            list(read_documents(tmp_path / name))


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", "/dev/null"):
        with pytest.raises(RequestError, match="is not a regular file"):
            check_source(path)
