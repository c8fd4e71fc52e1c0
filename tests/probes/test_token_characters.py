"""Letters read from embeddings: planted sums of letters, random rows, the split and the balancing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted_weights import planted_weights, word_tokenizer

import workbench as wb
from workbench.analysis.weights_probe import read_vocabulary
from workbench.probes import TokenCharacters
from workbench.probes.token_characters import LETTERS, LetterTokens, balanced, letter_tokens, macro_f1, ridge_r2, stem
from workbench.testing import ProbeContract

DRAW = np.random.default_rng(0)
WORDS = sorted({"".join(DRAW.choice(LETTERS, DRAW.integers(3, 8))) for _ in range(900)})
CODE = DRAW.normal(size=(len(LETTERS), 48))
QUICK = {"row_limit": 400, "epochs": 1}


def random_rows():
    return np.random.default_rng(1).normal(size=(len(WORDS) + 2, 48)).astype(np.float32)


def spelled_rows():
    """Each word's row is the sum of the codes of its letters, and a little noise."""
    rows = 0.05 * random_rows()
    for place, word in enumerate(WORDS):
        rows[place + 2] += CODE[[LETTERS.index(letter) for letter in set(word)]].sum(0)
    return rows.astype(np.float32)


class TestContract(ProbeContract):
    probe = TokenCharacters
    settings = {"row_limit": 100, "epochs": 1}  # noqa: RUF012

    @pytest.fixture
    def store(self):
        return planted_weights(random_rows(), word_tokenizer(WORDS))


@pytest.fixture(scope="module")
def spelled():
    return TokenCharacters(row_limit=400, epochs=4).run(planted_weights(spelled_rows(), word_tokenizer(WORDS)))


def test_planted_letters_are_read_and_matched_labels_are_not(spelled):
    means = spelled.data[["f1", "f1_control", "f1_matched", "selectivity"]].mean("letter")
    assert float(means["f1"].sel(probe="linear")) > 0.97
    assert float(means["f1"].sel(probe="MLP")) > 0.9
    assert means["f1_control"].to_numpy() == pytest.approx([0.5, 0.5], abs=0.05)
    assert (means["f1_matched"] < 0.65).all()
    np.testing.assert_allclose(means["selectivity"], means["f1"] - means["f1_matched"])
    assert float(spelled.data["length_r2"].sel(vectors="embedding")) > 0.5
    assert "divided by stem, not by WordNet" in spelled.headline()


def test_random_rows_tell_nothing():
    data = TokenCharacters(**QUICK).run(planted_weights(random_rows(), word_tokenizer(WORDS))).data
    assert data["f1"].mean("letter").to_numpy() == pytest.approx([0.5, 0.5], abs=0.05)
    assert float(data["length_r2"].sel(vectors="embedding")) < 0.1
    assert float(data["first_letter"].sel(vectors="embedding")) < 0.15


def test_stems_join_the_forms_of_a_word():
    for forms in (
        ("jump", "jumps", "jumped", "jumping", "JUMP"),
        ("hope", "hoping", "hoped"),
        ("run", "running"),
        ("city", "cities"),
    ):
        assert len({stem(form) for form in forms}) == 1, forms
    assert stem("glass") == "glass"
    assert stem("is") == "is"


def test_items_are_words_and_forms_of_a_word_are_on_one_side():
    words = ["jump", "jumps", "Jumped", "x", "a1", "don't", *WORDS]
    vocabulary = read_vocabulary(planted_weights(np.zeros((len(words) + 2, 4), np.float32), word_tokenizer(words)))
    for seed in range(5):
        items = letter_tokens(vocabulary, False, seed)
        assert items.words[:3] == ("jump", "jumps", "jumped")
        assert len(items.words) == 3 + len(WORDS)
        assert len(set(items.test[:3])) == 1
        assert 0.1 < items.test.mean() < 0.3
    assert letter_tokens(vocabulary, True, 0).words[2] == "Jumped"


def test_case_counts_when_it_is_asked_for():
    items = LetterTokens(np.arange(2), ("Ab", "ba"), np.array([False, True]))
    assert items.has("a").tolist() == [False, True]


def test_partners_have_equal_length_first_letter_and_side():
    test = DRAW.random(len(WORDS)) < 0.2
    items = LetterTokens(np.arange(len(WORDS)), tuple(WORDS), test)
    partner = items.partners(0)
    paired = np.flatnonzero(partner >= 0)
    assert len(paired) > 300
    for token in paired:
        match = partner[token]
        assert token != match
        assert (len(WORDS[token]), WORDS[token][0], test[token]) == (len(WORDS[match]), WORDS[match][0], test[match])


def test_sides_are_balanced_and_limited():
    label, test = DRAW.random(1000) < 0.3, DRAW.random(1000) < 0.2
    order, training = balanced(label, test, 200, 8, seed=0)
    assert (training, len(order)) == (160, 200)
    assert label[order[:training]].mean() == label[order[training:]].mean() == 0.5
    assert not test[order[:training]].any()
    assert test[order[training:]].all()
    assert len(set(order)) == len(order)
    assert balanced(label & (np.arange(1000) < 20), test, 200, 8, seed=0) is None


def test_scores_are_their_formulas():
    predicted, label = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 0, 1, 1], bool)
    assert macro_f1(predicted, label) == pytest.approx((2 * 2 / (3 + 3) + 2 * 1 / (2 + 2)) / 2)
    x = DRAW.normal(size=(60, 3)).astype(np.float32)
    y = x @ [1.0, 2.0, 3.0] + 5
    assert ridge_r2(x, y, 40, 1e-9) == pytest.approx(1)


def test_rare_letters_are_missing_and_said(spelled):
    words = [word for word in WORDS if "q" not in word]
    model = planted_weights(random_rows()[: len(words) + 2], word_tokenizer(words))
    result = TokenCharacters(**QUICK).run(model)
    assert result.data["f1"].sel(letter="q").isnull().all()
    assert int(result.data["tested"].sel(letter="q")) == 0
    assert "with or without q" in result.headline()
    assert int(spelled.data["tested"].sel(letter="q")) > 0


def test_without_a_measured_letter_the_headline_says_so(spelled):
    names = ("f1", "f1_control", "f1_matched")
    data = spelled.data.assign({name: spelled.data[name] * np.nan for name in names})
    headline = replace(spelled, data=data).headline()
    tokens = f"{int(data['tokens']):,}"
    assert headline.startswith(f"No letter is measured: of {tokens} tokens too few have it or lack it. First letter: ")
    assert "nan" not in headline


def test_a_vocabulary_of_characters_is_refused():
    with pytest.raises(wb.RequestError, match="0 tokens of this vocabulary consist of two letters or more"):
        TokenCharacters().run(planted_weights(np.zeros((28, 4), np.float32), word_tokenizer(LETTERS)))
    with pytest.raises(wb.RequestError, match="penalty"):
        TokenCharacters(penalty=0.0)
