"""Probes of weights: what they read of a model or a store, the provenance of their results, and their refusals."""

from __future__ import annotations

from inspect import unwrap

import numpy as np
import pytest
import torch
from command_line import run
from planted_weights import planted_weights, word_tokenizer

import workbench as wb
from workbench.analysis.weights_probe import read_vocabulary
from workbench.probes import UnderTrainedTokens

DRAW = np.random.default_rng(0)
ROWS = DRAW.normal(size=(6, 4)).astype(np.float32)


def test_the_vocabulary_has_the_tables_and_texts_of_the_model():
    tokenizer = word_tokenizer(["one", "two", "three"])
    unembedding = DRAW.normal(size=(6, 4)).astype(np.float32)
    untied = read_vocabulary(planted_weights(ROWS, tokenizer, unembedding))
    np.testing.assert_array_equal(untied.embedding, ROWS)
    np.testing.assert_array_equal(untied.unembedding, unembedding)
    assert not untied.tied
    assert untied.texts == ("<s>", "</s>", " one", " two", " three", "<5>")
    assert untied.ordinary.tolist() == [False, False, True, True, True, False]
    tied = read_vocabulary(planted_weights(ROWS, tokenizer))
    assert tied.tied
    assert tied.unembedding is tied.embedding


def test_a_model_without_a_head_has_no_unembedding():
    model = planted_weights(ROWS)
    headless = wb.load_model(model.module.model)
    assert read_vocabulary(headless).unembedding is None
    assert read_vocabulary(headless).ordinary.all()


def test_bfloat16_weights_are_read_exactly():
    model = planted_weights(ROWS)
    model.module.to(torch.bfloat16)
    np.testing.assert_array_equal(read_vocabulary(model).embedding, torch.tensor(ROWS).bfloat16().float())


def test_a_store_gives_the_result_of_its_model_and_its_own_provenance(tmp_path):
    model = wb.load_model("demo", device="cpu")
    store = wb.record(model, ["the little day"], sites=["embed"], out=tmp_path / "s", show_progress=False)
    probe = UnderTrainedTokens(tested=0)
    of_model, of_store = probe.run(model), probe.run(store, model=model)
    assert of_model.data.identical(of_store.data)
    fingerprint = model.fingerprint()
    known = of_model.provenance
    assert [known[key] for key in ("model", "model_fingerprint", "store_fingerprint")] == [
        "demo",
        fingerprint,
        fingerprint,
    ]
    assert (known["store"], known["rows"]) == ("weights alone", 1024)
    assert of_store.provenance["store_fingerprint"] == store.manifest.fingerprint
    assert "store weights alone" in of_model.source()


def test_neither_store_nor_model_is_refused():
    with pytest.raises(wb.RequestError, match=r"run needs a model \(wb.load_model\) or a store .* not NoneType"):
        unwrap(read_vocabulary)(None)  # without the checks of types that tests have
    with pytest.raises(wb.RequestError, match="not str"):
        unwrap(read_vocabulary)("demo")  # `run` of a probe opens a path
    first, second = planted_weights(ROWS), planted_weights(ROWS)
    with pytest.raises(wb.RequestError, match="two models"):
        UnderTrainedTokens().run(first, model=second)
    with pytest.raises(wb.RequestError, match="has no tokenizer, and this probe reads the texts of tokens"):
        UnderTrainedTokens().run(first)
    broken = ROWS.copy()
    broken[2, 1] = np.nan
    with pytest.raises(wb.RequestError, match="input embeddings that are not all finite"):
        read_vocabulary(planted_weights(broken))


def test_the_command_line_takes_a_model_in_place_of_a_store(tmp_path):
    code, out, err = run("probe", "under-trained-tokens", "demo", "--out", tmp_path / "r", "--tested", 0)
    assert err == ""
    assert code == 0
    assert "candidates by unembedding_cosine" in out
    assert wb.load_result(tmp_path / "r").provenance["store"] == "weights alone"
    code, _, err = run("probe", "under-trained-tokens", tmp_path / "nowhere", "--out", tmp_path / "q")
    assert code == 2
    assert len(err.splitlines()) == 1
    code, out, _ = run("probe", "under-trained-tokens", "--help")
    assert "MODEL" in out
