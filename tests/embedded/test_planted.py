"""The planted model: what its tables state, measured in the running model by plain hooks and in float64 numpy."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.embedded import planted
from workbench.embedded.planted import INDUCTION_HEAD, PREVIOUS_HEAD, SINK_HEAD, SUCCESSOR_HEAD, token_id
from workbench.model.location import locate


@pytest.fixture(scope="module")
def model():
    return wb.load_model("planted", device="cpu")


@pytest.fixture(scope="module")
def eager(model):
    """The same weights with eager attention, which returns its patterns."""
    module = planted.planted_module()
    module.set_attn_implementation("eager")
    return module


def ids_of(model, text):
    return model.tokenizer(text, return_tensors="pt")["input_ids"]


def following(model, text):
    with torch.no_grad():
        logits = model.module(ids_of(model, text)).logits[0, -1]
    return model.tokenizer.convert_ids_to_tokens(int(logits.argmax())), logits


def test_every_word_is_one_token_and_texts_are_read_back(model):
    assert len(planted.VOCABULARY) == len(set(planted.VOCABULARY)) == model.vocab == 64
    for document in wb.planted_corpus():
        ids = model.tokenizer(document["text"])["input_ids"]
        assert ids[0] == 0
        assert planted.token_id("<unk>") not in ids
        assert model.tokenizer.decode(ids[1:]) == document["text"]
        assert all(document["text"][span["start"] : span["end"]].isalpha() for span in document["spans"]["class"])


def test_the_corpus_is_the_same_at_every_call_and_json(model):
    assert json.loads(json.dumps(wb.planted_corpus())) == wb.planted_corpus()
    assert [document["domain"] for document in wb.planted_corpus()[:3]] == ["copying", "sequences", "sentences"]


def test_it_copies_what_followed_the_present_token(model):
    token, logits = following(model, "stone river cloud window garden stone river")
    assert token == "▁cloud"
    best = logits.sort(descending=True).values
    assert 15 < best[0] < 17
    assert best[1] < 1


def test_it_counts_on_in_each_class_and_not_beyond_its_end(model):
    for words in planted.CHAINS.values():
        for word, after in pairwise(words):
            assert following(model, word)[0] == f"▁{after}"
        assert following(model, words[-1])[1].abs().max() < 1.0  # the sinks write the first token at a sixtieth


def test_each_head_attends_where_it_was_planted(model, eager):
    ids = ids_of(model, "stone river cloud stone river the")
    with torch.no_grad():
        patterns = eager(ids, output_attentions=True).attentions
    weight = lambda head: patterns[head[0]][0, head[1]].double().numpy()  # noqa: E731
    n = ids.shape[1]
    np.testing.assert_allclose(weight(PREVIOUS_HEAD), np.eye(n, k=-1) + np.eye(n)[:1].T * np.eye(n)[:1], atol=1e-6)
    np.testing.assert_allclose(weight(SINK_HEAD)[:, 0], 1, atol=1e-6)
    np.testing.assert_allclose(weight(SUCCESSOR_HEAD), np.eye(n), atol=1e-6)
    expected = np.eye(n)[:1].repeat(n, 0)  # the first token where nothing repeats
    expected[4], expected[5] = np.eye(n)[2], np.eye(n)[3]
    np.testing.assert_allclose(weight(INDUCTION_HEAD), expected, atol=1e-5)
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    for head in ((0, 1), (0, 2), (0, 3), (1, 3)):
        np.testing.assert_allclose(weight(head), uniform, atol=1e-6)


def test_the_stream_holds_what_the_table_of_dimensions_says(model):
    ids = ids_of(model, "Monday stone")
    with torch.no_grad():
        _, first, _ = (states[0].double() for states in model.module(ids, output_hidden_states=True).hidden_states)
    before = torch.zeros(3, 64, dtype=torch.float64)
    before[[0, 1, 2], [0, 0, token_id("Monday")]] = 1
    torch.testing.assert_close(first[:, planted.PREVIOUS], before, atol=2e-3, rtol=0)
    massive = torch.tensor([[1000.0, -1000.0], [0, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(first[:, planted.MASSIVE], massive, atol=2, rtol=0)
    ordinal = torch.zeros(28, dtype=torch.float64)
    ordinal[0] = 1
    torch.testing.assert_close(first[1, planted.ORDINAL], ordinal, atol=5e-3, rtol=0)
    directions = planted.dictionary().double()
    for position, features in ((1, ("day", "m")), (2, ("object", "s"))):
        expected = directions[[planted.FEATURES.index(name) for name in features]].sum(0)
        torch.testing.assert_close(first[position, planted.DICTIONARY], expected, atol=5e-3, rtol=0)


def test_the_dictionary_has_twice_as_many_features_as_dimensions_and_the_stated_cosines():
    gram = planted.dictionary().double() @ planted.dictionary().double().T
    np.testing.assert_allclose(gram.diagonal(), 1)
    assert set(gram.flatten().tolist()) == {0.0, 0.25, -0.25, 1.0}
    assert gram.shape == (32, 32)


def test_it_can_be_cast_moved_and_named_as_any_model():
    model = wb.load_model("planted", dtype="bfloat16", tokenizer="planted", device="cpu")
    assert (model.dtype, model.name, model.tokenizer.bos_token) == (torch.bfloat16, "planted", "<s>")
    assert model.loading.load("cpu").fingerprint() == model.fingerprint()
    assert locate("planted").local


def test_a_folder_of_that_name_is_written_with_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted.planted_module().save_pretrained("planted")
    saved, built = (wb.load_model(name, device="cpu") for name in ("./planted", "planted"))
    assert saved.fingerprint() == built.fingerprint()
    assert saved.tokenizer is None
