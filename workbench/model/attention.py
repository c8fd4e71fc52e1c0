"""Attention, read while the model computes it in its own way.

transformers sends every attention layer through one table of functions, `AttentionInterface`. Inside
`tap_attention` the entry that a model uses is wrapped: the same function still computes the output (SDPA stays
SDPA), and the chosen layers also deliver their queries, keys, values and mask. Attention patterns are recomputed from
those a few query rows at a time, so that no layer holds a full T x T array. Sums over a whole pattern (attention
received, entropies) are accumulated over the same blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from workbench.model.passes import bound


@dataclass(frozen=True)
class AttentionCall:
    """Arguments and result of one layer's attention function. Keys and values keep their own number of heads."""

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
    """Computes the attention pattern in blocks of query positions. Memory: one block.

    Args:
        call: Attention of a layer.
        query_rows: Number of query positions in a block.

    Yields:
        First query of the block, and probabilities (batch, head, query, key) in float32. A row sums to 1 over the
        visible keys (to less if the layer has a learned sink logit) and is 0 elsewhere.
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
    """Keys that each query may see, for each of the three mask conventions of implementations."""
    mask = call.mask
    if mask is not None and mask.ndim == 4:
        return (mask[:, :, rows] if mask.shape[2] > 1 else mask)[..., :n_keys]
    query = torch.arange(rows.start, rows.stop, device=call.query.device)[:, None]
    key = torch.arange(n_keys, device=call.query.device)[None, :]
    visible = key <= query if call.causal else torch.ones_like(key <= query)
    if mask is None:
        return visible[None, None]  # SDPA ran with is_causal: with a window or padding there would be a mask
    if call.sliding_window:
        visible = visible & (query - key < call.sliding_window)
    return visible[None, None] & mask[:, None, None, :n_keys].bool()  # flash attention's 2-D padding mask


class Columns:
    """Attention that each key receives from the queries at and after it, summed over blocks of query rows.

    Padding does not count. A query whose window excludes the key counts with attention 0.
    """

    def __init__(self, real: Shaped[Tensor, "batch query"]) -> None:
        """Takes `real`, which is true at the tokens of right-padded sequences."""
        self._real = real.bool()
        self._mass = self._logs = torch.zeros(())

    def add(self, first: int, block: Float[Tensor, "batch head query key"]) -> None:
        """Adds a block of the pattern whose first query is `first`. Each block is added once, in any order."""
        self._real = self._real.to(block.device)
        padding = ~self._real[:, None, first : first + block.shape[2], None]
        visible = block.tril(first).masked_fill(padding, 0)
        self._mass = self._mass.to(visible) + visible.sum(2)
        self._logs = self._logs.to(visible) + torch.xlogy(visible, visible).sum(2)

    def received(self) -> Float[Tensor, "batch key head"]:
        """Returns the mean attention to each key over the queries at and after it, 0 to 1: alpha of Gu et al. 2024.

        The last keys have few queries: a key k that only its own query attends to has 1/(T - k).
        """
        queries = self._real.flip(1).cumsum(1).flip(1).clamp(min=1)
        return (self._mass / queries[:, None]).transpose(1, 2)

    def entropy(self) -> Float[Tensor, "batch key head"]:
        """Returns the entropy in nats of each column, normalised to sum 1: 0 (at most one query) to ln(T - k)."""
        return _entropy(self._mass, self._logs).transpose(1, 2)


def row_entropy(block: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch query head"]:
    """Returns the entropy in nats of each row, normalised to sum 1: 0 (one key) to ln of the visible keys (uniform)."""
    return _entropy(block.sum(-1), torch.xlogy(block, block).sum(-1)).transpose(1, 2)


def _entropy(mass: Float[Tensor, "*shape"], logs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Entropy of weights w / S, from S = sum w and sum w ln w: ln S - (sum w ln w) / S; 0 if S = 0."""
    return torch.where(mass > 0, mass.log() - logs / mass, 0).clamp(min=0)


@dataclass(frozen=True)
class AttentionInputs:
    """Tensors that an attention function gets, before it computes; keys and values include those of the cache."""

    module: nn.Module
    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    value: Float[Tensor, "batch kv_head key d_value"]
    mask: Tensor | None
    settings: Mapping[str, Any]
    """Other arguments: scaling, softcap, ...."""
    kernel: str | None = None
    """Name of the attention function that computes this call; None: the model's own."""

    def replaced(self, **values: Tensor | str | None) -> AttentionInputs:
        """Returns the inputs with other tensors, or for another kernel."""
        return replace(self, **values)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Tap:
    """Callbacks and changes of attention modules, and the pass that they are for."""

    callbacks: Mapping[nn.Module, Callable[[AttentionCall], None]]
    in_pass: Callable[[], bool]
    changes: Mapping[nn.Module, Callable[[AttentionInputs], AttentionInputs]] = field(default_factory=dict)


_TAPS: dict[str, list[_Tap]] = {}
"""Open taps by the name of the attention implementation, of all threads."""
_LOCK = threading.Lock()


@contextmanager
def tap_attention(
    implementation: str, callbacks: Mapping[nn.Module, Callable[[AttentionCall], None]]
) -> Iterator[None]:
    """Passes the `AttentionCall` of chosen attention modules to callbacks inside the block, in one pass (`passes`).

    The model and its config are not changed, other models and passes are not affected, and the table is restored when
    the last tap is closed.

    Args:
        implementation: The model's `config._attn_implementation`.
        callbacks: Attention modules with their callbacks.
    """
    if not callbacks:
        yield
        return
    with _opened(implementation, _Tap(callbacks, bound())):
        yield


@contextmanager
def change_attention(
    implementation: str, module: nn.Module, change: Callable[[AttentionInputs], AttentionInputs]
) -> Iterator[None]:
    """Replaces the inputs of one module's attention function by `change` of them, each time it runs in the block."""
    with _opened(implementation, _Tap({}, bound(), {module: change})):
        yield


@contextmanager
def _opened(implementation: str, tap: _Tap) -> Iterator[None]:
    """Keeps a tap in the table inside the block."""
    with _LOCK:
        taps = _TAPS.setdefault(implementation, [])
        if not taps:
            _install(implementation, taps)
        taps.append(tap)
    try:
        yield
    finally:
        with _LOCK:
            taps.remove(tap)
            if not taps:
                _restore(implementation)


_REPLACED: dict[str, Callable | None] = {}
"""Entries of the table that taps took the place of; None: there was none in its local part."""


def _install(implementation: str, taps: list[_Tap]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table  # takes seconds

    _REPLACED[implementation] = table._local_mapping.get(implementation)
    if implementation in table:
        table[implementation] = _tapped(table[implementation], taps)
        return
    interface = table.get_interface  # eager attention is not in the table: each file gives its own as the default

    def get_interface(name: str, default: Callable) -> Callable:
        attend = interface(name, default)
        return _tapped(attend, taps) if name == implementation and any(tap.in_pass() for tap in taps) else attend

    table.get_interface = get_interface  # pyright: ignore[reportAttributeAccessIssue]  # of the one instance


def _restore(implementation: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table  # takes seconds

    before = _REPLACED.pop(implementation)
    if "get_interface" in vars(table) and implementation not in table:
        del table.get_interface
    elif before is not None:
        table[implementation] = before
    else:
        table._local_mapping.pop(implementation, None)


def _tapped(attend: Callable, taps: list[_Tap]) -> Callable:
    def tapped(module, query, key, value, attention_mask=None, *args, **kwargs):
        inputs = AttentionInputs(module, query, key, value, attention_mask, kwargs)
        for tap in tuple(taps):
            if module in tap.changes and tap.in_pass():
                inputs = tap.changes[module](inputs)
        query, key, value, attention_mask = inputs.query, inputs.key, inputs.value, inputs.mask
        function = attend if inputs.kernel is None else _kernel(inputs.kernel)
        output, weights = function(module, query, key, value, attention_mask, *args, **kwargs)
        for tap in tuple(taps):
            if module in tap.callbacks and tap.in_pass():
                tap.callbacks[module](_call(module, query, key, value, output, weights, attention_mask, kwargs))
        return output, weights

    return tapped


def _kernel(name: str) -> Callable:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table  # takes seconds

    return table[name]


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
