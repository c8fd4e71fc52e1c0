"""Features in other tools' formats, read back as those tools read them."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from sae_example import save_sae, set_weights
from safetensors.numpy import load_file
from store_example import MODEL, contents, write_store

import workbench as wb
from workbench.features import other_formats
from workbench.features.extract import extract_features
from workbench.features.feature_store import Features
from workbench.features.index import invert
from workbench.features.records import (
    BY_FEATURE,
    BY_ROW,
    FeaturesRecord,
    SaeRecord,
    SiteFeatures,
    by_feature_layout,
    by_row_layout,
)
from workbench.io.errors import RequestError
from workbench.io.tensors import new_arrays
from workbench.model.load import Model
from workbench.model.unembed import measure_unembed, save_unembed
from workbench.sae.decoder import decoder_logits
from workbench.sae.load import load_sae
from workbench.store.manifest import SiteRecord
from workbench.store.reader import open_store

SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (32,), "float32")
LENGTHS = [7, 9, 12, 3, 1, 14, 5]


@pytest.fixture(scope="module")
def extraction(tiny_models, tmp_path_factory):
    """Features, their SAE and the unembedding; feature 0 is beyond float16, feature 1 below it."""
    folder, model = tmp_path_factory.mktemp("made"), tiny_models["llama"]
    unembed = replace(
        measure_unembed(model, Model(model, None, "tiny").site_map.last_block),
        tokens=tuple(f"t{i}" for i in range(320)),
    )
    path = write_store(
        folder / "x.acts",
        [LENGTHS[:3], LENGTHS[3:]],
        sites=(SITE,),
        model=replace(MODEL, d_model=32, vocab=320),
        unembed=lambda path: save_unembed(unembed, path, torch.float32),
        unembed_reason=None,
    )
    save_sae(folder / "sae", d_in=32, hook_name=SITE.name, model_name="demo")
    scale = np.ones(20)
    scale[:2] = 1e5, 1e-12
    weights = load_file(folder / "sae" / "sae_weights.safetensors")
    set_weights(folder / "sae", W_enc=weights["W_enc"] * scale, b_enc=weights["b_enc"] * scale)
    sae = load_sae(folder / "sae", device="cpu")
    return extract_features(open_store(path), sae, show_progress=False), sae, unembed


def delphi_reads(folder: Path) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], np.ndarray, dict]:
    """Latent -> its locations and activations; tokens; config: as delphi's LatentDataset goes about it."""
    latents, tokens = {}, None
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0])):
        split = load_file(file)
        assert split["locations"].dtype in (np.uint16, np.uint32)
        first, last = map(int, file.stem.split("_"))
        locations = split["locations"].astype(np.int64)
        locations[:, 2] += first
        assert locations[:, 2].min(initial=first) >= first
        assert locations[:, 2].max(initial=last) <= last
        for latent in np.unique(locations[:, 2]):
            of_latent = locations[:, 2] == latent
            latents[int(latent)] = locations[of_latent], split["activations"][of_latent]
        assert tokens is None or np.array_equal(tokens, split["tokens"])
        tokens = split["tokens"]
    return latents, tokens, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("splits", [1, 3, 20])
def test_delphi_reads_the_same_latents(extraction, tmp_path, splits):
    features, _, _ = extraction
    folder = wb.export_delphi(features, tmp_path / "latents", splits=splits, show_progress=False)
    assert folder == tmp_path / "latents" / SITE.name
    latents, tokens, config = delphi_reads(folder)
    assert len(list(folder.glob("*.safetensors"))) == splits
    assert tokens.shape == (len(LENGTHS), max(LENGTHS))
    table = features.store.tokens.to_pandas()
    activation_of = np.zeros((*tokens.shape, 20), np.float32)
    for latent, (locations, activations) in latents.items():
        assert activations.dtype == np.float16
        assert (np.diff(locations[:, 0] * 100 + locations[:, 1]) > 0).all()
        activation_of[locations[:, 0], locations[:, 1], latent] = activations
    expected = np.zeros_like(activation_of)
    dense = features[:].toarray()
    for line in table.itertuples():
        assert tokens[line.sequence, line.position] == line.token_id
        expected[line.sequence, line.position] = np.minimum(dense[line.row], 65504).astype(np.float16)
    assert np.array_equal(activation_of, expected)
    assert (activation_of[..., 0] == 65504).any()
    assert 1 not in latents
    padding = np.arange(max(LENGTHS)) >= np.array(LENGTHS)[:, None]
    assert (tokens[padding] == 1).all()  # what a sequence begins with in the example
    assert (config["model_name"], config["cache_ctx_len"], config["n_splits"]) == ("demo", 14, splits)


def test_blocks_and_groups_of_files_change_nothing(extraction, tmp_path, monkeypatch):
    features, _, _ = extraction
    whole = wb.export_delphi(features, tmp_path / "whole", splits=7, show_progress=False)
    monkeypatch.setattr(other_formats, "_BLOCK", 13)
    monkeypatch.setattr(other_formats, "_OPEN_FILES", 3)
    parts = wb.export_delphi(features, tmp_path / "parts", splits=7, show_progress=False)
    assert contents(whole) == contents(parts)
    assert len(contents(whole)) == 8


def test_the_export_takes_less_memory_than_the_features(tmp_path, monkeypatch):
    """16 entries in each of 20,480 rows; the features of a whole split in memory would take five times their file."""
    rows, active, count = 20_480, 16, 64
    store = open_store(write_store(tmp_path / "x.acts", [[256] * (rows // 256)], sites=()))
    size = (rows, count, rows * active, "float32")
    path = store.path / "features" / "f"
    path.mkdir(parents=True)
    random = np.random.default_rng(0)
    feature = (np.arange(active) * 4 + random.integers(0, 4, (rows, active))).astype(np.uint16).ravel()
    by_row = (np.arange(rows + 1) * active, feature, random.random(rows * active, np.float32))
    with new_arrays(path / BY_ROW, by_row_layout(*size)) as file:
        for name, values in zip(("indptr", "feature", "value"), by_row, strict=True):
            file.append(name, values)
    with new_arrays(path / BY_FEATURE, by_feature_layout(*size)) as file:
        invert(*by_row, np.bincount(feature), file, tmp_path / "spill", "int32")
    sae, reads = SaeRecord("sae", "", {}), (SiteFeatures(SITE.name, 0, count),)
    record = FeaturesRecord(sae, SITE.name, reads, "../..", store.manifest.fingerprint, *size[:3], "float32", 0, {}, {})
    features = Features(path, record, store)
    monkeypatch.setattr(other_formats, "_BLOCK", 1 << 12)
    tracemalloc.start()
    wb.export_delphi(features, tmp_path / "out", splits=1, show_progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < sum(file.stat().st_size for file in path.iterdir()) / 2


def test_wrong_requests_of_delphi_are_refused(extraction, tmp_path):
    features, _, _ = extraction
    for splits in (0, 21):
        text = refused(RequestError, lambda n=splits: wb.export_delphi(features, tmp_path, splits=n))
        assert text == f"splits must be a whole number, from 1 to 20, not {splits}"
    wb.export_delphi(features, tmp_path, show_progress=False)
    text = refused(RequestError, lambda: wb.export_delphi(features, tmp_path))
    assert text == f"{tmp_path / SITE.name} is not empty; choose another out"


def test_neuronpedia_reads_the_same_features(extraction, tmp_path):
    features, sae, unembed = extraction
    out = wb.export_neuronpedia(features, sae, tmp_path / "np", k=3, context=2, batch=8, show_progress=False)
    active = np.flatnonzero(features.counts).tolist()
    batches = [json.loads((out / f"batch-{n}.json").read_text()) for n in range(-(-len(active) // 8))]
    assert len(list(out.iterdir())) == len(batches)
    assert [f["feature_index"] for batch in batches for f in batch["features"]] == active
    for batch in batches:
        assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("demo", 1, "sae")
    dense, store = features[:].toarray(), features.store
    words, sequence = store.tokens["token"].to_pylist(), store.tokens["sequence"].to_numpy()
    for entry in (f for batch in batches for f in batch["features"]):
        feature = entry["feature_index"]
        assert entry["frac_nonzero"] == (dense[:, feature] != 0).mean()
        assert sum(entry["freq_hist_data_bar_heights"]) == features.counts[feature]
        assert len(entry["freq_hist_data_bar_values"]) == len(entry["freq_hist_data_bar_heights"])
        assert sum(entry["logits_hist_data_bar_heights"]) == 320
        effects = decoder_logits(sae, unembed, [feature])[0].numpy()
        order = np.argsort(-effects)
        assert entry["pos_str"] == [f"t{i}" for i in order[:10]]
        assert entry["neg_str"] == [f"t{i}" for i in order[::-1][:10]]
        np.testing.assert_allclose(entry["pos_values"], effects[order[:10]], atol=6e-4)
        np.testing.assert_allclose(entry["neg_values"], effects[order[::-1][:10]], atol=6e-4)
        assert 1 <= len(entry["activations"]) <= 3
        for activation in entry["activations"]:
            at = activation["qualifying_token_index"]
            assert len(activation["tokens"]) == len(activation["values"]) <= 5
            rows = [
                row
                for row in range(len(dense))
                if abs(dense[row, feature] - activation["values"][at]) < 0.001 + 1e-6 * dense[row, feature]
            ]
            near = [
                [r for r in range(row - 2, row + 3) if 0 <= r < 51 and sequence[r] == sequence[row]] for row in rows
            ]
            assert activation["tokens"] in [[words[r] for r in context] for context in near]
        strongest = entry["activations"][0]
        assert max(strongest["values"]) == strongest["values"][strongest["qualifying_token_index"]]
        assert strongest["bin_max"] == pytest.approx(dense[:, feature].max(), abs=0.001)
    read = {"neuron_alignment", "correlated_neurons", "correlated_features"}
    for name in read:  # what SAEDashboard's converter asks of every feature
        assert entry[f"{name}_indices"] == entry[f"{name}_l1"] == []
    assert (entry["n_prompts_total"], entry["n_tokens_in_prompt"], entry["dataset"]) == (7, 14, "x.acts")
    assert entry["decoder_weights_dist"] == []


def test_chosen_features_and_a_name_for_neuronpedia(extraction, tmp_path):
    features, sae, _ = extraction
    wb.export_neuronpedia(features, sae, tmp_path, ids=[5, 2, 5], sae_set="res-x", show_progress=False)
    (batch,) = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert batch["sae_set"] == "res-x"
    assert [f["feature_index"] for f in batch["features"]] == [5, 2]
    again = refused(RequestError, lambda: wb.export_neuronpedia(features, sae, tmp_path))
    assert again == f"{tmp_path} already has batches; choose another out"
    text = refused(RequestError, lambda: wb.export_neuronpedia(features, sae, tmp_path / "b", ids=[20]))
    assert text == "ids: the SAE has features 0 to 19, not 20"
    second_sae = load_sae(save_sae(tmp_path / "other", d_in=32, seed=1), device="cpu")
    assert "not with other" in refused(
        RequestError, lambda: wb.export_neuronpedia(features, second_sae, tmp_path / "b")
    )
    for name in ("k", "context", "batch"):
        text = refused(RequestError, lambda n=name: wb.export_neuronpedia(features, sae, tmp_path / "b", **{n: 0}))
        assert text == f"{name} must be a whole number, at least 1, not 0"
