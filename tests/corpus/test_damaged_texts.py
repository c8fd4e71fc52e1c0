"""Damaged files of texts are read or refused in one line, never with another exception."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import fuzz

from workbench.corpus.sources import read_documents

DOCUMENTS = [
    {"text": "the little day", "n": 1, "spans": [{"start": 0, "end": 3, "label": "word"}]},
    {"text": "é", "n": 2},
]
FILES = {
    "texts.txt": b"one text\nin two lines\n",
    "texts.jsonl": "".join(json.dumps(document) + "\n" for document in DOCUMENTS).encode(),
    "strings.jsonl": b'"one"\n"two"\n',
    "ids.jsonl": b'{"input_ids": [5, 6, 7]}\n{"input_ids": [8]}\n',
}


def read(path, span_column=None):
    return sum(
        len(document.text or document.token_ids or ()) for document in read_documents(path, span_column=span_column)
    )


@pytest.mark.parametrize("name", FILES)
def test_of_text_and_json(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    fuzz(lambda: read(tmp_path / name, "spans" if name == "texts.jsonl" else None), tmp_path / name)


def test_of_parquet(tmp_path):
    table = pa.table({"text": ["one", "two", None], "n": [1, 2, 3], "d": pa.array(["a", "b", "a"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "texts.parquet")
    fuzz(lambda: read(tmp_path / "texts.parquet"), tmp_path / "texts.parquet")
