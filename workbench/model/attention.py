"""Reads attention while the model computes it its own way.

transformers sends every attention layer through one table of functions, `AttentionInterface`. Inside
`tap_attention` the entry a model uses is wrapped: the same function still computes the output (SDPA stays
SDPA), and the layers asked for also hand over their queries, keys, values and mask. Attention patterns are
recomputed from those a few query rows at a time, so no layer ever holds a full T x T array. What a whole pattern
comes down to (attention received, entropies) is summed over the same blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, as its function was called. Keys and values keep their own number of heads."""

    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    value: Float[Tensor, "batch kv_head key d_value"]
    output: Float[Tensor, "batch query head d_value"]
    weights: Tensor | None
    mask: Tensor | None
    scaling: float
    causal: bool
    softcap: float | None
    position_bias: Tensor | None
    sliding_window: int | None


def pattern_blocks(call: AttentionCall, query_rows: int = 256) -> Iterator[tuple[int, Tensor]]:
    """The attention pattern in blocks of query positions: yields (first query, probabilities).

    Each block is `[batch, head, query, key]` in float32; a row sums to 1 over the keys it can see (less, where
    the layer has a learned sink logit) and is 0 elsewhere. Memory: one block, `query_rows` of it.
    """
    n = call.query.shape[2]
    if call.weights is not None:
        yield 0, call.weights.float()
        return
    groups = call.query.shape[1] // call.key.shape[1]
    key = call.key.float()
    for first in range(0, n, query_rows):
        rows = slice(first, min(first + query_rows, n))
        query = rearrange(call.query[:, :, rows].float(), "b (kv g) q d -> b kv g q d", g=groups)
        scores = torch.einsum("bkgqd,bksd->bkgqs", query, key).mul_(call.scaling).flatten(1, 2)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.position_bias is not None:
            scores = scores + call.position_bias[:, :, rows, : scores.shape[-1]].float()
        yield first, _masked_softmax(scores, call, rows)


def _masked_softmax(scores: Tensor, call: AttentionCall, rows: slice) -> Tensor:
    mask = call.mask
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        scores = scores + (mask[:, :, rows] if mask.shape[2] > 1 else mask)[..., : scores.shape[-1]].float()
    else:
        scores = scores.masked_fill(~_visible(call, rows, scores.shape[-1]), torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def _visible(call: AttentionCall, rows: slice, n_keys: int) -> Bool[Tensor, "#batch #head query key"]:
    """Which keys each query may see, whichever of the three mask conventions the implementation uses."""
    mask = call.mask
    if mask is not None and mask.ndim == 4:
        return (mask[:, :, rows] if mask.shape[2] > 1 else mask)[..., :n_keys]
    query = torch.arange(rows.start, rows.stop, device=call.query.device)[:, None]
    key = torch.arange(n_keys, device=call.query.device)[None, :]
    visible = key <= query if call.causal else torch.ones_like(key <= query)
    if mask is None:
        return visible[None, None]  # SDPA was told is_causal: no window, no padding, or it would have made a mask
    if call.sliding_window:
        visible = visible & (query - key < call.sliding_window)
    return visible[None, None] & mask[:, None, None, :n_keys].bool()  # flash attention's 2-D padding mask


class Columns:
    """What each key receives, summed over blocks of query rows: from the queries that are real and not before it.

    A query outside of whose window the key lies counts, and pays 0.
    """

    def __init__(self, real: Shaped[Tensor, "batch query"]) -> None:
        """`real`: which positions of the right-padded sequences are tokens."""
        self._real = real.bool()
        self._mass = self._logs = torch.zeros(())

    def add(self, first: int, block: Float[Tensor, "batch head query key"]) -> None:
        """Counts a block of the pattern whose first query is `first`. Each block comes once, in any order."""
        self._real = self._real.to(block.device)
        padding = ~self._real[:, None, first : first + block.shape[2], None]
        seen = block.tril(first).masked_fill(padding, 0)
        self._mass = self._mass.to(seen) + seen.sum(2)
        self._logs = self._logs.to(seen) + torch.xlogy(seen, seen).sum(2)

    def received(self) -> Float[Tensor, "batch key head"]:
        """Mean over the real queries from the key on of the attention they pay to it: 0 to 1; alpha of Gu et al. 2024.

        1/(T - k) of everything where attention is the key's own alone: the last keys have few queries.
        """
        queries = self._real.flip(1).cumsum(1).flip(1).clamp(min=1)
        return (self._mass / queries[:, None]).transpose(1, 2)

    def entropy(self) -> Float[Tensor, "batch key head"]:
        """Entropy in nats of the column, normalised to sum 1: 0 (one query pays, or none) to ln(T - k) (all alike)."""
        return _entropy(self._mass, self._logs).transpose(1, 2)


def row_entropy(block: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch query head"]:
    """Entropy in nats of what each query pays, normalised to sum 1: 0 (one key) to ln of the keys it sees (uniform)."""
    return _entropy(block.sum(-1), torch.xlogy(block, block).sum(-1)).transpose(1, 2)


def _entropy(mass: Float[Tensor, "*shape"], logs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Of weights w / S, from S = sum w and sum w ln w: ln S - (sum w ln w) / S; 0 where there are none."""
    return torch.where(mass > 0, mass.log() - logs / mass, 0).clamp(min=0)


@contextmanager
def tap_attention(
    implementation: str, callbacks: Mapping[nn.Module, Callable[[AttentionCall], None]]
) -> Iterator[None]:
    """Inside, each attention module among the keys of `callbacks` hands its `AttentionCall` to its callback.

    `implementation` is the model's `config._attn_implementation`. The model and its config are not touched,
    other models pass through, and the table is as before afterwards, exceptions included.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not callbacks:
        yield
        return
    had = implementation in ALL_ATTENTION_FUNCTIONS._local_mapping
    original = ALL_ATTENTION_FUNCTIONS.get(implementation)

    def tapped(module, query, key, value, attention_mask=None, *args, **kwargs):
        attend = original or eager_function(module)
        output, weights = attend(module, query, key, value, attention_mask, *args, **kwargs)
        if module in callbacks:
            callbacks[module](_call(module, query, key, value, output, weights, attention_mask, kwargs))
        return output, weights

    ALL_ATTENTION_FUNCTIONS[implementation] = tapped
    try:
        yield
    finally:
        if had:
            ALL_ATTENTION_FUNCTIONS[implementation] = original
        else:
            del ALL_ATTENTION_FUNCTIONS[implementation]


def eager_function(module: nn.Module) -> Callable:
    """The eager attention of the file that defines `module`: transformers keeps it out of the shared table."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _call(module, query, key, value, output, weights, mask, kwargs) -> AttentionCall:
    scaling = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        output=output,
        weights=weights if isinstance(weights, Tensor) and weights.ndim == 4 else None,
        mask=mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        softcap=kwargs.get("softcap"),
        position_bias=kwargs.get("position_bias"),
        sliding_window=kwargs.get("sliding_window"),
    )
