"""Documents about the demo's invented world, in five domains, with labels for every word.

    story       people in places over several days; names are carried from sentence to sentence
    facts       who lives where, does what, and keeps which animal: always the same
    lists       days, months, number words, digits, letters and ordinals in lists and in sentences
    copy        passages without meaning, repeated later in the same document
    backcopy    a bigram chain with trigger words, after which the word before the trigger returns
                (the Bigram-Backcopy task of Guo et al., arXiv 2410.13835, with words for characters)

`python -m workbench.experiments.demo_model.corpus` writes the held-out corpus that ships with the package.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from random import Random
from typing import Any

from workbench.embedded import CORPUS
from workbench.experiments.demo_model.world import CONCEPTS, ORDINALS, PEOPLE, PLAIN, SUCCESSORS, TRIGGERS, Person

HELD_OUT = 1_000_003
"""Seed of the corpus that ships with the package; training seeds are small numbers and never equal it."""

_WORD = re.compile(r"[A-Za-z0-9]+")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Piece:
    """Part of a text with its labels: value by column of the token table."""

    text: str
    labels: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class LabelledDocument:
    """A text, its domain, and for each label the spans of characters that carry it.

    Labels: `word` (the word), `entity` ("person" or "place"), `concept` (class of the word), `ordinal` (class) and
    `ordinal_index` (place in the class, from 0), `trigger` (the trigger word), `copy_source` (character at which the
    word that this one copies begins).
    """

    text: str
    domain: str
    spans: dict[str, list[dict[str, Any]]]

    def record(self) -> dict[str, Any]:
        """Returns the document as a line of the corpus file, which `workbench.record` reads."""
        return {"text": self.text, "domain": self.domain, "spans": self.spans}


def documents(count: int, seed: int, characters: int = 800) -> Iterator[LabelledDocument]:
    """Yields `count` documents of at least `characters` characters, the domains in turn; the seed determines all."""
    names = list(DOMAINS)
    for number in range(count):
        yield document(names[number % len(names)], Random(f"{seed}:{number}"), characters)


def document(domain: str, draw: Random, characters: int) -> LabelledDocument:
    """Returns one document: paragraphs of `domain` until there are `characters` characters."""
    pieces: list[Piece] = []
    length = 0
    while length < characters:
        paragraph = DOMAINS[domain](draw)
        pieces += paragraph
        length += sum(len(piece.text) for piece in paragraph)
    return _assemble(domain, pieces)


def _assemble(domain: str, pieces: list[Piece]) -> LabelledDocument:
    """Joins pieces into a text; a `copy_source` is the number of a piece and becomes a character offset here."""
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece.text))
    text = "".join(piece.text for piece in pieces)
    spans: dict[str, list[dict[str, Any]]] = {name: [] for name in LABELS}
    for match in _WORD.finditer(text):
        spans["word"].append({"start": match.start(), "end": match.end(), "value": match[0]})
    for number, piece in enumerate(pieces):
        for name, value in piece.labels:
            if name == "copy_source":
                value = starts[number - value]
            spans[name].append({"start": starts[number], "end": starts[number + 1], "value": value})
    return LabelledDocument(text, domain, spans)


# Labelled pieces


def _ordinal(kind: str, index: int) -> Piece:
    return Piece(ORDINALS[kind][index], (("ordinal", kind), ("ordinal_index", index)))


def _concept(kind: str, draw: Random) -> Piece:
    return _word(draw.choice(CONCEPTS[kind]))


def _word(word: str) -> Piece:
    """A word with its concept class, where it has one."""
    return Piece(word, (("concept", _CLASS_OF[word]),) if word in _CLASS_OF else ())


def _person(person: Person) -> Piece:
    return Piece(person.name, (("entity", "person"),))


def _place(name: str) -> Piece:
    return Piece(name, (("entity", "place"),))


def _fill(template: str, **slots: Piece) -> list[Piece]:
    """A sentence: the text of `template`, with a piece for each {slot}."""
    parts = _SLOT.split(template)
    return [slots[part] if place % 2 else Piece(part) for place, part in enumerate(parts) if part]


# Domains


def _story(draw: Random) -> list[Piece]:
    """A few days in the life of two people; the days follow one another."""
    hero, friend = draw.sample(PEOPLE, 2)
    a, b = _person(hero), _person(friend)
    day = draw.randrange(7)
    sentences = [_fill(draw.choice(_OPENINGS), a=a, home=_place(hero.home), job=_word(hero.job), pet=_word(hero.pet))]
    for number in range(draw.randint(2, 3)):
        slots = {
            "a": a,
            "b": b,
            "day": _ordinal("day", (day + number) % 7),
            "place": _place(friend.home),
            "pet": _word(hero.pet),
            "job": _word(friend.job),
            "weather": _concept("weather", draw),
            "colour": _concept("colour", draw),
            "object": _concept("object", draw),
            "food": _concept("food", draw),
            "feeling": _concept("feeling", draw),
            "animal": _word(friend.pet),
            "number": _ordinal("number word", draw.randrange(1, 9)),
        }
        for template in (draw.choice(_MORNINGS), draw.choice(_MEETINGS), draw.choice(_EVENINGS)):
            sentences.append(_fill(template, **slots))
    sentences.append([Piece("\n")])
    return list(chain.from_iterable(sentences))


_OPENINGS = (
    "{a} the {job} lived in {home} with the {pet}.",
    "In {home} lived {a}, who worked as a {job} and had a {pet}.",
    "There was once a {job} called {a}, who lived in {home} and kept a {pet}.",
)
_MORNINGS = (
    " On {day} there was {weather}, and {a} felt {feeling}.",
    " {day} began with {weather}.",
    " When {day} came, {a} woke up {feeling} and gave {food} to the {pet}.",
    " On {day} {a} packed the {colour} {object} and some {food}.",
)
_MEETINGS = (
    " {a} went to {place} to visit {b} the {job}.",
    " {b} the {job} came from {place} with a {colour} {object}.",
    " {a} wrote to {b} about the {colour} {object}, and {b} was {feeling}.",
    " {b} carried {number} {object} boxes, and {a} helped {b}.",
)
_EVENINGS = (
    " In the evening {a} and {b} ate {food} together.",
    " {b} gave {a} the {object}, and {a} thanked {b}.",
    " The {pet} of {a} ran after the {animal} of {b}.",
    " Then {b} told {a} a tale about a {colour} {animal}.",
)


def _facts(draw: Random) -> list[Piece]:
    """Returns sentences with the facts about one person, in random order."""
    person = draw.choice(PEOPLE)
    slots = {
        "name": _person(person),
        "home": _place(person.home),
        "job": _word(person.job),
        "pet": _word(person.pet),
    }
    templates = [draw.choice(forms) for forms in draw.sample(_FACTS, 3)]
    return [*chain.from_iterable(_fill(template, **slots) for template in templates), Piece("\n")]


_FACTS = (
    ("{name} lives in {home}. ", "The home of {name} is {home}. ", "You can find {name} in {home}. "),
    ("{name} works as a {job}. ", "The job of {name} is {job}. ", "Every day {name} works as a {job}. "),
    ("{name} has a {pet}. ", "The pet of {name} is a {pet}. ", "{name} looks after a {pet}. "),
)


def _lists(draw: Random) -> list[Piece]:
    """Consecutive members of one ordinal class, in one of several forms."""
    kind = draw.choice(list(ORDINALS))
    members = ORDINALS[kind]
    length = draw.randint(4, min(8, len(members)))
    first = draw.randrange(len(members) - length + 1)
    run = [_ordinal(kind, index) for index in range(first, first + length)]
    form = draw.choice((_separated, _separated, _annotated, _annotated, _spoken))
    return [*form(run, draw), Piece("\n")]


def _separated(run: list[Piece], draw: Random) -> list[Piece]:
    """Monday, Tuesday, Wednesday"""
    separator = draw.choice((", ", " ", "; ", " and ", " then ", " - ", "\n"))
    lead = draw.choice(("", "", "Count: ", "In order: ", "We said "))
    return [Piece(lead)] * bool(lead) + [part for item in run for part in (item, Piece(separator))][:-1]


def _annotated(run: list[Piece], draw: Random) -> list[Piece]:
    """Monday: bread, a line for each"""
    kind = draw.choice(list(CONCEPTS))
    mark = draw.choice((": ", " ", ". ", ") ", " - "))
    ending = draw.choice(("\n", ", ", "; "))
    return [part for item in run for part in (item, Piece(mark), _concept(kind, draw), Piece(ending))][:-1]


def _spoken(run: list[Piece], draw: Random) -> list[Piece]:
    """After Monday comes Tuesday."""
    template = draw.choice(_SUCCESSIONS)
    return [part for item, after in pairwise(run) for part in _fill(template, item=item, after=after)]


_SUCCESSIONS = ("After {item} comes {after}. ", "{item} is followed by {after}. ", "What follows {item} is {after}. ")


def _copy(draw: Random) -> list[Piece]:
    """A passage without meaning, and the same once more."""
    plain, concepts = [_word(word) for word in PLAIN], [_word(word) for word in _CLASS_OF]
    kinds = draw.choices((plain, concepts, [_person(person) for person in PEOPLE]), (3, 2, 2), k=draw.randint(8, 24))
    passage = [draw.choice(words) for words in kinds]
    first_lead, second_lead = draw.choice(_QUOTES)
    spaced = [part for item in passage for part in (Piece(" "), item)]
    distance = len(spaced) + 2  # the copy's lead and the first passage's full stop lie between
    copied = [
        Piece(part.text, (*part.labels, ("copy_source", distance))) if part.text != " " else part for part in spaced
    ]
    return [Piece(first_lead), *spaced, Piece(".\n"), Piece(second_lead), *copied, Piece(".\n")]


_QUOTES = (("Read:", "Repeat:"), ("The song went:", "Then all sang:"), ("Message:", "Message received:"))


def _backcopy(draw: Random) -> list[Piece]:
    """Some sixty words of the bigram chain; a quarter of them are followed by a trigger and return."""
    words = [draw.choice(PLAIN)]
    pieces = [Piece(words[0])]
    while len(pieces) < 120:
        last = words[-1]
        if draw.random() < 0.25:
            trigger = draw.choice(TRIGGERS)
            pieces += [Piece(" "), Piece(trigger, (("trigger", trigger),))]
            pieces += [Piece(" "), Piece(last, (("copy_source", 4),))]
        words.append(draw.choices(SUCCESSORS[last], weights=(6, 5, 4, 3, 2, 1))[0])
        pieces += [Piece(" "), Piece(words[-1])]
    return [*pieces, Piece("\n")]


_CLASS_OF = {word: kind for kind, words in CONCEPTS.items() for word in words}

LABELS = ("word", "entity", "concept", "ordinal", "ordinal_index", "trigger", "copy_source")

DOMAINS: dict[str, Callable[[Random], list[Piece]]] = {
    "story": _story,
    "facts": _facts,
    "lists": _lists,
    "copy": _copy,
    "backcopy": _backcopy,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the held-out corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CORPUS)
    parser.add_argument("--documents", type=int, default=150)
    request = parser.parse_args(arguments)
    with request.out.open("w", encoding="utf-8") as lines:
        for document_ in documents(request.documents, HELD_OUT):
            lines.write(json.dumps(document_.record(), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
