"""Residual cross-entropy: planted trajectories, plain Hugging Face in float64, areas under the curve pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from lens_example import followers, log_softmax, plain_logits, sequences_of
from planted import linear_unembed, planted_store
from refusals import refused

from workbench.analysis.detection import clustered_auc
from workbench.io.errors import RequestError
from workbench.probes import ResidualUncertainty
from workbench.testing import ProbeContract

VOCAB, LAYERS = 4, 5


def run(store, **settings):
    return ResidualUncertainty(**{"where": None, "resamples": 30, "device": "cpu", **settings}).run(store)


def planted(path, settled):
    """Logits of four tokens, of which the model predicts token 0 always: `settled(right)` is the layer from which its
    logit is 9 instead of 0; the last layer has it on every token."""
    draw = np.random.default_rng(0)
    documents = draw.integers(0, 2, (12, 30)).tolist()  # the model is right where 0 follows
    flat = np.concatenate(documents)
    right = np.append(flat[1:] == 0, False)
    sites = {}
    for layer in range(LAYERS):
        states = np.zeros((len(flat), VOCAB))
        states[:, 0] = [9.0 if layer >= settled(bool(answer)) else 0.5 for answer in right]
        sites[f"resid_post.{layer}"] = states
    return planted_store(path, documents, sites, linear_unembed(np.eye(VOCAB)))


@pytest.fixture(scope="module")
def early_and_late(tmp_path_factory):
    """Right predictions settle at layer 2, wrong ones at the last; the output is equally sure of both."""
    return planted(tmp_path_factory.mktemp("uncertainty") / "s", lambda right: 2 if right else LAYERS - 1)


class TestContract(ProbeContract):
    probe = ResidualUncertainty
    settings = {"where": None, "resamples": 10, "device": "cpu"}  # noqa: RUF012

    @pytest.fixture
    def store(self, early_and_late):
        return early_and_late


def test_a_depth_that_the_output_does_not_show(early_and_late):
    result = run(early_and_late)
    data = result.data
    assert float(data["output_auc"]) == 0.5
    assert data["depth_auc"].to_numpy().tolist() == [1, 1]
    assert data["depth_gain_low"].to_numpy().tolist() == [0.5, 0.5]
    assert data["auc"].to_numpy().tolist() == [0.5, 0.5, 1, 1, 0.5]
    unsure, sure = np.log(1 + 3 * np.exp([-0.5, -9.0]))
    right = data["right"].to_numpy() == 1
    assert data["settle_depth"].to_numpy()[right].tolist() == [2] * right.sum()
    np.testing.assert_allclose(data["area"][right], (2 * unsure + 3 * sure) / 5 / unsure, rtol=1e-5)
    wrong = data["right"].to_numpy() == 0
    np.testing.assert_allclose(data["area"][wrong], (4 * unsure + sure) / 5 / unsure, rtol=1e-5)
    assert set(data["settle_depth"].to_numpy()[wrong]) == {4}
    assert (data["right"] == -1).sum() == 12
    np.testing.assert_allclose(data["cross_entropy_right"], [unsure] * 2 + [sure] * 3, atol=1e-6)
    assert float(data["falling_share"]) == 1
    assert "Nothing before the output" not in result.headline()


def test_the_output_is_that_of_the_last_block_whatever_layers_are_read(early_and_late):
    data = run(early_and_late, layers=(2, 0)).data
    assert data["layer"].to_numpy().tolist() == [0, 2, LAYERS - 1]
    assert data["auc"].to_numpy().tolist() == [0.5, 1, 0.5]
    assert float(data["output_auc"]) == 0.5


def test_equal_trajectories_detect_nothing(tmp_path):
    result = run(planted(tmp_path / "s", lambda right: 2))
    assert set(result.data["auc"].to_numpy()) == {0.5}
    assert result.data["depth_auc"].to_numpy().tolist() == [0.5, 0.5]
    assert "Nothing before the output detects errors better than the output" in result.headline()


@pytest.mark.parametrize(
    ("documents", "reason"),
    [([[0], [1], [2]], "no token has a next one."), ([[0] * 5, [0] * 5], "the model errs on 0 % of the tokens.")],
)
def test_detectors_are_not_compared_where_there_is_nothing_to_detect(tmp_path, documents, reason):
    states = np.tile([9.0, 0, 0, 0], (sum(map(len, documents)), 1))
    sites = {"resid_post.0": states / 2, "resid_post.1": states}
    result = run(planted_store(tmp_path / "s", documents, sites, linear_unembed(np.eye(VOCAB))))
    assert f"Detectors of errors not compared: {reason}" in result.headline()
    assert np.isnan(result.data["auc"]).all()
    assert "nan" not in result.headline()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_trajectories_are_those_of_the_model(tiny_stores, tiny_models, family):
    store = tiny_stores[family]
    data = run(store).data
    logs = log_softmax(plain_logits(tiny_models[family], sequences_of(store)))
    best, targets = logs[-1].argmax(-1), followers(store)
    surprise = -np.take_along_axis(logs, best[None, :, None], -1)[..., 0]
    np.testing.assert_allclose(data["cross_entropy"], surprise.mean(1), atol=1e-4)
    np.testing.assert_allclose(data["area"], surprise.mean(0) / surprise[0], rtol=1e-3)
    np.testing.assert_array_equal(data["right"], np.where(targets < 0, -1, best == targets))
    settled = [
        next((d for d in range(len(curve)) if (curve[d:] <= np.log(2)).all()), len(curve)) for curve in surprise.T
    ]
    assert data["settle_depth"].to_numpy().tolist() == settled
    np.testing.assert_allclose(data["rising"][1:], (np.diff(surprise, axis=0) > 0).mean(1))


def test_a_single_layer_has_no_trajectory(tmp_path):
    states = {"resid_post.0": np.zeros((3, VOCAB))}
    store = planted_store(tmp_path / "s", [[0, 1, 2]], states, linear_unembed(np.eye(VOCAB)))
    assert "two layers or more" in refused(RequestError, lambda: run(store))


def test_areas_are_those_of_all_pairs():
    draw = np.random.default_rng(1)
    scores, positive = draw.integers(0, 5, (3, 40)).astype(float), draw.random(40) < 0.4
    area, resampled = clustered_auc(scores, positive, np.arange(40) // 4, resamples=500, seed=0)
    for score, measured in zip(scores, area, strict=True):
        difference = score[positive][:, None] - score[~positive][None]
        assert measured == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean())
    assert resampled.shape == (3, 500)
    np.testing.assert_allclose(resampled.mean(1), area, atol=0.05)
    again = clustered_auc(
        np.repeat(scores, 2, 1), np.repeat(positive, 2), np.repeat(np.arange(40) // 4, 2), resamples=9
    )
    np.testing.assert_allclose(again[0], area)
    area_of_one_text = clustered_auc(scores, positive, np.zeros(40), resamples=3)
    assert np.isnan(area_of_one_text[1]).all()
    assert np.isnan(clustered_auc(scores, np.ones(40, bool), np.arange(40), resamples=3)[0]).all()
