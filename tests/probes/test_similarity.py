"""Similarity of layers against direct formulas in numpy, planted representations, and its control."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import planted_store

import workbench as wb
from workbench.analysis.row_similarity import matching_rows, principal, subspace_overlap, svcca, unbiased_cka
from workbench.probes import Similarity
from workbench.testing import ProbeContract

ROWS = 120
DRAW = np.random.default_rng(0)
BASE = DRAW.normal(size=(ROWS, 6)) * [5, 4, 3, 2, 1, 0.5]
ROTATION = np.linalg.qr(DRAW.normal(size=(6, 6)))[0]
DOCUMENTS = [list(range(1 + 40 * n, 41 + 40 * n)) for n in range(3)]


class TestContract(ProbeContract):
    probe = Similarity
    settings = {"row_limit": 40, "subspace": 4}  # noqa: RUF012

    @pytest.fixture
    def store(self, llama_store):
        return llama_store


def store_of(path, *layers, documents=DOCUMENTS):
    sites = {f"resid_post.{layer}": values for layer, values in enumerate(layers)}
    return planted_store(path, documents, sites, n_layers=len(layers))


def centred(x):
    return torch.tensor(x - x.mean(0), dtype=torch.float32)


def hsic(x, y):
    """The U-statistic of Song et al. 2012, eq. 5, term by term."""
    n, ones = len(x), np.ones(len(x))
    k, m = (part @ part.T * (1 - np.eye(n)) for part in (x, y))
    terms = (
        np.trace(k @ m)
        + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (ones @ k @ m @ ones)
    )
    return terms / (n * (n - 3))


def test_unbiased_cka_is_the_formula():
    x, y = DRAW.normal(size=(40, 5)), DRAW.normal(size=(40, 9))
    y[:, :3] += x[:, :3]
    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    cka = unbiased_cka([centred(x)], [centred(y), centred(x)])
    np.testing.assert_allclose(cka, [[expected, 1]], rtol=1e-5)


def test_unbiased_cka_of_independent_rows_is_0_on_average_where_the_biased_one_is_not():
    draws = [[centred(DRAW.normal(size=(30, 60))) for _ in range(2)] for _ in range(200)]
    values = np.array([unbiased_cka([a], [b])[0, 0] for a, b in draws])
    biased = [float((a.T @ b).square().sum() / (a.T @ a).norm() / (b.T @ b).norm()) for a, b in draws]
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert np.mean(biased) > 0.5


def test_a_rotation_and_a_factor_change_no_measure_but_the_overlap(tmp_path):
    noise = DRAW.normal(size=BASE.shape)
    data = Similarity(where=None, subspace=2).run(store_of(tmp_path / "s", BASE, 7 * BASE @ ROTATION, noise)).data
    assert data["cka"].to_numpy()[0, :2] == pytest.approx([1, 1], abs=1e-5)
    assert data["svcca"].to_numpy()[0, :2] == pytest.approx([1, 1], abs=1e-5)
    assert abs(float(data["cka"][0, 2])) < 0.1
    assert abs(float(data["cka_shuffled"].max())) < 0.1
    directions = [np.linalg.svd(part - part.mean(0))[2][:2] for part in (BASE, BASE @ ROTATION)]
    expected = np.square(directions[0] @ directions[1].T).sum() / 2
    assert data["overlap"].to_numpy()[0, :2] == pytest.approx([1, expected], abs=1e-4)
    assert float(data["overlap_random"]) == pytest.approx(2 / 6)


def test_an_invertible_map_of_the_kept_directions_leaves_svcca_at_1_and_lowers_cka(tmp_path):
    data = Similarity(where=None, subspace=2).run(store_of(tmp_path / "s", BASE, BASE / BASE.std(0))).data
    assert float(data["svcca"][0, 1]) > 0.95
    assert float(data["cka"][0, 1]) < 0.75


@pytest.mark.parametrize("shape", [(50, 8), (20, 40)])
def test_principal_directions_are_numpys(shape):
    x = centred(DRAW.normal(size=shape) * np.linspace(3, 1, shape[1]))
    u, s, v = np.linalg.svd(x.double().numpy(), full_matrices=False)
    directions = principal(x, 0.9, 3)
    share = np.cumsum(s**2) / np.sum(s**2)
    assert directions.kept == min(int((share < 0.9).sum()) + 1, shape[0] // 10)
    number = directions.scores.shape[1]
    np.testing.assert_allclose(np.abs(np.diag(u[:, :number].T @ directions.scores.numpy())), 1, atol=1e-6)
    np.testing.assert_allclose(np.abs(np.diag(v[:number] @ directions.directions.numpy())), 1, atol=1e-6)


def test_svcca_is_the_mean_canonical_correlation():
    a, b = DRAW.normal(size=(200, 3)), DRAW.normal(size=(200, 4))
    b[:, 0] += 2 * a[:, 0]
    first, second = (principal(centred(part), 1.0, 1) for part in (a, b))
    qa, qb = (np.linalg.qr(part - part.mean(0))[0] for part in (a, b))
    assert svcca(first, second) == pytest.approx(np.linalg.svd(qa.T @ qb)[1].mean(), abs=1e-6)
    order = DRAW.permutation(200)
    assert svcca(first, second, order) == pytest.approx(np.linalg.svd(qa.T @ qb[order])[1].mean(), abs=1e-6)


def test_other_widths_have_no_overlap():
    wide = DRAW.normal(size=(50, 8))
    first, second = principal(centred(wide), 0.9, 2), principal(centred(wide[:, :5]), 0.9, 2)
    assert np.isnan(subspace_overlap(first, second, 2))
    assert subspace_overlap(first, first, 2) == pytest.approx(1)


def test_a_second_store_of_another_width_matches_its_layers(tmp_path):
    noise = DRAW.normal(size=BASE.shape)
    store_of(tmp_path / "b", noise, np.hstack([BASE @ ROTATION, 0 * BASE]))
    result = Similarity(where=None, other=str(tmp_path / "b")).run(store_of(tmp_path / "a", BASE))
    assert result.data["cka"].to_numpy() == pytest.approx(np.array([[0, 1]]), abs=0.1)
    assert "(0 with 1)" in result.headline()
    assert result.data["overlap"].isnull().all()
    assert list(result.figures()) == ["cka", "svcca"]


def test_rows_of_two_tokenizers_match_at_the_same_characters(tmp_path):
    texts = ["one two three four five six seven eight", "nine ten eleven twelve and so on"]
    a = wb.record(wb.load_model("demo"), texts, sites=["resid_post.0"], out=tmp_path / "a", show_progress=False)
    rows, partners = matching_rows(a, a, a.where("position > 1").ids)
    assert rows.tolist() == partners.tolist()
    assert len(rows) == int((~a.where("position > 1").tokens["is_special"].to_numpy()).sum())
    b = wb.record(wb.load_model("demo"), texts[::-1], sites=["resid_post.0"], out=tmp_path / "b", show_progress=False)
    with pytest.raises(wb.RequestError, match="a and b hold different texts"):
        matching_rows(a, b, np.arange(a.rows))


def test_settings_choose_the_rows(tmp_path):
    massive = BASE.copy()
    massive[::40] = 1e4 * np.eye(6)[0]  # first tokens
    store = store_of(tmp_path / "s", massive, np.where(massive > 100, massive, DRAW.normal(size=BASE.shape)))
    with_first, without = (Similarity(where=where).run(store).data for where in (None, "position > 0"))
    assert float(with_first["cka"][0, 1]) > 0.99
    assert float(without["cka"][0, 1]) < 0.2
    assert (int(with_first["rows"]), int(without["rows"])) == (120, 117)
    assert int(Similarity(row_limit=50).run(store).data["rows"]) == 50
    results = [
        Similarity(where=None, variance=share).run(store_of(tmp_path / f"{share}", BASE)).data for share in (0.5, 1.0)
    ]
    assert [int(data["kept"][0]) for data in results] == [2, 6]


def test_refusals_say_what_to_do(tmp_path):
    store = store_of(tmp_path / "s", BASE, 0 * BASE)
    with pytest.raises(wb.RequestError, match=r"resid_post\.1 is the same for all 117 tokens"):
        Similarity().run(store)
    with pytest.raises(wb.RequestError, match="3 tokens are selected; similarity needs 20 or more"):
        Similarity(where="position = 0").run(store)
    with pytest.raises(wb.RequestError, match="row_limit"):
        Similarity(row_limit=10)
