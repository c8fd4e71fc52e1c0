"""Extraction of sparse features: equal to the autoencoder's encode, on a matching site, under a free name."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from features_example import HEADS, ROWS, SEGMENTS, SITE, extracted, loaded
from refusals import refused
from sae_example import ARCHITECTURES, encode64, save_sae, set_weights
from safetensors.numpy import load_file
from store_example import BRAIN, HALF, MODEL, part_of, values, write_segment, write_store, writing
from warned import warned

from workbench.features import encoding
from workbench.features.extract import extract_features, matching_site
from workbench.features.feature_store import open_features
from workbench.io.errors import RequestError
from workbench.sae.encode import Encoder
from workbench.sae.load import load_sae
from workbench.sae.metrics import sae_metrics
from workbench.store.reader import open_store


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_equal_saelens(architecture, example, tmp_path):
    sae = loaded(tmp_path / "sae", architecture)
    encoded = extracted(example, sae, out=tmp_path / "f", batch_rows=4)[:].toarray()
    with torch.no_grad():
        dense = sae.module.encode(torch.from_numpy(values(SITE, 0, ROWS))).numpy()
    assert 0 < (dense != 0).sum() < dense.size
    assert np.array_equal(encoded != 0, dense != 0)
    np.testing.assert_allclose(encoded, dense, rtol=1e-5, atol=1e-5)
    if architecture != "matching_pursuit":
        np.testing.assert_allclose(encoded, encode64(tmp_path / "sae", values(SITE, 0, ROWS)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_rows", [1, 13, None])
def test_a_temporal_autoencoder_reads_whole_sequences(batch_rows, example, tmp_path, monkeypatch):
    """Wherever blocks and segments would end by themselves, they end where a sequence does."""
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 20)
    sae = loaded(tmp_path / "sae", "temporal")
    encoded = extracted(example, sae, out=tmp_path / "f", batch_rows=batch_rows)[:].toarray()
    x = torch.from_numpy(values(SITE, 0, ROWS))
    with torch.no_grad():
        dense = torch.cat(
            [sae.module.encode(part[None])[0] for part in x.split([n for part in SEGMENTS for n in part])]
        ).numpy()
    assert np.array_equal(encoded != 0, dense != 0)
    np.testing.assert_allclose(encoded, dense, rtol=1e-5, atol=1e-5)
    text = refused(RequestError, lambda: sae_metrics(example, sae))
    assert text == "SAE 'sae' is temporal: its features alone do not reconstruct a row"


def test_special_rows_are_extracted_too(features, example):
    special = example.where("is_special")
    assert len(special) == 7
    assert (np.diff(features[special].indptr) > 0).all()


def test_heads_are_flattened(example, tmp_path):
    sae = loaded(tmp_path / "sae", hook_name=HEADS.name, reshape_activations="hook_z")
    flat = load_sae(save_sae(tmp_path / "flat", hook_name=HEADS.name), device="cpu")
    expected = encode64(tmp_path / "sae", values(HEADS, 0, ROWS).reshape(ROWS, 8).astype(np.float32))
    for encoder_of in (sae, flat):
        features = extracted(example, encoder_of, ("z", 1), out=tmp_path / f"of-{encoder_of.name}")
        np.testing.assert_allclose(features[:].toarray(), expected, rtol=1e-4, atol=1e-4)


def test_blocks_have_the_requested_number_of_rows(example, sae, tmp_path, monkeypatch):
    sizes = []
    plain = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, x, *rest: sizes.append(len(x)) or plain(self, x, *rest))
    extracted(example, sae, out=tmp_path / "one", batch_rows=20)
    assert sizes == [20, 20, 11]
    sizes.clear()
    monkeypatch.setattr(Encoder, "block_rows", 8)
    extracted(example, sae, out=tmp_path / "two")
    assert sizes == [32, 19]


def test_float16_keeps_the_support_and_counts_what_overflows(example, tmp_path):
    sae = loaded(tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    scale = np.ones(20, np.float32)
    scale[:2] = 1e-9, 1e5  # feature 0 rounds to zero, feature 1 is beyond float16
    set_weights(tmp_path / "sae", W_enc=weights["W_enc"] * scale, b_enc=weights["b_enc"] * scale)
    sae = load_sae(tmp_path / "sae", device="cpu")
    whole = extracted(example, sae, out=tmp_path / "whole")
    beyond = int((whole[:].toarray() > 65504).sum())
    assert beyond > 5
    with warned(rf"^{beyond} activations are beyond the range of float16 and stored as its larg"):
        half = extracted(example, sae, out=tmp_path / "half", dtype="float16")
    assert (half.record.overflow, whole.record.overflow) == (beyond, 0)
    expected = np.minimum(whole[:].toarray(), 65504).astype(np.float16)
    assert np.array_equal(half[:].toarray(), expected.astype(np.float32))
    assert np.array_equal(half[:].indices, whole[:].indices)
    assert (expected[:, 0] == 0).all()
    assert half.counts[0] == whole.counts[0] > 0
    assert half.rows_of(0)[1].dtype == np.float16
    assert half[:].dtype == np.float32
    with warned("beyond the range of float16"):
        extracted(example, sae, out=tmp_path / "strict", dtype="float16")
    assert open_features(tmp_path / "strict", example).record == replace(
        half.record, store=os.path.relpath(example.path, tmp_path / "strict")
    )


def test_the_default_name_is_made_of_the_site_and_the_sae(store, tmp_path):
    sae = replace(loaded(tmp_path / "sae"), name="release/blocks.1 id")
    assert extracted(store, sae).path.name == "resid_post.1-release-blocks.1-id"


def test_progress_is_shown_unless_turned_off(example, sae, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("workbench.io.progress.EVERY", 0.0)
    extract_features(example, sae, out=tmp_path / "said", batch_rows=30)
    assert "extracting features: 30 of 51 rows" in capsys.readouterr().err
    extracted(example, sae, out=tmp_path / "unsaid", batch_rows=30)
    assert capsys.readouterr().err == ""


def test_the_sae_finds_its_own_site(example, tmp_path):
    for hook_name in (SITE.name, "blocks.2.hook_resid_pre", "resid_post.1"):
        sae = loaded(tmp_path / hook_name, hook_name=hook_name)
        assert matching_site(example, sae).name == SITE.name
        assert matching_site(example, sae, "resid_post.1").name == SITE.name


def test_two_names_of_one_model_agree(tmp_path):
    named = replace(MODEL, name="openai-community/gpt2")
    store = open_store(write_store(tmp_path / "x.acts", [[4]], sites=(SITE,), model=named))
    for model_name in ("gpt2-small", "gpt2", "GPT2", "openai-community/gpt2"):
        assert matching_site(store, loaded(tmp_path / "sae", model_name=model_name)).name == SITE.name
    refused(RequestError, lambda: matching_site(store, loaded(tmp_path / "sae", model_name="gpt2-medium")))


@pytest.mark.parametrize(
    ("settings", "site", "message"),
    [
        ({"d_in": 7}, None, "SAE 'sae' reads rows of width 7, but resid_post.1 of {store} has 8"),
        (
            {"hook_name": "blocks.0.hook_resid_post"},
            "resid_post.1",
            "SAE 'sae' was trained on blocks.0.hook_resid_post, but site is blocks.1.hook_resid_post; leave site out, "
            "or give force=True",
        ),
        (
            {"model_name": "gpt2-small"},
            None,
            "SAE 'sae' was trained on the model gpt2-small, but {store} was recorded from demo; if they are the same",
        ),
        ({"hook_name": None}, None, "site: the files of SAE 'sae' do not record its site; give site="),
        (
            {"hook_name": "blocks.5.hook_mlp_out"},
            None,
            "blocks.5.hook_mlp_out is not recorded in {store}; recorded are",
        ),
    ],
)
def test_a_mismatch_of_sae_and_site_is_refused(settings, site, message, example, tmp_path):
    sae = loaded(tmp_path / "sae", **settings)
    text = refused(RequestError, lambda: extracted(example, sae, site, out=tmp_path / "f"))
    assert text.startswith(message.format(store=example.path))
    assert not (tmp_path / "f").exists()


def test_force_allows_another_site_and_model_but_no_other_width(example, tmp_path):
    of_block_0 = loaded(tmp_path / "sae", hook_name="blocks.0.hook_resid_post", model_name="gpt2-small")
    assert extracted(example, of_block_0, "resid_post.1", force=True, out=tmp_path / "f").record.site == SITE.name
    wide = loaded(tmp_path / "wide", d_in=9)
    assert "reads rows of width 9" in refused(RequestError, lambda: extracted(example, wide, force=True))
    unsaid = loaded(tmp_path / "unsaid", hook_name=None, model_name=None)
    assert matching_site(example, unsaid, "resid_post.1").name == SITE.name


def test_features_are_written_into_the_store_by_default(store, sae):
    before = store.verify()
    features = extracted(store, sae)
    assert features.path == store.path / "features" / "resid_post.1-topk"
    assert extracted(store, sae, name="mine").path == store.path / "features" / "mine"
    assert sorted(path.name for path in features.path.iterdir()) == [
        "by_feature.safetensors",
        "by_row.safetensors",
        "features.json",
    ]
    assert store.verify().equals(before)


def test_the_same_features_are_opened_and_not_made_again(store, sae, tmp_path, monkeypatch):
    first = extracted(store, sae)
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded again"))
    again = extracted(store, sae, batch_rows=3)
    assert (again.path, again.record) == (first.path, first.record)
    assert again.store is store


def test_other_features_of_that_name_are_refused(store, sae, tmp_path):
    first = extracted(store, sae, name="mine")
    second = loaded(tmp_path / "other", seed=1)
    sums = first.record.sae.fingerprint[:12], second.fingerprint()[:12]
    assert refused(RequestError, lambda: extracted(store, second, name="mine")) == (
        f"features mine exist and differ: SAE is topk ({sums[0]}), requested is other ({sums[1]}); choose another name"
    )
    text = refused(RequestError, lambda: extracted(store, sae, "z.1", force=True, name="mine", dtype="float16"))
    assert f"site is {SITE.name}, requested is {HEADS.name}; dtype is float32, requested is float16" in text
    with writing(store.path, sites=(SITE, HEADS)) as writer:
        writer.begin(part_of([[4]]), append=True)
        write_segment(writer, [4])
    longer = open_store(store.path)
    assert " of 51 rows, requested is " in refused(RequestError, lambda: extracted(longer, sae, name="mine"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b"}, "name 'a/b' cannot be a folder; use letters, digits, '_', '.' and '-' only"),
        ({"name": "a", "out": "b"}, "give name, a folder in the store, or out, a folder anywhere, but not both"),
        ({"dtype": "bfloat16"}, "dtype must be one of float32, float16, not 'bfloat16'"),
        ({"batch_rows": 0}, "batch_rows must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(store, sae, settings, message):
    assert refused(RequestError, lambda: extracted(store, sae, **settings)) == message


def test_a_folder_of_something_else_is_left_alone(store, sae, tmp_path):
    (tmp_path / "mine").mkdir()
    assert len(extracted(store, sae, out=tmp_path / "mine")) == 51  # empty: nothing to lose
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today").touch()
    text = refused(RequestError, lambda: extracted(store, sae, out=tmp_path / "diary"))
    assert text == f"{tmp_path / 'diary'} exists and is not a folder of features; choose another name or out"


def test_a_store_without_rows_has_no_features(tmp_path, sae):
    store = open_store(write_store(tmp_path / "x.acts", [], sites=(SITE,)))
    features = extracted(store, sae)
    assert (features.shape, features[:].shape, features.counts.sum()) == ((0, 20), (0, 20), 0)
    assert features.max.sum() == features.mean.sum() == 0
    assert len(features.top(3)) == 0


def test_bfloat16_sites_can_be_read(tmp_path):
    """Their patterns stand for any bfloat16 site: eight numbers a row, two heads of four."""
    store = open_store(write_store(tmp_path / "x.acts", [[9]], sites=(BRAIN, HALF)))
    sae = loaded(tmp_path / "sae", hook_name=BRAIN.name)
    x = (values(BRAIN, 0, 9).astype(np.uint32) << 16).view(np.float32).reshape(9, 8)
    np.testing.assert_allclose(extracted(store, sae)[:].toarray(), encode64(tmp_path / "sae", x), rtol=1e-4, atol=1e-4)
