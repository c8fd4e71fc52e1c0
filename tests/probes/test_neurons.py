"""Neurons: moments and activity against numpy and scipy in float64, planted neurons, and neurons as features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refusals import refused
from scipy import stats

import workbench as wb
from workbench.analysis.neuron_activity import neuron_activity
from workbench.embedded import planted
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.unembed import load_unembed
from workbench.probes import Neurons
from workbench.testing import ProbeContract

TEXTS = ["Anna saw the old river on Monday.", "One two three, and the rest of it.", "The cat met the dog."]


@pytest.fixture(scope="module")
def model():
    return wb.load_model("planted", device="cpu")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("neurons") / "planted.acts"
    texts = wb.planted_corpus()[:24]
    return wb.record(model, texts, sites=["mlp_post", "mlp_out"], out=out, dtype="float32", show_progress=False)


@pytest.fixture(scope="module")
def gated(tiny_models, tiny_tokenizer, tmp_path_factory):
    model = Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")
    out = tmp_path_factory.mktemp("neurons") / "llama.acts"
    sites = ["mlp_post", "mlp_out"]
    return model, wb.record(model, TEXTS, sites=sites, out=out, dtype="float32", bos="always", show_progress=False)


class TestContract(ProbeContract):
    probe = Neurons
    settings = {"layers": (1,), "random": 16, "top": 2}  # noqa: RUF012

    @pytest.fixture
    def store(self, gated):
        return gated[1]

    @pytest.fixture
    def model(self, gated):
        return gated[0]


def test_planted_neurons_are_found_and_no_other(store, model):
    result = Neurons().run(store, model=model)
    table = result.table.loc[result.table["layer"] == 1]
    kinds = {kind: part["neuron"].tolist() for kind, part in table.groupby("kind")}
    assert kinds == {
        "prediction": [planted.PREDICTION_NEURON[1]],
        "suppression": [planted.SUPPRESSION_NEURON[1]],
        "entropy": [planted.ENTROPY_NEURON[1]],
    }
    assert table.set_index("kind").loc["prediction", "raises"].startswith("' saw'")
    assert table.set_index("kind").loc["suppression", "lowers"].startswith("'.'")
    assert float(result.data["random_prediction"]) == float(result.data["random_suppression"]) == 0
    present = set(store.tokens["token_id"].to_numpy().tolist())
    alive = [not present.isdisjoint(planted.feature_tokens(name)) for name in planted.FEATURES]
    alive += [planted.token_id(word) in present for word in planted.ORDINALS] + [True] + 3 * [False]
    np.testing.assert_array_equal(result.data["rate"].sel(layer=0) > 0, alive)
    np.testing.assert_allclose(result.data["dead"], [1 - np.mean(alive), 61 / 64])


@pytest.mark.parametrize("both_signs", [False, True])
def test_activity_is_that_of_float64(gated, both_signs, monkeypatch):
    monkeypatch.setattr("workbench.analysis.neuron_activity._BLOCK_BYTES", 4 * 48 * 5)  # blocks of five rows
    _, store = gated
    ids = np.arange(1, store.rows, 2)
    activity = neuron_activity(store["mlp_post.1"], ids, 3, 0.01, both_signs)
    values = store["mlp_post.1"][ids].double().numpy()
    size = np.abs(values) if both_signs else values
    np.testing.assert_allclose(activity.rate, (size > 0.01).mean(0))
    np.testing.assert_allclose(activity.mean, values.mean(0))
    at = np.searchsorted(ids, activity.rows)  # equal tokens have equal activations: rows may change places
    np.testing.assert_array_equal(np.take_along_axis(size, at.T, 0), -np.sort(-size, axis=0)[:3])
    np.testing.assert_allclose(activity.largest, values[np.abs(values).argmax(0), np.arange(values.shape[1])])


def test_moments_are_those_of_scipy(gated):
    model, store = gated
    data = Neurons(random=64).run(store, model=model).data
    unembed = load_unembed(store.path)
    tokens = (unembed.weight * unembed.gain).double().numpy()
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    output = model.module.model.layers[2].mlp.down_proj.weight.detach().double().numpy().T
    cosine = output @ tokens.T / np.linalg.norm(output, axis=1, keepdims=True)
    np.testing.assert_allclose(data["kurtosis"].sel(layer=2), stats.kurtosis(cosine, axis=1, fisher=False), rtol=1e-4)
    np.testing.assert_allclose(data["skew"].sel(layer=2), stats.skew(cosine, axis=1), atol=1e-4)
    np.testing.assert_allclose(data["norm"].sel(layer=2), np.linalg.norm(output, axis=1), rtol=1e-5)
    assert 0.5 < float(data["logit_variance"].median()) < 2


def test_settings_matter(store, model):
    quiet = Neurons(threshold=2.0, random=8).run(store, model=model).data
    assert float(quiet["dead"].sel(layer=0)) == 1  # all have about 1
    few = Neurons(where="position = 0", random=8, detail=1, tokens=2).run(store, model=model)
    assert int(few.data["rows"]) == 24
    assert few.table["raises"].str.count("'").max() <= 4
    assert (Neurons(layers=(0,), top=1, random=8).run(store, model=model).data["top_row"].shape) == (1, 64, 1)


def test_neurons_are_features_of_one_mechanism(gated):
    """Both signs of a gated MLP: the same top rows as the recording, and the MLP's own output by decoding."""
    model, store = gated
    neurons = wb.neuron_dictionary(model, -1)
    features = wb.extract_features(store, neurons, show_progress=False)
    values = store["mlp_post.2"][:].double().numpy()
    for neuron in (0, 7, 47):
        top = features.top(neuron, k=3)
        assert top["row"].tolist() == np.argsort(-values[:, neuron])[:3].tolist()
        np.testing.assert_allclose(top["activation"], np.sort(values[:, neuron])[::-1][:3], rtol=1e-6)
        lowest = features.top(neuron + 48, k=1)
        assert lowest["row"].tolist() == [int(values[:, neuron].argmin())]
    decoded = neurons.decode(neurons.encode(store["mlp_post.2"][:]))
    torch.testing.assert_close(decoded, store["mlp_out.2"][:], atol=1e-5, rtol=1e-5)
    effects = wb.promoted_tokens(features, neurons, 7)
    assert len(effects) == 20


def test_small_activations_are_left_out_and_a_plain_mlp_has_one_sign(store, model):
    neurons = wb.neuron_dictionary(model, 0, minimum=0.5)
    assert neurons.d_sae == 64
    dense = store["mlp_post.0"][:].numpy()
    encoded = neurons.encode(store["mlp_post.0"][:]).numpy()
    np.testing.assert_allclose(encoded, np.where(dense > 0.5, dense, 0))
    planted_features = wb.load_sae("planted", device="cpu").encode(store["mlp_out.0"][:]).numpy()
    np.testing.assert_array_equal(encoded > 0, planted_features > 0)


def test_refused_requests(store, model, tiny_models):
    gemma = Model(tiny_models["gemma2"], None, "gemma2")
    assert "Gemma2ForCausalLM norms the MLP's output" in refused(RequestError, lambda: wb.neuron_dictionary(gemma, 1))
    assert "layer 9 of 'planted' has no neurons" in refused(RequestError, lambda: wb.neuron_dictionary(model, 9))
    probe = Neurons(layers=(7,))
    assert "layer 7 was not recorded" in refused(RequestError, lambda: probe.run(store, model=model))
