"""Damaged files of features, finished and unfinished, give an answer or an error in one line."""

import json
import logging
import shutil

import numpy as np
import pytest
from features_example import extracted
from mutations import fuzz, mutations, safetensors

import workbench as wb
from workbench.features.feature_store import open_features
from workbench.features.records import BY_ROW


def question(folder, store):
    """What reads every array of the features."""
    features = open_features(folder, store)
    features[np.arange(0, len(features), 3)]
    features.top(int(features.counts.argmax()), k=3)
    return features.counts.sum()


@pytest.mark.parametrize("file", ["features.json", "by_row.safetensors", "by_feature.safetensors"])
def test_of_finished_features(file, features, store, tmp_path):
    folder = shutil.copytree(features.path, tmp_path / "features")
    fuzz(lambda: question(folder, store), folder / file, parts=safetensors if file != "features.json" else None)


def test_row_pointers_whose_difference_overflows_are_refused(features, store, tmp_path):
    folder = shutil.copytree(features.path, tmp_path / "features")
    data = bytearray((folder / BY_ROW).read_bytes())
    size = int.from_bytes(data[:8], "little")
    first = 8 + size + json.loads(data[8 : 8 + size])["indptr"]["data_offsets"][0]
    pointers = np.frombuffer(data, np.int64, len(features) + 1, first)
    pointers[10:12] = 6 * 10**18, -6 * 10**18
    assert (np.diff(pointers) >= 0).all()  # an int64 wraps around
    (folder / BY_ROW).write_bytes(data)
    with pytest.raises(wb.DataError) as caught:
        open_features(folder, store)
    assert str(caught.value).endswith(
        "is damaged: its indptr does not rise from 0 to the number of entries; extract the features again"
    )


def test_of_an_unfinished_extraction(store, sae, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    target = tmp_path / "features"
    with monkeypatch.context() as patched:
        patched.setattr("workbench.features.extract.merge_segments", interrupt)
        with pytest.raises(KeyboardInterrupt):
            extracted(store, sae, out=target)
    (record,) = tmp_path.glob(".features.partial/extraction.json")
    before = shutil.copytree(record.parent, tmp_path / "before")

    def resume():
        damaged = record.read_bytes()
        for folder in (target, record.parent):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, record.parent)
        record.write_bytes(damaged)
        try:
            return extracted(store, sae, out=target).record.entries
        finally:
            record.parent.mkdir(exist_ok=True)  # for the next damage

    entries = resume()
    warns = logging.getLogger("workbench.features.extraction_folder")
    monkeypatch.setattr(warns, "disabled", True)  # it warns of other library versions
    record.write_bytes((before / record.name).read_bytes())
    fuzz(resume, record, count=mutations() // 5, is_original=lambda answer: answer == entries)
