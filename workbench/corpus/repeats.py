"""Sequences of tokens made as controls: random tokens that repeat, and texts whose blocks are shuffled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from workbench.corpus.tokenizer import AddedTokens, special_ids
from workbench.io.checks import MOST, check
from workbench.io.errors import RequestError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def random_repeats(
    tokens: PreTrainedTokenizerBase | Sequence[int],
    sequences: int = 64,
    *,
    period: tuple[int, int] = (20, 60),
    copies: int = 2,
    filler: tuple[int, int] = (1, 30),
    bos: bool = True,
    seed: int = 0,
) -> list[list[int]]:
    """Returns sequences of token ids: BOS, random filler, then one block of random tokens several times.

    All tokens of filler and block are different, so that each token of a later copy has one earlier occurrence a copy.
    Periods and lengths of the filler differ between sequences: with a fixed period, a head that attends a fixed number
    of tokens back, without reading them, would pass for an induction head.

    Args:
        tokens: The model's tokenizer, whose special tokens are not drawn; or the ids to draw from, for a model without
            one.
        sequences: Number of sequences.
        period: Smallest and largest length of the block. Lengths are drawn without replacement, and again when all have
            been used.
        copies: Number of times that the block stands in a sequence.
        filler: Smallest and largest number of tokens before the first copy.
        bos: True begins every sequence with the tokenizer's BOS, where it has one.
        seed: Random seed.

    Raises:
        RequestError: A range is empty, or there are fewer tokens than a sequence needs.
    """
    check("sequences", sequences, at_least=1, at_most=MOST, whole=True)
    check("copies", copies, at_least=2, at_most=MOST, whole=True)
    for name, ends, least in (("period", period, 2), ("filler", filler, 0)):
        if not isinstance(ends, Sequence) or len(ends) != 2:
            raise RequestError(f"{name} must be the smallest and the largest one, such as (20, 60), not {shown(ends)}")
        low, high = ends
        check(f"the smallest {name}", low, at_least=least)
        check(f"the largest {name}", high, at_least=low)
    ids, first = _drawn_from(tokens)
    if len(ids) < period[1] + filler[1]:
        raise RequestError(
            f"period {period} and filler {filler} need up to {period[1] + filler[1]} different tokens, and there are "
            f"{len(ids)}; give shorter ones"
        )
    draw = np.random.default_rng(seed)
    periods = _without_replacement(draw, *period)
    result = []
    for _ in range(sequences):
        before, length = int(draw.integers(filler[0], filler[1] + 1)), next(periods)
        chosen = draw.choice(ids, before + length, replace=False).tolist()
        result.append([*(first if bos else ()), *chosen[:before], *chosen[before:] * copies])
    return result


def shuffled_blocks(ids: Sequence[int], shuffle: int, seed: int = 0) -> list[int]:
    """Returns the tokens in 4^shuffle blocks of equal length in a random order; 0 leaves them as they are.

    A control for what depends on the order of tokens (arXiv 2501.10573): 1,024 tokens are fully shuffled at 5.

    Raises:
        RequestError: The number of tokens is not divisible by 4^shuffle.
    """
    check("shuffle", shuffle, at_least=0)
    blocks = 4**shuffle
    if len(ids) % blocks:
        raise RequestError(f"{len(ids)} tokens cannot be cut into {blocks} equal blocks; cut the text or shuffle less")
    order = np.random.default_rng(seed).permutation(blocks)
    return np.asarray(ids, dtype=np.int64).reshape(blocks, -1)[order].ravel().tolist()


def _drawn_from(tokens: PreTrainedTokenizerBase | Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Ids to draw from, and BOS if there is one."""
    if isinstance(tokens, str) or not (isinstance(tokens, Sequence) or hasattr(tokens, "get_vocab")):
        raise RequestError("tokens must be a tokenizer, such as model.tokenizer, or ids, such as range(model.vocab)")
    if isinstance(tokens, Sequence):
        return np.unique(np.asarray(tokens, dtype=np.int64)), []
    special = special_ids(tokens, AddedTokens())
    first = tokens.bos_token_id
    ids = sorted(set(tokens.get_vocab().values()) - special)
    return np.array(ids), [first] if isinstance(first, int) else []


def _without_replacement(draw: np.random.Generator, low: int, high: int) -> Iterator[int]:
    while True:
        yield from draw.permutation(np.arange(low, high + 1)).tolist()
