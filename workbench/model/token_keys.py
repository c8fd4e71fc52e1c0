"""Attention to keys that the tokens determine: the token before, earlier occurrences, what followed them, recent ones.

An earlier occurrence of a query's token counts if another token stands between them: what followed the token right
before the query is the query itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

RECENT = 5
"""Tokens before a query whose attention `recent` adds up."""


def earlier_occurrences(
    ids: Int[Tensor, "sequence key"], first: int = 0, queries: int | None = None
) -> Bool[Tensor, "sequence query key"]:
    """Returns where each query's token stands earlier, with another token between them.

    Args:
        ids: Token ids.
        first: Position of the first query.
        queries: Number of queries. None: all.
    """
    position = torch.arange(ids.shape[1], device=ids.device)
    chosen_queries = slice(first, None if queries is None else first + queries)
    return (ids[:, chosen_queries, None] == ids[:, None]) & (position < position[chosen_queries, None] - 1)


def next_keys(keys: Float[Tensor, "sequence query key"]) -> Float[Tensor, "sequence query key"]:
    """Returns the same numbers at the keys after these."""
    return torch.nn.functional.pad(keys, (1, -1))


@dataclass(frozen=True)
class QueryBlock:
    """Attention of consecutive queries, and the tokens of their sequences."""

    attention: Float[Tensor, "batch head query key"]
    ids: Int[Tensor, "batch key"]
    first: int
    """Position of the first query."""

    @cached_property
    def earlier(self) -> Float[Tensor, "batch query key"]:
        """1 at earlier occurrences of the query's token."""
        ids = self.ids.to(self.attention.device)
        return earlier_occurrences(ids, self.first, self.attention.shape[2]).to(self.attention.dtype)


def duplicate(block: QueryBlock) -> Float[Tensor, "batch query head"]:
    """Returns the attention to earlier occurrences of the query's token; 0 where there is none."""
    return torch.einsum("bhqk,bqk->bqh", block.attention, block.earlier)


def induction(block: QueryBlock) -> Float[Tensor, "batch query head"]:
    """Returns the attention to the tokens that followed earlier occurrences of the query's; 0 where there is none."""
    return torch.einsum("bhqk,bqk->bqh", block.attention, next_keys(block.earlier))


def current(block: QueryBlock) -> Float[Tensor, "batch query head"]:
    """Returns the attention to the query's own token."""
    return _back(block, 0)


def previous(block: QueryBlock) -> Float[Tensor, "batch query head"]:
    """Returns the attention to the token before the query; 0 for the first."""
    return _back(block, 1)


def recent(block: QueryBlock) -> Float[Tensor, "batch query head"]:
    """Returns the attention to the five tokens before the query, or as many as there are."""
    return torch.stack([_back(block, offset) for offset in range(1, RECENT + 1)]).sum(0)


def first(block: QueryBlock) -> Float[Tensor, "batch query head"]:
    """Returns the attention to the first token."""
    return rearrange(block.attention[..., 0], "batch head query -> batch query head")


def _back(block: QueryBlock, offset: int) -> Float[Tensor, "batch query head"]:
    """Attention to the key `offset` tokens before each query; 0 where there is none."""
    query = torch.arange(block.attention.shape[2], device=block.attention.device)
    key = block.first + query - offset
    values = block.attention[:, :, query, key.clamp(min=0)].masked_fill(key < 0, 0)
    return rearrange(values, "batch head query -> batch query head")
