"""Linear probes: planted labels, both controls, baselines by hand, directions, and settings that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from planted import planted_store
from refusals import refused

import workbench as wb
from workbench.analysis.labelled_rows import control_task, shuffle_labels
from workbench.io.errors import RequestError
from workbench.probes import LinearProbes
from workbench.testing import ProbeContract

D, DOCUMENTS, LENGTH = 8, 24, 30
SHORT = {"dimensions": (1, 2), "resamples": 100, "penalties": (0.1, 0.001)}


@pytest.fixture(scope="module")
def planted():
    """Label `mood` of each token: read from one dimension of layer 1, from none of layer 0; `source` of documents."""
    draw = np.random.default_rng(0)
    rows = DOCUMENTS * LENGTH
    mood = draw.choice(["glad", "sad", "wry"], size=rows, p=[0.5, 0.3, 0.2])
    ids = draw.integers(0, 12, (DOCUMENTS, LENGTH))
    noise = draw.normal(size=(2, rows, D))
    noise[1, :, 5] += 9.0 * (mood == "sad") - 9.0 * (mood == "wry")
    source = np.repeat(["wiki", "news"] * (DOCUMENTS // 2), LENGTH)
    return {"mood": mood, "source": source, "ids": ids, "states": noise, "share": draw.random(rows)}


@pytest.fixture(scope="module")
def store(planted, tmp_path_factory):
    sites = {f"resid_post.{layer}": planted["states"][layer] for layer in range(2)}
    columns = {"mood": planted["mood"], "source": planted["source"], "share": planted["share"]}
    path = tmp_path_factory.mktemp("linear") / "x.acts"
    return planted_store(path, planted["ids"].tolist(), sites, columns=columns)


@pytest.fixture(scope="module")
def result(store):
    return LinearProbes(label="mood", **SHORT).run(store)


class TestContract(ProbeContract):
    probe = LinearProbes
    settings = {"label": "mood", **SHORT}  # noqa: RUF012

    @pytest.fixture
    def store(self, store):
        return store


def test_a_planted_label_is_read_where_it_is_and_nowhere_else(result):
    data = result.data
    assert float(data["accuracy"][1]) > 0.99
    assert float(data["accuracy_low"][1]) > float(data["majority_accuracy_high"])
    assert float(data["accuracy"][0]) < float(data["majority_accuracy"]) + 0.08
    assert float(data["cross_entropy"][0]) == pytest.approx(float(data["majority_cross_entropy"]), abs=0.1)
    assert data["sparse_order"].values[1, 0] == 5
    assert float(data["sparse_accuracy"].sel(layer=1, dimensions=1)) > 0.99
    assert "at layer 1" in result.headline()
    assert data["unconverged"].values.tolist() == [0, 0]


def test_controls_and_baselines_are_what_they_say(result, planted, store):
    data = result.data
    np.testing.assert_allclose(data["selectivity"], data["accuracy"] - data["control_accuracy"])
    np.testing.assert_allclose(data["gain"], data["accuracy"] - data["token_accuracy"])
    assert (data["shuffled_accuracy"] < float(data["majority_accuracy"]) + 0.08).all()
    document = store.tokens["document"].to_numpy()
    known = np.random.default_rng(0).permutation(np.unique(document))
    test = np.isin(document, known[: round(0.3 * DOCUMENTS)])
    mood, ids = planted["mood"], planted["ids"].ravel()
    assert dict(zip(data["value"].values.tolist(), data["test_rows"].values.tolist(), strict=True)) == {
        value: int((mood[test] == value).sum()) for value in ("glad", "sad", "wry")
    }
    assert float(data["majority_accuracy"]) == pytest.approx((mood[test] == "glad").mean())
    right = 0
    for token, value in zip(ids[test], mood[test], strict=True):
        moods = mood[~test][ids[~test] == token]
        right += max(("glad", "sad", "wry"), key=lambda label, moods=moods: (moods == label).sum()) == value
    assert float(data["token_accuracy"]) == pytest.approx(right / test.sum(), abs=0.02)  # ties


def test_weights_are_for_states_as_recorded(result, store, planted):
    data, document = result.data, store.tokens["document"].to_numpy()
    known = np.random.default_rng(0).permutation(np.unique(document))
    test = np.isin(document, known[: round(0.3 * DOCUMENTS)])
    scores = planted["states"][1][test] @ data["weight"][1].to_numpy().T + data["bias"][1].to_numpy()
    predicted = data["value"].to_numpy()[scores.argmax(1)]
    assert (predicted == planted["mood"][test]).mean() == pytest.approx(float(data["accuracy"][1]))


def test_directions_point_along_what_was_planted(result):
    directions = LinearProbes.directions(result, 1)
    assert list(directions) == ["glad", "sad", "wry"]
    vector = directions["sad"].unit().vector
    assert directions["sad"].site == "resid_post.1"
    assert float(vector[5]) > 0.9
    assert float(directions["wry"].unit().vector[5]) < -0.9
    assert "layer must be one of 0, 1" in refused(RequestError, lambda: LinearProbes.directions(result, 2))


def test_a_label_of_documents_is_shuffled_by_document(store):
    result = LinearProbes(label="source", layers=(-1,), **SHORT).run(store)
    assert result.data.attrs["shuffled"] == "documents"
    assert result.data["layer"].values.tolist() == [1]
    assert float(result.data["accuracy"][0]) < 0.7


def test_the_default_label_is_the_first_of_the_texts(store):
    assert LinearProbes(layers=(0,), **SHORT).run(store).data.attrs["label"] == "mood"


def test_fewer_rows_and_values_are_noted(store):
    note = LinearProbes(label="mood", row_limit=300, most=2, **SHORT).run(store).data.attrs["note"]
    assert "2 most frequent of 3 values of mood used" in note
    assert "300 of " in note


def test_both_controls_by_hand():
    draw = np.random.default_rng(0)
    token = np.array([7, 7, 3, 7, 3, 9])
    control = control_task(token, np.array([0, 1, 1, 2]), draw)
    assert len({*zip(token.tolist(), control.tolist(), strict=True)}) == 3
    codes, document = np.arange(8) % 3, np.arange(8) // 2
    parts = (document < 2, document >= 2)
    kind, permuted = shuffle_labels(codes, document, parts, draw)
    assert kind == "tokens"
    assert all(sorted(permuted[part]) == sorted(codes[part]) for part in parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "moood"}, "labels: no column 'moood'"),
        ({"label": "share"}, "label 'share' has values of type double; texts, integers or booleans are needed"),
        ({"label": "mood", "least": 100_000}, "label 'mood' has 0 values with 100000 tokens or more"),
        ({"label": "mood", "where": "document = 0", "least": 1}, "store has 1 document among the selected tokens"),
        ({"label": "mood", "layers": (0, 5)}, "layers: layer 5 was not recorded; recorded are 0, 1"),
        ({"label": "mood", "layers": ()}, "layers is empty"),
    ],
)
def test_runs_that_cannot_be(store, settings, message):
    assert refused(RequestError, lambda: LinearProbes(**settings).run(store)).startswith(message)


def test_settings_that_cannot_be():
    for settings, message in (
        ({"penalties": ()}, "penalties is empty"),
        ({"penalties": (0.0,)}, "penalties must be above 0"),
        ({"held_out": 0.7}, "held_out must be above 0 and below 0.6"),
        ({"most": 1}, "most must be a whole number, at least 2"),
    ):
        assert refused(RequestError, lambda s=settings: LinearProbes(**s)).startswith(message)


def test_a_store_without_labels_is_refused(planted, tmp_path):
    store = planted_store(tmp_path / "x.acts", planted["ids"].tolist(), {"resid_post.0": planted["states"][0]})
    text = refused(RequestError, lambda: LinearProbes().run(store))
    assert text.startswith("label is needed")
    assert isinstance(store, wb.Store)
