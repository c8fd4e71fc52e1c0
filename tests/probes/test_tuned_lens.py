"""The tuned lens: planted changes of basis, equality with the logit lens before training, and every setting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted import linear_unembed, planted_store
from refusals import refused

import workbench as wb
import workbench.probes.tuned_lens as tuned_lens
from workbench.analysis.lens import ModelOutput, auc, lens_statistics, prediction_depth
from workbench.io.errors import RequestError
from workbench.model.unembed import load_unembed
from workbench.probes import LogitLens, TunedLens
from workbench.testing import ProbeContract

D, VOCAB = 6, 9
DOCUMENTS, LENGTH = 12, 40


@pytest.fixture(scope="module")
def planted():
    """Content of the store: W_U, states of the last block, and of block 0 the same in another basis."""
    draw = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(draw.normal(size=(D, D)))
    final = 2 * draw.normal(size=(DOCUMENTS * LENGTH, D))
    shift = draw.normal(size=D)
    return {
        "unembed": draw.normal(size=(VOCAB, D)),
        "final": final,
        "first": (final - shift) @ rotation,
        "second": final + 0.3 * draw.normal(size=final.shape),
        "ids": draw.integers(0, VOCAB, (DOCUMENTS, LENGTH)).tolist(),
    }


@pytest.fixture(scope="module")
def store(planted, tmp_path_factory) -> wb.Store:
    sites = {"resid_post.0": planted["first"], "resid_post.1": planted["second"], "resid_post.2": planted["final"]}
    path = tmp_path_factory.mktemp("tuned") / "x.acts"
    return planted_store(path, planted["ids"], sites, linear_unembed(planted["unembed"]))


WELL = TunedLens(epochs=60, batch=32, learning_rate=0.03, weight_decay=0.0)


@pytest.fixture(scope="module")
def trained(store):
    return WELL.run(store)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# Against what was planted


class TestContract(ProbeContract):
    probe = TunedLens
    settings = {"epochs": 1, "top_k": 2, "detail": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, store):
        return store


def test_a_planted_rotation_is_undone_and_the_logit_lens_is_wrong(trained, planted):
    data = trained.data
    assert float(data["logit_mean_kl"][0]) > 1
    assert float(data["mean_kl"][0]) < 0.01
    assert float(data["mean_kl"][2]) == 0
    rows = data["row"].to_numpy()
    weight, bias = data["weight"][0].to_numpy().astype(float), data["bias"][0].to_numpy().astype(float)
    first = planted["first"][rows]
    lens = log_softmax((first + first @ weight.T + bias) @ planted["unembed"].T)
    model = log_softmax(planted["final"][rows] @ planted["unembed"].T)
    kl = (np.exp(model) * (model - lens)).sum(-1)
    np.testing.assert_allclose(data["kl"][0], kl, atol=1e-4)


def test_noise_that_no_map_removes_stays(trained):
    tuned, plain = float(trained.data["mean_kl"][1]), float(trained.data["logit_mean_kl"][1])
    assert plain == pytest.approx(0.06, abs=0.02)
    assert 0.03 < tuned < plain + 0.02


def test_untrained_it_is_the_logit_lens(store):
    tuned = TunedLens(epochs=0).run(store)
    rows = ", ".join(map(str, tuned.data["row"].to_numpy()))
    plain = LogitLens(where=f"row IN ({rows})").run(store).data
    for name in plain.data_vars:
        np.testing.assert_array_equal(tuned.data[name], plain[name])
    np.testing.assert_array_equal(tuned.data["logit_mean_kl"], plain["mean_kl"])
    assert not tuned.data["weight"].any()
    assert tuned.data["epochs"].values.tolist() == [0, 0, 0]


def test_documents_are_trained_on_or_read_never_both(trained, store):
    data, document = trained.data, store.tokens["document"].to_numpy()
    read = set(document[data["row"].to_numpy()])
    assert len(read) == round(0.2 * DOCUMENTS)
    assert (int(data["rows"]), int(data["validation_rows"]), int(data["training_rows"])) == (80, 40, 360)


def test_it_never_gets_worse_on_validation_than_the_logit_lens(store):
    """A learning rate that ruins it: the best pass is the one before the first."""
    ruined = TunedLens(learning_rate=1e4, epochs=2).run(store)
    assert ruined.data["epochs"].values.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(ruined.data["mean_kl"], ruined.data["logit_mean_kl"])


# The trajectory's statistics


def statistics(lens, model):
    logs = [torch.tensor(np.log([part]), dtype=torch.float32) for part in (lens, model)]
    return {
        name: values.tolist()
        for name, values in lens_statistics(logs[0], ModelOutput.of(logs[1]), torch.tensor([0]), 1).items()
    }


def test_js_and_tv_are_the_bounded_ones():
    apart = statistics([1 - 1e-12, 1e-12], [1e-12, 1 - 1e-12])
    assert apart["js"] == pytest.approx([math.log(2)], abs=1e-6)
    assert apart["tv"] == pytest.approx([1])
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.5, 0.4])
    m = (p + q) / 2
    values = statistics(p, q)
    assert values["js"] == pytest.approx([((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2], abs=1e-6)
    assert values["tv"] == pytest.approx([0.6], abs=1e-6)  # the largest difference is 0.6, half of all is 0.6 too
    spread = statistics([0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4])
    assert spread["tv"] == pytest.approx([0.6], abs=1e-6)  # and here the largest is 0.3
    assert statistics(p, p)["js"] == pytest.approx([0], abs=1e-6)


def test_surprise_is_at_the_models_own_top_token():
    assert statistics([0.7, 0.2, 0.1], [0.1, 0.5, 0.4])["surprise"] == pytest.approx([-math.log(0.2)])


def test_prediction_depth_is_where_it_stays():
    script = torch.tensor([ord(letter) for letter in "abccbcc"])
    depth = prediction_depth((script == script[-1])[:, None])
    assert depth.tolist() == [5]  # c comes first at 2 and does not stay
    assert prediction_depth(torch.tensor([[True], [True]])).tolist() == [0]
    assert prediction_depth(torch.tensor([[True], [False]])).tolist() == [2]


def test_auc_counts_pairs():
    draw = np.random.default_rng(0)
    scores, positive = draw.integers(0, 6, 50).astype(float), draw.random(50) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert auc(np.array([3.0, 4.0, 1.0]), np.array([True, True, False])) == 1
    assert math.isnan(auc(scores, np.ones(50, bool)))


def interpolated(tmp_path, ids, final, levels=4):
    """Logits (l / L) z_L."""
    unembed = linear_unembed(np.eye(VOCAB))
    sites = {f"resid_post.{layer}": (layer + 1) / levels * final for layer in range(levels)}
    return planted_store(tmp_path / "i.acts", ids, sites, unembed)


def test_residual_cross_entropy_falls_along_interpolated_logits_and_tells_errors(tmp_path):
    """The model is sure where it is right and not where it is wrong; with labels at random nothing can be told."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, VOCAB, (20, 30))
    final = draw.normal(size=(20, 30, VOCAB))
    right = draw.random((20, 30)) < 0.5
    following = np.roll(ids, -1, axis=1)
    for document, position in zip(*np.nonzero(right), strict=True):
        final[document, position, following[document, position]] += 9
    data = LogitLens().run(interpolated(tmp_path, ids.tolist(), final.reshape(-1, VOCAB))).data
    assert (np.diff(data["mean_surprise"]) < 0).all()
    assert (data["error_auc"] > 0.9).all()
    assert data["depth_share"].values.tolist() == [1, 0, 0, 0]
    without_error = interpolated(
        tmp_path / "noise", draw.permutation(ids.ravel()).reshape(20, 30).tolist(), final.reshape(-1, VOCAB)
    )
    np.testing.assert_allclose(LogitLens().run(without_error).data["error_auc"], 0.5, atol=0.12)


# Settings


def test_where(store):
    result = TunedLens(epochs=1, where="position < 10").run(store)
    assert set(store.tokens["position"].to_numpy()[result.data["row"].to_numpy()]) == set(range(10))
    assert refused(RequestError, lambda: TunedLens(where="position < 0").run(store)) == (
        "where 'position < 0' selects no token of 480"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 3},
        {"batch": 100},
        {"learning_rate": 0.01},
        {"weight_decay": 5.0},
        {"seed": 1},
        {"held_out": 0.4},
    ],
)
def test_every_setting_of_the_training_changes_the_translators(store, changed):
    short = {"epochs": 6, "batch": 32, "learning_rate": 0.03}
    before, after = (TunedLens(**settings).run(store).data for settings in (short, short | changed))
    assert abs(before["weight"] - after["weight"]).max() > 1e-3
    if "seed" in changed or "held_out" in changed:
        assert before["row"].values.tolist() != after["row"].values.tolist()


def test_site_top_k_and_detail(store, planted, tmp_path):
    sites = {"resid_pre.1": planted["first"], "resid_post.1": planted["final"]}
    of_pre = planted_store(tmp_path / "pre.acts", planted["ids"], sites, linear_unembed(planted["unembed"]))
    data = TunedLens(site="resid_pre", top_k=2, detail=3, epochs=2).run(of_pre).data
    assert (data["layer"].values.tolist(), data.sizes["top"], data.sizes["row"]) == ([1], 2, 3)
    assert float(data["mean_kl"][0]) > 0  # a layer that is not the last block's output has a translator
    assert data["weight"].any()


@pytest.mark.parametrize(("shares", "epochs", "read"), [(3.5, 3, 1.0), (0.5, 1, 0.5)])
def test_epochs_that_are_not_set_are_those_that_the_work_allows(store, monkeypatch, shares, epochs, read):
    settings = {"batch": 8, "learning_rate": 0.03}
    whole = TunedLens(epochs=epochs, **settings).run(store)
    rows = int(whole.data["training_rows"])
    products = 4 * (whole.data.sizes["layer"] - 1) * load_unembed(store.path).weight.numel()
    monkeypatch.setattr(tuned_lens, "_CPU_WORK", int(shares * rows) * products)
    result = TunedLens(**settings).run(store)
    note = f"trained for {epochs} epoch{'s' * (epochs > 1)} of {int(read * rows)} of {rows} tokens, as long as some"
    assert note in result.data.attrs["note"]
    assert int(result.data["training_rows"]) == int(read * rows)
    equal_weights = np.array_equal(result.data["weight"], whole.data["weight"])
    assert equal_weights == (read == 1)
    assert (result.data["mean_kl"] < result.data["logit_mean_kl"])[0]


def test_the_same_seed_gives_the_same(store):
    once, again = (TunedLens(epochs=2).run(store).data for _ in range(2))
    assert once.identical(again)


def test_device(store):
    assert refused(RequestError, lambda: TunedLens(device="toaster").run(store)).startswith("device 'toaster' cannot")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 0.0}, "held_out must be above 0 and below 0.6, not 0.0"),
        ({"epochs": -1}, "epochs must be from 0 to 10000, not -1"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0 and finite, not -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, not nan"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"detail": -1}, "detail must be at least 0, not -1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    assert refused(RequestError, lambda: TunedLens(**settings)) == message


def test_too_little_is_said_or_refused(store, planted, tmp_path, trained):
    assert trained.data.attrs["note"] == ""
    sites = {"resid_post.0": planted["first"][:9], "resid_post.1": planted["final"][:9]}
    unembed = linear_unembed(planted["unembed"])
    ids = np.array(planted["ids"]).ravel()
    few = planted_store(tmp_path / "few.acts", ids[:9].reshape(3, 3).tolist(), sites, unembed)
    result = TunedLens(epochs=1).run(few)
    assert result.data.attrs["note"] == "3 training rows are few for 6 x 6 maps; 30 or more are needed"
    assert result.data.attrs["note"] in result.headline()
    two = planted_store(tmp_path / "two.acts", [ids[:5].tolist(), ids[5:9].tolist()], sites, unembed)
    assert refused(RequestError, lambda: TunedLens().run(two)) == (
        "store has 2 documents among the selected tokens; "
        "a tuned lens needs three or more, to train on, to stop by and to read"
    )


def test_a_missing_last_block_is_refused_with_the_command(planted, tmp_path):
    sites = {"resid_post.0": planted["first"]}
    store = planted_store(tmp_path / "x.acts", planted["ids"], sites, linear_unembed(planted["unembed"]), n_layers=2)
    assert "workbench add" in refused(RequestError, lambda: TunedLens().run(store))


# The result


def test_result_headline_and_figures(trained, tmp_path):
    assert list(trained.figures()) == ["by_layer", "losses", "grid", "depth"]
    assert trained.headline().startswith("KL(model ‖ lens) at layer 0: 0.00 nats with the tuned lens, ")
    again = wb.load_result(trained.save(tmp_path / "tuned"))
    assert again.data.identical(trained.data)
    curves = {line.name: line.y for line in again.figure("by_layer").data}
    np.testing.assert_allclose(curves["tuned lens"], trained.data["mean_kl"])
    np.testing.assert_allclose(curves["logit lens"], trained.data["logit_mean_kl"])
