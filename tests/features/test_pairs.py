"""Counts of all pairs of features against dense NumPy."""

import numpy as np
import pytest
from command_line import run
from refusals import refused

import workbench as wb
from workbench.features import index, pairs
from workbench.figures.feature_questions import pairs_figure
from workbench.io.errors import RequestError


@pytest.mark.parametrize("by", ["jaccard", "pmi", "both"])
@pytest.mark.parametrize("small", [False, True])
def test_pairs_equal_dense_numpy(by, small, features, monkeypatch):
    if small:  # several groups of features, several blocks of rows
        monkeypatch.setattr(pairs, "_BYTES", 4 * 20 * 3)
        monkeypatch.setattr(index, "ENTRIES", 20)
    text = ~features.store.tokens["is_special"].to_numpy(zero_copy_only=False)
    active = (features[:].toarray() != 0)[text].astype(int)
    joint_counts, counts, rows = active.T @ active, active.sum(0), len(active)
    table = wb.coactive_pairs(features, least=2, k=30, by=by, show_progress=False)
    first, second = np.nonzero(np.triu(joint_counts, 1) >= 2)
    assert table.attrs["pairs"] == len(first)
    expected = counts[first] * counts[second] / rows
    order = {
        "jaccard": joint_counts[first, second] / (counts[first] + counts[second] - joint_counts[first, second]),
        "pmi": np.log(joint_counts[first, second] / expected),
        "both": joint_counts[first, second],
    }
    best = np.lexsort((second, first, -order[by]))[:30]
    assert table[["feature", "other"]].to_numpy().tolist() == np.stack([first, second], axis=1)[best].tolist()
    for name, values in (order | {"expected": expected, "lift": joint_counts[first, second] / expected}).items():
        np.testing.assert_allclose(table[name], values[best], rtol=1e-12)
    chance = expected[best] / (counts[first] + counts[second] - expected)[best]
    np.testing.assert_allclose(table["jaccard_expected"], chance, rtol=1e-12)


def test_a_pair_is_that_of_coactivation(features):
    table = wb.coactive_pairs(features, least=1, k=10_000, show_progress=False)
    number = int(table["feature"].mode()[0])
    single = wb.coactivation(features, number).set_index("feature")
    lines = table[(table["feature"] == number) | (table["other"] == number)]
    partner = np.where(lines["feature"] == number, lines["other"], lines["feature"])
    np.testing.assert_allclose(lines["jaccard"], single.loc[partner, "jaccard"])
    assert len(lines) == len(single)


def test_no_pair_and_wrong_settings(features):
    table = wb.coactive_pairs(features, least=1000, show_progress=False)
    assert (len(table), table.attrs["pairs"]) == (0, 0)
    assert list(table.columns)[:2] == ["feature", "other"]
    assert refused(RequestError, lambda: wb.coactive_pairs(features, by="lift")) == (
        "by must be one of jaccard, pmi, both, not 'lift'"
    )
    assert "least must be a whole number, at least 1" in refused(
        RequestError, lambda: wb.coactive_pairs(features, least=0)
    )


def test_pairs_are_drawn_and_printed(features, tmp_path):
    table = wb.coactive_pairs(features, least=2, k=12, show_progress=False)
    heat = pairs_figure(table).data[0]
    row, column = list(heat.y).index(str(table["feature"][0])), list(heat.x).index(str(table["other"][0]))
    assert heat.z[row][column] == heat.z[column][row] == table["jaccard"][0]
    assert np.isfinite(heat.z).sum() == 2 * 12
    out = tmp_path / "out"
    code, text, err = run("coactive", str(features.path), "--least", "2", "--k", "12", "--out", str(out))
    assert (code, err) == (0, "")
    assert f"12 of {table.attrs['pairs']:,} pairs" in text
    assert {path.name for path in out.iterdir()} == {"pairs.csv", "figure"}
