"""Saved probes of token erasure: read again from a folder they give the numbers of the run, on other texts too."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from erasure_example import WORD, forgetful_words
from planted import planted_store
from refusals import refused

import workbench as wb
from workbench.io.errors import DataError, RequestError
from workbench.probes import TokenErasure

QUICK = {"early": 1, "late": 2, "layers": (1, 2), "resamples": 20}
TRAINING = {"epochs": 15, "batch": 32, "learning_rate": 0.05, "weight_decay": 0.0, "offsets": (-2, -1, 0)}


def recorded(path, seed=0):
    example = forgetful_words(seed)
    return planted_store(path, example["ids"], example["sites"], columns={"word_span": example["span"]})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("erasure") / "x.acts")


@pytest.fixture(scope="module")
def probes(store):
    return TokenErasure(**QUICK, **TRAINING).fit(store)


@pytest.fixture(scope="module")
def again(probes, tmp_path_factory):
    return wb.load_lens(probes.save(tmp_path_factory.mktemp("saved") / "erasure"))


def test_read_on_the_test_documents_is_the_run(store, again):
    """The run trains its own probes; both see the same documents."""
    run = TokenErasure(**QUICK, **TRAINING).run(store)
    documents = sorted(set(run.table["document"]))
    read = again.read(store, **QUICK, where=f"NOT is_special AND document IN ({', '.join(map(str, documents))})")
    for name in ("accuracy", "accuracy_low", "fall", "tokens", "coverage", "best", "training_rows", "precision"):
        np.testing.assert_allclose(read.data[name], run.data[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(read.table["psi"], run.table["psi"], atol=1e-5)
    assert read.table["text"].tolist() == run.table["text"].tolist()
    assert "trained on documents of this store" in read.headline()


def test_other_texts_are_segmented_into_the_planted_words(again, tmp_path):
    """The word of three tokens stands twice in each of 24 documents that the probes never saw."""
    second_store = recorded(tmp_path / "other.acts", seed=9)
    result = again.read(second_store, **QUICK)
    assert "trained on documents" not in result.headline()
    words = result.table.loc[result.table["is_span"]]
    assert (words["tokens"] == len(WORD)).all()
    assert len(words) >= 36
    assert float(result.data["recall"]) == len(words) / 48
    assert result.figure("accuracy") is not None


def test_log_probabilities_are_a_softmax_in_float64(store, again):
    states = store["resid_post", 2][:7]
    scaled = states.double().numpy() / again.scale[1].double().numpy()
    logits = scaled @ again.weight[1, 0].double().numpy()
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    log_probabilities = again.log_probabilities(-2, -2, states)
    np.testing.assert_allclose(log_probabilities, expected, atol=1e-4)
    assert again.classes.tolist() == list(range(8))
    assert again.offsets == (-2, -1, 0)


def test_a_saved_object_is_the_one_that_was_trained(probes, again):
    assert repr(again) == repr(probes)
    assert repr(again).endswith("2 layers of resid_post, offsets -2, -1, +0, 8 tokens")
    for name in ("weight", "scale", "validated"):
        assert torch.equal(getattr(again, name), getattr(probes, name))
    assert json.loads(json.dumps(dict(again.made_of))) == json.loads(json.dumps(dict(probes.made_of)))
    assert again.made_of["method"] == "token erasure"


def test_what_the_probes_lack_is_refused_by_name(store, probes, again, tmp_path):
    assert "layer 0 has no probes; layers with probes are 1, 2" in refused(RequestError, lambda: again.probes(0))
    assert "offset 3 has no probe" in refused(RequestError, lambda: again.log_probabilities(1, 3, torch.zeros(1, 24)))
    assert "layers with probes are 1, 2" in refused(RequestError, lambda: again.read(store, layers=(0, 1)))
    assert "set late, or add the layer" in refused(RequestError, lambda: again.read(store, early=1, late=3))
    assert "leave them out" in refused(RequestError, lambda: again.read(store, offsets=(0,)))
    foreign_store = planted_store(tmp_path / "o.acts", [[0, 1]], {"resid_post.0": np.eye(2, 3)})
    assert "read a store of the probe's model" in refused(RequestError, lambda: again.read(foreign_store))
    folder = probes.save(tmp_path / "erasure")
    assert "not empty" in refused(RequestError, lambda: probes.save(folder))
    record = json.loads((folder / "lens.json").read_text())
    (folder / "maps.safetensors").write_bytes(b"x" + (folder / "maps.safetensors").read_bytes()[1:])
    refused(DataError, lambda: wb.load_lens(folder))
    (folder / "lens.json").write_text(json.dumps(record | {"format": "x"}))
    assert "format is 'x'" in refused(DataError, lambda: wb.load_lens(folder))


def test_offsets_that_no_text_has_are_refused(store):
    text = refused(RequestError, lambda: TokenErasure(early=1, late=2, offsets=(90,)).run(store))
    assert text.startswith("offsets: no training token has a token at (90,)")
