"""Contributions of features to logits: their sum is the model's logit, each term is what float64 NumPy gives."""

import numpy as np
import pytest
import torch
from command_line import run
from refusals import refused
from safetensors.numpy import load_file

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model


def model_logits(model, store, row):
    """Logits of the plain module after a row."""
    part = store.tokens.to_pandas()
    part = part[part["sequence"] == part["sequence"][row]]
    with torch.no_grad():
        logits = model.module(torch.tensor(part["token_id"].to_numpy()[None], dtype=torch.long)).logits[0]
    return logits[row - part["row"].iloc[0]].double().numpy()


@pytest.mark.parametrize("name", ["last", "normed", "middle"])
def test_the_terms_sum_to_the_models_logits(name, recorded, recorded_model, feature_stores):
    features, sae = feature_stores[name]
    for row in (0, 7, len(features) - 1):
        ids = [5, 300, int(model_logits(recorded_model, recorded, row).argmax())]
        table = wb.feature_contributions(features, sae, row, ids)
        logits = model_logits(recorded_model, recorded, row)
        sums = table.groupby("token_id", sort=False)[["logit", "relative"]].sum()
        assert sums.index.tolist() == ids
        np.testing.assert_allclose(sums["logit"], logits[ids], atol=1e-4)
        np.testing.assert_allclose(sums["relative"], logits[ids] - logits.mean(), atol=1e-4)
        terms = set(table["term"]) - {"feature"}
        assert ("rest of the stream" in terms) == (name == "middle")
        feature_terms = table[(table["token_id"] == 5) & table["feature"].notna()]
        assert set(feature_terms["feature"]) == set(features[row].indices)
        assert (feature_terms["relative"].abs().diff().dropna() <= 0).all()
        assert wb.feature_contributions(features, sae, row)["token_id"].unique().tolist() == [logits.argmax()]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_terms_sum_to_the_logits_of_other_models(family, tiny_models, tiny_tokenizer, saes, tmp_path):
    model = Model(tiny_models[family], tiny_tokenizer, family)
    store = wb.record(
        model,
        ["Monday was the day", "the"],
        out=tmp_path / "x.acts",
        sites=["resid_post"],
        dtype="float32",
        show_progress=False,
    )
    sae = wb.load_sae(saes["middle"], device="cpu")
    features = wb.extract_features(store, sae, show_progress=False)
    table = wb.feature_contributions(features, sae, 3, [7, 11], k=2)
    logits = model_logits(model, store, 3)[[7, 11]]
    expected = 2.0 * np.arctanh(logits / 2.0) if family == "gemma2" else logits  # before its soft-cap
    np.testing.assert_allclose(table.groupby("token_id")["logit"].sum(), expected, atol=2e-4)
    assert (table.groupby("token_id")["feature"].count() == 2).all()
    assert table["term"].str.contains("other features").sum() == 2


def test_a_term_is_the_activation_times_the_direct_effect(recorded, recorded_model, saes, feature_stores):
    features, sae = feature_stores["last"]
    row, token = 9, 21
    table = wb.feature_contributions(features, sae, row, token).dropna().set_index("feature")
    module = recorded_model.module
    gain = module.transformer.ln_f.weight.detach().double().numpy()
    head = module.lm_head.weight.detach().double().numpy()
    x = recorded["resid_post.2"][row].double().numpy()
    scale = np.sqrt(np.var(x) + module.config.layer_norm_epsilon)
    decoder = load_file(saes["last"] / "sae_weights.safetensors")["W_dec"].astype(np.float64)
    for feature, line in table.iterrows():
        direction = line["activation"] * decoder[feature]
        effects = head @ ((direction - direction.mean()) * gain / scale)
        assert line["logit"] == pytest.approx(effects[token], rel=1e-5)
        assert line["relative"] == pytest.approx(effects[token] - effects.mean(), rel=1e-5, abs=1e-7)
    promoted = wb.promoted_tokens(features, sae, int(table.index[0]), k=1)
    largest = wb.feature_contributions(features, sae, row, int(promoted["token_id"][0])).dropna()
    line = largest[largest["feature"] == table.index[0]].iloc[0]
    assert line["relative"] == pytest.approx(line["activation"] * promoted["logit"][0] / scale, rel=1e-3)


def test_what_cannot_be_decomposed_is_refused(feature_stores, recorded_model, tmp_path):
    features, sae = feature_stores["last"]
    middle_features = feature_stores["middle"][1]
    for arguments, message in (
        ((sae, len(features)), f"row must be a whole number, from 0 to {len(features) - 1}"),
        ((sae, 3, 999), "tokens must be a whole number, from 0 to 319, not 999"),
        ((sae, 3, "Mondoy"), "tokens: 'Mondoy' is no single token"),
        ((sae, 3, []), "tokens is empty"),
        ((middle_features, 3), "features last were made with SAE last"),
    ):
        text = refused(RequestError, lambda a=arguments: wb.feature_contributions(features, *a))
        assert text.startswith(message)
    store = wb.record(recorded_model, ["the day"], out=tmp_path / "x.acts", sites=["resid_post.1"], show_progress=False)
    without = wb.extract_features(store, middle_features, show_progress=False)
    assert "resid_post.2" in refused(RequestError, lambda: wb.feature_contributions(without, middle_features, 1))


def test_contributions_on_the_command_line(feature_stores, saes):
    features, _ = feature_stores["last"]
    options = ("--sae", str(saes["last"]), "--k", "2", "--tokens", " Monday", "5")
    code, out, err = run("contributions", str(features.path), "9", *options)
    assert (code, err) == (0, "")
    assert out.count("other features") == 2
    assert "' Monday'" in out
