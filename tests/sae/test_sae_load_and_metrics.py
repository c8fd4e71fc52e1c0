"""Loading autoencoders, what they say of themselves, and how well they fit: against NumPy and plain forward passes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused
from sae_example import ARCHITECTURES, edit_config, encode64, save_sae, set_weights
from safetensors.numpy import load_file
from store_example import values, write_store
from warned import warned

import workbench as wb
from workbench import embedded
from workbench.io.errors import DataError, RequestError
from workbench.model.forward import run
from workbench.model.interventions import splice
from workbench.model.load import Model
from workbench.sae import metrics
from workbench.sae.load import load_sae
from workbench.sae.metrics import SplicedLoss, sae_metrics
from workbench.store import SiteRecord, open_store

X = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32) + 1
SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
TEXTS = ["Once upon a time the little day was Monday", "Monday and Tuesday was the day to Once upon a time", "the"]


# ---- loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_sae_is_loaded_as_it_was(architecture, tmp_path):
    from sae_lens import SAE

    about = {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2-small", "context_size": 64}
    folder = save_sae(tmp_path / "one", architecture, dtype="bfloat16", **about)
    sae = load_sae(folder, device="cpu")
    inference = "jumprelu" if architecture == "batchtopk" else architecture
    assert (sae.name, sae.d_in, sae.d_sae, sae.architecture) == ("one", 8, 20, inference)
    assert (sae.site, sae.model_name, sae.context_size) == tuple(about.values())
    assert repr(sae) == f"Sae('one', {inference}, 8 -> 20, blocks.3.hook_resid_post, cpu)"
    assert (sae.module.training, sae.W_dec.dtype, sae.W_dec.shape) == (False, torch.float32, (20, 8))
    plain = SAE.load_from_disk(folder, dtype="float32")
    with torch.no_grad():
        expected = plain.encode(torch.from_numpy(X))
        reconstructed = plain.decode(expected)
    assert torch.equal(sae.encode(torch.from_numpy(X)), expected)
    assert torch.equal(sae.decode(expected), reconstructed)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {"apply_b_dec_to_input": False}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("topk", {"k": 5}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_settings_that_change_the_mathematics_are_honoured(architecture, settings, tmp_path):
    plain, changed = (save_sae(tmp_path / name, architecture) for name in ("plain", "changed"))
    edit_config(changed, **settings)
    sae = load_sae(changed, device="cpu")
    found = sae.encode(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found, encode64(changed, X), rtol=1e-4, atol=1e-4)
    assert not np.allclose(found, encode64(plain, X), atol=1e-2)
    assert sae.fingerprint() != load_sae(plain, device="cpu").fingerprint()


def test_layer_norm_is_undone_by_decode(tmp_path):
    sae = load_sae(save_sae(tmp_path / "one", normalize_activations="layer_norm"), device="cpu")
    weights = load_file(tmp_path / "one" / "sae_weights.safetensors")
    found = sae.decode(sae.encode(torch.from_numpy(X))).numpy()
    spread = X.std(1, ddof=1, keepdims=True)
    expected = (encode64(tmp_path / "one", X) @ weights["W_dec"] + weights["b_dec"]) * spread + X.mean(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_heads_come_flat_and_so_do_reconstructions(tmp_path):
    folder = save_sae(tmp_path / "one", reshape_activations="hook_z", hook_name="blocks.0.attn.hook_z")
    sae = load_sae(folder, device="cpu")
    heads = torch.from_numpy(X).reshape(30, 2, 4)
    np.testing.assert_allclose(sae.encode(heads).numpy(), encode64(folder, X), rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.encode(heads), sae.encode(torch.from_numpy(X)))
    assert sae.decode(sae.encode(heads)).shape == (30, 8)
    assert torch.equal(sae.encode(heads.half()), sae.encode(heads.half().float()))


def test_a_file_that_says_nothing_is_asked_nothing(tmp_path):
    sae = load_sae(save_sae(tmp_path / "one"), device="cpu")
    assert (sae.site, sae.model_name, sae.context_size) == (None, None, None)
    assert repr(sae) == "Sae('one', standard, 8 -> 20, cpu)"


def test_files_from_before_saelens_6_are_read(tmp_path):
    """Then everything lay on one level, under other names."""
    folder = save_sae(tmp_path / "old")
    old = {"hook_point": "blocks.2.hook_resid_pre", "model_name": "gpt2-small", "activation_fn_str": "relu"}
    edit_config(folder, remove=("metadata", "architecture"), l1_coefficient=1e-3, **old)
    sae = load_sae(folder, device="cpu")
    assert (sae.site, sae.model_name) == ("blocks.2.hook_resid_pre", "gpt2-small")
    np.testing.assert_allclose(
        sae.encode(torch.from_numpy(X)).numpy(), encode64(save_sae(tmp_path / "n"), X), atol=1e-4
    )


def test_a_fingerprint_is_that_of_the_mathematics(tmp_path):
    first = load_sae(save_sae(tmp_path / "one", "topk"), device="cpu").fingerprint()
    same = save_sae(tmp_path / "two", "topk", hook_name="blocks.0.hook_resid_post", model_name="demo")
    assert load_sae(same, device="cpu").fingerprint() == first
    other = load_sae(save_sae(tmp_path / "three", "topk", seed=1), device="cpu").fingerprint()
    b_dec = load_file(same / "sae_weights.safetensors")["b_dec"]
    b_dec[3] += 1e-6
    changed = load_sae(set_weights(same, b_dec=b_dec), device="cpu").fingerprint()
    assert len({first, other, changed}) == 3


def test_one_of_several_is_chosen_by_its_folder(tmp_path):
    for name in ("layer_0", "layer_1"):
        save_sae(tmp_path / "all" / name, seed=len(name), hook_name=f"blocks.{name[-1]}.hook_resid_post")
    assert load_sae(tmp_path / "all", "layer_1", device="cpu").site == "blocks.1.hook_resid_post"
    assert load_sae(str(tmp_path / "all"), "layer_0", device="cpu").name == "layer_0"
    place = str(tmp_path / "all")
    assert refused(RequestError, lambda: load_sae(place)) == (
        f"SAE {place!r} holds several; give one as sae_id: layer_0, layer_1"
    )
    assert refused(RequestError, lambda: load_sae(place, "layer_7")) == (
        f"sae_id 'layer_7': no such folder in {place!r}; nearest: layer_1, layer_0"
    )


def test_what_is_not_there_is_refused_before_saelens_is_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sae_lens", None)
    save_sae_folder = tmp_path / "gelu-sae"
    save_sae_folder.mkdir()
    assert refused(RequestError, lambda: load_sae(str(tmp_path / "gelu-seä"), device="cpu")) == (
        f"SAE {str(tmp_path / 'gelu-seä')!r}: no such directory; nearest: gelu-sae"
    )
    assert refused(RequestError, lambda: load_sae(tmp_path / "zzz")).endswith("zzz': no such directory")
    assert refused(RequestError, lambda: load_sae("")).startswith("SAE '': no such directory")
    (save_sae_folder / "readme").touch()
    assert refused(RequestError, lambda: load_sae(save_sae_folder)) == (
        f"SAE {str(save_sae_folder)!r} is a directory without cfg.json; it holds readme"
    )
    assert refused(RequestError, lambda: load_sae(save_sae_folder / "readme")) == (
        f"SAE {str(save_sae_folder / 'readme')!r} is a file; give the folder that holds cfg.json and sae_weights."
        "safetensors"
    )
    assert refused(RequestError, lambda: load_sae(save_sae_folder, device="abacus")).startswith(
        "device 'abacus' cannot"
    )


def test_damaged_and_misspelt_files_are_refused(tmp_path):
    folder = save_sae(tmp_path / "one", "topk")

    def text(kind=DataError, **changes) -> str:
        copied = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        return refused(kind, lambda: load_sae(edit_config(copied, **changes), device="cpu")).removeprefix(
            str(copied / "cfg.json")
        )

    assert text(d_sae="20") == ": d_sae is '20', expected a whole number above 0"
    assert text(remove=("k",)) == ": k is missing, and SAELens would take 100 for it"
    assert text(remove=("d_in",)) == ": d_in is None, expected a whole number above 0"
    unknown = ": SAELens knows no 'rescale_act_by_decoder_norm' of a topk SAE and would ignore it"
    assert text(rescale_act_by_decoder_norm=True) == f"{unknown}; nearest: rescale_acts_by_decoder_norm"
    assert text(RequestError, architecture="topq").startswith(": architecture 'topq' has no inference form in SAELens;")
    assert text(RequestError, architecture="batchtopk").endswith("; save it with save_inference_model")
    assert "cfg.json and sae_weights.safetensors do not fit: " in text(d_sae=21)
    assert "do not fit: normalize_activations must be" in text(normalize_activations="batch")
    weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert refused(DataError, lambda: load_sae(folder)).startswith(f"{weights} is missing or damaged: ")
    weights.unlink()
    assert refused(DataError, lambda: load_sae(folder)).startswith(f"{weights} is missing or damaged: ")
    config.write_text("{")
    assert refused(DataError, lambda: load_sae(folder)).startswith(f"{config} cannot be read: ")
    config.write_text("[]")
    assert refused(DataError, lambda: load_sae(folder)) == f"{config} is not a JSON object"


@pytest.mark.parametrize("way", ["expected_average_only_in", "covariance_whitening"])
def test_a_normalisation_that_the_files_lack_is_warned_of(way, tmp_path):
    folder = save_sae(tmp_path / "one", normalize_activations=way)
    with warned(rf"^SAE 'one' was trained on inputs under {way}, which its files do not hold"):
        load_sae(folder, device="cpu")


def test_a_release_is_fetched_only_when_it_exists(tmp_path, monkeypatch):
    from sae_lens import SAE

    folder, asked = save_sae(tmp_path / "one"), []

    def fetched(release, sae_id, **options):
        asked.append((release, sae_id, options))
        return SAE.load_from_disk(folder)

    monkeypatch.setattr(SAE, "from_pretrained", fetched)
    monkeypatch.chdir(tmp_path)
    sae = load_sae("gpt2-small-res-jb", "blocks.3.hook_resid_pre", device="cpu")
    assert sae.name == "gpt2-small-res-jb/blocks.3.hook_resid_pre"
    assert asked == [("gpt2-small-res-jb", "blocks.3.hook_resid_pre", {"device": "cpu", "dtype": "float32"})]
    text = refused(RequestError, lambda: load_sae("gpt2-small-res-jp", "blocks.3.hook_resid_pre"))
    assert text.startswith(
        "SAE 'gpt2-small-res-jp' is no directory here and no release that SAELens lists; nearest: gpt2"
    )
    text = refused(RequestError, lambda: load_sae("gpt2-small-res-jb", "blocks.33.hook_resid_pre"))
    assert text.startswith(
        "sae_id 'blocks.33.hook_resid_pre' is none of the 13 of release 'gpt2-small-res-jb'; nearest: "
    )
    text = refused(RequestError, lambda: load_sae("gpt2-small-res-jb"))
    assert text == (
        "sae_id None is none of the 13 of release 'gpt2-small-res-jb'; it has blocks.0.hook_resid_pre, "
        "blocks.1.hook_resid_pre, blocks.2.hook_resid_pre, ..."
    )
    assert len(asked) == 1

    def offline(*_arguments, **_options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(SAE, "from_pretrained", offline)
    text = refused(RequestError, lambda: load_sae("gpt2-small-res-jb", "blocks.3.hook_resid_pre"))
    assert text == "SAE gpt2-small-res-jb/blocks.3.hook_resid_pre cannot be fetched or read: no route to the hub"


def test_demo_is_the_embedded_one(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "SAE", tmp_path / "embedded" / "sae")
    assert refused(DataError, lambda: load_sae("demo")) == (
        "SAE 'demo': this installation lacks the embedded autoencoder; install the workbench again"
    )
    save_sae(tmp_path / "embedded" / "sae", d_sae=33)
    sae = load_sae("demo", device="cpu")
    assert (sae.name, sae.d_sae) == ("demo", 33)


# ---- how well it fits a store -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Seven sequences; the first row of each, a special token, is 100 times as large as it was."""
    store = open_store(write_store(tmp_path_factory.mktemp("m") / "x.acts", [[7, 9], [12, 3, 1, 14, 5]], sites=(SITE,)))
    special = store.tokens["is_special"].to_numpy()
    for index, (first, last) in enumerate(((0, 16), (16, 51))):
        file = store.path / "segments" / f"0000{index}" / SITE.file
        rows = values(SITE, first, last - first) * np.where(special[first:last], 100, 1)[:, None]
        data = file.read_bytes()
        file.write_bytes(data[: -rows.size * 4] + rows.astype(np.float32).tobytes())
    return store


def fit64(folder, x: np.ndarray) -> tuple[float, float, float]:
    """L0, explained variance, dead share in float64 NumPy."""
    weights = load_file(folder / "sae_weights.safetensors")
    latents = encode64(folder, x)
    error = x - (latents @ weights["W_dec"].astype(np.float64) + weights["b_dec"])
    active = latents != 0
    return active.sum(1).mean(), 1 - (error**2).sum() / ((x - x.mean(0)) ** 2).sum(), 1 - active.any(0).mean()


@pytest.mark.parametrize("block", [None, 6])
@pytest.mark.parametrize("rows", [None, "true", "position BETWEEN 1 AND 3"])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_metrics_are_numpys(architecture, rows, block, store, tmp_path, monkeypatch):
    folder = save_sae(tmp_path / "one", architecture, hook_name=SITE.name)
    b_enc = load_file(folder / "sae_weights.safetensors")["b_enc"]
    b_enc[:4] = -1e5  # dead
    sae = load_sae(set_weights(folder, b_enc=b_enc), device="cpu")
    if block:
        monkeypatch.setattr(metrics, "block_rows", lambda _sae: block)
    chosen = store.where("NOT is_special" if rows is None else rows)
    found = sae_metrics(store, sae, rows=rows)
    l0, explained, dead = fit64(folder, chosen["resid_post", 1].double().numpy())
    assert (found.rows, found.loss) == (len(chosen), None)
    assert found.l0 == pytest.approx(l0, rel=1e-12)
    assert found.explained_variance == pytest.approx(explained, rel=1e-4)
    assert found.dead_share == pytest.approx(dead, abs=1e-12)
    assert dead > 0.19
    assert found == sae_metrics(store, sae, "resid_post.1", rows=chosen)


def test_the_mean_explains_nothing_and_the_rows_themselves_all(store, tmp_path):
    x = store.where("NOT is_special")["resid_post", 1].double().numpy()
    folder = save_sae(tmp_path / "mean", hook_name=SITE.name)
    sae = load_sae(set_weights(folder, W_dec=np.zeros((20, 8)), b_dec=x.mean(0)), device="cpu")
    assert sae_metrics(store, sae).explained_variance == pytest.approx(0, abs=1e-6)
    exact = sae_metrics(store, identity_sae(tmp_path / "same", 8, SITE.name))
    assert exact.explained_variance == pytest.approx(1, abs=1e-12)
    assert exact.l0 == pytest.approx((x != 0).sum(1).mean())


def test_rows_that_are_all_the_same_have_no_variance(store, tmp_path):
    sae = identity_sae(tmp_path / "same", 8, SITE.name)
    assert np.isnan(sae_metrics(store, sae, rows="row = 3").explained_variance)


def identity_sae(folder, d: int, hook_name: str, scale: float = 1.0):
    """Two features an axis, one for each sign: its reconstruction is `scale` times its input."""
    save_sae(folder, d_in=d, d_sae=2 * d, apply_b_dec_to_input=False, hook_name=hook_name)
    both = np.concatenate([np.eye(d), -np.eye(d)])
    return load_sae(
        set_weights(folder, W_enc=both.T, W_dec=scale * both, b_enc=np.zeros(2 * d), b_dec=np.zeros(d)), device="cpu"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": "position > 99"}, "rows: none of the 51 of {store} is selected"),
        ({"site": "resid_post.7"}, "resid_post.7 is not recorded in {store}; recorded are 1: resid_post.1"),
    ],
)
def test_metrics_of_nothing_are_refused(settings, message, store, tmp_path):
    sae = load_sae(save_sae(tmp_path / "one", hook_name=SITE.name), device="cpu")
    text = refused(RequestError, lambda: sae_metrics(store, sae, **settings))
    assert text.startswith(message.format(store=store.path))


def test_a_sae_of_another_site_needs_force(store, tmp_path):
    sae = load_sae(save_sae(tmp_path / "one", hook_name="blocks.0.hook_resid_post"), device="cpu")
    assert "was trained on blocks.0" in refused(RequestError, lambda: sae_metrics(store, sae, "resid_post.1"))
    assert sae_metrics(store, sae, "resid_post.1", force=True).rows == 44


def test_a_transcoder_is_refused(store, tmp_path):
    folder = save_sae(tmp_path / "one", "transcoder", d_out=5, apply_b_dec_to_input=False, hook_name=SITE.name)
    sae = load_sae(folder, device="cpu")
    np.testing.assert_allclose(sae.encode(torch.from_numpy(X)).numpy(), encode64(folder, X), rtol=1e-4, atol=1e-4)
    text = refused(RequestError, lambda: sae_metrics(store, sae))
    assert text == "SAE 'one' is a transcoder: what it writes is not what it reads"


# ---- what the model loses ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["gpt2"], tiny_tokenizer, "tiny-gpt2")


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    sites = ("resid_pre.1", "resid_post.0", "mlp_out.0", "resid_mid.0", "z.0")
    out = tmp_path_factory.mktemp("recorded") / "x.acts"
    return wb.record(model, TEXTS, out=out, sites=sites, bos="always", dtype="float32", context=12, show_progress=False)


def losses_by_hand(model, store, change, counted=None) -> np.ndarray:
    """Cross-entropies of every following token, GPT-2 run block by block without hooks, `change` applied to the rows of
    text after block 0; one sequence at a time, in float64 from the logits on."""
    body, found = model.module.transformer, []
    for _, part in store.tokens.to_pandas().groupby("sequence"):
        ids = torch.tensor(part["token_id"].to_numpy(), dtype=torch.int64)
        with torch.inference_mode():
            hidden = body.wte(ids) + body.wpe(torch.arange(len(ids)))
            for layer, block in enumerate(body.h):
                hidden = block(hidden[None])
                hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
                if layer == 0 and change is not None:
                    text = torch.from_numpy(~part["is_special"].to_numpy())[:, None]
                    hidden = torch.where(text, change(hidden), hidden)
            logits = model.module.lm_head(body.ln_f(hidden)).double().numpy()
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        use = (~part["is_special"] if counted is None else part["row"].isin(counted)).to_numpy()[:-1]
        follows = part["document"].to_numpy()[1:] == part["document"].to_numpy()[:-1]
        found.append(-logs[np.arange(len(ids) - 1), ids[1:].numpy()][use & follows])
    return np.concatenate(found)


def test_the_loss_is_that_of_the_model_run_by_hand(model, recorded, tmp_path, monkeypatch):
    sae = load_sae(save_sae(tmp_path / "one", "topk", d_in=32, d_sae=64, hook_name="resid_post.0", k=8), device="cpu")
    loss = sae_metrics(recorded, sae, model=model).loss
    clean = losses_by_hand(model, recorded, None)
    spliced = losses_by_hand(model, recorded, lambda rows: sae.decode(sae.encode(rows)))
    zeroed = losses_by_hand(model, recorded, torch.zeros_like)
    assert loss.tokens == len(clean)
    for found, expected in ((loss.clean, clean), (loss.spliced, spliced), (loss.zeroed, zeroed)):
        assert found == pytest.approx(expected.mean(), abs=1e-5)
    assert abs(loss.spliced - loss.clean) > 0.01
    assert abs(loss.zeroed - loss.clean) > 0.01
    expected = (zeroed.mean() - spliced.mean()) / (zeroed.mean() - clean.mean())
    assert loss.recovered == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(metrics, "_LOGIT_BYTES", 1)  # one sequence at a time
    again = sae_metrics(recorded, sae, model=model).loss
    assert again.tokens == loss.tokens
    assert again.spliced == pytest.approx(loss.spliced, abs=1e-5)


def test_only_the_rows_asked_for_count_but_all_text_is_replaced(model, recorded, tmp_path):
    sae = identity_sae(tmp_path / "half", 32, "resid_post.0", scale=0.5)
    rows = recorded.where("token = ' the' OR is_special")
    loss = sae_metrics(recorded, sae, model=model, rows=rows).loss
    expected = losses_by_hand(model, recorded, lambda hidden: hidden / 2, counted=rows.ids)
    assert loss.tokens == len(expected)
    assert loss.spliced == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.parametrize("site", ["resid_post.0", "resid_pre.1", "mlp_out.0", "z.0"])
def test_the_rows_themselves_lose_nothing_and_zeros_all(site, model, recorded, tmp_path):
    same = sae_metrics(recorded, identity_sae(tmp_path / "same", 32, site), model=model).loss
    assert same.spliced == pytest.approx(same.clean, abs=1e-5)
    assert same.recovered == pytest.approx(1, abs=1e-3)
    none = sae_metrics(recorded, identity_sae(tmp_path / "none", 32, site, scale=0), model=model).loss
    assert none.spliced == pytest.approx(none.zeroed, abs=1e-6)
    assert none.recovered == pytest.approx(0, abs=1e-4)
    assert abs(same.zeroed - same.clean) > 0.01


def test_recovered_of_a_site_that_does_not_matter_is_unknown():
    assert np.isnan(SplicedLoss(1, 2.0, 2.0, 2.0).recovered)
    assert SplicedLoss(1, 2.0, 2.5, 4.0).recovered == 0.75


def test_a_site_that_cannot_be_replaced_is_refused(model, recorded, tmp_path):
    """The block reads it twice: its norm, and the residual stream past the MLP."""
    sae = identity_sae(tmp_path / "same", 32, "resid_mid.0")
    assert refused(RequestError, lambda: sae_metrics(recorded, sae, model=model)) == (
        "site resid_mid.0 cannot be replaced: it is read in several places, or inside of attention; resid_pre, "
        "resid_post, attn_out and mlp_out can"
    )


def test_another_model_is_refused(recorded, tiny_models, model, tmp_path):
    other = Model(tiny_models["llama"], model.tokenizer, "tiny-llama")
    sae = identity_sae(tmp_path / "same", 32, "resid_post.0")
    sums = other.fingerprint()[:12], model.fingerprint()[:12]
    assert refused(RequestError, lambda: sae_metrics(recorded, sae, model=other)) == (
        f"model tiny-llama with weights {sums[0]} is not the one that {recorded.path} is of, tiny-gpt2 with weights "
        f"{sums[1]}"
    )


def test_rows_that_nothing_follows_have_no_loss(recorded, model, tmp_path):
    sae = identity_sae(tmp_path / "same", 32, "resid_post.0")
    last = f"row = {recorded.rows - 1}"
    assert refused(RequestError, lambda: sae_metrics(recorded, sae, model=model, rows=last)) == (
        "rows: no token follows any of them in its document, so there is no loss to compare"
    )


def batch_of(positions: int = 4):
    return torch.tensor([[5] * positions]), torch.ones(1, positions, dtype=torch.int64)


def test_a_splice_is_gone_afterwards_whatever_happens(model):
    (site,) = model.site_map.select(["resid_post.1"])
    part = model.module.get_submodule(site.tap.path)
    ids, mask = batch_of()
    before = run(model.module, ids, mask).logits
    hooks = len(part._forward_hooks)

    def fail(_rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), splice(model.module, site, mask.bool(), fail):
        run(model.module, ids, mask)
    assert len(part._forward_hooks) == hooks
    with splice(model.module, site, mask.bool(), torch.zeros_like):
        assert not torch.equal(run(model.module, ids, mask).logits, before)
    assert torch.equal(run(model.module, ids, mask).logits, before)


def test_a_splice_that_never_came_to_it_is_an_error(model):
    (site,) = model.site_map.select(["resid_post.1"])

    def nothing_run():
        with splice(model.module, site, torch.ones(1, 4, dtype=torch.bool), torch.zeros_like):
            pass

    text = refused(DataError, nothing_run)
    assert text == "site resid_post.1 did not come up in the forward pass: nothing was replaced"


@pytest.mark.parametrize("wrap", [tuple, list, dict])
def test_modules_that_give_more_than_a_tensor_keep_the_rest(wrap, model):
    (site,) = model.site_map.select(["resid_post.1"])
    extra = torch.full((3,), 7.0)

    class Block(torch.nn.Module):
        def forward(self, hidden):
            return {"hidden": hidden, "extra": extra} if wrap is dict else wrap((hidden, extra))

    module = torch.nn.ModuleDict({"block": Block()})
    there = replace(site, shape=(2,), tap=replace(site.tap, path="block", part="out"))
    hidden, mask = torch.arange(8.0).reshape(2, 2, 2), torch.tensor([[True, False], [False, True]])
    with splice(module, there, mask, lambda rows: rows + 100):
        output = module["block"](hidden)
    first, rest = output.values() if wrap is dict else output
    expected = hidden.clone()
    expected[0, 0] += 100
    expected[1, 1] += 100
    assert isinstance(output, wrap)
    assert torch.equal(first, expected)
    assert rest is extra
    assert torch.equal(hidden, torch.arange(8.0).reshape(2, 2, 2))
    there = replace(there, tap=replace(there.tap, part="in"))
    for call in (lambda: module["block"](hidden), lambda: module["block"](hidden=hidden)):
        with splice(module, there, mask, lambda rows: rows + 100):
            output = call()
        assert torch.equal(next(iter(output.values())) if wrap is dict else output[0], expected)


def test_the_settings_saved_are_the_files(tmp_path):
    folder = save_sae(tmp_path / "one", "topk", hook_name="blocks.0.hook_resid_post")
    written = json.loads((folder / "cfg.json").read_text())
    found = load_sae(folder, device="cpu").config()
    assert {key: found[key] for key in written if key != "device"} == {
        k: v for k, v in written.items() if k != "device"
    }
