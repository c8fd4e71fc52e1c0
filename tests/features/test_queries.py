"""Tests of feature queries against the dense matrix in NumPy, a loop, or planted truth."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from refusals import refused
from sae_example import save_sae, set_weights
from safetensors.numpy import load_file
from store_example import MODEL, values, write_store
from warned import warned

import workbench as wb
from workbench.features import index
from workbench.features.extract import extract_features
from workbench.features.queries import feature_quantiles, text_counts
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.model.unembed import measure_unembed, save_unembed
from workbench.sae.decoder import decoder_directions, decoder_logits
from workbench.sae.load import load_sae
from workbench.store.manifest import SiteRecord
from workbench.store.reader import open_store

SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
SEGMENTS = [[7, 9], [12], [3, 1, 14], [5]]
ROWS = 51
TRAINED = {"hook_name": SITE.name, "model_name": "demo"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(write_store(tmp_path_factory.mktemp("stores") / "x.acts", SEGMENTS, sites=(SITE,)))


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """Features 3 and 19 never active, feature 7 often negative."""
    folder = save_sae(tmp_path_factory.mktemp("saes") / "abs", "abstopk", **TRAINED)
    bias = load_file(folder / "sae_weights.safetensors")
    bias["W_enc"][:, [3, 19]] = 0
    return load_sae(set_weights(folder, W_enc=bias["W_enc"], b_enc=np.zeros(20)), device="cpu")


@pytest.fixture(scope="module")
def features(store, sae, tmp_path_factory):
    return extract_features(store, sae, out=tmp_path_factory.mktemp("f") / "abs", show_progress=False)


@pytest.fixture(params=[1 << 22, 11], ids=["whole", "pieces"])
def pieces(request, monkeypatch):
    """In one piece, and a few entries at a time."""
    monkeypatch.setattr(index, "ENTRIES", request.param)
    monkeypatch.setattr(index.feature_groups, "__defaults__", (request.param,))


@pytest.fixture(scope="module")
def dense(features):
    return features[:].toarray()


@pytest.fixture(scope="module")
def text(store):
    return ~store.tokens["is_special"].to_numpy(zero_copy_only=False)


# ---- statistics -------------------------------------------------------------------------------------------


def test_quantiles_equal_numpy_over_active_rows(features, dense):
    levels = (0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1)
    quantiles = feature_quantiles(features, levels)
    for feature in range(20):
        active = dense[:, feature][dense[:, feature] != 0].astype(np.float64)
        expected = np.quantile(active, levels) if len(active) else np.full(len(levels), np.nan)
        np.testing.assert_allclose(quantiles[feature], expected, rtol=1e-12)
    assert (quantiles < 0).any()


def test_statistics_have_a_line_per_feature(features, dense):
    table = wb.feature_statistics(features, quantiles=(0.5, 0.995))
    assert list(table) == ["feature", "active", "density", "max", "mean", "q50", "q99.5"]
    assert table["feature"].tolist() == list(range(20))
    assert np.array_equal(table["active"], (dense != 0).sum(0))
    np.testing.assert_allclose(table["density"], (dense != 0).mean(0), rtol=1e-12)
    assert np.array_equal(table["q50"], feature_quantiles(features, [0.5])[:, 0], equal_nan=True)
    assert table.loc[3, ["active", "max", "mean"]].tolist() == [0, 0, 0]
    assert np.isnan(table.loc[3, "q50"])


@pytest.mark.parametrize("bins", [1, 7, 40])
def test_a_histogram_equals_numpy(features, dense, bins):
    for feature in range(20):
        active = dense[:, feature][dense[:, feature] != 0].astype(np.float64)
        counts, edges = wb.feature_histogram(features, feature, bins)
        assert (len(counts), counts.sum()) == (bins, len(active))
        if len(active):
            assert (edges[0], edges[-1]) == (min(0, active.min()), max(0, active.max()))
            assert np.array_equal(counts, np.histogram(active, edges)[0])
        else:
            assert (edges[0], edges[-1]) == (0, 1)


# ---- rows -------------------------------------------------------------------------------------------------


def test_rows_above_a_threshold_combine_with_sql(features, dense, store):
    feature = int(np.argmax((dense > 0).sum(0)))
    activations = dense[:, feature]
    for above in (None, 0, float(np.median(activations[activations > 0])), float(activations.max()), -1e9):
        expected = np.flatnonzero((activations != 0) & ((activations > above) if above is not None else True))
        assert wb.active_rows(features, feature, above).ids.tolist() == expected.tolist()
    late_rows = wb.active_rows(features, feature, 0) & store.where("position > 3")
    position = store.tokens["position"].to_numpy()
    assert late_rows.ids.tolist() == np.flatnonzero((activations > 0) & (position > 3)).tolist()
    assert len(wb.active_rows(features, 3)) == 0


def test_top_rows_of_a_selection(features, dense, store):
    feature = int(features.counts.argmax())
    position = store.tokens["position"].to_numpy()
    order = np.lexsort((np.arange(ROWS), -dense[:, feature]))
    order = order[(dense[order, feature] != 0) & (position[order] > 3)]
    assert features.top(feature, k=3, where="position > 3")["row"].tolist() == order[:3].tolist()
    assert features.top(feature, k=99, where=store.where("position > 3"))["row"].tolist() == order.tolist()


# ---- labels -----------------------------------------------------------------------------------------------


def expected_best(dense, text, columns, k, least):
    """The table by loops over values and features."""
    lines = []
    for label, column in columns.items():
        for value in dict.fromkeys(v for v in column if v is not None):
            labelled = np.array([v == value for v in column]) & text
            if not least <= labelled.sum() < text.sum():
                continue
            scored = []
            for feature in range(dense.shape[1]):
                on = (dense[:, feature] != 0) & text
                hits = int((on & labelled).sum())
                if hits:
                    scored.append((-2 * hits / int(on.sum() + labelled.sum()), feature, hits, int(on.sum())))
            lines += [(label, value, int(labelled.sum()), f, n, h, -s) for s, f, h, n in sorted(scored)[:k]]
    return sorted(lines, key=lambda line: -line[-1])


@pytest.mark.parametrize(("k", "least"), [(1, 1), (3, 4), (99, 8)])
def test_best_features_equal_a_count_by_hand(features, dense, text, store, k, least, pieces):
    tokens = store.tokens
    columns = {name: tokens[name].to_pylist() for name in ("token", "source", "sequence")}
    table = wb.best_features(features, ["token", "source", "sequence"], k=k, least=least)
    assert list(table)[:6] == ["label", "value", "tokens", "feature", "active", "hits"]
    best = [
        (line.label, line.value, line.tokens, line.feature, line.active, line.hits, line.f1)
        for line in table.itertuples()
    ]
    expected = expected_best(dense, text, columns, k, least)
    assert sorted(map(repr, best)) == sorted(map(repr, expected))
    assert [line[-1] for line in best] == [line[-1] for line in expected]
    np.testing.assert_allclose(table["precision"], table["hits"] / table["active"])
    np.testing.assert_allclose(table["recall"], table["hits"] / table["tokens"])


def test_one_label_agrees_with_enrichment(features):
    line = wb.best_features(features, "source").set_index("value").loc["wiki"]
    best = features.enrichment("source = 'wiki'").iloc[0]
    assert line[["feature", "active", "hits", "precision", "recall", "f1"]].tolist() == best.tolist()


def test_labels_given_as_values(features, text, store):
    """Planted: the label is where one feature is active."""
    planted = int(text_counts(features).argmax())
    on = features[:].toarray()[:, planted] != 0
    table = wb.best_features(features, {"mine": np.where(on, "yes", None)}, least=1)
    assert table.loc[0, ["label", "value", "feature", "f1"]].tolist() == ["mine", "yes", planted, 1]
    numeric_table = wb.best_features(features, {"mine": pd.Series(np.where(on, 1.0, np.nan))}, least=1)
    assert numeric_table.loc[0, ["value", "feature", "f1"]].tolist() == [1.0, planted, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: feature_quantiles(f, [0.5, 1.5]), "quantiles must be from 0 to 1, not 1.5"),
        (lambda f: wb.feature_histogram(f, 0, bins=0), "bins must be a whole number, at least 1, not 0"),
        (lambda f: wb.feature_histogram(f, 20), "feature 20 does not exist; the SAE has features 0 to 19"),
        (lambda f: wb.active_rows(f, 3, above=float("nan")), "above must be finite, not nan"),
        (lambda f: wb.active_rows(f, -1), "feature -1 does not exist; the SAE has features 0 to 19"),
        (lambda f: wb.coactivation(f, 20), "feature 20 does not exist; the SAE has features 0 to 19"),
        (lambda f: wb.best_features(f, "sorce"), "labels: no column 'sorce'; columns are row, sequence, "),
        (lambda f: wb.best_features(f), "labels: the texts of "),
        (lambda f: wb.best_features(f, "source", k=0), "k must be a whole number, at least 1, not 0"),
        (lambda f: wb.best_features(f, "source", least=0), "least must be a whole number, at least 1, not 0"),
        (
            lambda f: wb.best_features(f, "row"),
            "labels: no value of row has 20 tokens without having all; give a smalle",
        ),
        (lambda f: wb.best_features(f, {"a": [1]}), "labels: a has 1 values for 51 rows; give one per row"),
        (lambda f: wb.best_features(f, {"a": [1, "b"] + [None] * 49}), "labels: the values of a have several types: "),
    ],
)
def test_invalid_queries_are_refused(features, call, message):
    assert refused(RequestError, lambda: call(features)).startswith(message)


# ---- what fires together ----------------------------------------------------------------------------------


def test_coactivation_by_hand(features, dense, text, pieces):
    on = (dense != 0)[text]
    assert np.array_equal(text_counts(features), on.sum(0))
    for feature in (0, 7, int(features.counts.argmax())):
        table = wb.coactivation(features, feature)
        together = {g: int((on[:, feature] & on[:, g]).sum()) for g in range(20) if g != feature}
        assert dict(zip(table["feature"], table["both"], strict=True)) == {g: n for g, n in together.items() if n}
        for line in table.itertuples():
            chance = on[:, feature].mean() * on[:, line.feature].mean() * len(on)
            assert line.expected == pytest.approx(chance, rel=1e-12)
            assert line.lift == pytest.approx(line.both / chance, rel=1e-12)
            assert line.jaccard == line.both / int((on[:, feature] | on[:, line.feature]).sum())
        assert table["jaccard"].is_monotonic_decreasing
    assert len(wb.coactivation(features, 3)) == 0


# ---- what features write ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("standard", {}), ("topk", {"rescale_acts_by_decoder_norm": True}), ("matching_pursuit", {}), ("gated", {})],
)
def test_a_direction_is_the_effect_of_a_unit_on_the_reconstruction(architecture, settings, tmp_path):
    sae = load_sae(save_sae(tmp_path / "sae", architecture, **settings), device="cpu")
    zero = sae.decode(torch.zeros(1, 20))
    for feature in (0, 13):
        unit = torch.zeros(1, 20)
        unit[0, feature] = 1
        torch.testing.assert_close(decoder_directions(sae, [feature]), sae.decode(unit) - zero, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoder_directions(sae)[[13]], decoder_directions(sae, [13]))


def test_nearest_features_by_hand(tmp_path):
    folder = save_sae(tmp_path / "sae")
    W = load_file(folder / "sae_weights.safetensors")["W_dec"].astype(np.float64)
    W[5], W[9], W[11] = 3 * W[2], 0, -W[2]
    sae = load_sae(set_weights(folder, W_dec=W), device="cpu")
    cosine = W @ W[2] / np.maximum(np.linalg.norm(W, axis=1) * np.linalg.norm(W[2]), 1e-30)
    table = wb.nearest_features(sae, 2, k=50)
    assert (len(table), table["feature"][0], table["feature"][18]) == (19, 5, 11)
    assert sorted(table["feature"]) == [f for f in range(20) if f != 2]
    np.testing.assert_allclose(table["cosine"], cosine[table["feature"]], atol=1e-6)
    assert table["cosine"].is_monotonic_decreasing
    assert wb.nearest_features(sae, 2, k=3).equals(table.head(3))
    for size in (1e30, 1e-30):  # whose squares float32 cannot hold
        scaled = load_sae(set_weights(folder, W_dec=W * size), device="cpu")
        np.testing.assert_allclose(wb.nearest_features(scaled, 2, k=3)["cosine"], table["cosine"][:3], rtol=1e-5)
    W[4, 1], W[7, 0] = np.nan, np.inf
    broken = load_sae(set_weights(folder, W_dec=W), device="cpu")
    with warned("the decoder has NaN or infinite values at 2 features, 4, 7; .*; they are left out of comparisons"):
        assert wb.nearest_features(broken, 2, k=50).equals(table[~table["feature"].isin([4, 7])].reset_index(drop=True))
    refusal = "SAE 'sae': the decoder has NaN or infinite values at feature 4; save or download the SAE again"
    assert refused(DataError, lambda: wb.nearest_features(broken, 4)) == refusal
    assert "at 2 features, 4, 7; " in refused(DataError, lambda: broken.decode(torch.zeros(1, 20)))
    assert refused(RequestError, lambda: wb.nearest_features(sae, 20)).startswith("feature 20 does not exist; ")
    assert (
        refused(RequestError, lambda: wb.nearest_features(sae, 0, k=0)) == "k must be a whole number, at least 1, not 0"
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_effects_on_logits_equal_the_models_head(family, tiny_models, tmp_path):
    """In float64, by the model's own norm and head: a small step across x, which the norm's divisor does not feel."""
    model = tiny_models[family]
    sae = load_sae(save_sae(tmp_path / "sae", d_in=32), device="cpu")
    unembed = measure_unembed(model, Model(model, None, "tiny").site_map.last_block)
    effects = decoder_logits(sae, unembed, [4, 11]).double()
    body = model.transformer.ln_f if family == "gpt2" else model.model.norm
    norm, head = copy.deepcopy(body).double(), copy.deepcopy(model.lm_head).double()
    x = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction, effect in zip(sae.W_dec[[4, 11]].double(), effects, strict=True):
        d = direction - direction.mean() if family == "gpt2" else direction
        across = x - (x @ d) / (d @ d) * d
        across = across - across.mean() if family == "gpt2" else across
        across = across / across.square().mean().sqrt() * 1000  # eps is nothing beside it
        with torch.no_grad():
            moved = (head(norm(across + 0.1 * direction)) - head(norm(across))) * 1000 / 0.1
        assert effect.std() > 1
        torch.testing.assert_close(effect, moved - moved.mean(), rtol=1e-3, atol=1e-2)  # some norms are in float32


def test_promoted_tokens_are_the_extremes(tiny_models, tmp_path):
    model = tiny_models["gpt2"]
    unembed = replace(
        measure_unembed(model, Model(model, None, "tiny").site_map.last_block),
        tokens=tuple(f"<{i}>" for i in range(320)),
    )
    site = replace(SITE, shape=(32,))
    record = replace(MODEL, name="tiny", d_model=32, vocab=320)
    path = write_store(
        tmp_path / "x.acts",
        [[9]],
        sites=(site,),
        model=record,
        unembed=lambda path: save_unembed(unembed, path, torch.float32),
        unembed_reason=None,
    )
    about = {"hook_name": SITE.name, "model_name": "tiny"}
    sae = load_sae(save_sae(tmp_path / "sae", d_in=32, **about), device="cpu")
    features = extract_features(open_store(path), sae, show_progress=False)
    effects = decoder_logits(sae, unembed, [6])[0].numpy()
    table = wb.promoted_tokens(features, sae, 6, k=4)
    order = np.argsort(-effects)
    assert table["token_id"].tolist() == [*order[:4], *order[-4:]]
    assert table["token"].tolist() == [f"<{i}>" for i in table["token_id"]]
    assert np.array_equal(table["logit"], effects[table["token_id"]])
    assert wb.promoted_tokens(features, sae, 6, k=999)["token_id"].tolist() == order.tolist()
    second = load_sae(save_sae(tmp_path / "other", d_in=32, seed=1, **about), device="cpu")
    sums = sae.fingerprint()[:12], second.fingerprint()[:12]
    assert refused(RequestError, lambda: wb.promoted_tokens(features, second, 6)) == (
        f"features resid_post.1-sae were made with SAE sae ({sums[0]}), not with other ({sums[1]}); give that one"
    )
    assert (
        refused(RequestError, lambda: wb.promoted_tokens(features, sae, 6, k=0))
        == "k must be a whole number, at least 1, not 0"
    )
    narrow = load_sae(save_sae(tmp_path / "narrow"), device="cpu")
    text = refused(RequestError, lambda: decoder_logits(narrow, unembed, [0]))
    assert text.startswith("the output of SAE 'narrow' has width 8 and the residual stream 32; ")


def test_an_sae_outside_the_residual_stream_has_no_effect_on_logits(tmp_path):
    site = SiteRecord("blocks.1.mlp.hook_post", "mlp_post.1", ("row", "d_mlp"), (8,), "float32")
    store = open_store(write_store(tmp_path / "x.acts", [[9]], sites=(site,)))
    sae = load_sae(save_sae(tmp_path / "sae", hook_name=site.name, model_name="demo"), device="cpu")
    features = extract_features(store, sae, show_progress=False)
    text = refused(RequestError, lambda: wb.promoted_tokens(features, sae, 0))
    assert text.startswith("SAE 'sae' reconstructs blocks.1.mlp.hook_post, which is not part of the residual stream; ")


def test_a_store_without_unembedding_is_refused(features, sae):
    assert "holds no unembedding: the model has none" in refused(
        RequestError, lambda: wb.promoted_tokens(features, sae, 0)
    )


def test_values_of_the_example_differ():
    assert len(np.unique(values(SITE, 0, ROWS))) > 100  # or every feature would be active on the same rows
