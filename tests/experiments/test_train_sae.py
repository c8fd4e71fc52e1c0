"""Autoencoders trained from a store: the data they are given, what is written, and that they come to fit."""

from dataclasses import replace

import numpy as np
import pytest
import store_example
import torch
from refusals import refused
from store_example import MODEL, token_table, values, write_store
from warned import warned

import workbench as wb
from workbench.experiments.train_sae import TrainSae, batches, main, train_sae
from workbench.io.errors import DataError, RequestError
from workbench.store.manifest import SiteRecord
from workbench.store.reader import open_store

SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
HEADS = SiteRecord("blocks.1.attn.hook_z", "z.1", ("row", "head", "d_head"), (2, 4), "float16")
SMALL = TrainSae(site="resid_post.1", d_sae=16, k=3, steps=40, batch=16, learning_rate=1e-2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(write_store(tmp_path_factory.mktemp("s") / "x.acts", [[40], [30, 20]], sites=(SITE, HEADS)))


def test_every_row_is_given_once_an_epoch_and_nothing_else(store):
    rows = store.where("NOT is_special").ids
    draw = batches(store["resid_post.1"], rows, replace(SMALL, batch=29))
    assert len(rows) == 87
    first, second = (torch.cat([next(draw) for _ in range(3)]).numpy() for _ in range(2))
    expected = values(SITE, 0, 90)[rows]
    for epoch in (first, second):
        assert np.array_equal(epoch[np.lexsort(epoch.T)], expected[np.lexsort(expected.T)])
    assert not np.array_equal(first, second)
    special = token_table([40, 30, 20])["is_special"].to_numpy(zero_copy_only=False)
    assert not set(rows) & set(np.flatnonzero(special))


@pytest.mark.parametrize(
    ("change", "saved"),
    [
        ({}, "topk"),
        ({"architecture": "batchtopk"}, "jumprelu"),
        ({"architecture": "standard", "k": None, "l1_coefficient": 0.1}, "standard"),
        ({"architecture": "jumprelu", "k": None, "l0_coefficient": 0.1}, "jumprelu"),
        ({"architecture": "gated", "k": None}, "gated"),
        ({"site": "z.1"}, "topk"),
    ],
)
def test_what_is_trained_fits_better_than_at_first_and_loads(store, tmp_path, change, saved):
    settings = replace(SMALL, **change)
    errors = []
    for steps in (1, 40):
        folder = tmp_path / str(steps)
        train_sae(replace(settings, steps=steps), store).save_inference_model(str(folder))
        sae = wb.load_sae(folder, device="cpu")
        assert (sae.architecture, sae.d_sae, sae.d_in) == (saved, 16, 8)
        assert (sae.site, sae.model_name, sae.context_size) == (store[settings.site].name, MODEL.name, 8)
        x = store[settings.site][store.where("NOT is_special")].float().flatten(1)
        errors.append(float((x - sae.decode(sae.encode(x))).square().sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("architecture", ["topk", "standard", "gated", "jumprelu"])
def test_the_bias_of_the_decoder_starts_at_the_mean_activation(store, architecture):
    """Inputs are scaled in training: a mean in the units of the store would become another one when weights are."""
    settings = replace(SMALL, architecture=architecture, k=3 if architecture == "topk" else None)
    settings = replace(settings, steps=1, learning_rate=1e-9)
    rows = values(SITE, 0, 90)[store.where("NOT is_special").ids].astype(np.float64)
    bias = train_sae(settings, store).b_dec.detach().numpy()
    np.testing.assert_allclose(bias, rows.mean(0), rtol=1e-4, atol=1e-5)
    assert abs(np.linalg.norm(rows, axis=1).mean() - 8**0.5) > 10  # another scale than that of training


def test_the_seed_decides_the_weights_and_every_setting_matters(store):
    def weights(**change):
        return train_sae(replace(SMALL, **{"steps": 3, **change}), store).W_enc.detach()

    first = weights()
    assert torch.equal(first, weights())
    dead = {"dead_feature_window": 1, "d_sae": 64, "k": 1, "steps": 14}
    losses = [weights(**dead, aux_loss=name) for name in ("architecture", "zipf", "none")]
    assert not any(torch.equal(losses[a], losses[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(losses[1], weights(**dead, aux_loss="zipf"))
    for change in ({"seed": 1}, {"k": 2}, {"learning_rate": 1e-3}, {"batch": 17}, {"where": "position > 5"}):
        assert not torch.equal(first, weights(**change)), change


def test_checkpoints_are_saelens_own(store, tmp_path):
    settings = "--site resid_post.1 --d-sae 16 --k 3 --steps 30 --batch 16 --checkpoints 2"
    with pytest.raises(SystemExit) as stopped:
        main([str(store.path), "--out", str(tmp_path / "sae"), *settings.split()])
    assert stopped.value.code == 0
    saved = sorted((tmp_path / "sae" / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    assert len(saved) == 2
    from sae_lens import TrainingSAE

    assert TrainingSAE.load_from_disk(saved[0]).cfg.k == 3
    assert wb.load_sae(tmp_path / "sae", device="cpu").architecture == "topk"
    sae = wb.load_sae(tmp_path / "sae", device="cpu")
    with warned("trained on sequences of 8 tokens"):  # the planted sequences are longer than the store's context
        assert wb.extract_features(store, sae, show_progress=False).shape[1] == 16


def test_wrong_requests(store, tmp_path, capsys):
    for change, message in (
        ({"l1_coefficient": 1.0}, "l1_coefficient is not a setting of a topk SAE; leave it out"),
        (
            {"architecture": "standard", "k": None, "aux_loss": "zipf"},
            "aux_loss 'zipf' is for topk and batchtopk, not ",
        ),
        ({"architecture": "gated", "k": None, "aux_loss": "none"}, "aux_loss is not a setting of a gated SAE; "),
        ({"batch": 88}, "batch is 88 and 'NOT is_special' selects 87 tokens; give less"),
        ({"site": "resid_post.0"}, f"resid_post.0 is not recorded in {store.path}; recorded are "),
    ):
        assert refused(RequestError, lambda change=change: train_sae(replace(SMALL, **change), store)).startswith(
            message
        )
    (tmp_path / "diary").touch()
    with pytest.raises(SystemExit) as stopped:
        main([str(store.path), "--out", str(tmp_path), "--site", "resid_post.1"])
    assert stopped.value.code == 2
    message = f"workbench: --out {str(tmp_path)!r} exists and is not empty; choose another folder\n"
    assert capsys.readouterr().err == message
    with pytest.raises(SystemExit) as stopped:
        main([str(store.path), "--out", str(tmp_path / "diary"), "--site", "resid_post.1"])
    assert (stopped.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number, at least 1, not 0"),
        ({"k": 17}, "k must be a whole number, from 1 to 16, not 17"),
        ({"k": 0}, "k must be a whole number, from 1 to 16, not 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0 and finite, not -1.0"),
        ({"checkpoints": -1}, "checkpoints must be a whole number, at least 0, not -1"),
        ({"l0_coefficient": float("nan")}, "l0_coefficient must be at least 0 and finite, not nan"),
    ],
)
def test_settings_out_of_range_are_refused_before_training(change, message):
    assert refused(RequestError, lambda: replace(SMALL, **change)) == message


@pytest.mark.parametrize(
    ("number", "settings", "message"),
    [
        (np.nan, {}, "the rows of resid_post.1 have the mean norm nan, by which inputs are divided; give a where that"),
        (
            0.0,
            {},
            "the rows of resid_post.1 have the mean norm 0, by which inputs are divided; give a where that leaves",
        ),
        (None, {"learning_rate": 1e38}, "training of resid_post.1 ended in "),
    ],
)
def test_an_autoencoder_with_nan_is_never_returned(tmp_path, monkeypatch, number, settings, message):
    if number is not None:
        monkeypatch.setattr(store_example, "values", lambda site, first, rows: np.full((rows, 8), number, np.float32))
    store = open_store(write_store(tmp_path / "x.acts", [[40]], sites=(SITE,)))
    error = refused(DataError, lambda: train_sae(replace(SMALL, **settings), store))
    assert error.startswith(message)
