"""Texts in which one harmless word stands for another, with the texts that serve as controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.io.checks import MOST, whole_number
from workbench.io.errors import RequestError

SENTENCES: Mapping[str, tuple[str, ...]] = {
    "bicycle": (
        "She rode the {} to school every morning.",
        "The {} has two wheels and a bell.",
        "He pumped air into the tyres of the {}.",
        "I locked my {} to the fence outside the library.",
        "The chain of the {} needs some oil.",
        "They raced down the hill, each on a {}.",
        "My brother fell off his {} and scraped his knee.",
        "The {} leaned against the wall of the garage.",
        "You can rent a {} at the station by the hour.",
        "The brakes of the {} squeaked at the crossing.",
        "A child learns to balance on a small {}.",
        "The courier delivers parcels on a {}.",
        "She raised the saddle of the {} by an inch.",
        "On Sundays we take the {} along the river path.",
    ),
    "carrot": (
        "She peeled the {} and cut it into slices.",
        "The rabbit nibbled on a {} in the garden.",
        "He pulled a fresh {} out of the soil.",
        "I added a {} and an onion to the soup.",
        "The {} is orange and sweet when it is cooked.",
        "They grated a {} over the salad.",
        "My sister dips each {} into hummus.",
        "The {} grew well in the sandy bed.",
        "You can steam a {} in ten minutes.",
        "The leaves of the {} are green and feathery.",
        "A horse will do anything for a {}.",
        "The cook roasted the {} with butter and thyme.",
        "She washed the dirt off the {} under the tap.",
        "In winter we store every {} in a box of sand.",
    ),
}
"""Sentences that fit a word, with `{}` in its place."""

CONDITIONS = ("substituted", "original", "own", "shuffled")
_QUESTION = "What is a {} good for?"


def substitution_texts(
    word: str = "carrot",
    original: str = "bicycle",
    counts: Sequence[int] = (1, 2, 4, 8),
    draws: int = 8,
    *,
    sentences: Mapping[str, Sequence[str]] | None = None,
    question: str = _QUESTION,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Returns texts for `record` in which a word is used in sentences that fit another one.

    Each text has some sentences and a question about its word. Condition "substituted": sentences that fit `original`
    with `word` in its place; "original": the same with `original`; "own": sentences that fit `word`; "shuffled": the
    words of the substituted sentences in random order. "plain" are single sentences of either word, none of which is
    in the others; they say what each word means without the others.

    Args:
        word: The word that is used wrongly.
        original: The word that the sentences fit.
        counts: Numbers of sentences.
        draws: Texts of each condition and number, with other sentences in another order.
        sentences: Word to sentences with `{}` in its place, more than the largest of `counts` for each word. None: of
            "bicycle" and "carrot", 14 each.
        question: The question, with `{}`.
        seed: Random seed.

    Returns:
        Mappings with text, condition, sentences (their number), draw, and spans with the label "target": the last
        occurrence of the word, whose value is the word.

    Raises:
        RequestError: Too few sentences for a word, one without `{}`, or both words are equal.
    """
    known: Mapping[str, Sequence[str]] = SENTENCES
    if sentences is not None:
        known = sentences
    draws = whole_number("draws", draws, at_least=1, at_most=MOST)
    if word == original or not counts:
        raise RequestError("word and original must differ, and counts must name a number of sentences")
    _check_sentences({noun: known.get(noun, ()) for noun in (word, original)}, question, max(counts))
    draw = np.random.default_rng(seed)
    used = max(counts)
    texts = []
    for noun in (word, original):
        texts += [_text(text.format(noun), noun, "plain", 1, number) for number, text in enumerate(known[noun][used:])]
    for count in counts:
        for number in range(draws):
            chosen: dict[str, list[str]]
            chosen = {noun: [known[noun][int(i)] for i in draw.permutation(used)[:count]] for noun in (word, original)}
            words = " ".join(text.format(word) for text in chosen[original]).split(" ")
            contexts = {
                "substituted": (word, " ".join(words)),
                "original": (original, " ".join(text.format(original) for text in chosen[original])),
                "own": (word, " ".join(text.format(word) for text in chosen[word])),
                "shuffled": (word, " ".join(words[i] for i in draw.permutation(len(words)))),
            }
            for condition, (subject, context) in contexts.items():
                texts.append(_text(f"{context} {question.format(subject)}", subject, condition, count, number))
    return texts


def _check_sentences(sentences: Mapping[str, Sequence[str]], question: str, used: int) -> None:
    """Refuses words with too few sentences, and sentences without the place of a word."""
    for word, known in sentences.items():
        if len(known) <= used:
            raise RequestError(
                f"sentences of {word!r}: {len(known)} are given; give more than {used}, with {{}} in the word's place"
            )
        if missing := [text for text in (*known, question) if "{}" not in text]:
            raise RequestError(f"sentences of {word!r}: {missing[0]!r} has no {{}} in the place of the word")


def _text(text: str, word: str, condition: str, count: int, draw: int) -> dict[str, Any]:
    start = text.rindex(word)
    span = {"start": start, "end": start + len(word), "value": word}
    columns = {"condition": condition, "sentences": count, "draw": draw}
    return {"text": text, **columns, "spans": {"target": [span]}}
