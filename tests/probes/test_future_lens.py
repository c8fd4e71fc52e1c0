"""The future lens: planted futures at exactly one distance, maps in closed form, baselines by hand, every setting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from planted import linear_unembed, planted_store
from refusals import refused

import workbench as wb
import workbench.analysis.future_maps as future_maps
from workbench.analysis.future import bigrams
from workbench.analysis.future_maps import ridge_maps
from workbench.io.errors import RequestError
from workbench.probes.future_lens import FutureLens, future_view
from workbench.testing import ProbeContract

VOCAB, DOCUMENTS, LENGTH = 5, 24, 14
QUICK = {"horizons": 3, "top_k": 2, "direct_vocab": 0}
"""The linear method alone."""


def one_hot(ids: np.ndarray) -> np.ndarray:
    return np.eye(VOCAB)[ids]


def texts(seed: int = 0, documents: int = DOCUMENTS, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (documents, length))


def ahead(ids: np.ndarray, n: int) -> np.ndarray:
    """The token n places on in the same document, wrapped round where the document ends."""
    return np.roll(ids, -n, axis=1)


def recorded(path, ids: np.ndarray, first: np.ndarray, final: np.ndarray) -> wb.Store:
    """Two layers over documents of the same length; logits are the last one's states themselves."""
    sites = {"resid_post.0": first.reshape(ids.size, -1), "resid_post.1": final.reshape(ids.size, -1)}
    return planted_store(path / "x.acts", ids.tolist(), sites, linear_unembed(np.eye(final.shape[-1])))


def knowing(path, n: int, seed: int = 0) -> wb.Store:
    """A model that says the text at random tokens, and at layer 0 knows what it will say n tokens past the next."""
    ids = texts(seed)
    return recorded(path, ids, one_hot(ahead(ids, n + 1)), 9 * one_hot(ahead(ids, 1)))


@pytest.fixture(scope="module")
def knows_second(tmp_path_factory):
    return knowing(tmp_path_factory.mktemp("second"), 1)


@pytest.fixture(scope="module")
def result(knows_second):
    return FutureLens(**QUICK).run(knows_second)


class TestContract(ProbeContract):
    probe = FutureLens
    settings = {**QUICK, "direct_vocab": 10, "epochs": 1}  # noqa: RUF012

    @pytest.fixture
    def store(self, knows_second):
        return knows_second


def division(documents: int, seed: int = 0, held_out: float = 0.25, validation: float = 0.1):
    """Documents tested, chosen by and fitted on, drawn again."""
    order = np.random.default_rng(seed).permutation(documents)
    tested, validating = round(held_out * documents), round(validation * documents)
    return np.split(order, [tested, tested + validating])


# Against what was planted


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_future_is_found_at_its_own_distance_and_no_other(tmp_path, n):
    data = FutureLens(**QUICK | {"direct_vocab": 10, "learning_rate": 0.1}).run(knowing(tmp_path, n)).data
    for method in ("linear", "direct"):
        precision = data["precision"].sel({"method": method, "layer": 0, "k": 1}).to_numpy()
        assert precision[n] == 1
        assert (np.delete(precision, n) < 0.5).all()
    np.testing.assert_array_equal(data["text_precision"].sel(layer=0, horizon=n, k=1), 1)


def test_the_last_layer_says_the_next_token_itself(result):
    assert float(result.data["precision"].sel(layer=1, horizon=0, k=1)[0]) == 1
    assert float(result.data["surprisal"].sel(layer=1, horizon=0)[0]) == pytest.approx(
        math.log1p(4 * math.exp(-9)), abs=1e-6
    )


def test_a_deterministic_text_is_read_where_both_tokens_are_in_the_state(tmp_path):
    """x_(t+2) = f(x_t, x_(t+1)), a table drawn at random: no bigram knows it, a state that holds the pair does."""
    draw = np.random.default_rng(1)
    follows = draw.integers(0, VOCAB, (VOCAB, VOCAB))
    ids = draw.integers(0, VOCAB, (60, LENGTH))
    for place in range(LENGTH - 2):
        ids[:, place + 2] = np.where(
            draw.random(60) < 0.6, ids[:, place + 2], follows[ids[:, place], ids[:, place + 1]]
        )
    predicted = follows[ids, ahead(ids, 1)]  # at T+1 the model says f(x_T, x_(T+1)) of the text it sees
    pair = np.eye(VOCAB * VOCAB)[ids * VOCAB + ahead(ids, 1)]
    final = np.roll(9 * one_hot(predicted), 1, axis=1)
    data = FutureLens(**QUICK).run(recorded(tmp_path, ids, pair, final)).data
    assert float(data["precision"].sel(layer=0, horizon=1, k=1)[0]) == 1
    assert float(data["bigram_precision"].sel(horizon=1)) < 0.8
    assert float(data["gain_low"].sel(layer=0, horizon=1)[0]) > 0.1


def test_a_future_that_is_chance_has_the_rate_of_the_most_frequent(tmp_path):
    ids = np.random.default_rng(0).choice(VOCAB, p=[0.6, 0.1, 0.1, 0.1, 0.1], size=(60, 30))
    noise = np.random.default_rng(1).normal(size=(60, 30, 4))
    data = FutureLens(top_k=1).run(recorded(tmp_path, ids, noise, 9 * one_hot(ahead(ids, 1)))).data
    first = data.sel(layer=0)
    for horizon in range(4):
        mode = float(first["unigram_precision"].sel(horizon=horizon))
        assert mode == pytest.approx(0.6, abs=0.08)
        np.testing.assert_allclose(first["precision"].sel(horizon=horizon, k=1), mode, atol=0.02)
        np.testing.assert_allclose(first["shuffled_precision"].sel(horizon=horizon), mode, atol=0.02)


def test_with_the_states_of_other_tokens_it_falls_to_chance(result):
    shuffled = float(result.data["shuffled_precision"].sel(layer=0, horizon=1)[0])
    rows = int(result.data["rows"].sel(horizon=1))
    assert shuffled == pytest.approx(1 / VOCAB, abs=4 * math.sqrt(0.16 / rows))


# The parts


def test_ridge_maps_are_the_closed_form():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(50, 4)) * [1, 2, 3, 0.1] + 5, draw.normal(size=(50, 3))
    extended = np.hstack([x, np.ones((50, 1))])
    sums = torch.tensor(extended.T @ extended), torch.tensor(extended.T @ y)
    for penalty, (weight, bias) in zip((1e-6, 0.5), ridge_maps(*sums, (1e-6, 0.5)), strict=True):
        centred = x - x.mean(0)
        padded = np.vstack([centred, np.sqrt(50 * penalty * x.var(0).mean()) * np.eye(4)])
        expected = np.linalg.lstsq(padded, np.vstack([y - y.mean(0), np.zeros((4, 3))]), rcond=None)[0]
        np.testing.assert_allclose(weight, expected, atol=1e-9)
        np.testing.assert_allclose(bias, y.mean(0) - x.mean(0) @ expected, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_states_that_never_vary_predict_the_mean(value):
    x, y = np.full((9, 3), value), np.arange(18.0).reshape(9, 2)
    extended = np.hstack([x, np.ones((9, 1))])
    ((weight, bias),) = ridge_maps(torch.tensor(extended.T @ extended), torch.tensor(extended.T @ y), (1e-6,))
    np.testing.assert_allclose(x @ weight.numpy() + bias.numpy(), np.tile(y.mean(0), (9, 1)), atol=1e-6)


def test_every_number_of_one_layer_against_float64(tmp_path):
    """All of it again, in NumPy, with the documents drawn again."""
    ids = texts(3, 40)
    draw = np.random.default_rng(4)
    hidden = one_hot(ahead(ids, 2)) + 0.7 * draw.normal(size=(40, LENGTH, VOCAB))
    final = 3 * one_hot(ahead(ids, 1)) + draw.normal(size=(40, LENGTH, VOCAB))
    store = recorded(tmp_path, ids, hidden, final)
    data = FutureLens(horizons=2, ridge=(0.3,), direct_vocab=0, top_k=3).run(store).data
    tested, validating, fitted = division(40)
    log = final - np.log(np.exp(final).sum(-1, keepdims=True))
    predicted = final.argmax(-1)
    for n in range(2):
        last = LENGTH - n
        x, y = hidden[fitted, 1:last].reshape(-1, VOCAB), final[fitted, 1 + n :].reshape(-1, VOCAB)
        between = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
        weight = np.linalg.solve(np.cov(x.T, bias=True) + 0.3 * x.var(0).mean() * np.eye(VOCAB), between)
        chosen = np.sort(tested)
        read = (hidden[chosen, 1:last] - x.mean(0)) @ weight + y.mean(0)
        order, targets = np.argsort(-read, axis=-1), predicted[chosen, 1 + n :]
        at = data.isel(method=0).sel(layer=0, horizon=n)
        hits = order[..., :3] == targets[..., None]
        np.testing.assert_allclose(at["precision"], [hits[..., :k].any(-1).mean() for k in (1, 2, 3)], atol=1e-9)
        surprisal = -np.take_along_axis(log[chosen, 1 + n :], order[..., :1], -1).mean()
        assert float(at["surprisal"]) == pytest.approx(surprisal, abs=1e-5)
        text = (order[:, :-1, 0] == ids[chosen, 2 + n :]).mean()
        assert float(at["text_precision"][0]) == pytest.approx(text)
        followers = np.zeros((VOCAB, VOCAB))
        np.add.at(followers, (ids[fitted, 1:last].ravel(), predicted[fitted, 1 + n :].ravel()), 1)
        bigram = (followers + 1e-6 * followers.sum(0)).argmax(1)[ids[chosen, 1:last]]
        assert float(at["bigram_precision"]) == pytest.approx((bigram == targets).mean())
        assert float(at["gain"]) == pytest.approx(hits[..., 0].mean() - (bigram == targets).mean())
        by_document = hits[..., 0].mean(1) - (bigram == targets).mean(1)
        spread = scipy.stats.t.ppf(0.975, len(chosen) - 1) * by_document.std(ddof=1) / math.sqrt(len(chosen))
        assert float(at["gain_high"] - at["gain_low"]) == pytest.approx(2 * spread, rel=0.15)
        assert float(at["gain_low"]) < float(at["gain"]) < float(at["gain_high"])
        counts = (len(fitted) * (last - 1), len(validating) * (last - 1), len(tested) * (last - 1), len(tested) * n)
        assert tuple(int(at[name]) for name in ("training_rows", "validation_rows", "rows", "left_out")) == counts
        assert int(at["text_rows"]) == len(tested) * (last - 2)
        sure = np.exp(read - read.max(-1, keepdims=True))
        bins = (10 / sure.sum(-1)).astype(int)
        np.testing.assert_array_equal(at["calibration_rows"], np.bincount(bins.ravel(), minlength=10))
        right = np.bincount(bins.ravel(), hits[..., 0].ravel(), minlength=10)
        np.testing.assert_allclose(np.nan_to_num(at["calibration"] * at["calibration_rows"]), right)


def test_bigrams_by_hand():
    token = np.array([1, 1, 1, 2, 2, 3, 3, 3])
    followers = np.array([7, 7, 4, 4, 5, 4, 5, 5])  # of all: 4 thrice, 5 thrice, 7 twice
    bigram = bigrams(token, followers, np.array([3, 1, 2, 0, 9]))
    assert bigram.most_frequent == 4
    assert bigram.prediction.tolist() == [5, 7, 4, 4, 4]  # after 2 both once; 0 and 9 never seen
    assert bigram.seen.tolist() == [True, True, True, False, False]


def test_the_gain_is_over_tokens_that_the_bigram_has_seen(tmp_path):
    """In every test document one token of 13 is of a kind that no other document has; the map is always right."""
    ids = np.random.default_rng(0).integers(0, VOCAB - 1, (DOCUMENTS, LENGTH))
    ids[division(DOCUMENTS)[0], 5] = VOCAB - 1
    store = recorded(tmp_path, ids, one_hot(ahead(ids, 1)), 9 * one_hot(ahead(ids, 1)))
    result = FutureLens(**QUICK | {"horizons": 1}).run(store)
    at = result.data.sel(horizon=0, layer=0).isel(method=0)
    assert float(at["bigram_seen"]) == pytest.approx(12 / 13)
    assert float(at["bigram_precision"]) != float(at["bigram_seen_precision"])
    right = float(at["precision"].sel(k=1)) * 13 - float(at["seen_precision"]) * 12
    assert right == pytest.approx(float(at["precision"].sel(k=1)) * 13 - 12 * float(at["seen_precision"]))
    assert float(at["gain"]) == pytest.approx(float(at["seen_precision"]) - float(at["bigram_seen_precision"]))
    assert "on the 92 % of tokens that the bigram has seen" in result.headline()
    result.data["bigram_seen"][:] = 0
    assert "the bigram has seen none of the tokens, so there is no gain to measure." in result.headline()


def test_the_model_s_own_output_is_no_layer_to_choose(tmp_path):
    ids = texts()
    data = FutureLens(**QUICK).run(recorded(tmp_path, ids, one_hot(ids), 9 * one_hot(ahead(ids, 1)))).data
    assert float(data["precision"].sel(layer=1, horizon=0, k=1)[0]) == 1
    assert int(data["best_layer"].sel(horizon=0)) == 0
    alone = planted_store(
        tmp_path / "alone.acts",
        ids.tolist(),
        {"resid_post.1": (9 * one_hot(ahead(ids, 1))).reshape(ids.size, -1)},
        linear_unembed(np.eye(VOCAB)),
    )
    assert "the only layer is the model's own output" in FutureLens(**QUICK | {"horizons": 1}).run(alone).headline()


def test_the_first_of_a_sequence_is_not_read_and_targets_stay_in_the_document(tmp_path):
    """Garbage in the first state would ruin the map, garbage in the last place is read from nowhere."""
    ids = texts()
    first, final = one_hot(ahead(ids, 2)), 9 * one_hot(ahead(ids, 1))
    first[:, 0] = 1e4 * np.random.default_rng(0).normal(size=first[:, 0].shape)
    first[:, -1] = 1e4
    data = FutureLens(**QUICK).run(recorded(tmp_path, ids, first, final)).data
    assert 0 not in data["position"]
    assert float(data["precision"].sel(layer=0, horizon=1, k=1)[0]) == 1
    np.testing.assert_array_equal(data["top_id"].sel(horizon=1) == -1, data["position"] == LENGTH - 1)
    np.testing.assert_array_equal(data["top_id"].sel(horizon=2) == -1, data["position"] >= LENGTH - 2)


def test_documents_are_fitted_on_or_tested_never_both(result):
    tested, _, _ = division(DOCUMENTS)
    assert set((result.data["row"].to_numpy() // LENGTH).tolist()) == set(tested.tolist())
    assert int(result.data["documents"]) == 6


# Settings


def noisy(path) -> wb.Store:
    ids = texts(5)
    draw = np.random.default_rng(6)
    first = one_hot(ahead(ids, 2)) + draw.normal(size=(DOCUMENTS, LENGTH, VOCAB))
    return recorded(path, ids, first, 2 * one_hot(ahead(ids, 1)) + draw.normal(size=first.shape))


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return noisy(tmp_path_factory.mktemp("noise"))


@pytest.mark.parametrize(
    ("changed", "variable"),
    [
        ({"held_out": 0.5}, "rows"),
        ({"validation": 0.3}, "validation_rows"),
        ({"ridge": (50.0,)}, "validation_cross_entropy"),
        ({"epochs": 0}, "validation_cross_entropy"),
        ({"learning_rate": 0.1}, "validation_cross_entropy"),
        ({"seed": 1}, "validation_cross_entropy"),
        ({"where": "position < 6"}, "rows"),
    ],
)
def test_settings_change_the_result(noise, changed, variable):
    short = {"horizons": 2, "top_k": 1, "epochs": 2}
    before, after = (FutureLens(**settings).run(noise).data for settings in (short, short | changed))
    assert (before[variable].to_numpy() != after[variable].to_numpy()).any()


@pytest.mark.parametrize("tokens", [2, 300])
def test_the_penalty_is_chosen_on_validation_documents(noise, monkeypatch, tokens):
    """On a few of their tokens; what is stated of the chosen map is of all."""
    monkeypatch.setattr(future_maps, "_CHOOSING", tokens)
    short = {"horizons": 2, "top_k": 1, "direct_vocab": 0}
    penalties = (1e-6, 0.5, 50.0)
    single = [FutureLens(**short, ridge=(penalty,)).run(noise).data for penalty in penalties]
    data = FutureLens(**short, ridge=penalties).run(noise).data
    at = np.vectorize(penalties.index)(data["ridge"].to_numpy())
    for name in ("validation_cross_entropy", "validation_precision"):
        values = np.stack([penalty_data[name].to_numpy()[0] for penalty_data in single])
        np.testing.assert_allclose(data[name].to_numpy()[0], np.take_along_axis(values, at[None], 0)[0])
    if tokens == 300:
        losses = [penalty_data["validation_cross_entropy"].to_numpy()[0] for penalty_data in single]
        np.testing.assert_allclose(data["ridge"], np.array(penalties)[np.argmin(losses, axis=0)])


def test_the_direct_method_keeps_its_best_pass(noise):
    short = {"horizons": 2, "top_k": 1}
    start = FutureLens(**short, epochs=0).run(noise).data
    assert not start["epochs"].any()
    np.testing.assert_array_equal(start["precision"].sel({"method": "direct", "k": 1})[0], start["unigram_precision"])
    ruined = FutureLens(**short, learning_rate=1e4).run(noise).data
    np.testing.assert_array_equal(ruined["epochs"], 0)
    np.testing.assert_array_equal(
        ruined["precision"].sel({"method": "direct"}), start["precision"].sel({"method": "direct"})
    )


def test_site_horizons_top_k_detail_and_direct_vocab(tmp_path):
    ids = texts()
    unembed = linear_unembed(np.eye(VOCAB))
    sites = {"resid_pre.1": one_hot(ahead(ids, 2)), "resid_post.1": 9 * one_hot(ahead(ids, 1))}
    store = planted_store(
        tmp_path / "x.acts", ids.tolist(), {k: v.reshape(-1, VOCAB) for k, v in sites.items()}, unembed
    )
    data = FutureLens(site="resid_pre", horizons=2, top_k=4, detail=5, direct_vocab=VOCAB - 1).run(store).data
    assert dict(data.sizes) == {"method": 1, "layer": 1, "horizon": 2, "k": 4, "bin": 10, "row": 5}
    assert data["layer"].values.tolist() == [1]
    assert float(data["precision"].sel(horizon=1, k=1).squeeze()) == 1
    assert data.attrs["direct"] == "left out: vocabulary of 5, direct_vocab is 4"
    assert "epochs" not in data
    at_all = FutureLens(site="resid_pre", horizons=1, direct_vocab=VOCAB, epochs=1, top_k=VOCAB, detail=0).run(store)
    np.testing.assert_array_equal(at_all.data["precision"].sel(k=VOCAB), 1)
    assert at_all.data["method"].values.tolist() == ["linear", "direct"]
    assert at_all.data.attrs["direct"] == ""
    assert list(at_all.figures()) == ["precision", "gain", "calibration"]
    assert at_all.headline().startswith("Top-1 accuracy at t+1: ")


def test_the_same_seed_gives_the_same(noise):
    once, again = (FutureLens(horizons=2, epochs=1, top_k=1).run(noise).data for _ in range(2))
    assert once.identical(again)


def test_device(noise):
    assert refused(RequestError, lambda: FutureLens(device="toaster").run(noise)).startswith("device 'toaster' cannot")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizons": 0}, "horizons must be from 1 to 1000, not 0"),
        ({"direct_vocab": -1}, "direct_vocab must be at least 0, not -1"),
        ({"epochs": -1}, "epochs must be from 0 to 10000, not -1"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"detail": -1}, "detail must be at least 0, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"held_out": 1.0}, "held_out must be above 0 and below 1, not 1.0"),
        ({"validation": 0.0}, "validation must be above 0 and below 1, not 0.0"),
        (
            {"held_out": 0.6, "validation": 0.4},
            "held_out 0.6 and validation 0.4 leave no document to train on; their sum must be less than 1",
        ),
        ({"ridge": ()}, "ridge must be one or more finite numbers above 0, not ()"),
        ({"ridge": (1.0, 0.0)}, "ridge must be one or more finite numbers above 0, not (1.0, 0.0)"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0 and finite, not nan"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    assert refused(RequestError, lambda: FutureLens(**settings)) == message


def test_requests_that_the_store_cannot_meet(noise, tmp_path):
    assert refused(RequestError, lambda: FutureLens(top_k=6).run(noise)) == (
        "top_k is 6 and the vocabulary has 5; give at most that"
    )
    assert refused(RequestError, lambda: FutureLens(top_k=1, horizons=20).run(noise)) == (
        "horizons is 20 and no training token has 19 more after it in its document and sequence; give at most 13"
    )
    assert refused(RequestError, lambda: FutureLens(top_k=1, where="document < 2").run(noise)) == (
        "store has 2 documents among the selected tokens; a future lens needs three or more, "
        "to fit on, to validate on and to test on"
    )
    assert refused(RequestError, lambda: FutureLens(top_k=1, where="position = 0").run(noise)).startswith(
        "store has 0 documents among the selected tokens"
    )
    ids = texts()
    sites = {"resid_post.0": one_hot(ids).reshape(-1, VOCAB)}
    missing = planted_store(tmp_path / "x.acts", ids.tolist(), sites, linear_unembed(np.eye(VOCAB)), n_layers=2)
    assert "workbench add" in refused(RequestError, lambda: FutureLens().run(missing))


# The result


def test_small_samples_are_noted(result, tmp_path):
    assert result.data.attrs["note"] == "intervals over 6 test documents, fewer than 10"
    ids = texts(0, 3)
    few = recorded(tmp_path, ids, one_hot(ids), one_hot(ids))
    small = FutureLens(**QUICK).run(few)
    assert small.data.attrs["note"] == (
        "11 training rows are few for 5 x 5 maps; 25 or more are needed; intervals over 1 test document, fewer than 10"
    )
    assert np.isnan(small.data["gain_low"]).all()
    assert small.headline().endswith(f"no interval from one document. Note: {small.data.attrs['note']}.")


def test_the_best_layer_is_chosen_on_validation_and_reported(result):
    data = result.data
    assert data["best_layer"].values[:2].tolist() == [0, 0]  # at N = 0 layer 1 is right by definition
    assert float(data["validation_precision"].sel(layer=1, horizon=0)[0]) == 1
    bigram, low, high = (
        float(value)
        for value in (
            data["bigram_precision"][1],
            data["gain_low"].sel(layer=0)[0, 1],
            data["gain_high"].sel(layer=0)[0, 1],
        )
    )
    assert result.headline() == (
        f"Top-1 accuracy at t+2: 100 % (layer 0, linear probe); bigram baseline {100 * bigram:.0f} %; on the 100 % of "
        f"tokens that the bigram has seen 100 to {100 * bigram:.0f} %, gain {100 - 100 * bigram:.0f} points, "
        f"95 % CI [{100 * low:.0f}, {100 * high:.0f}]. Note: {data.attrs['note']}."
    )


def test_the_view_shows_the_predictions(result):
    data = result.data
    figure = result.figure("view")
    row = data["row"].to_numpy()[: len(figure.data[0].x)]  # one line of the grid
    ids = texts().ravel()
    cells = figure.data[0].text[1:]  # above the tokens
    inside = row % LENGTH < LENGTH - 2
    read = [cells[1][column] for column in np.flatnonzero(inside)]
    assert read == [f"[{token}]" for token in ids[row[inside] + 2]]
    assert cells[1][int(np.flatnonzero(row % LENGTH == LENGTH - 1)[0])] == ""
    later = future_view(result, sequence=int(data["sequence"][-1]), first=4, tokens=3)
    assert len(later.data[0].x) == 3
    assert refused(RequestError, lambda: future_view(result, sequence=999)) == (
        "sequence 999 from position 0 was not kept; see result.data['sequence']"
    )


def test_result_table_and_figures(result, tmp_path):
    assert list(result.figures()) == ["precision", "gain", "calibration", "view"]
    assert len(result.table) == 1 * 2 * 3
    line = result.table.query("layer == 0 and horizon == 1").iloc[0]
    assert (line["method"], line["precision_1"], line["precision_2"]) == ("linear", 1, 1)
    again = wb.load_result(result.save(tmp_path / "future"))
    assert again.headline() == result.headline()
    for name, variable in result.data.variables.items():
        np.testing.assert_array_equal(again.data[name], variable)
    curves = {line.name: line.y for line in again.figure("precision").data}
    np.testing.assert_allclose(curves["t+2"], result.data["precision"].sel({"method": "linear", "horizon": 1, "k": 1}))
    np.testing.assert_allclose(curves["bigram baseline, t+2"], float(result.data["bigram_precision"][1]))
    (baseline,) = (line for line in again.figure("precision").data if line.name == "bigram baseline, t+2")
    for end, error, sign in (("low", "arrayminus", -1), ("high", "array", 1)):
        expected = float(result.data[f"bigram_precision_{end}"][1])
        np.testing.assert_allclose(baseline.y + sign * baseline.error_y[error], expected)
    np.testing.assert_array_equal(again.figure("view").data[0].text, result.figure("view").data[0].text)
    assert {line.name for line in again.figure("calibration").data} >= {"perfect calibration", "t+2, layer 0"}
