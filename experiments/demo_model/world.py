"""The invented world of the demo's texts: people with their facts, places, classes of words, orders.

Nothing here depends on the seed of a corpus: every corpus, the one trained on and the one held out, speaks of the
same people and the same facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random

ORDINALS: dict[str, tuple[str, ...]] = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ),
    "number word": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    "digit": tuple("0123456789"),
    "letter": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "ordinal": ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
}
"""Members of each ordinal class, in order."""

CONCEPTS: dict[str, tuple[str, ...]] = {
    "animal": (
        *("goat", "cat", "dog", "hen", "duck", "pony", "rabbit", "parrot"),
        *("turtle", "ferret", "falcon", "sheep", "hedgehog", "donkey"),
    ),
    "job": (
        *("baker", "teacher", "sailor", "farmer", "tailor", "miller"),
        *("painter", "doctor", "singer", "gardener", "carpenter", "potter"),
    ),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "grey", "brown", "purple", "pink"),
    "food": ("bread", "soup", "cheese", "plums", "honey", "rice", "beans", "cake", "pears", "fish"),
    "object": (
        *("lamp", "rope", "basket", "parcel", "hat", "drum"),
        *("kettle", "clock", "ladder", "mirror", "bell", "coat"),
    ),
    "weather": ("rain", "snow", "wind", "fog", "sunshine", "thunder", "frost", "hail"),
    "feeling": ("happy", "sad", "tired", "proud", "afraid", "calm", "angry", "curious"),
}
"""Words of each concept class; they have no other meaning in any text."""

PLAIN = (
    *("stone", "river", "cloud", "window", "garden", "candle", "bridge", "paper"),
    *("silver", "market", "button", "forest", "needle", "pocket", "copper", "meadow"),
    *("engine", "feather", "island", "kitchen", "marble", "orchard", "pillow", "saddle"),
    *("tunnel", "valley", "winter", "summer", "ribbon", "hammer"),
)
"""Words without a class, for meaningless passages."""

TRIGGERS = ("indeed", "again", "namely")
"""Trigger words of the back-copy texts: the word before a trigger follows it again."""

SUCCESSORS: dict[str, tuple[str, ...]] = {
    word: tuple(Random(f"successors of {word}").sample([successor for successor in PLAIN if successor != word], 6))
    for word in PLAIN
}
"""Bigram of the back-copy texts: possible successors of a plain word, the likelier first (weights 6 to 1)."""


@dataclass(frozen=True)
class Person:
    """A person with a name of one or two words and three constant facts."""

    name: str
    home: str
    job: str
    pet: str


ONSETS = (
    *("Quo", "Zev", "Fyr", "Jex", "Vod", "Wyk", "Xan", "Gub"),
    *("Kyz", "Myx", "Phu", "Dwy", "Hox", "Luj", "Ryv", "Uzo"),
)
CODAS = (
    *("vim", "zag", "koth", "bux", "phy", "dju", "wex", "mog"),
    *("xil", "gwy", "ruk", "tov", "zeb", "jun", "quil", "fex"),
)
STEMS = ("Vex", "Dru", "Ozk", "Gly", "Bwo", "Uxb", "Kri", "Jyn", "Pwe", "Zhu")
_KINDS = ("Mill", "Bridge", "Harbour", "Hill", "Gate")


def _places() -> tuple[str, ...]:
    sides = ("Upper", "Lower", "Old", "New")
    chosen = Random("places").sample(list(product(sides, STEMS, _KINDS)), 40)
    return tuple(f"{side} {stem}{Random(stem).choice(('by', 'um', 'ock'))} {kind}" for side, stem, kind in chosen)


PLACES = _places()
"""Forty places, each of three words."""


def _people(count: int) -> tuple[Person, ...]:
    draw = Random("people")
    names = [first + last for first, last in draw.sample(list(product(ONSETS, CODAS)), count)]
    return tuple(
        Person(
            name=name,
            home=draw.choice(PLACES),
            job=draw.choice(CONCEPTS["job"]),
            pet=draw.choice(CONCEPTS["animal"]),
        )
        for name in names
    )


PEOPLE = _people(120)
"""A hundred and twenty people, with names of 16 beginnings and 16 ends; neither part determines the other."""
