"""Tasks shown by examples in the prompt: "France: Paris", one a line, and a question (Todd et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from random import Random

from workbench.corpus.prompt_pairs import PromptPair

SHOTS = 5
"""Examples before the question."""
_CAPITALS = (
    "France Paris Italy Rome Spain Madrid Germany Berlin Japan Tokyo Egypt Cairo Russia Moscow China Beijing "
    "Greece Athens Poland Warsaw Austria Vienna Ireland Dublin Portugal Lisbon Hungary Budapest Norway Oslo "
    "Cuba Havana England London Turkey Ankara Syria Damascus Iraq Baghdad Iran Tehran Kenya Nairobi Peru Lima "
    "Chile Santiago"
)
_OPPOSITES = (
    "hot cold big small up down left right good bad old young fast slow hard soft open closed early late high "
    "low long short rich poor strong weak light dark full empty true false win lose buy sell love hate day "
    "night"
)
_PLURALS = (
    "dog dogs car cars tree trees house houses book books friend friends letter letters window windows song "
    "songs table tables key keys king kings ship ships road roads star stars child children man men woman "
    "women foot feet"
)
_PAST = (
    "walk walked go went see saw take took give gave come came run ran eat ate say said find found make made "
    "know knew tell told bring brought keep kept leave left write wrote speak spoke play played look looked "
    "want wanted ask asked"
)
_CHAINS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten",
)


def _map(words: str) -> dict[str, str]:
    parts = words.split()
    return dict(zip(parts[::2], parts[1::2], strict=True))


WORD_MAPS: Mapping[str, Mapping[str, str]] = {
    "capitals": _map(_CAPITALS),
    "opposites": _map(_OPPOSITES),
    "plurals": _map(_PLURALS),
    "past": _map(_PAST),
    "next": {word: after for chain in _CHAINS for word, after in pairwise(chain.split())},
}
"""Name of each task to its questions and answers."""


def _prompts(words: Mapping[str, str]) -> Callable[[Random], Iterator[PromptPair]]:
    """Draws of one task. In the corrupt prompt no example has its own answer; the answers are the same ones."""

    def draw_pairs(draw: Random) -> Iterator[PromptPair]:
        while True:
            *examples, question = draw.sample(list(words), SHOTS + 1)
            answers = [words[word] for word in examples]
            shift = draw.randint(1, SHOTS - 1)
            turned = answers[shift:] + answers[:shift]
            last = f"{question}:"
            clean, corrupt = (
                "".join(f"{word}: {answer}\n" for word, answer in zip(examples, side, strict=True)) + last
                for side in (answers, turned)
            )
            wrong = tuple(f" {answer}" for answer in dict.fromkeys(answers) if answer != words[question])
            ends = [(len(text) - len(last), len(text)) for text in (clean, corrupt)]
            yield PromptPair(clean, corrupt, (f" {words[question]}",), wrong, {"question": (ends[0], ends[1])})

    return draw_pairs


IN_CONTEXT = {f"in-context-{name}": (_prompts(words),) for name, words in WORD_MAPS.items()}
"""Forms of these tasks, for `prompt_pairs`. Their corrupt prompts have the answers of the examples shuffled."""
