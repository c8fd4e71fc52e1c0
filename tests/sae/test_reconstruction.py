"""Metrics of reconstructions against SAELens' evaluation, NumPy in float64, and resampling written out."""

import numpy as np
import pytest
import torch
from sae_example import encode64, save_sae, set_weights
from safetensors.numpy import load_file
from store_example import write_store

import workbench as wb
from workbench.model.load import Model
from workbench.results.bootstrap import wilson
from workbench.sae import reconstruction
from workbench.sae.load import load_sae
from workbench.sae.metrics import sae_metrics
from workbench.sae.reconstruction import Documents, FeatureCounts, ratio_intervals
from workbench.store.manifest import SiteRecord
from workbench.store.reader import open_store

SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
FIT = ("l0", "l1", "explained_variance", "explained_variance_by_row", "mse", "cosine", "l2_ratio", "relative_bias")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(
        write_store(tmp_path_factory.mktemp("m") / "x.acts", [[7, 9, 4], [12, 3, 1, 14, 5]], sites=(SITE,))
    )


def sae_and_rows(store, folder, architecture="topk"):
    """An SAE, the rows of text, their documents, and their activations and reconstructions in float64."""
    save_sae(folder, architecture, hook_name=SITE.name)
    rows = store.where("NOT is_special")
    x = rows["resid_post", 1].double().numpy()
    weights = load_file(folder / "sae_weights.safetensors")
    latents = encode64(folder, x)
    document = store.tokens["document"].to_numpy()[rows.ids]
    return (
        load_sae(folder, device="cpu"),
        document,
        x,
        latents,
        latents @ weights["W_dec"].astype(float) + weights["b_dec"],
    )


def fit64(x, latents, y, mean) -> list[float]:
    """The metrics of `FIT` by their definitions."""
    error, spread = ((x - y) ** 2).sum(1), ((x - mean) ** 2).sum(1)
    norm, output = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    return [
        (latents != 0).sum(1).mean(),
        np.abs(latents).sum(1).mean(),
        1 - error.sum() / spread.sum(),
        (1 - error / spread).mean(),
        error.mean(),
        ((x * y).sum(1) / norm / output).mean(),
        (output / norm).mean(),
        (output**2).sum() / (x * y).sum(),
    ]


@pytest.mark.parametrize("block", [None, 5])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_metrics_and_intervals_equal_resampling_written_out(architecture, block, store, tmp_path, monkeypatch):
    sae, document, x, latents, y = sae_and_rows(store, tmp_path / "one", architecture)
    if block:  # a document then lies in several blocks
        monkeypatch.setattr(reconstruction, "block_rows", lambda _sae: block)
        monkeypatch.setattr(reconstruction, "_BLOCK_BYTES", 8 * 8 * block)
    metrics = sae_metrics(store, sae, resamples=200, seed=3)
    np.testing.assert_allclose([getattr(metrics, name) for name in FIT], fit64(x, latents, y, x.mean(0)), rtol=1e-5)
    assert (metrics.rows, metrics.documents) == (len(x), len(set(document)))
    parts = [np.flatnonzero(document == number) for number in np.unique(document)]
    times = np.random.default_rng(3).multinomial(len(parts), [1 / len(parts)] * len(parts), size=200)
    drawn = []
    for line in times:
        rows = np.concatenate([np.tile(part, number) for part, number in zip(parts, line, strict=True)]).astype(int)
        drawn.append(fit64(x[rows], latents[rows], y[rows], x.mean(0)))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    table = metrics.table.set_index("metric").loc[list(FIT)]
    np.testing.assert_allclose(table["low"], low, rtol=1e-4)
    np.testing.assert_allclose(table["high"], high, rtol=1e-4)


def test_the_constant_mean_has_the_values_under_the_null(store, tmp_path):
    _, _, x, _, _ = sae_and_rows(store, tmp_path / "one")
    folder = set_weights(tmp_path / "one", W_dec=np.zeros((20, 8)), b_dec=x.mean(0))
    metrics = sae_metrics(store, load_sae(folder, device="cpu"))
    assert metrics.explained_variance == pytest.approx(0, abs=1e-6)
    assert metrics.explained_variance_by_row == pytest.approx(0, abs=1e-6)
    assert metrics.relative_bias == pytest.approx(1, abs=1e-6)
    assert metrics.mse == pytest.approx(x.var(0).sum(), rel=1e-6)
    zero = sae_metrics(store, load_sae(set_weights(folder, b_dec=np.zeros(8)), device="cpu"))
    assert (zero.l2_ratio, zero.cosine) == (0, 0)
    assert np.isnan(zero.relative_bias)


def test_dead_share_has_the_interval_of_leaving_each_document_out(store, tmp_path):
    folder = save_sae(tmp_path / "one", "topk", d_sae=200, k=2, hook_name=SITE.name)
    sae = load_sae(folder, device="cpu")
    metrics = sae_metrics(store, sae)
    numbers = np.unique(store.tokens["document"].to_numpy())
    without = [sae_metrics(store, sae, rows=f"NOT is_special AND document <> {n}").dead_share for n in numbers]
    error = np.sqrt((len(numbers) - 1) * np.var(without))
    interval = metrics.intervals["dead_share"]
    assert interval.mean == metrics.dead_share == pytest.approx((metrics.density["active"] == 0).mean())
    assert interval.high - interval.mean == pytest.approx(1.96 * error)
    assert interval.mean - interval.low == pytest.approx(1.96 * error)
    assert error > 0.003


def counted(active: np.ndarray, documents: np.ndarray) -> FeatureCounts:
    counts = FeatureCounts(active.shape[1], torch.device("cpu"))
    for start in range(0, len(active), 37):
        counts.add(torch.from_numpy(active[start : start + 37]), documents[start : start + 37])
    counts.finish()
    return counts


def test_the_interval_of_density_is_wilsons_for_independent_rows_and_wider_for_documents():
    draw = np.random.default_rng(0)
    rows = draw.random((4000, 6)) < [0, 0.002, 0.05, 0.3, 0.7, 1]
    table = counted(rows, np.arange(4000)).table()
    np.testing.assert_allclose(table["density"], rows.mean(0))
    low, high = wilson(rows.mean(0), np.full(6, 4000))
    np.testing.assert_allclose(table["low"], low, rtol=0.01, atol=1e-12)
    np.testing.assert_allclose(table["high"], high, rtol=0.01)
    repeated = counted(np.repeat(rows[:400], 10, axis=0), np.arange(4000) // 10).table()  # ten equal rows a document
    np.testing.assert_allclose(repeated["high"], wilson(rows[:400].mean(0), np.full(6, 400))[1], rtol=0.01)
    assert repeated["high"][0] == pytest.approx(3.84 / 403.84, rel=0.01)  # never active in 400 documents


def test_the_interval_of_dead_share_holds_that_of_new_documents():
    """Features of Zipf's densities, active in bursts: 60 samples of 40 documents, against the mean of all samples."""
    draw = np.random.default_rng(0)
    chance = 0.5 / np.arange(1, 301)
    samples = [counted(np.repeat(draw.random((40, 300)) < chance, 3, axis=0), np.arange(120) // 3) for _ in range(60)]
    intervals = [sample.dead_share() for sample in samples]
    expected = ((1 - chance) ** 40).mean()
    assert np.mean([interval.mean for interval in intervals]) == pytest.approx(expected, abs=0.02)
    assert np.mean([interval.low <= expected <= interval.high for interval in intervals]) >= 0.9
    assert max(interval.high - interval.low for interval in intervals) < 0.2


def test_one_document_has_no_interval(store, tmp_path):
    sae, *_ = sae_and_rows(store, tmp_path / "one")
    metrics = sae_metrics(store, sae, rows="document = 0")
    assert metrics.documents == 1
    assert metrics.table[["low", "high"]].isna().all(axis=None)
    assert metrics.table["value"].notna().all()
    assert metrics.density[["low", "high"]].isna().all(axis=None)


def test_documents_apart_are_counted_as_one():
    documents = Documents.of(np.array([4, 4, 7, 4, 9]), np.array([1, 2, 3]))
    assert (documents.ids.tolist(), documents.number.tolist(), documents.count) == ([1, 3, 2], [0, 0, 1], 2)


def test_a_ratio_without_denominator_is_nan():
    interval = ratio_intervals({"a": (np.ones(3), np.zeros(3))}, 10, 0)["a"]
    assert np.isnan(interval).all()


class Tokens:
    """Gives SAELens' evaluation the tokens that were recorded."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def get_batch_tokens(self, _number: int) -> torch.Tensor:
        return self.ids


@pytest.fixture(scope="module")
def recorded(tiny_models, tiny_tokenizer, tmp_path_factory):
    """Nine sequences of twelve tokens, none of them special."""
    model = Model(tiny_models["gpt2"], tiny_tokenizer, "tiny-gpt2")
    ids = np.random.default_rng(0).integers(6, model.vocab, (9, 12))
    out = tmp_path_factory.mktemp("evals") / "x.acts"
    store = wb.record(
        model, ids.tolist(), out=out, sites=("resid_post.0",), dtype="float32", context=12, show_progress=False
    )
    assert not store.tokens["is_special"].to_numpy(zero_copy_only=False).any()
    return model, store, Tokens(torch.from_numpy(ids))


@pytest.mark.parametrize(("architecture", "settings"), [("topk", {"k": 8}), ("jumprelu", {})])
def test_metrics_equal_those_of_saelens(architecture, settings, recorded, tmp_path):
    from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    model, store, tokens = recorded
    save_sae(tmp_path / "one", architecture, d_in=32, d_sae=64, hook_name="blocks.0.hook_resid_post", **settings)
    sae = load_sae(tmp_path / "one", device="cpu")
    shared = (tokens, ActivationScaler())
    names = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    options = {"n_batches": 1, "eval_batch_size_prompts": 9}
    saelens_values, of_features = get_sparsity_and_variance_metrics(
        sae.module, model.bridge(), *shared, **options, model_kwargs={}, **{f"compute_{name}": True for name in names}
    )
    saelens_values |= get_downstream_reconstruction_metrics(
        sae.module, model.bridge(), *shared, **options, compute_kl=True, compute_ce_loss=True
    )
    metrics = sae_metrics(store, sae, model=model)
    loss = metrics.loss
    pairs = {
        "l0": metrics.l0,
        "l1": metrics.l1,
        "explained_variance": metrics.explained_variance,
        "explained_variance_legacy": metrics.explained_variance_by_row,
        "mse": metrics.mse,
        "cossim": metrics.cosine,
        "l2_ratio": metrics.l2_ratio,
        "relative_reconstruction_bias": metrics.relative_bias,
        "kl_div_with_sae": loss.kl_spliced,
        "kl_div_with_ablation": loss.kl_zeroed,
        "kl_div_score": loss.kl_score,
        "ce_loss_without_sae": loss.clean,
        "ce_loss_with_sae": loss.spliced,
        "ce_loss_with_ablation": loss.zeroed,
        "ce_loss_score": loss.recovered,
    }
    assert {name: pytest.approx(saelens_values[name], rel=2e-4, abs=1e-6) for name in pairs} == pairs
    np.testing.assert_allclose(metrics.density["density"], of_features["feature_density"], rtol=1e-6)
    table = metrics.table.set_index("metric")
    assert {name: table["value"][name] for name in ("kl_score", "loss_recovered")} == {
        "kl_score": pytest.approx(loss.kl_score),
        "loss_recovered": pytest.approx(loss.recovered),
    }
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
