"""Metrics of autoencoders on a store, against NumPy and plain forward passes."""

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import run
from refusals import refused
from sae_example import encode64, save_sae, set_weights
from safetensors.numpy import load_file
from store_example import values, write_store

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.sae import reconstruction, spliced_loss
from workbench.sae.load import load_sae
from workbench.sae.metrics import SplicedLoss, sae_metrics
from workbench.store.manifest import SiteRecord
from workbench.store.reader import open_store

X = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32) + 1
SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
TEXTS = ["Once upon a time the little day was Monday", "Monday and Tuesday was the day to Once upon a time", "the"]


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
def test_metrics_equal_numpy(architecture, rows, block, store, tmp_path, monkeypatch):
    folder = save_sae(tmp_path / "one", architecture, hook_name=SITE.name)
    b_enc = load_file(folder / "sae_weights.safetensors")["b_enc"]
    b_enc[:4] = -1e5  # dead
    sae = load_sae(set_weights(folder, b_enc=b_enc), device="cpu")
    if block:
        monkeypatch.setattr(reconstruction, "block_rows", lambda _sae: block)
    chosen = store.where("NOT is_special" if rows is None else rows)
    measured = sae_metrics(store, sae, rows=rows)
    l0, explained, dead = fit64(folder, chosen["resid_post", 1].double().numpy())
    assert (measured.rows, measured.loss) == (len(chosen), None)
    assert measured.l0 == pytest.approx(l0, rel=1e-12)
    assert measured.explained_variance == pytest.approx(explained, rel=1e-4)
    assert measured.dead_share == pytest.approx(dead, abs=1e-12)
    assert dead > 0.19
    assert measured == sae_metrics(store, sae, "resid_post.1", rows=chosen)


def test_the_mean_explains_no_variance_and_an_identity_all(store, tmp_path):
    x = store.where("NOT is_special")["resid_post", 1].double().numpy()
    folder = save_sae(tmp_path / "mean", hook_name=SITE.name)
    sae = load_sae(set_weights(folder, W_dec=np.zeros((20, 8)), b_dec=x.mean(0)), device="cpu")
    assert sae_metrics(store, sae).explained_variance == pytest.approx(0, abs=1e-6)
    exact = sae_metrics(store, identity_sae(tmp_path / "same", 8, SITE.name))
    assert exact.explained_variance == pytest.approx(1, abs=1e-12)
    assert exact.l0 == pytest.approx((x != 0).sum(1).mean())


def test_rows_that_dominate_the_variance_are_named(store, tmp_path):
    """The special tokens are 100 times as large as the others, and first of their sequences."""
    sae = identity_sae(tmp_path / "same", 8, SITE.name)
    (note,) = sae_metrics(store, sae, rows="true").notes
    assert note.startswith("7 of the 51 rows have 99 % of the variance, 7 of them the first of their sequence")
    assert sae_metrics(store, sae).notes == ()


def test_equal_rows_have_no_explained_variance(store, tmp_path):
    sae = identity_sae(tmp_path / "same", 8, SITE.name)
    assert np.isnan(sae_metrics(store, sae, rows="row = 3").explained_variance)


def identity_sae(folder, d: int, hook_name: str, scale: float = 1.0):
    """Two features an axis, one for each sign: its reconstruction is `scale` times its input."""
    save_sae(folder, d_in=d, d_sae=2 * d, apply_b_dec_to_input=False, hook_name=hook_name)
    axes = np.concatenate([np.eye(d), -np.eye(d)])
    return load_sae(
        set_weights(folder, W_enc=axes.T, W_dec=scale * axes, b_enc=np.zeros(2 * d), b_dec=np.zeros(d)), device="cpu"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": "position > 99"}, "rows: none of the 51 rows of {store} is selected"),
        ({"site": "resid_post.7"}, "resid_post.7 is no site of demo, whose layers are 0 to 1"),
    ],
)
def test_metrics_of_no_rows_are_refused(settings, message, store, tmp_path):
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
    assert text == "SAE 'one' is a transcoder: its output is another site than its input"


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
    body, losses = model.module.transformer, []
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
        losses.append(-logs[np.arange(len(ids) - 1), ids[1:].numpy()][use & follows])
    return np.concatenate(losses)


def test_the_loss_equals_a_forward_pass_by_hand(model, recorded, tmp_path, monkeypatch):
    sae = load_sae(save_sae(tmp_path / "one", "topk", d_in=32, d_sae=64, hook_name="resid_post.0", k=8), device="cpu")
    loss = sae_metrics(recorded, sae, model=model).loss
    clean = losses_by_hand(model, recorded, None)
    spliced = losses_by_hand(model, recorded, lambda rows: sae.decode(sae.encode(rows)))
    zeroed = losses_by_hand(model, recorded, torch.zeros_like)
    assert loss.tokens == len(clean)
    for measured, expected in ((loss.clean, clean), (loss.spliced, spliced), (loss.zeroed, zeroed)):
        assert measured == pytest.approx(expected.mean(), abs=1e-5)
    assert abs(loss.spliced - loss.clean) > 0.01
    assert abs(loss.zeroed - loss.clean) > 0.01
    expected = (zeroed.mean() - spliced.mean()) / (zeroed.mean() - clean.mean())
    assert loss.recovered == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(spliced_loss, "_LOGIT_BYTES", 1)  # one sequence at a time
    again = sae_metrics(recorded, sae, model=model).loss
    assert again.tokens == loss.tokens
    assert again.spliced == pytest.approx(loss.spliced, abs=1e-5)


def test_only_selected_rows_count_but_all_text_is_replaced(model, recorded, tmp_path):
    sae = identity_sae(tmp_path / "half", 32, "resid_post.0", scale=0.5)
    rows = recorded.where("token = ' the' OR is_special")
    loss = sae_metrics(recorded, sae, model=model, rows=rows).loss
    expected = losses_by_hand(model, recorded, lambda hidden: hidden / 2, counted=rows.ids)
    assert loss.tokens == len(expected)
    assert loss.spliced == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.parametrize("site", ["resid_post.0", "resid_pre.1", "mlp_out.0", "z.0"])
def test_an_identity_recovers_all_of_the_loss_and_zeros_none(site, model, recorded, tmp_path):
    identity = sae_metrics(recorded, identity_sae(tmp_path / "same", 32, site), model=model).loss
    assert identity.spliced == pytest.approx(identity.clean, abs=1e-5)
    assert identity.recovered == pytest.approx(1, abs=1e-3)
    none = sae_metrics(recorded, identity_sae(tmp_path / "none", 32, site, scale=0), model=model).loss
    assert none.spliced == pytest.approx(none.zeroed, abs=1e-6)
    assert none.recovered == pytest.approx(0, abs=1e-4)
    assert abs(identity.zeroed - identity.clean) > 0.01


def test_loss_recovered_of_a_site_without_effect_is_nan():
    assert np.isnan(SplicedLoss(1, 2.0, 2.0, 2.0).recovered)
    assert SplicedLoss(1, 2.0, 2.5, 4.0).recovered == 0.75


def test_the_middle_of_a_block_is_replaced_at_attentions_output(model, recorded, tmp_path):
    """Two modules read it: the norm of the MLP, and the residual stream past the MLP."""
    identity = sae_metrics(recorded, identity_sae(tmp_path / "same", 32, "resid_mid.0"), model=model).loss
    assert identity.spliced == pytest.approx(identity.clean, abs=1e-5)
    none = sae_metrics(recorded, identity_sae(tmp_path / "none", 32, "resid_mid.0", scale=0), model=model).loss
    assert none.spliced == pytest.approx(none.zeroed, abs=1e-6)
    assert abs(none.zeroed - none.clean) > 0.01


def test_another_model_is_refused(recorded, tiny_models, model, tmp_path):
    llama = Model(tiny_models["llama"], model.tokenizer, "tiny-llama")
    sae = identity_sae(tmp_path / "same", 32, "resid_post.0")
    assert refused(RequestError, lambda: sae_metrics(recorded, sae, model=llama)).startswith(
        "model 'tiny-llama' is not the one that the store 'x.acts' was recorded from ('tiny-gpt2', GPT2LMHeadModel): "
    )
    hook = model.module.transformer.h[0].register_forward_hook(lambda *_: None)
    text = refused(RequestError, lambda: sae_metrics(recorded, sae, model=model))
    hook.remove()
    assert "its forward hooks are transformer.h.0: " in text


def test_rows_without_a_next_token_have_no_loss(recorded, model, tmp_path):
    sae = identity_sae(tmp_path / "same", 32, "resid_post.0")
    last = f"row = {recorded.rows - 1}"
    assert refused(RequestError, lambda: sae_metrics(recorded, sae, model=model, rows=last)) == (
        "rows: none has a next token in its document, so there is no loss; choose others"
    )


def test_the_command_prints_and_saves_what_the_function_returns(tmp_path):
    texts = [document["text"][:200] for document in wb.demo_corpus()[:5]]
    store = wb.record(
        wb.load_model("demo"), texts, out=tmp_path / "x.acts", sites=["resid_post.0"], context=48, show_progress=False
    )
    code, out, err = run("metrics", store.path, "--sae", "demo", "--model", "demo", "--out", tmp_path / "tables")
    assert (code, err) == (0, "")
    metrics = sae_metrics(store, wb.load_sae("demo"), model=wb.load_model("demo"))
    heading, *lines = (line.split() for line in out.splitlines()[:-2])
    assert heading == ["metric", "value", "low", "high"]
    expected = metrics.table.set_index("metric").loc[[line[0] for line in lines]]
    assert len(lines) == len(metrics.table) == 17
    np.testing.assert_allclose([list(map(float, line[1:])) for line in lines], expected, rtol=1e-3)
    tokens = f"{metrics.loss.tokens} predicted tokens, losses and KL in nats"
    assert out.splitlines()[-2] == f"{metrics.rows} rows of 5 documents, {tokens}; low, high: 95 % CI"
    saved = pd.read_csv(tmp_path / "tables" / "density.csv")
    np.testing.assert_allclose(saved["density"], metrics.density["density"])
    assert pd.read_csv(tmp_path / "tables" / "metrics.csv")["metric"].tolist() == metrics.table["metric"].tolist()
    code, out, err = run("metrics", store.path, "--sae", "demo", "--rows", "position > 99", "--out", tmp_path / "other")
    assert (code, out) == (2, "")
    assert err.startswith("workbench: --rows: none of the ")
