"""An autoencoder reads the rows that it was trained on, or the difference is refused or said in one line."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import planted_store
from refusals import refused
from sae_example import encode64, save_sae, set_weights
from store_example import write_store
from warned import warned

import workbench as wb
from workbench.features.extract import extract_features
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.sae.encode import encoder
from workbench.sae.load import load_sae
from workbench.sae.metrics import sae_metrics
from workbench.store.manifest import ModelRecord, SiteRecord
from workbench.store.reader import open_store

CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
SITES = ["resid_pre.1", "resid_mid.1", "resid_post.2", "attn_out.1", "mlp_out.0", "mlp_post.1"]
IDS = [[5, 6, 7, 8, 9], [10, 11, 12]]


def centred(module):
    """The model after TransformerLens' `center_writing_weights`, done by hand on the weights of GPT-2 and GPT-NeoX."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, part in module.named_parameters():
            if name.endswith(("wte.weight", "wpe.weight", "embed_in.weight", "c_proj.weight", "c_proj.bias")):
                part -= part.mean(-1, keepdim=True)
            elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):  # nn.Linear: (out, in)
                part -= part.mean(0, keepdim=True)
            elif name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
                part -= part.mean()
    return module


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox"])
def pair(request, tiny_models, tmp_path_factory):
    """The same texts recorded from a model, and from the same model with centred weights."""
    folder = tmp_path_factory.mktemp("centred")
    sites = [site for site in SITES if request.param == "gpt2" or not site.startswith("resid_mid")]
    stores = []
    for name, module in (("plain", tiny_models[request.param]), ("centred", centred(tiny_models[request.param]))):
        model = Model(module, None, "tiny")
        out = folder / f"{name}.acts"
        stores.append(wb.record(model, IDS, sites=sites, out=out, dtype="float32", show_progress=False))
    return stores


def test_features_of_centred_weights_are_those_of_the_centred_model(pair, tmp_path):
    plain, centred = pair
    for label in (site.label for site in plain.sites):
        name, width = plain[label].site.name, plain[label].site.shape[0]
        folder = save_sae(tmp_path / label, "jumprelu", d_in=width, hook_name=name, **CENTRED)
        sae = load_sae(folder, device="cpu")
        truth = encode64(folder, centred[label][:].numpy())
        features = extract_features(plain, sae, out=tmp_path / f"{label}.features", show_progress=False)
        np.testing.assert_allclose(features[np.arange(plain.rows)].toarray(), truth, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(sae.encode(plain[label][:]).numpy(), truth, rtol=2e-4, atol=2e-4)
        assert sae.centres == (label != "mlp_post.1")
    uncentred = encode64(folder.parent / "resid_post.2", plain["resid_post.2"][:].numpy())
    assert np.abs(uncentred - encode64(folder.parent / "resid_post.2", centred["resid_post.2"][:].numpy())).max() > 0.01


def test_metrics_of_centred_weights_are_those_of_the_centred_model(pair, tmp_path):
    plain, centred = pair
    width = plain["resid_post.2"].site.shape[0]
    sae = load_sae(save_sae(tmp_path / "one", d_in=width, hook_name=plain["resid_post.2"].site.name, **CENTRED))
    plain_metrics, centred_metrics = sae_metrics(plain, sae, rows="true"), sae_metrics(centred, sae, rows="true")
    assert plain_metrics.explained_variance == pytest.approx(centred_metrics.explained_variance, rel=1e-4)
    assert (plain_metrics.l0, plain_metrics.dead_share) == (centred_metrics.l0, centred_metrics.dead_share)


def test_a_centring_autoencoder_has_a_fingerprint_of_its_own(tmp_path):
    first, second = (
        load_sae(save_sae(tmp_path / name, hook_name="blocks.0.hook_resid_post", **settings), device="cpu")
        for name, settings in (("one", {}), ("other", CENTRED))
    )
    assert first.fingerprint() != second.fingerprint()


# ---- rows that do not follow from the recorded ones -----------------------------------------------------------


ROWS = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    return planted_store(tmp_path / "x.acts", IDS, {"resid_post.1": ROWS, "z.1": ROWS.reshape(8, 2, 4)})


def with_architecture(store, architecture):
    model = replace(store.manifest.model, architecture=architecture)
    assert isinstance(model, ModelRecord)
    return wb.Store(store.path, replace(store.manifest, model=model))


def trained(tmp_path, site="blocks.1.hook_resid_post", **settings):
    return load_sae(save_sae(tmp_path / "one", hook_name=site, **settings), device="cpu")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BloomForCausalLM", "OPTForCausalLM", "Mine"])
def test_centred_weights_of_other_models_are_refused(architecture, store, tmp_path):
    sae = trained(tmp_path, **CENTRED)
    text = refused(RequestError, lambda: sae_metrics(with_architecture(store, architecture), sae, force=True))
    assert text == (
        f"SAE 'one' was trained with center_writing_weights, and the rows of a {architecture} are not known to differ "
        "by their mean alone; record the model with these weights, and remove the setting from its cfg.json"
    )


@pytest.mark.parametrize(
    ("site", "settings", "text"),
    [
        (None, CENTRED, "whose rows of blocks.1.hook_resid_post do not follow from the recorded ones"),
        (
            "blocks.1.attn.hook_z",
            {"hook_head_index": 2},
            "head 2 of z.1 does not exist: a row has the axes head 2, d_head 4",
        ),
        (
            "blocks.1.attn.hook_z",
            {"model_from_pretrained_kwargs": {"fold_value_biases": True}},
            "a model loaded with fold_value_biases, which changes blocks.1.attn.hook_z",
        ),
    ],
)
def test_other_rows_are_refused(site, settings, text, store, tmp_path):
    sae = trained(tmp_path, site, **settings)
    read = "resid_post.1" if site is None else None
    with pytest.raises(RequestError, match=text) as caught:
        extract_features(with_architecture(store, "GPT2LMHeadModel"), sae, read, force=True, show_progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prepend_bos": False}, "trained on sequences without BOS, and those of x.acts begin with it: .*bos='never'"),
        ({"context_size": 4}, "trained on sequences of 4 tokens; 1 rows lie beyond: .*record with context=4"),
        (
            {"context_size": 9, "seqpos_slice": [2, None]},
            r"trained on positions \[2, None\] alone; 4 rows lie at others",
        ),
        ({"context_size": 9, "seqpos_slice": [0, -6]}, r"trained on positions \[0, -6\] alone; 2 rows lie at others"),
        ({"model_from_pretrained_kwargs": {"revision": "step1"}}, "trained on a model loaded with revision='step1'"),
    ],
)
def test_another_training_is_said_in_one_line(settings, text, store, tmp_path):
    with warned(text) as records:
        sae_metrics(store, trained(tmp_path, **settings))
    assert len(records) == 1


def test_sequences_without_the_bos_of_training_are_said(store, tmp_path):
    bare = wb.Store(store.path, replace(store.manifest, tokens_added={"prefix": (), "suffix": ()}))
    with warned("trained on sequences that begin with BOS, and those of x.acts do not: .*record with bos='always'"):
        sae_metrics(bare, trained(tmp_path, prepend_bos=True))


def test_special_tokens_that_were_left_out_are_counted(tmp_path):
    site = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
    store = open_store(write_store(tmp_path / "y.acts", [[7, 9], [12, 3]], sites=(site,)))
    special = int(store.tokens["is_special"].to_numpy().sum())
    with warned(f"trained without special tokens: its features on the {special} special tokens mean nothing"):
        sae_metrics(store, trained(tmp_path, exclude_special_tokens=True))
    assert special == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"prepend_bos": True},
        {"context_size": 5, "seqpos_slice": [None]},
        {"context_size": 5, "seqpos_slice": "all", "exclude_special_tokens": False},
        {"model_from_pretrained_kwargs": {"center_writing_weights": False, "fold_ln": True, "dtype": "bfloat16"}},
        {"model_from_pretrained_kwargs": ["strange"], "context_size": "long", "hook_head_index": None},
    ],
)
def test_the_same_training_is_silent(settings, store, tmp_path):
    assert sae_metrics(store, trained(tmp_path, **settings)).rows == 8


# ---- lost values ----------------------------------------------------------------------------------------------


def lossy(tmp_path, value):
    rows = ROWS.copy()
    rows[3, 2] = value
    return planted_store(tmp_path / "lossy.acts", IDS, {"resid_post.1": rows}, dtype="float16")


def test_rows_that_are_not_finite_are_refused_or_left_out(tmp_path):
    store, sae = lossy(tmp_path, np.nan), trained(tmp_path)
    assert "resid_post.1 has 1 NaN or infinite values in 1 of the 8" in refused(
        RequestError, lambda: sae_metrics(store, sae)
    )
    metrics = sae_metrics(store, sae, allow_nonfinite=True)
    assert metrics.rows == 7
    assert metrics.notes == ("1 row with NaN or infinite values left out (resid_post.1)",)
    assert sae_metrics(store, sae, rows="row <> 3") == sae_metrics(store, sae, rows="row <> 3", allow_nonfinite=True)
    text = refused(DataError, lambda: extract_features(store, sae, show_progress=False))
    assert text.startswith("row 3 of ")
    assert not (store.path / "features").exists()


def test_clipped_values_are_named(tmp_path):
    store, sae = lossy(tmp_path, 1e6), trained(tmp_path)
    assert sae_metrics(store, sae).notes[0].startswith("1 value is clipped to ±65,504 (resid_post.1)")
    with warned("clipped values at resid_post.1: 1, stored as ±65,504; features of their rows are those of the stored"):
        extract_features(store, sae, show_progress=False)


@pytest.mark.parametrize("size", [1e-12, 1e-16, 1e-19, 1e-22, 1e-30, 0.0])
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_rows_of_tiny_norm_have_the_features_of_float32(architecture, size, tmp_path):
    folder = save_sae(tmp_path / "tiny", architecture, d_in=64, d_sae=512, apply_b_dec_to_input=False)
    rng = np.random.default_rng(1)  # one feature in a hundred is active: more would not be screened at all
    set_weights(folder, b_enc=np.zeros(512), W_enc=rng.normal(-0.3, 1, (64, 512)))
    sae = load_sae(folder, device="cpu")
    rows = torch.from_numpy(rng.normal(1, 0.3, (40, 64)).astype(np.float32)) * size
    exact, bounded = (encoder(sae, precision=precision)(rows) for precision in ("float32", "bfloat16"))
    assert bounded.unsettled == (0 if size > 1e-13 else 40)
    assert torch.equal(exact.indptr, bounded.indptr)
    assert torch.equal(exact.feature, bounded.feature)
    torch.testing.assert_close(exact.value, bounded.value, rtol=1e-3, atol=1e-4 * size)
