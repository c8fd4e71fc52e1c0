"""The law of next-token prediction: planted residuals, noise, and least squares by numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import linear_unembed, planted_store
from refusals import refused

from workbench.analysis.least_squares import FoldedLeastSquares
from workbench.io.errors import RequestError
from workbench.probes import NextTokenLaw
from workbench.testing import ProbeContract

VOCAB, DOCUMENTS, LENGTH = 50, 20, 41


def run(store, **settings):
    return NextTokenLaw(**{"where": None, "shuffles": 3, "norm": "none", "device": "cpu", **settings}).run(store)


def documents(seed=0, length=LENGTH, number=DOCUMENTS):
    return np.random.default_rng(seed).integers(0, VOCAB, (number, length)).tolist()


def followers(ids):
    """Row numbers that have a next token, and its id."""
    flat = np.concatenate(ids)
    has = np.concatenate([np.arange(len(sequence)) < len(sequence) - 1 for sequence in ids])
    rows = np.flatnonzero(has)
    return rows, flat[rows + 1]


def law_store(path, ids, residuals):
    """Layers of one dimension that leave exactly these shares of the variance of the next token's id."""
    rows, targets = followers(ids)
    y = (targets - targets.mean()) / targets.std()
    noise = np.random.default_rng(1).normal(size=len(y))
    noise -= noise.mean() + (noise @ y) / (y @ y) * y
    noise /= noise.std()
    sites = {}
    for layer, residual in enumerate(residuals):
        states = np.zeros((sum(map(len, ids)), 1))
        states[rows, 0] = y + np.sqrt(residual / (1 - residual)) * noise
        sites[f"resid_post.{layer}"] = states
    return planted_store(path, ids, sites, linear_unembed(np.ones((VOCAB, 1))), dtype="float32")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Each layer leaves 0.8 of what the one before it left."""
    return law_store(tmp_path_factory.mktemp("law") / "s", documents(), [0.9 * 0.8**layer for layer in range(6)])


class TestContract(ProbeContract):
    probe = NextTokenLaw
    settings = {"shuffles": 2, "where": None, "norm": "none", "device": "cpu"}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted):
        return planted


def test_a_planted_law_is_recovered(planted):
    data = run(planted).data
    np.testing.assert_allclose(data["residual"], [0.9, 0.72, 0.576, 0.4608, 0.36864, 0.294912], atol=1e-6)
    assert float(data["slope"]) == pytest.approx(-0.0969100, abs=1e-6)
    assert float(data["rho"]) == pytest.approx(0.8, abs=1e-6)
    assert float(data["pearson"]) == pytest.approx(-1)
    assert float(data["slope_low"]) < float(data["slope"]) < float(data["slope_high"])
    assert float(data["slope_heldout"]) == pytest.approx(-0.0969, abs=2e-3)
    assert (data["residual_shuffled"] > 0.95).all()
    assert int(data["rows"]) == DOCUMENTS * (LENGTH - 1)
    assert NextTokenLaw.headline(run(planted)).startswith(
        "Residual of a linear map to the next token's id: 0.90 at layer 0, 0.29 at layer 5"
    )


def test_an_exact_fit_has_no_law(tmp_path):
    data = run(law_store(tmp_path / "s", documents(), [0.5, 0.2, 0.0])).data
    assert float(data["residual"][2]) < 1e-9
    assert np.isnan(float(data["slope"]))
    assert "no slope: a layer leaves nothing, which has no logarithm" in data.attrs["note"]


def test_a_single_layer_has_no_line(tmp_path):
    result = run(law_store(tmp_path / "s", documents(), [0.5]))
    assert "nan" not in result.headline()
    assert result.headline().startswith("Residual of a linear map to the next token's id: 0.5")
    assert "nan" not in result.figure("law").layout.title.subtitle.text


def test_a_single_document_has_none_held_out(tmp_path):
    result = run(law_store(tmp_path / "s", documents(number=1), [0.5, 0.4]))
    assert "(none held out)" in result.headline()
    assert "nan" not in result.headline()


def test_noise_fits_in_sample_and_not_on_other_documents(tmp_path):
    ids, d_model = documents(number=50), 100
    states = np.random.default_rng(2).normal(size=(50 * LENGTH, d_model))
    store = planted_store(tmp_path / "s", ids, {"resid_post.0": states}, linear_unembed(np.ones((VOCAB, d_model))))
    data = run(store).data
    assert float(data["noise"]) == pytest.approx(1 - 100 / 1999)
    assert float(data["residual"][0]) == pytest.approx(float(data["noise"]), abs=0.02)
    assert float(data["residual_heldout"][0]) > 1
    text = refused(RequestError, lambda: run(store, rows_per_dimension=21))
    assert text.startswith("2,000 tokens are too few for maps of 100 dimensions, which need 2,100; ")


def test_residuals_are_those_of_numpy(tmp_path):
    """In sample and held out, with the norm of the model's kind, against lstsq in float64."""
    ids, d_model = documents(number=10), 6
    draw = np.random.default_rng(3)
    states = draw.normal(size=(10 * LENGTH, d_model)) * 3 + 1
    rows, targets = followers(ids)
    states[rows, 2] += 0.2 * targets
    states = states.astype(np.float32)
    unembed = linear_unembed(np.ones((VOCAB, d_model)))
    unembed = type(unembed)(**{**vars(unembed), "norm": "layer", "eps": 1e-5, "gain": 7 * unembed.gain})
    store = planted_store(tmp_path / "s", ids, {"resid_post.0": states}, unembed)
    data = run(store, norm="final", folds=10, rows_per_dimension=1).data
    x = states[rows].astype(float)
    x = x - x.mean(1, keepdims=True)
    x = np.column_stack([x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5), np.ones(len(x))])
    y = (targets - targets.mean()) / targets.std()
    expected = np.mean((y - x @ np.linalg.lstsq(x, y, rcond=1e-10)[0]) ** 2)
    assert float(data["residual"][0]) == pytest.approx(expected, abs=1e-7)
    document, squares = np.repeat(np.arange(10), LENGTH)[rows], 0.0
    for fold in range(10):
        inside = document != fold
        fit = np.linalg.lstsq(x[inside], y[inside], rcond=1e-10)[0]
        squares += ((y[~inside] - x[~inside] @ fit) ** 2).sum()
    assert float(data["residual_heldout"][0]) == pytest.approx(squares / len(y), abs=1e-6)


def test_other_targets(tmp_path):
    """A state that is the row's own id predicts offset 0 and nothing else."""
    ids = documents()
    id_values = np.concatenate(ids)[:, None].astype(float)
    store = planted_store(tmp_path / "s", ids, {"resid_post.0": id_values}, linear_unembed(np.ones((VOCAB, 1))))
    residuals = [float(run(store, offset=offset).data["residual"][0]) for offset in (-1, 0, 1)]
    assert residuals[1] < 1e-9
    assert min(residuals[0], residuals[2]) > 0.98


def test_one_document_has_no_held_out_residual(tmp_path):
    data = run(law_store(tmp_path / "s", documents(number=1), [0.5, 0.4, 0.3])).data
    assert data["residual_heldout"].isnull().all()
    assert np.isnan(float(data["slope_low"]))
    assert "held-out residuals over 1 document" in data.attrs["note"]


def test_folds_are_whatever_their_order():
    draw = np.random.default_rng(4)
    x, y = draw.normal(size=(60, 5)), draw.normal(size=(60, 2))
    sums = []
    for order in (range(3), reversed(range(3))):
        fits = FoldedLeastSquares(5, 2, 3)
        for fold in order:
            fits.add(fold, torch.tensor(x[fold::3]), torch.tensor(y[fold::3]))
        sums.append(np.concatenate([fits.in_sample(), fits.in_sample(1), fits.held_out()]))
    np.testing.assert_allclose(sums[0], sums[1])
    design = np.column_stack([x, np.ones(60)])
    keep = np.arange(60) % 3 != 1
    residual = y[keep] - design[keep] @ np.linalg.lstsq(design[keep], y[keep], rcond=None)[0]
    np.testing.assert_allclose(sums[0][2:4], (residual**2).sum(0), rtol=1e-9)
