"""Under-trained tokens against planted rows, a plain Hugging Face loop, and their null."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_weights import planted_weights, word_tokenizer
from refusals import refused

import workbench as wb
from workbench.analysis.repetition import _templates, repetition_probabilities
from workbench.analysis.weights_probe import read_vocabulary
from workbench.probes import UnderTrainedTokens
from workbench.probes.under_trained_tokens import _auc, _indicators
from workbench.testing import ProbeContract

WIDTH = 16


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


def rows(number, seed=0):
    return np.random.default_rng(seed).normal(size=(number, WIDTH)).astype(np.float32)


class TestContract(ProbeContract):
    probe = UnderTrainedTokens
    settings = {"tested": 3}  # noqa: RUF012

    @pytest.fixture
    def store(self, tokenizer):
        return planted_weights(rows(len(tokenizer) + 8), tokenizer)


def test_kinds_follow_the_round_trip(tokenizer):
    vocabulary = read_vocabulary(planted_weights(rows(len(tokenizer) + 2), tokenizer))
    kinds = vocabulary.kinds
    by_name = {name: kinds[id] for name, id in tokenizer.get_vocab().items()}
    assert by_name["<s>"] == by_name["</s>"] == "special"
    assert by_name["ĠMonday"] == by_name["a"] == by_name["Ġ"] == "ok"
    assert by_name["Ã"] == "undecodable"  # the byte C3
    assert kinds[-2:].tolist() == ["unused", "unused"]
    unseen = vocabulary.never_seen
    names = {name for name, id in tokenizer.get_vocab().items() if unseen[id]}
    assert names == {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    assert unseen[-2:].all()


def test_an_unreachable_token_is_no_candidate():
    tokenizer = word_tokenizer(["one", "two three", "<|reserved_7|>"])  # a text with a space is two tokens
    vocabulary = read_vocabulary(planted_weights(rows(5), tokenizer))
    assert vocabulary.kinds.tolist() == ["special", "special", "ok", "unreachable", "ok"]
    assert vocabulary.never_seen.tolist() == [False, False, False, False, True]


def test_planted_rows_of_small_norm_are_the_candidates_of_untied_tables(tokenizer):
    embedding = rows(len(tokenizer))
    ok = np.flatnonzero(read_vocabulary(planted_weights(embedding, tokenizer)).kinds == "ok")
    planted = np.random.default_rng(1).choice(ok, 4, replace=False)
    embedding[planted] *= 0.01
    model = planted_weights(embedding, tokenizer, rows(len(tokenizer), 2))
    result = UnderTrainedTokens(share=0.05, tested=0).run(model)
    table = result.table
    assert result.data.attrs["indicator"] == "embedding_norm"
    assert set(planted) <= set(table["token_id"])
    assert len(table) == round(0.05 * (len(ok) + 2))  # special tokens count as well
    assert set(table["token_id"][:4]) == set(planted)
    np.testing.assert_allclose(
        result.data["value"].sel(indicator="embedding_norm"), np.linalg.norm(embedding.astype(float), axis=1), rtol=1e-6
    )


def test_planted_rows_of_a_tied_table_are_found_by_the_reference_and_missed_by_the_norm(tokenizer):
    known, beyond = len(tokenizer), 12
    embedding = rows(known + beyond)
    common = 3 * rows(1, 7)
    ok = np.flatnonzero(read_vocabulary(planted_weights(embedding, tokenizer)).kinds == "ok")
    planted = np.random.default_rng(1).choice(ok, 4, replace=False)
    unseen = read_vocabulary(planted_weights(embedding, tokenizer)).never_seen
    embedding[unseen] = common + 0.1 * rows(int(unseen.sum()), 8)
    embedding[planted] = common + 0.1 * rows(4, 9)
    model = planted_weights(embedding, tokenizer)
    by_reference = UnderTrainedTokens(share=0.05, tested=0).run(model)
    by_norm = UnderTrainedTokens(share=0.05, tested=0, indicator="embedding_norm").run(model)
    assert by_reference.data.attrs["indicator"] == "unembedding_cosine"
    assert set(by_reference.table["token_id"][:4]) == set(planted)
    assert not set(planted) & set(by_norm.table["token_id"])
    auc = by_reference.data["auc"].to_series()
    assert auc["embedding_norm"] < 0.05
    assert min(auc["unembedding_cosine"], auc["unembedding_cosine_centred"], auc["unembedding_distance"]) > 0.95


def test_padding_of_zeros_has_no_direction_to_compare_with():
    """Every cosine to it would be 0, and the candidates those with the lowest ids."""
    tokenizer, known = word_tokenizer([f"{first}{second}" for first in "abcdefg" for second in "hijklmn"]), 51
    embedding = rows(64)
    embedding[known:] = 0
    embedding[20] *= 0.01
    result = UnderTrainedTokens(tested=0).run(planted_weights(embedding, tokenizer))
    assert result.data.attrs["indicator"] == "embedding_norm"
    assert result.table["token_id"].tolist() == [20]
    assert "the rows of tokens that no text contains are 0" in result.headline()
    assert bool(result.data["value"].sel(indicator="unembedding_cosine").isnull().all())
    with pytest.raises(wb.RequestError, match="with rows other than 0"):
        UnderTrainedTokens(tested=0, indicator="unembedding_cosine").run(planted_weights(embedding, tokenizer))


def test_models_that_cannot_be_asked_are_refused_in_one_line(tokenizer):
    """An encoder, and a table that is smaller than its tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = wb.load_model(BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).eval(), tokenizer=tokenizer)
    message = refused(wb.RequestError, lambda: UnderTrainedTokens(tested=2).run(encoder))
    assert "does not generate text, which verifies tokens; set tested=0" in message
    small = planted_weights(rows(60), tokenizer)
    message = refused(wb.RequestError, lambda: UnderTrainedTokens(tested=2).run(small))
    assert "and the model has 60 tokens; load it with its own tokenizer, or set tested=0" in message
    assert len(UnderTrainedTokens(tested=0).run(small).table) == 1


def test_the_indicators_are_their_formulas(tokenizer):
    embedding, head = rows(len(tokenizer)), rows(len(tokenizer), 3).astype(float) + 0.5
    vocabulary = read_vocabulary(planted_weights(embedding, tokenizer, head.astype(np.float32)))
    unseen = vocabulary.never_seen
    head = head.astype(np.float32).astype(float)
    values = _indicators(vocabulary, unseen)
    first = np.linalg.svd(head)[2][0]
    cosine = lambda a, b: 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    token, known = int(np.flatnonzero(~unseen)[5]), int(np.flatnonzero(unseen)[2])
    spaces = {
        "": head,
        "_centred": head - head[~unseen].mean(0),
        "_without_first": head - np.outer(head @ first, first),
    }
    for name, part in spaces.items():
        cosines = values["unembedding_cosine" + name]
        assert cosines[token] == pytest.approx(cosine(part[token], part[unseen].mean(0)))
        unseen_others = unseen & (np.arange(len(unseen)) != known)
        assert cosines[known] == pytest.approx(cosine(part[known], part[unseen_others].mean(0)))
    assert values["unembedding_distance"][token] == pytest.approx(np.linalg.norm(head[token] - head[unseen].mean(0)))


def test_random_rows_have_an_auc_of_one_half(tokenizer):
    areas = []
    for seed in range(40):
        vocabulary = read_vocabulary(planted_weights(rows(len(tokenizer), seed), tokenizer))
        unseen = vocabulary.never_seen
        values = _indicators(vocabulary, unseen)
        areas.append([_auc(part[unseen], part[~unseen]) for part in values.values()])
    mean, error = np.mean(areas, 0), np.std(areas, 0) / np.sqrt(40)
    assert (np.abs(mean - 0.5) < 4 * error).all()
    assert _auc(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_probabilities_are_those_of_a_plain_loop(tiny_models, tokenizer):
    model = wb.load_model(tiny_models["gpt2"], tokenizer=tokenizer)
    tokens = np.array([5, 100, 290])
    probabilities = repetition_probabilities(model, tokens)
    for name, template in _templates(model).items():
        for column, token in enumerate(tokens):
            ids = [int(token) if part is None else part for part in template]
            largest = 0.0
            for _ in range(3):
                with torch.no_grad():
                    logits = model.module(torch.tensor([ids])).logits[0, -1]
                largest = max(largest, float(logits.softmax(0)[token]))
                ids.append(int(logits.argmax()))
            assert probabilities[name][column] == pytest.approx(largest, rel=1e-3)


def test_prompts_fit_the_context(tiny_models, tokenizer):
    model = wb.load_model(tiny_models["llama"], tokenizer=tokenizer)  # 128 positions; letters are tokens here
    assert all(len(template) <= 125 for template in _templates(model).values())
    assert [template.count(None) for template in _templates(model).values()] == [1, 1, 50]


def test_tested_tokens_stand_beside_as_many_random_ones(tokenizer):
    model = planted_weights(rows(len(tokenizer)), tokenizer)
    first, second = (UnderTrainedTokens(tested=3, share=0.05, seed=seed).run(model) for seed in (0, 1))
    assert first.data["tested"].to_numpy().tolist() == [3, 3]
    randoms = [set(part.table.loc[part.table["group"] == "random", "token_id"]) for part in (first, second)]
    assert randoms[0] != randoms[1]
    assert int(first.data["probability"].notnull().all("prompt").sum()) == 6
    table = first.table[first.table["probability"].notna()]
    assert (table["verified"] == (table["probability"] < 0.01)).all()
    assert "of 3 random tokens" in first.headline()
    assert list(first.figures()) == ["indicator", "verification"]


def test_rows_of_one_norm_and_no_reference_give_no_list():
    tokenizer = word_tokenizer(["one", "two", "three", "four"])
    embedding = rows(6) / np.linalg.norm(rows(6), axis=1, keepdims=True)
    result = UnderTrainedTokens(tested=0).run(planted_weights(embedding, tokenizer))
    assert len(result.table) == 0
    assert "one norm, and no token is known to be unseen" in result.headline()
    assert list(result.figures()) == ["indicator"]
    plain = UnderTrainedTokens(tested=0).run(planted_weights(rows(6), tokenizer))
    assert "low norm marks frequent tokens and names" in plain.headline()


def test_refusals_name_the_setting(tokenizer):
    with pytest.raises(wb.RequestError, match="indicator"):
        UnderTrainedTokens(indicator="norm")
    with pytest.raises(wb.RequestError, match="share"):
        UnderTrainedTokens(share=0.0)
    with pytest.raises(wb.RequestError, match="needs tokens that no text contains"):
        UnderTrainedTokens(indicator="unembedding_distance").run(planted_weights(rows(4), word_tokenizer(["a", "b"])))
