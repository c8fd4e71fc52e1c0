"""The planted model's texts for each question, its stream in float64 from its tables, and the rows of what is known.

A row says what one probe must find and why that is known without running it; tests/probes/test_planted_model.py runs
them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import workbench as wb
from workbench.embedded import planted

CORPUS_SITES = ("resid_pre.0", "resid_post", "attn_out", "mlp_out", "mlp_post", "pattern", "z", "v")
PASSAGE_SITES = ("pattern", "v", "q", "k", "resid_pre.0", "resid_mid", "resid_post")
HALF = 11
"""Words of a passage that is read twice."""
ALTERNATING = 48
"""Tokens of a text of two words in turn."""


@dataclass(frozen=True)
class Truth:
    """What one probe must find in the planted model."""

    why: str
    check: Callable[[PlantedStores], None]


def only(values: Any, *heads: tuple[int, int], value: float = 1.0, atol: float = 1e-3) -> None:
    """Asserts that a grid of heads has `value` at these heads and 0 elsewhere."""
    expected = np.zeros(np.shape(values))
    for head in heads:
        expected[head] = value
    np.testing.assert_allclose(values, expected, atol=atol)


def stream(ids: Any) -> np.ndarray:
    """Returns the stream behind block 0, axes (position, d_model), in float64, from the tables of the construction.

    The weights are not read: dimensions 0 to 63 the token, 64 to 127 the one before, then the clock and the features.
    """
    x = np.zeros((len(ids), planted.D_MODEL))
    place = np.arange(len(ids))
    x[place, planted.TOKEN.start + np.asarray(ids)] = 1
    x[place, planted.PREVIOUS.start + np.asarray([ids[0], *ids[:-1]])] = 1
    x[:, planted.CONSTANT] = 16, -16
    angle = place[:, None] * np.pi / 2.0 ** np.arange(8)
    x[:, planted.POSITION] = np.stack([np.cos(angle), np.sin(angle)], -1).reshape(len(ids), 16)
    for feature, direction in zip(planted.FEATURES, planted.dictionary().double().numpy(), strict=True):
        x[np.ix_(np.isin(ids, planted.feature_tokens(feature)), planted.DICTIONARY)] += direction
    for word, dimension in zip(planted.ORDINALS, planted.ORDINAL, strict=True):
        x[np.asarray(ids) == planted.token_id(word), dimension] = 1
    x[np.ix_(np.asarray(ids) == 0, planted.MASSIVE)] = 1000, -1000
    return x


class PlantedStores:
    """The planted model and its recordings, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = wb.load_model("planted", device="cpu")

    @cached_property
    def corpus(self) -> wb.Store:
        """The planted corpus: copied passages, days, months and numbers in order, sentences."""
        return self._record("corpus", wb.planted_corpus(), CORPUS_SITES)

    @cached_property
    def repeats(self) -> wb.Store:
        """Random tokens, repeated at random distances."""
        ids = wb.random_repeats(self.model.tokenizer, 16, period=(8, 30), filler=(1, 20))
        return self._record("repeats", ids, ("pattern", "resid_post"))

    @cached_property
    def passages(self) -> wb.Store:
        """23 tokens: 22 different objects ("new"), or 11 objects twice ("twice"), of one half of them or the other.

        Objects are words at which no neuron of MLP 1 is active. Pairs of words are labelled, every third word is not.
        """
        draw, texts = Random(0), []
        for number in range(16):
            half = planted.OBJECTS[:HALF] if number % 2 else planted.OBJECTS[HALF:]
            texts += [passage("new", draw.sample(planted.OBJECTS, 2 * HALF))]
            texts += [passage("twice", 2 * draw.sample(half, HALF))]
        return self._record("passages", texts, PASSAGE_SITES)

    @cached_property
    def alternating(self) -> wb.Store:
        """Two words in turn, 48 tokens with the first."""
        pairs = zip(planted.OBJECTS[::2][:4], planted.OBJECTS[1::2], strict=False)
        texts = [" ".join((24 * list(pair))[: ALTERNATING - 1]) for pair in pairs]
        return self._record("alternating", texts, ("pattern",))

    @cached_property
    def chains(self) -> wb.Store:
        """Three words of a class in order, so that the next one is known from each; every text four times."""
        texts = [
            " ".join(words[start : start + 3])
            for words in planted.CHAINS.values()
            for start in range(len(words) - 3)
            for _ in range(4)
        ]
        return self._record("chains", texts, ("resid_post",))

    @cached_property
    def substitutions(self) -> wb.Store:
        """A word in place of another one: the planted model has no circuit that reads a word by its company."""
        sentences = {
            "stone": ("Anna saw the {}.", "Ben met the {}.", "the {} met Clara.", "Read the {}."),
            "river": ("David saw the {}.", "Clara met the {}.", "the {} saw Ben.", "Repeat the {}."),
        }
        texts = wb.substitution_texts("stone", "river", (1, 2), 3, sentences=sentences, question="Read the {}")
        return self._record("substitutions", texts, ("resid_post",))

    def _record(self, name: str, texts: Any, sites: Any) -> wb.Store:
        out = self.folder / f"{name}.acts"
        return wb.record(self.model, texts, sites=sites, out=out, dtype="float32", show_progress=False)


def passage(domain: str, words: list[str]) -> dict[str, Any]:
    """Returns a text of these words, with a label over the second and third word of every three."""
    text, spans = "", []
    for number, word in enumerate(words):
        text += f" {word}" if text else word
        if number % 3 == 1:
            spans.append({"start": len(text) - len(word), "value": "pair"})
        if number % 3 == 2:
            spans[-1]["end"] = len(text)
    return {"text": text, "domain": domain, "spans": {"pair": [span for span in spans if "end" in span]}}
