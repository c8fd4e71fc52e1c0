"""Matching and splitting of features against dense NumPy, a permuted SAE and planted parts."""

import numpy as np
import pytest
from command_line import run
from features_example import SEGMENTS, SITE, TRAINED, extracted, loaded
from refusals import refused
from sae_example import save_sae, set_weights
from safetensors.numpy import load_file
from scipy.optimize import linear_sum_assignment
from store_example import write_store
from warned import warned

import workbench as wb
from workbench.features import index, matching
from workbench.io.errors import DataError, RequestError
from workbench.store.reader import open_store


@pytest.fixture(scope="module")
def second_extraction(example, tmp_path_factory):
    """Another SAE's features of the same store, and that SAE."""
    folder = tmp_path_factory.mktemp("other")
    sae = loaded(folder / "sae", "jumprelu", d_sae=26, seed=5)
    return extracted(example, sae, out=folder / "features"), sae


def dense(features):
    text = ~features.store.tokens["is_special"].to_numpy(zero_copy_only=False)
    return features[:].toarray().astype(np.float64)[text]


@pytest.mark.parametrize("small", [False, True])
def test_matches_equal_dense_numpy(small, features, sae, second_extraction, monkeypatch):
    if small:
        monkeypatch.setattr(matching, "_BYTES", 8 * 26 * 4)
        monkeypatch.setattr(index, "ENTRIES", 30)
        monkeypatch.setattr(matching, "_EXACT", 10)
        monkeypatch.setattr(matching, "_CANDIDATES", 26)
    table = wb.match_features(features, second_extraction[0], sae, second_extraction[1])
    x, y = dense(features), dense(second_extraction[0])
    left, right = np.flatnonzero(x.any(0)), np.flatnonzero(y.any(0))
    assert table["feature"].tolist() == left.tolist()
    correlation = np.corrcoef(x[:, left].T, y[:, right].T)[: len(left), len(left) :]
    np.testing.assert_allclose(table["correlation"], correlation.max(1), atol=1e-9)
    assert table["match"].tolist() == right[correlation.argmax(1)].tolist()
    assert table["mutual"].tolist() == (correlation.argmax(0)[correlation.argmax(1)] == np.arange(len(left))).tolist()
    gain = np.maximum(correlation, 0)
    rows, partners = linear_sum_assignment(-gain)
    assert table["assigned_correlation"].sum() == pytest.approx(gain[rows, partners].sum())
    assigned_features = table["assigned"].dropna()
    assert len(set(assigned_features)) == len(assigned_features)
    shifted = np.roll(y, -(len(y) // 2), axis=0)
    chance = np.corrcoef(x[:, left].T, shifted[:, right].T)[: len(left), len(left) :]
    np.testing.assert_allclose(table["chance"], chance.max(1), atol=1e-9)
    units = [
        encoder.W_dec.numpy() / np.linalg.norm(encoder.W_dec.numpy(), axis=1, keepdims=True)
        for encoder in (sae, second_extraction[1])
    ]
    cosine = units[0][left] @ units[1].T
    np.testing.assert_allclose(table["nearest_cosine"], cosine.max(1), atol=1e-5)
    np.testing.assert_allclose(table["cosine"], cosine[np.arange(len(left)), table["match"]], atol=1e-5)


def test_a_permuted_sae_is_found_again(example, tmp_path):
    folder = save_sae(tmp_path / "one", "topk", hook_name=SITE.name, model_name="demo")
    order = np.random.default_rng(0).permutation(20)
    weights = load_file(folder / "sae_weights.safetensors")
    copy = save_sae(tmp_path / "two", "topk", hook_name=SITE.name, model_name="demo")
    set_weights(copy, W_enc=weights["W_enc"][:, order], b_enc=weights["b_enc"][order], W_dec=weights["W_dec"][order])
    set_weights(copy, b_dec=weights["b_dec"])
    saes = [wb.load_sae(path, device="cpu") for path in (folder, copy)]
    first, two = (extracted(example, sae, out=tmp_path / sae.name / "f") for sae in saes)
    table = wb.match_features(first, two, *saes)
    np.testing.assert_allclose(table["assigned_correlation"], 1, atol=1e-6)
    alone = table[table["correlation"] > table["correlation"].max() - 1e-9]
    assert (order[alone["assigned"].to_numpy(int)] == alone["feature"]).mean() > 0.8
    np.testing.assert_allclose(table["nearest_cosine"], 1, atol=1e-6)
    assert (order[table["nearest"]] == table["feature"]).all()


@pytest.mark.parametrize("small", [False, True])
def test_splits_equal_dense_numpy(small, features, second_extraction, monkeypatch):
    if small:
        monkeypatch.setattr(matching, "_BYTES", 8 * 26 * 4)
    table = wb.feature_splits(features, second_extraction[0], precision=0.5, least=3)
    x, y = dense(features) != 0, dense(second_extraction[0]) != 0
    expected = {}
    for feature in np.flatnonzero(x.sum(0) >= 3):
        inside = [
            part
            for part in np.flatnonzero(y.sum(0) >= 3)
            if (x[:, feature] & y[:, part]).sum() >= 0.5 * y[:, part].sum()
        ]
        if inside:
            on = x[:, feature]
            covered = y[on][:, inside].any(1).mean()
            expected[feature] = (set(inside), covered, max((on & y[:, part]).sum() for part in inside) / on.sum())
    assert set(table["feature"]) == set(expected)
    assert expected
    for line in table.itertuples():
        parts, covered, largest = expected[line.feature]
        assert (set(line.features), line.parts) == (parts, len(parts))
        assert (line.covered, line.largest) == (pytest.approx(covered), pytest.approx(largest))
        assert line.density == pytest.approx(x[:, line.feature].mean())
    assert (table["parts"].diff().dropna() <= 0).all()


def test_directions_that_are_nan_are_no_neighbours_and_refused_of_active_features(example, features, sae, tmp_path):
    """NaN of a feature that is never active is left out; that of an active one would be a wrong cosine."""

    def changed(name, **weights):
        folder = save_sae(tmp_path / name, "jumprelu", d_sae=26, seed=5, **TRAINED)
        copy = wb.load_sae(set_weights(folder, **weights), device="cpu")
        return extracted(example, copy, out=tmp_path / f"features of {name}"), copy

    weights = load_file(save_sae(tmp_path / "w", "jumprelu", d_sae=26, seed=5) / "sae_weights.safetensors")
    silent = np.where(np.arange(26) == 4, 1e6, weights["threshold"])
    whole = changed("whole", threshold=silent)
    expected = wb.match_features(features, whole[0], sae, whole[1])
    undefined = weights["W_dec"].copy()
    undefined[4] = np.nan
    nan = changed("nan", threshold=silent, W_dec=undefined)
    with warned("they are left out of comparisons"):
        table = wb.match_features(features, nan[0], sae, nan[1])
    assert 4 not in table["nearest"].tolist()
    defined_rows = expected["nearest"] != 4
    assert table[defined_rows].equals(expected[defined_rows])
    assert np.isfinite(table[["cosine", "nearest_cosine"]].to_numpy()).all()
    undefined[expected["match"].iloc[0]] = np.nan
    damaged = changed("damaged", threshold=silent, W_dec=undefined)
    assert "NaN" in refused(DataError, lambda: wb.match_features(features, damaged[0], sae, damaged[1]))


def test_what_cannot_be_matched_is_refused(features, sae, second_extraction, tmp_path):
    store = open_store(write_store(tmp_path / "y.acts", SEGMENTS[:2], sites=(SITE,)))
    elsewhere = extracted(store, sae)
    assert "are of different stores" in refused(RequestError, lambda: wb.match_features(features, elsewhere))
    assert refused(RequestError, lambda: wb.match_features(features, second_extraction[0], sae)).startswith(
        "other_sae is missing"
    )
    text = refused(RequestError, lambda: wb.match_features(features, second_extraction[0], second_extraction[1], sae))
    assert "were made with SAE" in text
    assert "precision must be" in refused(
        RequestError, lambda: wb.feature_splits(features, second_extraction[0], precision=0)
    )


def test_matches_on_the_command_line(features, second_extraction, tmp_path):
    out = tmp_path / "matches.csv"
    code, text, err = run("match", str(features.path), str(second_extraction[0].path), "--k", "3", "--out", str(out))
    assert (code, err) == (0, "")
    assert text.startswith("feature")
    assert f"3 of {len(out.read_text().splitlines()) - 1} features" in text
    code, text, err = run("match", str(features.path), str(second_extraction[0].path), "--splits")
    assert (code, err) == (0, "")
