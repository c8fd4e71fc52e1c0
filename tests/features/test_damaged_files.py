"""Damaged files of features, finished and unfinished, give an answer or an error in one line."""

import logging
import shutil

import numpy as np
import pytest
from features_example import extracted
from mutations import fuzz, mutations, safetensors

from workbench.features.feature_store import open_features


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
        for made in (target, record.parent):
            shutil.rmtree(made, ignore_errors=True)
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
    fuzz(resume, record, count=mutations() // 5, same=lambda answer: answer == entries)
