"""Every probe recognises what is planted in the planted model, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb
from workbench.corpus.prompt_pairs import PromptPair
from workbench.embedded import planted
from workbench.embedded.planted import INDUCTION_HEAD, PREVIOUS_HEAD, SINKS, SUCCESSOR_HEAD
from workbench.probes import (
    ActivationPatching,
    AttentionSinks,
    DirectLogitAttribution,
    InductionHeads,
    LinearProbes,
    LogitLens,
    MassiveActivations,
    PathPatching,
    Steering,
    SuccessorHeads,
)

SITES = ("resid_pre.0", "resid_post", "attn_out", "mlp_out", "mlp_post", "pattern", "z", "v")


@pytest.fixture(scope="module")
def model():
    return wb.load_model("planted", device="cpu")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("planted") / "corpus.acts"
    return wb.record(model, wb.planted_corpus(), sites=SITES, out=out, dtype="float32", show_progress=False)


@pytest.fixture(scope="module")
def repeats(model, tmp_path_factory):
    ids = wb.random_repeats(model.tokenizer, 16, period=(8, 30), filler=(1, 20))
    out = tmp_path_factory.mktemp("planted") / "repeats.acts"
    return wb.record(model, ids, sites=("pattern", "resid_post"), out=out, dtype="float32", show_progress=False)


def only(values, *heads, value=1.0, atol=1e-3):
    """Asserts that a grid of heads has `value` at these heads and 0 elsewhere."""
    expected = np.zeros(values.shape)
    for head in heads:
        expected[head] = value
    np.testing.assert_allclose(values, expected, atol=atol)


def test_induction_heads(repeats, model):
    data = InductionHeads(copying_tokens=64, early=2, late=20, resamples=10).run(repeats, model=model).data
    assert np.argwhere(data["excess"].to_numpy() > 0.3).tolist() == [list(INDUCTION_HEAD)]
    assert data["induction"].to_numpy()[INDUCTION_HEAD] > 0.999
    assert data["copying"].to_numpy()[INDUCTION_HEAD] == 1
    assert data["previous"].to_numpy()[PREVIOUS_HEAD] > 0.999
    assert data["loss_repeated"] < 0.01 < 3.5 < data["loss_new"]


def test_attention_sinks(store):
    probe = AttentionSinks(length=8, where="domain = 'sentences'", min_visible=2, examples=0, resamples=10)
    data = probe.run(store).data
    alpha = data["alpha"].to_numpy()[..., 0]
    assert [tuple(index) for index in np.argwhere(alpha > 0.9).tolist()] == list(SINKS)
    assert data["massive_dimension"].to_numpy()[0] in planted.MASSIVE
    assert (data["value_norm_ratio"].to_numpy()[[1, 1], [0, 1]] < 0.05).all()


def test_successor_heads(store, model):
    data = SuccessorHeads(permutations=50, row_limit=200).run(store, model=model).data
    only(data["macro"].to_numpy(), SUCCESSOR_HEAD)
    assert data["task"].to_numpy().tolist() == ["number words", "days", "months"]
    assert (data["tokens"].to_numpy() == [8, 6, 11]).all()
    assert data["wins"].to_numpy()[SUCCESSOR_HEAD] > 0.95


def test_direct_logit_attribution(store, model):
    probe = DirectLogitAttribution(parts="heads", predicted="next", where="domain = 'sequences'", resamples=10)
    result = probe.run(store, model=model)
    sizes = result.data["absolute"].to_series().sort_values()
    assert sizes.index[-1] == "L1H2"
    assert float(result.data["error"]) < 1e-3


def test_activation_and_path_patching_of_the_copied_word(model):
    pairs = wb.prompt_pairs("copying", model, 6)
    data = ActivationPatching(site="z", resamples=10, controls_too=False).run_pairs(model, pairs).data
    for direction in ("denoising", "noising"):
        only(data[direction].to_numpy(), INDUCTION_HEAD, atol=5e-3)
    data = PathPatching(resamples=10, control_too=False).run_pairs(model, pairs).data
    only(data["denoising"].to_numpy(), INDUCTION_HEAD, atol=5e-3)


def test_path_patching_finds_the_edge_from_the_previous_token_to_the_keys(model):
    """The two words before the two candidates change places, so that the cue stands before the other one."""
    pairs = [
        PromptPair(
            f"Read: {first} stone {second} river. Repeat: {first}".replace(". Repeat", ".\nRepeat"),
            f"Read: {second} stone {first} river. Repeat: {first}".replace(". Repeat", ".\nRepeat"),
            (" stone",),
            (" river",),
        )
        for first, second in (("cloud", "window"), ("garden", "candle"), ("bridge", "paper"))
    ]
    pairs = wb.check_pairs(pairs, model)
    probe = PathPatching(receivers=("L1H0.k",), resamples=10, control_too=False)
    only(probe.run_pairs(model, pairs).data["denoising"].to_numpy(), PREVIOUS_HEAD, atol=5e-3)
    probe = PathPatching(receivers=("L1H0.v",), resamples=10, control_too=False)
    only(probe.run_pairs(model, pairs).data["denoising"].to_numpy(), atol=5e-3)


def test_features_are_active_exactly_where_their_words_stand(store):
    features = wb.extract_features(store, wb.load_sae("planted", device="cpu"), show_progress=False)
    active = features[: store.rows].toarray() > 0
    ids = store.tokens["token_id"].to_numpy()
    for number, name in enumerate(planted.FEATURES):
        np.testing.assert_array_equal(active[:, number], np.isin(ids, planted.feature_tokens(name)), err_msg=name)
    for number, word in enumerate(planted.ORDINALS):
        np.testing.assert_array_equal(active[:, 32 + number], ids == planted.token_id(word))
    np.testing.assert_array_equal(active[:, 60], store.tokens["position"].to_numpy() == 0)
    assert not active[:, 61:].any()
    best = wb.best_features(features, "class").set_index("value")
    for name in ("day", "month", "number", "object", "name", "verb", "frame"):
        assert (best.loc[name, "feature"], best.loc[name, "f1"]) == (planted.FEATURES.index(name), 1)


def test_massive_activations(store, model):
    result = MassiveActivations(resamples=10).run(store, model=model)
    data, table = result.data, result.table
    np.testing.assert_allclose(data["massive"], 1)
    np.testing.assert_allclose(data["first_tokens"], 1)
    np.testing.assert_allclose(data["dimensions"], 2)
    np.testing.assert_allclose(data["top"][:, :2], 1000, rtol=1e-3)
    massive = table.loc[table["massive"] > 0]
    assert set(massive["dimension"]) == set(planted.MASSIVE)
    assert set(massive["token"]) == {"<s>"}
    loss = {change: float(data["loss"].sel(change=change)) for change in ("none", "mean", "zero", "random")}
    assert abs(loss["mean"] - loss["none"]) < 1e-3
    assert abs(loss["random"] - loss["none"]) < 0.05
    assert loss["zero"] > loss["none"] + 0.2


def test_logit_lens_sees_the_prediction_after_the_block_that_makes_it(store):
    data = LogitLens(detail=0, where="position > 0").run(store).data
    np.testing.assert_allclose(data["mean_entropy"][0], np.log(64), atol=1e-4)  # block 0 writes nothing W_U reads
    assert float(data["mean_entropy"][1]) < 2.5
    np.testing.assert_allclose(data["mean_kl"][1], 0, atol=1e-6)


def test_linear_probes_read_the_class_at_both_layers(store):
    data = LinearProbes("class", least=20, resamples=10).run(store).data
    assert (data["accuracy"] > 0.95).all()  # words that no training document has are unknown to it
    assert (data["shuffled_accuracy"] < 0.8).all()


def test_steering_by_a_direction_of_the_output(store, model):
    direction = np.zeros(planted.D_MODEL)
    direction[planted.OUTPUT[planted.token_id("feather")]] = 1
    steered = Steering(tokens=(" feather",), scales=(0.0, 4.0), prompt=4, new_tokens=2, resamples=10).steer(
        store, wb.Direction("resid_post.1", direction, "feather"), model=model
    )
    share = steered.data["share"]
    assert float(share.sel(kind="direction", scale=4.0)) == 1
    assert float(share.sel(kind="random", scale=4.0)) < 0.2
