"""Tasks for causal analyses: generators of clean and corrupt prompts whose answers a model may know.

Each task draws pairs from a seed; `prompt_pairs` keeps those that fit a tokenizer. The two prompts of a pair are of one
template, and differ in the slots that decide the answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from workbench.corpus.in_context import IN_CONTEXT
from workbench.corpus.prompt_pairs import (
    Characters,
    CheckedPair,
    PairChecker,
    PromptPair,
    PromptPairs,
    WithTokenizer,
    made_pairs,
)
from workbench.embedded import demo_corpus
from workbench.io.checks import MOST, check, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

_TRIES = 40  # draws for each pair that is asked for
_STALLED = 100  # draws without a new pair, for each that was drawn, after which there are no others
_FIRST = 100  # draws after which a form that has given no pair is left

_NAMES = (
    *(
        "John",
        "Mary",
        "Tom",
        "James",
        "Dan",
        "Sarah",
        "Anna",
        "Peter",
        "Paul",
        "Mark",
        "David",
        "Kate",
        "Alice",
        "Jack",
    ),
    *("Emma", "Lucy", "Henry", "Robert", "Laura", "Simon", "Adam", "Ruth", "Martin", "Jane", "Susan", "George"),
)
_IOI = (
    "Then, {a} and {b} went to the {place}. {subject} gave a {object} to",
    "When {a} and {b} got a {object} at the {place}, {subject} decided to give it to",
    "After {a} and {b} went to the {place}, {subject} gave a {object} to",
    "While {a} and {b} were working at the {place}, {subject} handed a {object} to",
)
_PLACES = ("store", "garden", "school", "office", "park", "station", "market", "house")
_GIFTS = ("drink", "book", "ring", "letter", "flower", "key", "ball", "cake")
_PERIODS = ("war", "project", "journey", "study", "conflict", "tour", "siege", "campaign", "reign", "expedition")
_SINGULAR = {
    **{"key": "keys", "dog": "dogs", "picture": "pictures", "book": "books", "teacher": "teachers", "car": "cars"},
    **{"letter": "letters", "window": "windows", "friend": "friends", "student": "students", "table": "tables"},
    **{"house": "houses", "tree": "trees", "song": "songs", "doctor": "doctors", "bottle": "bottles"},
}
_NEAR = ("near", "behind", "beside", "with")
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "purple")
_THINGS = ("lamp", "hat", "bag", "box", "coat", "bell", "chair", "door", "car", "book", "cup", "ball")
_WORDS = (
    *("stone", "river", "cloud", "window", "garden", "candle", "bridge", "paper", "silver", "market", "button"),
    *("forest", "needle", "pocket", "copper", "meadow", "engine", "feather", "island", "kitchen", "pillow", "summer"),
)
_CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo"},
    **{"Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Poland": "Warsaw", "Austria": "Vienna"},
    **{"Ireland": "Dublin", "Portugal": "Lisbon", "Hungary": "Budapest", "Norway": "Oslo", "Cuba": "Havana"},
}


def prompt_pairs(
    task: str, tokenizer: PreTrainedTokenizerBase | WithTokenizer, count: int = 50, *, seed: int = 0
) -> PromptPairs:
    """Returns pairs of prompts of one task that fit a tokenizer.

    Tasks: "ioi" (indirect object: the name that was not repeated; the corrupt prompt repeats the other name);
    "greater-than" (a later year of the century; corrupt: a later first year); "agreement" (is or are, with another noun
    between; corrupt: the subject's other number); "facts" (job or animal of a person of the embedded world; corrupt:
    another person); "capitals" (of countries; corrupt: another country); "colours" (of one of two things; corrupt: the
    other thing); "copying" (the next word of a passage that is repeated; corrupt: another word in the first one);
    "in-context-capitals", "-opposites", "-plurals", "-past", "-next" (five examples and a question; corrupt: the
    answers of the examples shuffled, so that they do not show the task).

    Args:
        task: Name of the task.
        tokenizer: Tokenizer, or a model with its tokenizer.
        count: Number of pairs; fewer are returned where too few fit.
        seed: Seed of the draws; the same seed gives the same pairs.

    Returns:
        The pairs, and how many were dropped for each reason.

    Raises:
        RequestError: No such task, or no pair fits the tokenizer.
    """
    check("task", task, one_of=tuple(TASKS))
    count = whole_number("count", count, at_least=1, at_most=MOST)
    fitting_pairs: list[CheckedPair] = []
    dropped: Mapping[str, int] = {}
    for form in TASKS[task]:
        checker, drawn_prompts, draw, newest = PairChecker(tokenizer), set(), Random(f"{task}:{seed}"), 0
        for number, pair in enumerate(islice(form(draw), _TRIES * count)):
            exhausted = number - newest > max(_FIRST, _STALLED * len(drawn_prompts))
            if len(fitting_pairs) == count or (not fitting_pairs and number == _FIRST) or exhausted:
                break
            if (pair.clean, pair.corrupt) not in drawn_prompts:
                newest = number
                drawn_prompts.add((pair.clean, pair.corrupt))
                fitting_pairs += filter(None, [checker(pair)])
        dropped = checker.dropped
        if fitting_pairs:
            break
    pairs = made_pairs(task, fitting_pairs, dropped, seed)
    if len(fitting_pairs) < count:
        _LOG.warning(f"task {task}: {len(fitting_pairs):,} pairs fit the tokenizer, fewer than the {count:,} asked for")
    return pairs


# ---- templates ------------------------------------------------------------------------------------------


def _fill(template: str, slots: Mapping[str, str]) -> tuple[str, dict[str, Characters]]:
    """The text of a template, and the characters of each slot."""
    text, spans = "", {}
    for index, part in enumerate(re.split(r"\{(\w+)\}", template)):
        if index % 2:
            spans[part] = (len(text), len(text) + len(slots[part]))
            part = slots[part]
        text += part
    return text, spans


def _pair(
    template: str, slots: Mapping[str, str], changed: Mapping[str, str], answer: str | tuple, wrong: str | tuple
) -> PromptPair:
    clean, spans = _fill(template, slots)
    corrupt, corrupt_spans = _fill(template, {**slots, **changed})
    labelled = {label: (ends, corrupt_spans[label]) for label, ends in spans.items()}
    right, false = (value if isinstance(value, tuple) else (f" {value}",) for value in (answer, wrong))
    return PromptPair(clean, corrupt, right, false, labelled)


# ---- tasks: endless draws -------------------------------------------------------------------------------


def _ioi(draw: Random) -> Iterator[PromptPair]:
    while True:
        first_name, second_name = draw.sample(_NAMES, 2)
        slots = {"a": first_name, "b": second_name, "place": draw.choice(_PLACES), "object": draw.choice(_GIFTS)}
        subject, answer = draw.sample((first_name, second_name), 2)
        yield _pair(draw.choice(_IOI), {**slots, "subject": subject}, {"subject": answer}, answer, subject)


def _years(draw: Random) -> Iterator[PromptPair]:
    """Two digits a token: the right answers to the corrupt prompt are right for the clean one, too, and not counted."""
    while True:
        low, high = draw.randint(2, 39), draw.randint(50, 79)
        century = draw.choice(("11", "12", "13", "14", "15", "16", "17"))
        slots = {"period": draw.choice(_PERIODS), "century": century, "year": f"{low:02d}"}
        answers = tuple(tuple(f"{year:02d}" for year in span) for span in (range(low + 1, high), range(high + 1, 100)))
        template = "The {period} lasted from the year {century}{year} to the year " + century
        yield _pair(template, slots, {"year": f"{high:02d}"}, *answers)


def _digits(draw: Random) -> Iterator[PromptPair]:
    """One digit a token: the decade is compared."""
    while True:
        low, high = draw.randint(1, 3), draw.randint(5, 7)
        century = draw.choice(("11", "12", "13", "14", "15", "16", "17"))
        slots = {"period": draw.choice(_PERIODS), "century": century, "year": f"{low}9"}
        answers = tuple(tuple(map(str, span)) for span in (range(low + 1, high + 1), range(high + 1, 10)))
        template = "The {period} lasted from the year {century}{year} to the year " + century
        yield _pair(template, slots, {"year": f"{high}9"}, *answers)


def _agreement(draw: Random) -> Iterator[PromptPair]:
    while True:
        noun, other_noun = draw.sample(list(_SINGULAR), 2)
        forms, plural = (noun, _SINGULAR[noun]), draw.random() < 0.5
        right, wrong = ("are", "is") if plural else ("is", "are")
        attractor = draw.choice((other_noun, _SINGULAR[other_noun]))
        slots = {"subject": forms[plural], "near": draw.choice(_NEAR), "attractor": attractor}
        yield _pair("The {subject} {near} the {attractor}", slots, {"subject": forms[not plural]}, right, wrong)


def _facts(draw: Random) -> Iterator[PromptPair]:
    facts = _world_facts()
    while True:
        template, known = draw.choice(list(facts.items()))
        (subject, answer), (corrupt_subject, wrong) = draw.sample(list(known.items()), 2)
        if answer != wrong:
            yield _pair(template, {"subject": subject}, {"subject": corrupt_subject}, answer, wrong)


@lru_cache(1)
def _world_facts() -> dict[str, dict[str, str]]:
    """Jobs and animals of the people of the embedded world, as its corpus tells them, by template."""
    texts = [document["text"] for document in demo_corpus()]
    facts = {}
    for template in ("{subject} works as a", "{subject} has a"):
        pattern = re.compile(template.replace("{subject}", r"\b([A-Z][a-z]+)") + r" ([a-z]+)\.")
        facts[template] = {name: value for text in texts for name, value in pattern.findall(text)}
    return facts


def _capitals(draw: Random) -> Iterator[PromptPair]:
    templates = ("The capital of {subject} is the city of", "{subject} is a country, and its capital is called")
    while True:
        country, corrupt_country = draw.sample(list(_CAPITALS), 2)
        yield _pair(
            draw.choice(templates),
            {"subject": country},
            {"subject": corrupt_country},
            _CAPITALS[country],
            _CAPITALS[corrupt_country],
        )


def _colours(draw: Random) -> Iterator[PromptPair]:
    template = "The {first} is {first_colour} and the {second} is {second_colour}. The colour of the {thing} is"
    while True:
        (first, second), (first_colour, second_colour) = draw.sample(_THINGS, 2), draw.sample(_COLOURS, 2)
        slots = {
            "first": first,
            "first_colour": first_colour,
            "second": second,
            "second_colour": second_colour,
            "thing": first,
        }
        if draw.random() < 0.5:
            yield _pair(template, slots, {"thing": second}, first_colour, second_colour)
        else:
            yield _pair(template, {**slots, "thing": second}, {"thing": first}, second_colour, first_colour)


def _copying(draw: Random) -> Iterator[PromptPair]:
    while True:
        words = draw.sample(_WORDS, 9)
        source = draw.randint(2, 6)
        passage = [f"{{word_{index}}}" if index != source else "{source}" for index in range(8)]
        slots = {f"word_{index}": word for index, word in enumerate(words[:8])} | {"source": words[source]}
        slots |= {"cue": words[source - 1]}
        repeat = [*words[: source - 1], "{cue}"]
        template = f"Read: {' '.join(passage)}.\nRepeat: {' '.join(repeat)}"
        yield _pair(template, slots, {"source": words[8]}, words[source], words[8])


TASKS: Mapping[str, tuple[Callable[[Random], Iterator[PromptPair]], ...]] = {
    "ioi": (_ioi,),
    "greater-than": (_years, _digits),
    "agreement": (_agreement,),
    "facts": (_facts,),
    "capitals": (_capitals,),
    "colours": (_colours,),
    "copying": (_copying,),
    **IN_CONTEXT,
}
"""Forms of each task: the first one of which a pair fits the tokenizer is taken."""
