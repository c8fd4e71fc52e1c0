"""Ordered classes of words, such as days and numbers, as tokens of a model (Gould et al., arXiv 2312.09230)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from workbench.io.errors import RequestError
from workbench.model.unembed import Unembed

SPACES: Mapping[str, tuple[str, ...]] = {"with": (" ",), "without": ("",), "both": (" ", "")}
CASES: Mapping[str, tuple[Callable[[str], str], ...]] = {
    "listed": (str,),
    "lower": (str.lower,),
    "both": (str, str.lower),
}
_WORDS = {
    "number words": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "day prefixes": "Mon Tue Wed Thu Fri Sat Sun",
    "months": "January February March April May June July August September October November December",
    "month prefixes": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
}
TASKS: Mapping[str, tuple[str, ...]] = {
    "numbers": tuple(map(str, range(1, 201))),
    **{task: tuple(words.split()) for task, words in _WORDS.items()},
}
"""The eight tasks, each a class of words in order."""

CYCLIC = frozenset({"days", "day prefixes", "months", "month prefixes"})
"""Tasks whose first word can be the successor of the last."""


@dataclass(frozen=True)
class Chain:
    """One spelling of one task: its members that are single tokens, in order, and their successors."""

    task: str
    ids: Int[np.ndarray, " member"]
    index: Int[np.ndarray, " member"]
    """Index of each member in the task's list of words, from 1."""
    source: Int[np.ndarray, " pair"]
    target: Int[np.ndarray, " pair"]
    """Members, as indices into `ids`: `target` is the successor of `source`."""


@dataclass(frozen=True)
class Pairs:
    """(source, target) pairs of all chains, one chain after another."""

    chain: Int[np.ndarray, " pair"]
    source: Int[np.ndarray, " pair"]
    target: Int[np.ndarray, " pair"]
    of_task: Float[np.ndarray, "pair task"]
    """1 where a pair belongs to a task."""

    def mean(self, values: Shaped[np.ndarray, "*head pair"]) -> Float[np.ndarray, "*head task"]:
        """Returns the mean over each task's pairs; exact for 0 and 1, so that half of them is not above 0.5."""
        return values @ self.of_task / self.of_task.sum(0)


def find_chains(
    unembed: Unembed, *, space: str, case: str, min_members: int, wrap: bool, min_pairs: int = 1
) -> list[Chain]:
    """Returns every spelling with enough members of one token each, of every task with enough pairs of them.

    Args:
        unembed: Unembedding with the texts of its tokens.
        space: Leading space of the members: a key of `SPACES`.
        case: Case of the members: a key of `CASES`.
        min_members: Minimum number of members.
        wrap: True if the first day and month are the successors of the last.
        min_pairs: Minimum number of pairs of a task in all its spellings: a share of one or two pairs is no score.

    Raises:
        RequestError: The model has no tokenizer, or no class has enough members and pairs.
    """
    if unembed.tokens is None:
        raise RequestError("the recorded model has no tokenizer, so the tokens of the words are unknown")
    ids = {text: token for token, text in enumerate(unembed.tokens)}  # byte tokens come first and are overwritten
    chains: dict[tuple, Chain] = {}
    for task, words in TASKS.items():
        for prefix in SPACES[space]:
            for change in CASES[case]:
                members = [(i, ids[t]) for i, word in enumerate(words) if (t := prefix + change(word)) in ids]
                chain = make_chain(task, members, len(words), wrap and task in CYCLIC)
                if len(chain.ids) >= min_members and len(chain.source):
                    chains.setdefault((task, *chain.ids.tolist()), chain)  # "one" is the same in lower case
    pairs = Counter()
    for chain in chains.values():
        pairs[chain.task] += len(chain.source)
    large_chains = [chain for chain in chains.values() if pairs[chain.task] >= min_pairs]
    if not large_chains:
        raise RequestError(
            f"no class has {min_members} members and {min_pairs} pairs of them that are single tokens of this model "
            f"(space={space!r}, case={case!r}); try space='both', case='both' or lower min_members and min_pairs"
        )
    return large_chains


def make_chain(task: str, members: Sequence[tuple[int, int]], listed: int, wrap: bool) -> Chain:
    """Returns the chain of `members`, (index in the list from 0, token id); a gap in the list breaks it."""
    place = {index: member for member, (index, _) in enumerate(members)}
    first_after_last = {listed - 1: 0} if wrap else {}
    pairs = [
        (member, place[after])
        for index, member in place.items()
        if (after := first_after_last.get(index, index + 1)) in place and after != index
    ]
    source, target = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    index, ids = (np.array(part, dtype=np.int64) for part in (list(place), [token for _, token in members]))
    return Chain(task, ids, index + 1, source, target)


def make_pairs(chains: Sequence[Chain], tasks: Sequence[str]) -> Pairs:
    """Returns the pairs of all chains, one chain after another."""
    chain = np.repeat(np.arange(len(chains)), [len(part.source) for part in chains])
    task = np.array([tasks.index(chains[i].task) for i in chain.tolist()])
    of_task = (task[:, None] == np.arange(len(tasks))).astype(float)
    source, target = (np.concatenate([getattr(part, name) for part in chains]) for name in ("source", "target"))
    return Pairs(chain, source, target, of_task)


def shuffled_null(
    tops: Int[np.ndarray, "layer head pair"],
    pairs: Pairs,
    macro: Float[np.ndarray, "layer head"],
    permutations: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (mean score by task, mean macro, p, p over all heads) with successors shuffled within each class.

    All heads share a shuffle, so that the best of them has a null too. p is (1 + shuffles as high) / (1 + shuffles).
    """
    generator = np.random.default_rng(seed)
    score, total = np.zeros((*macro.shape, pairs.of_task.shape[1])), np.zeros(macro.shape)
    higher, best_higher = np.zeros(macro.shape, int), np.zeros(macro.shape, int)
    reached = macro - 1e-9  # sums in another order differ in their last bit
    for _ in range(permutations):
        order = np.lexsort((generator.random(len(pairs.chain)), pairs.chain))  # chains are in order and keep places
        shuffled = pairs.mean(tops == pairs.target[order])
        null = shuffled.mean(-1)
        score, total = score + shuffled, total + null
        higher += null >= reached
        best_higher += null.max() >= reached
    p_value, p_family = ((1 + count) / (1 + permutations) for count in (higher, best_higher))
    return score / permutations, total / permutations, p_value, p_family
