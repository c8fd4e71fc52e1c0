"""Excess of scores of earlier text over scores of newer text: relative contextualization, by query and in the mean."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mean_excess(
    x: Float[Tensor, "*batch x"],
    y: Float[Tensor, "*batch y"],
    counts_y: Bool[Tensor, "*batch y"],
) -> Float[Tensor, "*batch x"]:
    """Returns the mean over y of max(x - y, 0) for each x, in O(n log n); NaN where no y counts.

    Args:
        x: Scores of earlier keys.
        y: Scores of newer keys.
        counts_y: Which of them count.
    """
    large = torch.where(counts_y, y, torch.inf)
    ordered = large.sort(-1).values
    below = torch.searchsorted(ordered, x.contiguous())
    finite = torch.where(ordered.isinf(), 0, ordered)
    sums = torch.nn.functional.pad(finite.cumsum(-1), (1, 0)).gather(-1, below)
    number = counts_y.sum(-1, keepdim=True)
    return (below * x - sums) / torch.where(number > 0, number, torch.nan)


def conditional_excess(
    scores: Float[Tensor, "head query key"],
    earlier: Bool[Tensor, "head query key"],
    newer: Bool[Tensor, "head query key"],
) -> tuple[Float[Tensor, " head"], Float[Tensor, "head key"]]:
    """Returns the mean over queries of the mean over pairs of max(f_earlier - f_newer, 0), and that of each key alone.

    Args:
        scores: f of each query and key.
        earlier: Keys of the prompt that the query sees and that count.
        newer: Keys of the newer text that the query sees.

    Returns:
        By head; and by head and key, the mean over the queries that see the key, NaN for keys that do not count.
    """
    excess = torch.where(earlier, mean_excess(scores, scores, newer), 0)
    number = earlier.sum(-1)
    has_pairs = number > 0
    by_query = excess.sum(-1) / number.clamp(min=1)
    queries = has_pairs.sum(-1)
    total = torch.where(has_pairs, by_query, 0).sum(-1) / torch.where(queries > 0, queries, torch.nan)
    queries_of_key = earlier.sum(-2)
    return total, excess.sum(-2) / torch.where(queries_of_key > 0, queries_of_key, torch.nan)


def marginal_excess(
    scores: Float[Tensor, "head query key"],
    earlier: Bool[Tensor, "head query key"],
    newer: Bool[Tensor, "head query key"],
) -> Float[Tensor, " head"]:
    """Returns the mean over all earlier scores x and all newer scores y, of any queries, of max(x - y, 0)."""
    flat_scores, flat_earlier = scores.flatten(1), earlier.flatten(1)
    excess = torch.where(flat_earlier, mean_excess(flat_scores, flat_scores, newer.flatten(1)), 0)
    number = flat_earlier.sum(-1)
    return excess.sum(-1) / torch.where(number > 0, number, torch.nan)
