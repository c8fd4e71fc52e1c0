"""Representation hijacking: planted mixtures of two directions, texts of known words, and what the controls are."""

from __future__ import annotations

import numpy as np
import pytest
from planted import planted_store
from refusals import refused

import workbench as wb
from workbench.corpus.substitutions import SENTENCES
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import RepresentationHijacking
from workbench.testing import ProbeContract

MIXED = {
    "little": ("the {} day", "a {} to the", "{} was", "day {} to day"),
    "Monday": ("on {} was", "{} and the", "day of {}", "to {}"),
}


@pytest.fixture(scope="module")
def tiny(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")


@pytest.fixture(scope="module")
def mixed_store(tiny, tmp_path_factory):
    texts = wb.substitution_texts("little", "Monday", (1, 2), 3, sentences=MIXED, question="what is {}?")
    out = tmp_path_factory.mktemp("hijack") / "s"
    return wb.record(tiny, texts, sites=["resid_post"], out=out, show_progress=False)


class TestContract(ProbeContract):
    probe = RepresentationHijacking
    settings = {"resamples": 20, "prompt": "day"}  # noqa: RUF012

    @pytest.fixture
    def store(self, mixed_store):
        return mixed_store

    @pytest.fixture
    def model(self, tiny):
        return tiny

    def test_everything_is_there(self, result):
        assert set(result.figures()) == {"overwrite", "sentences", "reading"}
        assert result.data["texts"].to_numpy().tolist() == [[3, 3]] * 4
        assert "'little' in 2 sentences of 'Monday'" in result.headline()


def mixture(path, weights):
    """A store whose substituted word has the states (1 - w) a + w b at each layer; all states together have mean 0."""
    a, b = np.eye(6)[0], np.eye(6)[1]
    kinds = [("plain", "A"), ("plain", "B"), ("substituted", "A"), ("original", "B"), ("own", "A"), ("shuffled", "A")]
    documents, columns = [], {"condition": [], "sentences": [], "target": []}
    sites = {f"resid_post.{layer}": [] for layer in range(len(weights))}
    for condition, word in kinds:
        documents.append([1, 2, 3])
        columns["condition"] += [condition] * 3
        columns["sentences"] += [1] * 3
        columns["target"] += [None, word, None]  # position 1 is the word, position 2 balances the mean
        for layer, w in enumerate(weights):
            state = {"A": a, "B": b}[word] if condition != "substituted" else (1 - w) * a + w * b
            sites[f"resid_post.{layer}"] += [9 * np.ones(6), state, -state]
    sites = {name: np.array(values) for name, values in sites.items()}
    return planted_store(path, documents, sites, columns=columns, n_layers=len(weights))


def test_overwrite_and_crossing_are_those_of_a_planted_mixture(tmp_path):
    weights = np.array([0.0, 0.25, 0.5, 0.6, 1.0])
    data = RepresentationHijacking(resamples=2).run(mixture(tmp_path / "s", weights)).data.isel(sentences=0)
    expected = (2 * weights - 1) / np.sqrt(weights**2 + (1 - weights) ** 2)
    np.testing.assert_allclose(data["overwrite"].sel(condition="substituted"), expected, atol=1e-6)
    np.testing.assert_allclose(data["overwrite"].sel(condition="original"), 1, atol=1e-6)
    np.testing.assert_allclose(data["overwrite"].sel(condition="own"), -1, atol=1e-6)
    assert float(data["crossing"].sel(condition="substituted")) == 3
    assert float(data["crossing"].sel(condition="original")) == 0
    assert np.isnan(data["crossing"].sel(condition="own"))


def test_texts_of_the_conditions_are_what_they_say():
    texts = wb.substitution_texts(counts=(2, 3), draws=2, seed=1)
    by = {(text["condition"], text["sentences"], text["draw"]): text for text in texts if text["condition"] != "plain"}
    assert len(by) == 4 * 2 * 2
    plain = [text["text"] for text in texts if text["condition"] == "plain"]
    for draw in range(2):
        wrong, right = (by[kind, 3, draw]["text"] for kind in ("substituted", "original"))
        assert wrong.replace("carrot", "bicycle") == right
        assert wrong.count("carrot") == 4
        unmixed, shuffled = (by[kind, 3, draw]["text"] for kind in ("own", "shuffled"))
        assert sorted(shuffled.split()) == sorted(wrong.split())
        assert shuffled != wrong
        assert sum(text.format("carrot") in unmixed for text in SENTENCES["carrot"]) == 3
        assert not any(text in wrong or text in unmixed for text in plain)
        (span,) = by["substituted", 3, draw]["spans"]["target"]
        assert wrong[span["start"] : span["end"]] == "carrot"
        assert span["start"] == wrong.rindex("carrot")


def test_requests_without_an_answer_are_refused(tmp_path):
    store = planted_store(tmp_path / "s", [[1, 2]], {"resid_post.0": np.ones((2, 4))}, n_layers=1)
    assert "wb.substitution_texts" in refused(RequestError, lambda: RepresentationHijacking().run(store))
    assert "give more than 99" in refused(RequestError, lambda: wb.substitution_texts(counts=(99,)))
    assert "must differ" in refused(RequestError, lambda: wb.substitution_texts("bicycle"))
    sentences = {"a": ("no place", "x"), "b": ("{}", "{}")}
    assert "has no {}" in refused(RequestError, lambda: wb.substitution_texts("a", "b", (1,), sentences=sentences))
