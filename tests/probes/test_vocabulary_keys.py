"""Vocabulary keys on planted clusters, random keys, and the ratio of next tokens at equal rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import linear_unembed, planted_store

import workbench as wb
from workbench.probes import VocabularyKeys
from workbench.probes.vocabulary_keys import _ratio, in_main, k_means
from workbench.testing import ProbeContract

WIDTH, CLUSTERS, SIZE = 24, 16, 30
DRAW = np.random.default_rng(0)


def clustered_keys(noise=0.05):
    centres = np.linalg.qr(DRAW.normal(size=(WIDTH, WIDTH)))[0][:CLUSTERS]
    keys = np.repeat(centres, SIZE, 0) + noise * DRAW.normal(size=(CLUSTERS * SIZE, WIDTH)) / np.sqrt(WIDTH)
    return keys, centres


def store_of(path, keys, states):
    documents = np.split(DRAW.integers(len(keys), size=len(states)), 8)
    return planted_store(path, [ids.tolist() for ids in documents], {"resid_post.0": states}, linear_unembed(keys))


class TestContract(ProbeContract):
    probe = VocabularyKeys
    settings = {"row_limit": 20, "clusters": 8, "seeds": 1}  # noqa: RUF012

    @pytest.fixture
    def store(self, llama_store):
        return llama_store


def test_a_state_at_a_centre_has_its_cluster_first(tmp_path):
    keys, centres = clustered_keys()
    states = centres[DRAW.integers(CLUSTERS, size=160)]
    data = VocabularyKeys(where=None, clusters=CLUSTERS).run(store_of(tmp_path / "s", keys, states)).data
    share = data["share_main"].sel(rank=slice(11, 100)).to_numpy()
    assert share[: SIZE - 10].min() > 0.95
    assert share[SIZE:].mean() < 0.3
    assert float(data["share_permuted"].mean()) > share[SIZE:].mean()
    assert data["share_main"].sel(rank=slice(2, 10)).isnull().all()


def test_random_keys_and_states_equal_the_permutation(tmp_path):
    keys = DRAW.normal(size=(1000, 400))  # in few dimensions, keys near a state are near each other
    states = DRAW.normal(size=(400, 400))
    data = VocabularyKeys(where=None, clusters=20).run(store_of(tmp_path / "s", keys, states)).data
    assert float(data["share_main"].mean()) == pytest.approx(float(data["share_permuted"].mean()), abs=0.06)
    assert abs(float(data["spearman"])) < 0.1
    assert abs(float(data["cosine_random"])) < 0.02


def test_next_tokens_are_compared_at_equal_rank():
    """Hits depend on the rank alone, and so does the share in main clusters: the crude ratio is far from 1."""
    draw = np.random.default_rng(1)
    p = np.geomspace(0.2, 0.002, 90)
    main = draw.random((20_000, 90)) < np.linspace(0.9, 0.1, 90)
    hits = draw.random((20_000, 90)) < p
    documents = np.repeat(np.arange(100), 200)
    ratio, low, high = _ratio(main, hits, documents, seed=0)
    assert hits[main].mean() / hits[~main].mean() > 2
    assert ratio == pytest.approx(1, abs=0.05)
    assert low < 1 < high
    doubled = draw.random((20_000, 90)) < p * np.where(main, 2, 1)
    assert _ratio(main, doubled, documents, seed=0)[0] == pytest.approx(2, abs=0.1)


def test_main_clusters_are_those_of_the_first_ten():
    labels = np.array([0] * 10 + [1] * 5 + [2] * 200)
    ranked = np.concatenate([np.arange(9), [10], np.arange(11, 14), np.arange(100, 187)])[None]
    assert in_main(ranked, labels)[0].tolist() == [True] * 3 + [False] * 87


@pytest.mark.parametrize("unit", [False, True])
def test_k_means_finds_planted_clusters_and_leaves_none_empty(unit):
    keys, _ = clustered_keys(0.02)
    if unit:
        keys = keys * DRAW.uniform(0.2, 5, (len(keys), 1))
    labels = k_means(torch.tensor(keys), CLUSTERS, seed=0, rounds=40, unit=unit)
    assert len(set(labels)) == CLUSTERS
    truth = np.repeat(np.arange(CLUSTERS), SIZE)
    best = sum(np.bincount(truth[labels == cluster]).max() for cluster in range(CLUSTERS))
    assert best > 0.8 * len(keys)


def test_k_means_ends_where_no_row_changes_and_assigns_the_nearest_centre():
    points = torch.tensor(DRAW.normal(size=(300, 3)), dtype=torch.float32)
    labels = k_means(points, 5, seed=1, rounds=200)
    centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(5)])
    np.testing.assert_array_equal(torch.cdist(points, centres).argmin(1), labels)


def test_settings_choose_clusters_rows_and_seeds(tmp_path):
    keys, centres = clustered_keys()
    store = store_of(tmp_path / "s", keys, centres[DRAW.integers(CLUSTERS, size=160)])
    data = VocabularyKeys(seeds=1).run(store).data
    assert (int(data["clusters"]), int(data["rows"]), float(data["seed_spread"])) == (15, 152, 0.0)
    few = VocabularyKeys(clusters=4, row_limit=40, seeds=3, unit=True).run(store).data
    assert (int(few["clusters"]), int(few["rows"])) == (4, 40)
    assert float(few["seed_spread"]) > 0


def test_refusals_say_what_to_do(tmp_path):
    small = store_of(tmp_path / "s", DRAW.normal(size=(150, 8)), DRAW.normal(size=(40, 8)))
    with pytest.raises(wb.RequestError, match="150 tokens has too few ranks"):
        VocabularyKeys().run(small)
    (tmp_path / "other").mkdir()  # stores of one model in one folder share its unembedding
    keys, centres = clustered_keys()
    with pytest.raises(wb.RequestError, match="clusters=481 of 480 tokens"):
        VocabularyKeys(clusters=481).run(store_of(tmp_path / "other" / "s", keys, centres[[0] * 40]))


def test_a_headline_without_hits_or_intervals_has_no_nan(tmp_path):
    keys, centres = clustered_keys()
    states = np.tile(centres[0], (8, 1))
    ids = [[SIZE * 3 + number for number in range(8)]]  # next tokens of another cluster, ranked behind 100
    store = planted_store(tmp_path / "s", ids, {"resid_post.0": states}, linear_unembed(keys))
    headline = VocabularyKeys(where=None, clusters=CLUSTERS, seeds=1).run(store).headline()
    assert "nan" not in headline
    assert "no candidate of ranks 11 to 100 is the next token" in headline


def test_last_tokens_have_no_next_token_and_are_ranked_all_the_same(tmp_path):
    keys, centres = clustered_keys()
    ids = [[SIZE * 3 + number] for number in range(8)]
    store = planted_store(tmp_path / "s", ids, {"resid_post.0": np.tile(centres[0], (8, 1))}, linear_unembed(keys))
    result = VocabularyKeys(where=None, clusters=CLUSTERS, seeds=1).run(store)
    assert np.isnan(float(result.data["next_ratio"]))
    assert not np.isnan(float(result.data["mean_share"]))
    assert "nan" not in result.headline()


def test_curves_by_rank_have_intervals_over_documents(tmp_path):
    keys, centres = clustered_keys()
    states = centres[DRAW.integers(CLUSTERS, size=160)]
    result = VocabularyKeys(where=None, clusters=CLUSTERS, seeds=1).run(store_of(tmp_path / "s", keys, states))
    data, drawn = result.data, result.figures()
    for name, figure in (("share_main", drawn["share"]), ("cosine", drawn["cosine"])):
        low, mean, high = (data[f"{name}{end}"].to_numpy() for end in ("_low", "", "_high"))
        known = ~np.isnan(mean)
        assert (low[known] <= mean[known] + 1e-9).all()
        assert (mean[known] <= high[known] + 1e-9).all()
        band, line, _ = figure.data
        np.testing.assert_allclose(line.y - line.error_y.arrayminus, low[known])
        assert band.meta == {"decoration": "band"}
        assert "band: 95 % CI over documents" in figure.layout.title.subtitle.text
    lost = [f"{name}_{end}" for name in ("share_main", "cosine") for end in ("low", "high")]
    old = replace(result, data=data.drop_vars(lost)).figures()
    assert [len(figure.data) for figure in old.values()] == [2, 2]
    assert not any("95 %" in figure.layout.title.subtitle.text for figure in old.values())
