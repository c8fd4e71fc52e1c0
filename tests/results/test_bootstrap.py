"""Means with intervals by document, against resampling written out, and the division of documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from refusals import refused

from workbench.analysis.rows import split_by_document
from workbench.io.errors import RequestError
from workbench.results import bootstrap
from workbench.results.bootstrap import (
    binned_ends,
    central,
    clustered_ends,
    clustered_interval,
    clustered_means,
    group_means,
    intervals,
    resampled_means,
)


def test_means_leave_out_nan_and_columns_are_apart():
    values = np.array([[1.0, math.nan], [3.0, 5.0], [8.0, 7.0]])
    mean, drawn = clustered_means(values, np.array(["a", "a", "b"]), resamples=10)
    assert mean.tolist() == [4, 6]
    assert drawn.shape == (10, 2)
    assert set(map(tuple, drawn.tolist())) <= {(2.0, 5.0), (8.0, 7.0), (4.0, 6.0)}  # a twice, b twice, one of each


def test_the_interval_is_that_of_documents_not_of_tokens():
    """Ten documents of equal tokens: the error is sigma / sqrt(10), however many tokens there are."""
    draw = np.random.default_rng(0)
    level = draw.normal(size=10)
    values, document = np.repeat(level, 200), np.repeat(np.arange(10), 200)
    interval = clustered_interval(values, document, resamples=4000)
    student = scipy.stats.t(9, level.mean(), level.std(ddof=1) / np.sqrt(10))
    assert interval.mean == pytest.approx(level.mean())
    assert (interval.low, interval.high) == pytest.approx(student.interval(0.95), abs=0.06)
    tokens = clustered_interval(values, np.arange(2000), resamples=500)
    assert tokens.high - tokens.low < (interval.high - interval.low) / 5


def tails(clusters: int) -> list[float]:
    """Levels of the expanded percentile interval of Hesterberg 2015."""
    tail = scipy.stats.norm.cdf(-math.sqrt(clusters / (clusters - 1)) * scipy.stats.t.ppf(0.975, clusters - 1))
    return [tail, 1 - tail]


def test_ends_of_several_statistics_are_those_of_each_alone():
    draw = np.random.default_rng(0)
    values, document = draw.normal(size=(40, 2, 3)), draw.integers(7, size=40)
    low, high = clustered_ends(values, document, resamples=50, seed=2)
    assert low.shape == high.shape == (2, 3)
    for at in np.ndindex(2, 3):
        interval = clustered_interval(values[:, *at], document, resamples=50, seed=2)
        drawn = clustered_means(values[:, *at, None], document, resamples=50, seed=2)[1][:, 0]
        assert (low[at], high[at]) == pytest.approx(tuple(np.quantile(drawn, tails(7))))
        assert low[at] < interval.mean < high[at]
    assert np.isnan(clustered_ends(values, np.zeros(40), resamples=50)).all()  # one document
    assert np.isnan(clustered_ends(values[:0], document[:0], resamples=50)).all()  # no row


def test_ends_of_bins_are_those_of_the_rows_of_each_bin():
    draw = np.random.default_rng(1)
    values, bins, document = draw.normal(size=60), draw.integers(3, size=60), draw.integers(8, size=60)
    low, high = binned_ends(values, bins, document, resamples=400)
    for place in range(3):
        rows = np.where(bins == place, values, np.nan)[:, None]
        number = len(np.unique(document[bins == place]))
        ends = np.nanquantile(clustered_means(rows, document, resamples=400)[1], tails(number))
        assert (low[place], high[place]) == pytest.approx(tuple(ends))


def test_long_documents_weigh_more():
    values = np.array([0.0] * 9 + [1.0])
    assert clustered_interval(values, np.array([0] * 9 + [1])).mean == pytest.approx(0.1)


def test_seed_and_resamples():
    values, document = np.random.default_rng(0).normal(size=40), np.arange(40) // 2
    once, again, of_another_seed = (clustered_interval(values, document, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert once != of_another_seed
    assert (
        clustered_interval(values, document, resamples=1).low == clustered_interval(values, document, resamples=1).high
    )


def test_a_column_of_one_cluster_has_no_interval_beside_one_of_two():
    values = np.array([[1.0, 1.0], [3.0, 2.0], [8.0, math.nan]])
    mean, drawn = clustered_means(values, np.array(["a", "a", "b"]), resamples=20)
    assert mean.tolist() == [4, 1.5]
    assert np.isnan(drawn[:, 1]).all()
    assert not np.isnan(drawn[:, 0]).any()


def test_groups_of_one_document_take_no_part_in_the_gap():
    """Means 0, 5, 9 and 100; the last group is one document, however many rows it has."""
    group = np.repeat([0, 1, 2, 3], 4)
    values = np.repeat([0.0, 5.0, 9.0, 100.0], 4)[:, None]
    document = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6])
    means = group_means(values, group, 4, document, resamples=20)
    assert means.clusters.tolist() == [2, 2, 2, 1]
    assert (means.most.tolist(), means.least.tolist(), means.gap.tolist()) == ([2], [0], [9])
    assert np.isnan(means.low[3]).all()
    alone = group_means(values[8:], group[8:] - 2, 2, document[8:], resamples=20)
    assert (alone.most.tolist(), alone.least.tolist()) == ([-1], [-1])
    assert np.isnan([alone.gap, alone.gap_low, alone.gap_high]).all()


def test_nothing_gives_nan():
    interval = clustered_interval(np.full(3, math.nan), np.arange(3), resamples=5)
    assert all(map(math.isnan, interval))
    assert all(map(math.isnan, clustered_interval(np.empty(0), np.empty(0, int), resamples=5)))
    assert central([math.nan, 2.0]) == (2.0, 2.0)


def test_documents_are_in_one_part_each():
    documents = np.random.default_rng(0).integers(0, 20, 500)
    training, validation, tested = split_by_document(documents, 0.3, purpose="a test")
    assert (training.astype(int) + validation + tested == 1).all()
    parts = [set(documents[part]) for part in (training, validation, tested)]
    assert [len(part) for part in parts] == [11, 3, 6]
    assert not parts[0] & parts[1] | parts[1] & parts[2] | parts[0] & parts[2]
    assert set(documents[split_by_document(documents, 0.3, purpose="a test", seed=1)[2]]) != parts[2]


def test_too_few_documents_are_refused():
    assert refused(RequestError, lambda: split_by_document(np.array([0, 1]), 0.2, purpose="a test")) == (
        "store has 2 documents among the selected tokens; a test needs three or more, "
        "to train on, to stop by and to read"
    )


def test_resamples_in_several_parts_are_those_in_one(monkeypatch):
    totals = np.random.default_rng(0).normal(size=(7, 3))
    mean, drawn = bootstrap.resampled_means(totals, np.ones_like(totals), resamples=50)
    monkeypatch.setattr(bootstrap, "_DRAWS", 20)
    again, parts = bootstrap.resampled_means(totals, np.ones_like(totals), resamples=50)
    assert np.array_equal(mean, again)
    np.testing.assert_allclose(parts, drawn, rtol=1e-12)


@pytest.mark.parametrize(("pairs", "before", "after"), [(5, 0.13, 0.1), (8, 0.095, 0.065), (12, 0.075, 0.06)])
def test_intervals_of_few_clusters_cover_the_null_as_often_as_they_state(pairs, before, after):
    """Effects without a mean, over gaps that differ: percentiles miss 0 too often, those for the number do not."""
    draw = np.random.default_rng(pairs)
    gaps = draw.uniform(5, 15, size=(pairs, 1))
    effects = draw.normal(size=(pairs, 4000)) * gaps
    _, resampled = resampled_means(effects, np.broadcast_to(gaps, effects.shape), resamples=1000)
    missed = []
    for clusters in (None, np.full(4000, pairs)):
        low, high = intervals(resampled, clusters)
        missed.append(float(((low > 0) | (high < 0)).mean()))
    assert missed[0] > before
    assert 0.04 < missed[1] < after
    assert central(resampled[:, 0], 10**6) == pytest.approx(central(resampled[:, 0]), abs=1e-3)
