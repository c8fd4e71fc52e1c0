"""Semantic axes on planted embeddings: the law of noise, order of pairs, components, and the effect on the output."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from planted_weights import planted_weights, word_tokenizer
from scipy.stats import binomtest, t

import workbench as wb
from workbench.analysis.axis_effects import axis_effects
from workbench.analysis.poles import NOUNS, POLES
from workbench.analysis.weights_probe import read_vocabulary
from workbench.figures.describe import figure_data
from workbench.probes import SemanticAxes
from workbench.probes.semantic_axes import (
    axis_directions,
    component_share,
    held_out_order,
    random_axes,
    token_axes,
    without_frequency,
)
from workbench.testing import ProbeContract

WIDTH = 32
DRAW = np.random.default_rng(0)
FILLERS = ["".join(word) for word in sorted({tuple(DRAW.choice(list("bcdfgklmnprst"), 6)) for _ in range(300)})]
POLE_WORDS = [word for pairs in POLES.values() for pair in pairs for word in pair]
WORDS = list(dict.fromkeys([*FILLERS, *POLE_WORDS, *NOUNS, "This", "is", "a", "It", "very", "."]))
TOKENIZER_WORDS = WORDS


SIZE = len(WORDS) + 2


def rows(seed=0, size=SIZE):
    return np.random.default_rng(seed).normal(size=(size, WIDTH)).astype(np.float32)


def planted(noise, seed=0):
    """Rows Z D + noise; three axes, whose poles are far out on D's orthonormal rows."""
    embedding = noise * rows(seed + 1).astype(float)
    directions = np.linalg.qr(DRAW.normal(size=(WIDTH, 3)))[0].T
    latent = np.random.default_rng(seed).normal(size=(len(embedding), 3))
    embedding += latent @ directions
    for place, axis in enumerate(list(POLES)[:3]):
        for a, b in POLES[axis]:
            embedding[2 + WORDS.index(a)] = 30 * directions[place]
            embedding[2 + WORDS.index(b)] = -30 * directions[place]
    return embedding.astype(np.float32), latent


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(TOKENIZER_WORDS)


class TestContract(ProbeContract):
    probe = SemanticAxes

    @pytest.fixture
    def store(self, tokenizer):
        return planted_weights(rows(), tokenizer)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_ratings_correlate_by_the_law_of_the_noise(noise, tokenizer, tmp_path):
    embedding, latent = planted(noise)
    poles = {axis: POLES[axis] for axis in list(POLES)[:3]}
    (tmp_path / "poles.json").write_text(json.dumps(poles))
    names = list(poles)
    table = [(word, name, latent[2 + WORDS.index(word), place]) for place, name in enumerate(names) for word in FILLERS]
    pole = POLES[names[0]][0][0]
    table.append((pole, names[0], 1e6))  # it would decide the correlation
    pd.DataFrame(table, columns=["word", "axis", "rating"]).to_csv(tmp_path / "ratings.csv", index=False)
    probe = SemanticAxes(poles=str(tmp_path / "poles.json"), ratings=str(tmp_path / "ratings.csv"), strength=0.0)
    result = probe.run(planted_weights(embedding, tokenizer))
    correlation = result.data["rating"].to_numpy()
    assert correlation.mean() == pytest.approx(1 / np.sqrt(1 + noise**2), abs=0.03)
    assert (result.data["rating_low"] <= correlation).all()
    assert (result.data["rating_high"] >= correlation).all()
    assert (result.data["rating_null"] < correlation).all()
    drawn = figure_data(result.figures()["ratings"]).set_index("series").loc["axis"]
    np.testing.assert_allclose(drawn["low"], result.data["rating_low"])
    np.testing.assert_allclose(drawn["high"], result.data["rating_high"])
    if not noise:
        assert float(result.data["components"]) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(result.data["alignment"], np.eye(3), atol=0.02)
    np.testing.assert_array_equal(np.diag(result.data["held_out"]), 1)


def test_pairs_in_order_have_intervals(tokenizer):
    """Of all axes the spread of axes; of one axis scipy's interval of its pairs."""
    result = SemanticAxes(strength=0.0).run(planted_weights(rows(), tokenizer))
    own_shares, pairs = np.diag(result.data["held_out"]), result.data["pairs"].to_numpy()
    share, low, high = (float(result.data[f"in_order{end}"]) for end in ("", "_low", "_high"))
    assert share == pytest.approx(np.average(own_shares, weights=pairs))
    error = np.sqrt(np.sum((pairs * (own_shares - share)) ** 2)) / pairs.sum()
    assert (high - low) / 2 == pytest.approx(t.ppf(0.975, len(own_shares) - 1) * error, rel=0.15)
    assert f"in order, 95 % CI [{100 * low:.0f}, {100 * high:.0f}]" in result.headline()
    drawn = figure_data(result.figures()["order"]).set_index("series").loc["own axis, pair left out"]
    for line, number in zip(drawn.itertuples(), pairs, strict=True):
        ends = binomtest(round(line.y * number), int(number)).proportion_ci(method="wilson")
        assert (line.low, line.high) == pytest.approx((ends.low, ends.high), abs=1e-4)


def test_random_rows_put_pairs_in_order_by_chance(tokenizer):
    vocabulary = read_vocabulary(planted_weights(rows(), tokenizer))
    axes = token_axes(vocabulary, POLES)
    shares, weights = [], [len(pairs) for pairs in axes.pairs]
    for seed in range(30):
        vectors = dict(enumerate(rows(seed).astype(float)))
        shares.append(np.average(np.diag(held_out_order(vectors, axes.pairs)), weights=weights))
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * np.std(shares) / np.sqrt(30))


def test_a_held_out_pair_is_left_out_of_its_axis():
    vectors = {0: np.array([1.0, 0]), 1: np.array([-1.0, 0]), 2: np.array([0, 0.1]), 3: np.array([0, -0.1])}
    pairs = [np.array([[0, 1], [2, 3]])]
    assert held_out_order(vectors, pairs)[0, 0] == 0  # orthogonal pairs say nothing of each other: no order is right
    np.testing.assert_allclose(axis_directions(vectors, pairs)[0], np.array([1, 0.1]) / np.sqrt(1.01))


def test_frequency_is_regressed_out(tokenizer):
    slope = np.random.default_rng(3).normal(size=WIDTH)
    ids = np.arange(2, len(WORDS) + 2)
    embedding = 0.1 * rows().astype(float)
    embedding += np.outer(np.log(np.arange(len(embedding)) + 1.0), slope)
    clean, rank = without_frequency(embedding, ids.tolist(), ids)
    assert abs(np.corrcoef(clean @ slope, rank)[0, 1]) < 1e-6
    assert abs(np.corrcoef(embedding[ids] @ slope, rank)[0, 1]) > 0.9
    data = SemanticAxes(strength=0.0).run(planted_weights(embedding.astype(np.float32), tokenizer)).data
    assert float(np.abs(data["frequency"]).mean()) > 0.5


def test_components_and_random_axes():
    words = DRAW.normal(size=(500, 40))
    like = DRAW.normal(size=(6, 40))
    like[1] = like[0] + 0.1 * like[1]
    like /= np.linalg.norm(like, axis=1, keepdims=True)
    axes = random_axes(words, like, seed=0)
    np.testing.assert_allclose(axes @ axes.T, like @ like.T, atol=1e-8)
    x = words @ like.T
    sizes = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    assert component_share(x) == pytest.approx(sizes[:3].sum() / sizes.sum())


def test_the_effect_is_that_of_a_changed_embedding_table(tokenizer):
    model = planted_weights(rows(), tokenizer, rows(5))
    vocabulary = read_vocabulary(model)
    axes = token_axes(vocabulary, POLES)
    directions = axis_directions(dict(enumerate(rows().astype(float))), axes.pairs)
    effects = axis_effects(model, vocabulary, axes.pairs, directions, 0.5)
    words = ["This", "is", "a", NOUNS[0], ".", "It", "is", "very"]
    noun = 2 + WORDS.index(NOUNS[0])
    odds, table = [], model.module.get_input_embeddings().weight
    before = table.detach().clone()
    for name in NOUNS:
        noun = 2 + WORDS.index(name)
        words[3] = name
        for sign in (1, -1):
            with torch.no_grad():
                step = torch.tensor(directions[2], dtype=torch.float32)
                table[noun] += sign * 0.5 * before[noun].norm() * step
                logits = model.module(torch.tensor([[2 + WORDS.index(word) for word in words]])).logits[0, -1]
                table.copy_(before)
            pairs = axes.pairs[4]
            odds.append(sign * float((logits[pairs[:, 0]] - logits[pairs[:, 1]]).mean()) / 2)
    assert effects[2, 4] == pytest.approx(2 * np.mean(odds), rel=1e-3, abs=1e-6)


def test_settings_choose_the_table_the_strength_and_the_seed(tokenizer):
    model = planted_weights(rows(), tokenizer, rows(5))
    embedding = SemanticAxes(strength=0.0).run(model)
    unembedding = SemanticAxes(strength=0.0, table="unembedding").run(model)
    assert not np.allclose(embedding.data["alignment"], unembedding.data["alignment"])
    assert embedding.data["effect"].isnull().all()
    assert list(embedding.figures()) == ["alignment", "order"]
    seeded = SemanticAxes(strength=0.0, seed=1).run(model)
    assert float(seeded.data["components_words"]) != float(embedding.data["components_words"])


def test_refusals_say_what_to_do(tokenizer, tmp_path):
    model = planted_weights(rows(), tokenizer)
    few = planted_weights(rows(size=len(FILLERS) + 2), word_tokenizer(FILLERS))
    with pytest.raises(wb.RequestError, match="0 axes have two pairs of single tokens"):
        SemanticAxes().run(few)
    (tmp_path / "bad.json").write_text('{"a": ["b"]}')
    with pytest.raises(wb.RequestError, match="must hold"):
        SemanticAxes(poles=str(tmp_path / "bad.json")).run(model)
    with pytest.raises(wb.RequestError, match="cannot be read as JSON"):
        SemanticAxes(poles=str(tmp_path / "none.json")).run(model)
    (tmp_path / "bad.csv").write_text("word,rating\ngood,1\n")
    with pytest.raises(wb.RequestError, match="no column axis"):
        SemanticAxes(ratings=str(tmp_path / "bad.csv"), strength=0.0).run(model)
    with pytest.raises(wb.RequestError, match="table"):
        SemanticAxes(table="both")


def test_a_model_that_predicts_no_next_word_has_no_effect_and_says_so(tokenizer):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = wb.load_model(BertModel(BertConfig(vocab_size=SIZE, **sizes)).eval(), tokenizer=tokenizer)
    result = SemanticAxes().run(encoder)
    assert bool(result.data["effect"].isnull().all())
    assert "effect not measured: the model does not predict the next word" in result.headline()
    assert "effect" not in result.figures()
