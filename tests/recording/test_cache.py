"""Recordings that runs share: made once, known by all they depend on, never half."""

from __future__ import annotations

import io
import sys
import threading

import numpy as np
import pytest
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.recording import record as recorder
from workbench.recording import segments
from workbench.recording.cache import record_once

TEXTS = ["Once upon a time", "the little day was Monday", "and Tuesday to the day"]


@pytest.fixture
def model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "tiny/llama")


@pytest.fixture
def recorded(monkeypatch):
    """Paths of the recordings that were made."""
    recordings, real = [], recorder.record_plan

    def counting(plan, model, texts, out, *options):
        recordings.append(out)
        return real(plan, model, texts, out, *options)

    monkeypatch.setattr(recorder, "record_plan", counting)
    return recordings


def once(model, texts, folder, **settings):
    return record_once(model, texts, folder=folder, show_progress=False, **settings)


def test_the_same_request_is_recorded_once_and_gives_what_record_gives(model, recorded, tmp_path):
    first, second = (once(model, TEXTS, tmp_path / "shared", context=16, dtype="float32") for _ in range(2))
    assert len(recorded) == 1
    assert first.path == second.path
    plain = wb.record(model, TEXTS, out=tmp_path / "p.acts", context=16, dtype="float32", show_progress=False)
    assert first.manifest.fingerprint == plain.manifest.fingerprint
    assert first.path.parent.name.startswith("tiny-llama-")
    assert (first.path.parent / "request.json").is_file()


def test_the_behaviour_of_the_model_is_measured_once(model, monkeypatch, tmp_path):
    measured, real = [], Model.identity
    monkeypatch.setattr(Model, "identity", lambda model: measured.append(model) or real(model))
    once(model, TEXTS, tmp_path / "shared", context=16)
    assert measured == [model]


def test_whatever_it_depends_on_gives_another(model, tiny_models, tiny_tokenizer, recorded, tmp_path):
    gpt2 = Model(tiny_models["gpt2"], tiny_tokenizer, "tiny/llama")
    renamed = Model(model.module, tiny_tokenizer, "tiny/other")
    file = tmp_path / "texts.txt"
    file.write_text("Once upon a time")
    requests = [
        (model, TEXTS, {}),
        (gpt2, TEXTS, {}),
        (renamed, TEXTS, {}),
        (model, TEXTS[::-1], {}),
        (model, [{"text": text} for text in TEXTS], {}),
        (model, [[1, 2, 3]], {}),
        (model, [np.array([1, 2, 4])], {}),
        (model, file, {}),
        (model, TEXTS, {"context": 8}),
        (model, TEXTS, {"sites": ("resid_post.0",)}),
        (model, TEXTS, {"max_rows": 5}),
    ]
    stores = [once(of, texts, tmp_path / "shared", **settings) for of, texts, settings in requests]
    assert len(recorded) == len({store.path for store in stores}) == len(requests)
    file.write_text("another time")
    assert once(model, file, tmp_path / "shared").path not in {store.path for store in stores}
    for (of, texts, settings), store in zip(requests, stores, strict=True):
        if texts is not file:
            assert once(of, texts, tmp_path / "shared", **settings).path == store.path
    assert len(recorded) == len(requests) + 1


def test_an_interrupted_recording_is_resumed(model, tmp_path, monkeypatch):
    settings = {"segment_rows": 8, "context": 16}
    whole = once(model, TEXTS, tmp_path / "whole", **settings)
    real, filled = segments.fill, []

    def killed(*arguments, **settings):
        filled.append(1)
        if len(filled) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(segments, "fill", killed)
    with pytest.raises(KeyboardInterrupt):
        once(model, TEXTS, tmp_path / "shared", **settings)
    store = once(model, TEXTS, tmp_path / "shared", **settings)
    assert len(whole.manifest.segments) > 2
    assert len(filled) == 1 + len(whole.manifest.segments)  # the first segment is not made again
    assert store.manifest.fingerprint == whole.manifest.fingerprint


def test_two_at_once_record_it_once(model, tmp_path, monkeypatch):
    inside, go_on, real, recordings, stores = threading.Event(), threading.Event(), recorder.record_plan, [], []

    def slow(*arguments, **options):
        recordings.append(1)
        inside.set()
        assert go_on.wait(30)
        return real(*arguments, **options)

    monkeypatch.setattr(recorder, "record_plan", slow)
    monkeypatch.setattr(sys, "stderr", waiting := io.StringIO())
    threads = [threading.Thread(target=lambda: stores.append(once(model, TEXTS, tmp_path))) for _ in range(2)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    while "waiting for another process" not in waiting.getvalue():
        threads[1].join(0.01)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(recordings) == 1
    assert stores[0].manifest.fingerprint == stores[1].manifest.fingerprint


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("no such file", "texts must be a file or a list of documents, not 'no such file'"),
        ([object()], "texts holds a object; give strings, mappings or token ids"),
    ],
)
def test_texts_that_have_no_content_to_be_known_by_are_refused(model, texts, message, tmp_path):
    assert refused(RequestError, lambda: once(model, texts, tmp_path)) == message
