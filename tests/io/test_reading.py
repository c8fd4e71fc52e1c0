"""Tests of the readers of files that anybody may have damaged: JSON, safetensors, Parquet, and what is no file."""

import json
import os
import random
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import changed_bytes, fuzz, safetensors
from refusals import refused
from safetensors.numpy import save_file

from workbench.io.errors import DataError, printable
from workbench.io.parquet import read_table, read_table_schema
from workbench.io.parse import from_json, read_json
from workbench.io.reading import open_file, read_file
from workbench.io.tensors import map_arrays, map_rows, open_safetensors, read_header

READERS = {
    "json": lambda path: read_json(path, "look"),
    "safetensors": lambda path: map_arrays(path, {"x": ("int32", 3)}, "look"),
    "tensor": map_rows,
    "library": lambda path: _library(path),
    "parquet": lambda path: read_table(path, "look"),
    "schema": lambda path: read_table_schema(path, "look"),
}


def _library(path: Path) -> list[float]:
    with open_safetensors(path, "look") as file:
        return file.get_tensor("x").tolist()


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once_and_named(tmp_path, reader):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "to_fifo").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name in ("fifo", "to_fifo", "socket", "folder", "loop", "nowhere", "missing"):
            assert str(tmp_path / name) in refused(DataError, lambda name=name: READERS[reader](tmp_path / name))
    assert "/dev/zero is not a regular file" in refused(DataError, lambda: READERS[reader](Path("/dev/zero")))


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link") == {}


def test_a_path_with_nul_and_a_file_too_large_for_memory_are_refused(tmp_path):
    assert "cannot be the name of a file; look" in refused(DataError, lambda: open_file("a\0b", "look"))
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    assert refused(DataError, lambda: read_file(tmp_path / "sparse", "look")).endswith("too large for a record; look")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -1e999}', "-1e999 is no number of JSON"),
        (b'{"a": 18446744073709551616}', "an integer of 20 digits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_cannot_be_a_record_is_refused_with_the_reason(text, reason):
    message = refused(DataError, lambda: from_json(text, "file.json"))
    assert message.startswith(f"file.json is not JSON ({reason}")
    assert message.endswith("; run workbench verify on the store")


def test_numbers_at_the_borders_are_read_exactly():
    text = '{"a": [18446744073709551615, -9223372036854775808, 1e308, true]}'
    assert from_json(text, "x") == json.loads(text)
    assert from_json('{"a": Infinity}', "x", finite=False) == {"a": np.inf}
    deep = "[" * 63 + "]" * 63
    assert from_json(f'{{"a": {deep}}}', "x") == {"a": json.loads(deep)}


def test_a_message_is_one_line_that_a_terminal_can_show():
    assert str(DataError("a\nb\x1b[31m\u202e\ud800\x9b é 日")) == "a\\nb\\x1b[31m\\u202e\\ud800\\x9b é 日"
    assert str(DataError(str(DataError("a\nb")))) == "a\\nb"
    text = str(DataError(f"/p: {'x' * 100_000}; look"))
    assert (len(text) < 2_100, text[:7], text[-9:]) == (True, "/p: xxx", "xxx; look")
    assert printable("plain") == "plain"


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "I32", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "I32", "shape": [0] * 100, "data_offsets": [0, 0]}},
        {"x": {"dtype": "I32", "shape": [10**30], "data_offsets": [0, 0]}},
        {"x": {"dtype": ["I32"], "shape": [0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "I32", "shape": 3, "data_offsets": None}},
        {"x": []},
        [],
    ],
)
def test_a_header_of_an_absurd_shape_is_refused_and_the_file_named(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    for read in (read_header, lambda path: map_arrays(path, {})):
        assert str(tmp_path / "x") in refused(DataError, lambda read=read: read(tmp_path / "x"))


def test_damaged_files_give_an_answer_or_an_error_that_names_them(tmp_path):
    save_file({"x": np.arange(3, dtype=np.int32)}, tmp_path / "arrays")
    save_file({"x": np.arange(6, dtype=np.float16).reshape(3, 2)}, tmp_path / "rows", {"site": "x"})
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"x": [1, 2, 3], "word": words}), tmp_path / "table", compression="zstd")
    (tmp_path / "record.json").write_text('{"a": {"b": [1, 2.5, "x", null]}, "c": true}')
    for reader, file, parts in [
        ("json", "record.json", None),
        ("safetensors", "arrays", safetensors),
        ("tensor", "rows", safetensors),
        ("library", "arrays", safetensors),
        ("parquet", "table", None),
        ("schema", "table", None),
    ]:
        outcomes = fuzz(lambda reader=reader, file=file: READERS[reader](tmp_path / file), tmp_path / file, parts=parts)
        assert outcomes["DataError"] > 0.1 * sum(outcomes.values()), (reader, outcomes)


def test_mutations_are_the_same_for_the_same_seed():

    assert len({changed_bytes(b"0123456789", random.Random(3)) for _ in range(3)}) == 1
