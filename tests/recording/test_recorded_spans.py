"""Tests of recordings of labelled texts: queries, resuming and appending."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.compute as pc
import pytest
from labelled import SPANS, TEXT, by_character, source

import workbench as wb
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.recording import segments
from workbench.store.manifest import read_manifest, write_manifest


@pytest.fixture(scope="module")
def model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["gpt2"], tiny_tokenizer, "tiny")


RECORDS = [
    {"text": TEXT, "tag": "x", "spans": SPANS},
    {"text": "the little Tuesday", "tag": "y", "spans": {"entity": [{"start": 4, "end": 18, "value": "day"}]}},
    {"text": "Once upon a time", "tag": "y"},
]


def record(model, texts, path, **options):
    return wb.record(model, texts, **{"out": path, "sites": ["resid_post.0"], "show_progress": False, **options})


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_store_is_queried_by_labels(model, tmp_path):
    store = record(model, RECORDS, tmp_path / "s", metadata=["tag"], segment_rows=16)
    assert len(store.manifest.segments) > 1
    assert store.tokens.column_names[-7:] == [
        "tag",
        "entity",
        "entity_span",
        "entity_cut",
        "rank",
        "rank_span",
        "rank_cut",
    ]
    frame = store.tokens.to_pandas()
    expected = by_character(frame.to_dict("records"), [{"spans": None, **line} for line in RECORDS])
    where = {
        "entity = 'day'": [value == "day" for value in expected["entity"]],
        "entity = 'day' AND document = 1": [
            value == "day" and document == 1 for value, document in zip(expected["entity"], frame.document, strict=True)
        ],
        "entity IS NULL": [value is None for value in expected["entity"]],
        "rank > 2": [value == 3 for value in expected["rank"]],
        "entity_span = 0": [number == 0 for number in expected["entity_span"]],
        "rank > 5": [False] * len(frame),
    }
    for predicate, chosen in where.items():
        rows = store.where(predicate)
        assert rows.tokens["row"].to_pylist() == np.flatnonzero(chosen).tolist(), predicate
    assert store.where("entity = 'day'")["resid_post", 0].shape == (sum(where["entity = 'day'"]), 32)
    assert store.manifest.recording["span_column"] == "spans"
    last = store.where("entity IS NOT NULL").tokens.to_pandas().groupby(["document", "entity_span"])["row"].max()
    ends = frame.set_index("row").char_end[last].tolist()
    assert ends == [4, 23, 18], "the last token of each span ends where the span ends"
    assert not len(store.verify())


def test_none_records_the_column_as_it_is(model, tmp_path):
    store = record(model, RECORDS, tmp_path / "s", span_column=None)
    assert store.tokens.column_names[-2:] == ["tag", "spans"]
    assert json.loads(store.where("document = 0").tokens["spans"][0].as_py()) == SPANS


def test_an_interrupted_recording_resumes_to_the_same_bytes(model, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    record(model, RECORDS, whole, segment_rows=16)
    run, calls = segments.capture, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise DataError("the power went")
        return run(*arguments)

    monkeypatch.setattr(segments, "capture", failing)
    with pytest.raises(DataError, match="the power went"):
        record(model, RECORDS, tmp_path / "s", segment_rows=16)
    assert len(wb.open_store(tmp_path / "s").manifest.segments) == 1
    monkeypatch.undo()
    record(model, RECORDS, tmp_path / "s", segment_rows=16)
    assert files(tmp_path / "s") == files(whole)


def test_labels_that_a_part_lacks_are_null_and_other_types_are_refused_before_the_model_runs(model, tmp_path):
    record(model, RECORDS, tmp_path / "s")
    store = record(model, RECORDS[:1], tmp_path / "s", append=True)
    assert store.where("entity = 'once'").tokens["document"].to_pylist() == [0] * 4 + [3] * 4
    fewer_labels = [{"text": TEXT, "tag": "x", "spans": {"entity": SPANS["entity"]}}]
    store = record(model, fewer_labels, tmp_path / "s", append=True)
    added = store.tokens.filter(pc.field("document") == 4)
    assert added["rank"].null_count == len(added) > 0
    assert set(store.where("entity = 'once'").tokens["document"].to_pylist()) == {0, 3, 4}
    numbers = [{"text": TEXT, "spans": {"entity": [{"start": 0, "end": 2, "value": 7}]}}]
    before = files(tmp_path / "s")
    with pytest.raises(RequestError, match=r"^append: column 'entity' holds whole numbers, in the store text, and no"):
        record(model, numbers, tmp_path / "s", append=True)
    assert files(tmp_path / "s") == before
    with pytest.raises(RequestError, match="span_column: spans in the store, none requested"):
        record(model, RECORDS, tmp_path / "s", span_column=None)


def test_a_store_from_before_spans_is_resumed(model, tmp_path):
    path, texts = tmp_path / "s", [{"text": TEXT, "tag": "x"}, {"text": TEXT, "tag": "y"}]
    record(model, texts, path)
    manifest = read_manifest(path)
    older = {name: value for name, value in manifest.recording.items() if name != "span_column"}
    write_manifest(path, dataclasses.replace(manifest, recording=older))
    assert record(model, texts, path).rows == manifest.rows
    assert record(model, texts, path, append="again").rows == 2 * manifest.rows
    assert read_manifest(path).recording == older
    assert record(model, RECORDS, path, append=True).tokens["rank"].null_count > 2 * manifest.rows


def test_the_command_line_spells_none(model, tmp_path, monkeypatch, capsys):
    from workbench.cli import main as cli
    from workbench.model import load, location, preview

    file = source("jsonl", RECORDS, tmp_path)
    monkeypatch.setattr(load, "load_model", lambda *_names, **_options: model)
    monkeypatch.setattr(location, "locate", lambda *_names, **_options: None)
    monkeypatch.setattr(preview, "check_config", lambda *_: None)
    for name, options, column in (("a", [], "rank_cut"), ("b", ["--span-column", "None"], "spans")):
        with pytest.raises(SystemExit) as caught:
            cli.main(["record", "m", str(file), "--out", str(tmp_path / name), "--sites", "resid_post.0", *options])
        assert caught.value.code == 0, capsys.readouterr().err
        assert wb.open_store(tmp_path / name).tokens.column_names[-1] == column
