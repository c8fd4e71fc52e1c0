"""The fiber-bundle test on planted embeddings, its Gaussian control, and what it leaves out."""

from __future__ import annotations

import numpy as np
import pytest
from planted_weights import planted_weights, word_tokenizer

import workbench as wb
from workbench.probes import FiberBundle
from workbench.testing import ProbeContract

WIDTH = 8


def rows(number, width=WIDTH, seed=0):
    return np.random.default_rng(seed).normal(size=(number, width)).astype(np.float32)


class TestContract(ProbeContract):
    probe = FiberBundle
    settings = {"row_limit": 12}  # noqa: RUF012

    @pytest.fixture
    def store(self):
        return planted_weights(rows(400))


def circle_in_a_ball():
    """600 points of a circle in a ball of 4 dimensions, 3,000 points: around the first rows the dimension rises."""
    draw = np.random.default_rng(0)
    angle = draw.uniform(0, 2 * np.pi, 600)
    circle = np.column_stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle])
    ball = draw.normal(size=(3000, 4))
    ball *= 1.5 * draw.random((3000, 1)) ** 0.25 / np.linalg.norm(ball, axis=1, keepdims=True)
    return np.concatenate([circle, ball]).astype(np.float32)


def test_a_planted_circle_in_a_ball_is_rejected_and_its_gaussian_is_not():
    result = FiberBundle(row_limit=600, neighbours=500).run(planted_weights(circle_in_a_ball()))
    at = result.data.sel(token=result.data["token"] < 600)
    assert float((at["p_holm"].sel(cloud="embedding") < 0.05).mean()) > 0.9
    assert float((at["p_holm"].sel(cloud="gaussian") < 0.05).mean()) < 0.1
    assert float(at["small"].sel(cloud="embedding").median()) < 1.5
    assert float(at["large"].sel(cloud="embedding").median()) > 2
    assert (result.table["token_id"][:40] < 600).mean() > 0.9


def test_a_gaussian_embedding_gives_what_its_control_gives():
    data = FiberBundle(row_limit=200).run(planted_weights(rows(3000))).data
    shares = data["below"].to_series()
    assert shares["embedding"] == pytest.approx(shares["gaussian"], abs=0.06)
    assert 0.03 < float(data["null_below"]) < 0.055
    assert 0.5 < float(data["null_detector"]) < 0.7
    assert (int(data["neighbours"]), int(data["points"])) == (60, 3000)


def test_special_unseen_and_equal_rows_are_left_out():
    words = [f"w{number}" for number in range(298)]
    embedding = rows(305)
    embedding[10] = embedding[11] = embedding[12]
    result = FiberBundle(row_limit=300).run(planted_weights(embedding, word_tokenizer(words)))
    assert int(result.data["points"]) == 296  # 298 words but two
    assert not set(result.data["token"].to_numpy()) & {0, 1, 300, 301, 302, 303, 304}
    assert "2 tokens with the row of another one left out" in result.headline()
    assert "60 neighbours are over a fiftieth of 296 tokens" in result.headline()
    assert result.data["text"].to_numpy()[0].startswith(" w")


def test_settings_and_seed_choose_tokens_and_neighbours():
    model = planted_weights(rows(500))
    first, second = (FiberBundle(row_limit=20, seed=seed).run(model).data for seed in (0, 1))
    assert first["token"].to_numpy().tolist() != second["token"].to_numpy().tolist()
    wide = FiberBundle(row_limit=20, neighbours=120).run(model).data
    assert int(wide["neighbours"]) == 120
    assert (wide["radius"].sel(cloud="embedding") > 0).all()


def test_refusals_say_what_to_do():
    with pytest.raises(wb.RequestError, match="150 tokens have embeddings of their own; fiber-bundle needs 200"):
        FiberBundle().run(planted_weights(rows(150)))
    with pytest.raises(wb.RequestError, match="neighbours=400 of 300 tokens"):
        FiberBundle(neighbours=400).run(planted_weights(rows(300)))
    with pytest.raises(wb.RequestError, match="neighbours"):
        FiberBundle(neighbours=20)
