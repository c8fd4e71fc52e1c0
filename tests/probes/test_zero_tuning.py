"""ZeroTuning: planted weights, an edit after an eager softmax, temperatures, and what is tuned."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
from change_oracles import eager, edited_softmax, scaled
from refusals import refused

import workbench as wb
from workbench.analysis.change_effects import MeasuredRows
from workbench.analysis.first_key import scaled_entropy, scaled_first, temperature_curve
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import ZeroTuning
from workbench.testing import ProbeContract

IDS = [list(range(5, 15)), list(range(40, 52)), [20, 31, 22, 80], [30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return Model(tiny_models["llama"], None, "tiny-llama")


@pytest.fixture(scope="module")
def tiny_store(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero") / "s"
    return wb.record(tiny, IDS, sites=["pattern"], out=out, dtype="float32", show_progress=False)


class TestContract(ProbeContract):
    probe = ZeroTuning
    settings = {"gammas": (0.0, 1.0, 2.0), "resamples": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, tiny_store):
        return tiny_store

    @pytest.fixture
    def model(self, tiny):
        return tiny

    def test_gamma_1_is_the_model_and_the_tuned_layers_are_those_of_the_common_kind(self, result):
        data = result.data
        for name in ("loss", "entropy", "kl", "agreement", "loss_temperature"):
            assert float(np.abs(data[name].sel(gamma=1)).max()) == 0
        up, down = data["loss_up"].to_numpy()[:, 0], data["loss_down"].to_numpy()[:, 0]
        tuned = np.unique(data["tuned"].to_numpy(), axis=1)
        assert tuned.shape == (3, 1)  # all heads of a layer together
        ups = up < down
        common = ups.mean() >= 0.5
        assert all(ups[layer] == common for layer in np.flatnonzero(tuned[:, 0]))


@pytest.mark.parametrize(
    ("gamma", "weights", "entropy"),
    [(2.0, (0.6667, 0.2, 0.1333), 0.8609), (0.5, (0.3333, 0.4, 0.2667), 1.0852), (1.0, (0.5, 0.3, 0.2), 1.0297)],
)
def test_the_closed_form_gives_the_planted_weights_and_entropies(gamma, weights, entropy):
    a = np.array([0.5, 0.3, 0.2])
    before = np.array([-(a * np.log(a)).sum()])
    first = scaled_first(a[:1], gamma)
    rest = a[1:] / ((gamma - 1) * a[0] + 1)
    assert [*first, *rest] == pytest.approx(weights, abs=1e-4)
    assert scaled_entropy(a[:1], before, gamma) == pytest.approx(entropy, abs=1e-4)
    pure = np.array([0.0, 1.0])
    assert scaled_entropy(pure, np.zeros(2), 2.0).tolist() == [0, 0]
    assert scaled_first(pure, gamma).tolist() == [0, 1]


def test_the_sweep_equals_weights_edited_after_an_eager_softmax(tiny, tiny_store):
    """One layer alone, by its profile; `measured` are both halves."""
    probe = ZeroTuning(gammas=(1.0, 2.0), resamples=2)
    rows = np.flatnonzero(tiny_store.tokens["position"].to_numpy() > 0)
    rows = rows[np.append(np.diff(tiny_store.tokens["sequence"].to_numpy()) == 0, False)[rows]]
    up, down, _ = probe._profiled(tiny, MeasuredRows(tiny_store, {"all": rows}), {1: 4}, 4)
    module = eager(tiny.module)

    def loss(gamma):
        values = []
        for ids in IDS:
            with torch.no_grad(), edited_softmax(1, scaled(gamma, range(4), [0], slice(None))):
                log = module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            values += [-float(log[at, ids[at + 1]]) for at in range(1, len(ids) - 1)]
        return np.mean(values)

    assert up[0] == pytest.approx([loss(2) - loss(1)] * 4, abs=1e-5)
    assert down[0] == pytest.approx([loss(0.5) - loss(1)] * 4, abs=1e-5)


def test_temperatures_are_those_of_scipy(tiny, tiny_store):
    curve = temperature_curve(tiny, MeasuredRows(tiny_store, {"all": np.array([1, 2])}), (0.5, 1.0, 2.0))
    with torch.no_grad():
        logits = tiny.module(torch.tensor([IDS[0]])).logits[0, 1:3].double().numpy()
    for line, temperature in zip(curve, (0.5, 1.0, 2.0), strict=True):
        log = scipy.special.log_softmax(logits / temperature, axis=1)
        assert line[0] == pytest.approx(-np.mean([log[0, IDS[0][2]], log[1, IDS[0][3]]]), abs=1e-5)
        assert line[2] == pytest.approx(-(np.exp(log) * log).sum(1).mean(), abs=1e-5)


def test_settings_that_say_nothing_are_refused(tiny, tiny_store, tmp_path):
    assert "gammas" in refused(RequestError, lambda: ZeroTuning(gammas=(-1.0,)))
    assert "profile" in refused(RequestError, lambda: ZeroTuning(profile="all"))
    bare = wb.record(tiny, IDS, sites=["resid_post.0"], out=tmp_path / "s", show_progress=False)
    assert "attn_first" in refused(RequestError, lambda: ZeroTuning().run(bare, model=tiny))
