"""Records that change attention weights: added to the scores before the softmax, or redistributed after it.

A change of the scores is an additive mask, given to the attention module in place of its own: so every kernel that
takes a mask computes it, in every architecture. A key is named by its position, also where a cache holds the last ones
alone or more than there are.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.io.checks import check
from workbench.io.errors import DataError, RequestError
from workbench.model.attention import AttentionCall, AttentionInputs, change_attention, pattern_blocks
from workbench.model.forward import attention_name, change_arguments
from workbench.model.intervene import Bound, CurrentTokens, Intervention
from workbench.model.load import Model
from workbench.model.mask_gain import mask_gain, takes_mask_by_head
from workbench.model.positions import PassTokens
from workbench.model.row_changes import Head, query_heads
from workbench.model.token_choice import At, Tokens, tokens_at, whole
from workbench.sites.grammar import Site

_MASKED_KERNELS = ("eager", "sdpa")
"""Attention functions that take an additive mask; in the place of others SDPA computes a changed layer."""

_MASKED = 0.5
"""Share of a type's lowest number below which a mask hides a key."""


class ScoreIntervention(Intervention):
    """A record that adds one number to attention scores of chosen heads, queries and keys."""

    layer: int
    head: Head
    key: At
    queries: At

    @property
    @abstractmethod
    def bias(self) -> float:
        """Number that is added to the scores; minus infinity hides the keys."""

    def bind(self, model: Model) -> Bound:
        """Returns the record made ready for one model; see `Intervention.bind`."""
        return _BoundScores(self, model)


@dataclass(frozen=True, eq=False)
class ScaleAttention(ScoreIntervention):
    """Multiplies unnormalised attention weights to chosen keys by a factor: score <- score + ln(factor).

    A weight a becomes factor · a / (1 + (factor - 1) · s), with s the weight of all chosen keys before.
    """

    layer: int
    head: Head
    """Query heads. None: all."""
    key: At
    """Keys: positions, `Tokens`, ..., as in `at`."""
    factor: float | int
    """0 hides the keys; a query that would lose its last key is left as it is, and counted as exempt."""
    queries: At = "all"

    @property
    def bias(self) -> float:
        """ln(factor). RequestError for a factor below 0."""
        check("factor", self.factor, at_least=0, below=inf)
        return math.log(self.factor) if self.factor else -inf

    def __str__(self) -> str:
        return f"scale attention by {self.factor:g} at layer {self.layer}{_heads_text(self.head)}"


@dataclass(frozen=True, eq=False)
class BiasAttention(ScoreIntervention):
    """Adds a number to the attention scores of chosen keys: score <- score + bias, before the softmax."""

    layer: int
    head: Head
    """Query heads. None: all."""
    key: At
    """Keys: positions, `Tokens`, ..., as in `at`."""
    value: float | int
    """Number that is added, finite."""
    queries: At = "all"

    @property
    def bias(self) -> float:
        """The number. RequestError if it is not finite."""
        check("value", self.value, above=-inf, below=inf)
        return float(self.value)

    def __str__(self) -> str:
        return f"add {self.value:g} to attention scores at layer {self.layer}{_heads_text(self.head)}"


@dataclass(frozen=True, eq=False)
class RedistributeAttention(Intervention):
    """Moves attention weight away from chosen keys, after the softmax (ACT, Yu et al. 2024).

    The keys get `keep` times their weight; the rest goes to the other keys in proportion to their weights. A query
    whose whole weight is on the keys is left as it is, and counted as exempt.
    """

    layer: int
    head: Head
    """Query heads. None: all."""
    keys: At
    """Keys: positions, `Tokens`, ..., as in `at`."""
    keep: float | int = 0.0
    """Share of their weight that the keys keep, 0 to 1."""
    queries: At = field(default="all", kw_only=True)

    def bind(self, model: Model) -> Bound:
        """Returns the record made ready for one model; see `Intervention.bind`."""
        return _BoundRedistribution(self, model)

    def __str__(self) -> str:
        return f"keep {self.keep:g} of attention to keys at layer {self.layer}{_heads_text(self.head)}"


def _heads_text(head: Head) -> str:
    return "" if head is None else f" head {head}"


class _BoundAttention(Bound):
    """A change of the attention of one layer of a model."""

    def __init__(self, record: Any, model: Model, key: At) -> None:
        super().__init__(record, f"attention.{record.layer}")
        self.site = attention_site(model, record.layer)
        self.heads_of_layer = query_heads(model, record.layer) or 0
        self.heads = attention_heads(model, record.layer, record.head)
        self.queries, self.key = tokens_at(record.queries), tokens_at(key)
        self.at = self.queries
        self.keys_seen: set[int] = set()
        self.kernel = None if attention_name(model.module) in _MASKED_KERNELS else "sdpa"

    @property
    def choices(self) -> tuple[Tokens | Tensor, ...]:
        """Its choices of queries and of keys."""
        return self.queries, self.key

    def selection(self, present: PassTokens, key_count: int) -> tuple[Tensor, Tensor]:
        """Masks of the chosen queries (batch, query) and keys (batch, key) of a pass, on the CPU."""
        keys = present.keys(key_count)
        self.count.passes += 1
        self.seen |= present.came_up(self.at)
        self.keys_seen |= keys.came_up(self.key)
        return present.chosen(self.queries), keys.chosen(self.key)

    def check(self) -> None:
        """Raises DataError for what did not happen; see `Bound.check`."""
        positions = self.key.positions if isinstance(self.key, Tokens) else ()
        missing = sorted(set(positions) - self.keys_seen)
        if missing and self.count.passes:
            raise DataError(f"{self.record}: no pass had a key at position {missing[0]} within reach; name another")
        super().check()


class _BoundScores(_BoundAttention):
    """Numbers added to attention scores, by the mask of the attention module."""

    def __init__(self, record: ScoreIntervention, model: Model) -> None:
        super().__init__(record, model, record.key)
        self.module_path = attention_module(model, self.site)
        part = model.module.get_submodule(self.module_path)
        self.bias = record.bias / mask_gain(model.module, part, self.site)
        self.of_heads = torch.zeros(self.heads_of_layer, dtype=torch.bool, device="cpu")
        self.of_heads[list(self.heads)] = True
        if bool(self.of_heads.all()):  # one mask is for all heads: XGLM takes no other
            self.of_heads = self.of_heads[:1]
        elif not takes_mask_by_head(model.module, part, self.site, self.heads_of_layer):
            raise RequestError(
                f"layer {record.layer}: the attention of {model.architecture} takes one mask for all heads; "
                "give head=None"
            )
        self.call_path = attention_call(model, record.layer) if self.kernel else self.module_path
        self.eager = attention_name(model.module) == "eager"

    def attach(self, module: nn.Module, tokens: CurrentTokens, stack: ExitStack) -> None:
        """Registers the hook; see `Bound.attach`."""
        part = module.get_submodule(self.call_path)
        if self.kernel:
            change = partial(self._in_call, tokens)
            stack.enter_context(change_attention(attention_name(module), part, change))
        else:
            stack.enter_context(change_arguments(part, partial(self._arguments, tokens, part)))

    def _in_call(self, tokens: CurrentTokens, inputs: AttentionInputs) -> AttentionInputs:
        """Changes the scores where a kernel takes no additive mask: another one computes the call."""
        present = tokens.of(self.record)
        queries, keys = self.selection(present, inputs.key.shape[2])
        if self.bias == 0 or not bool(keys.any()):
            self.count.rows += int((queries & keys.any(1)[:, None])[:, present.fresh :].sum())
            return inputs
        mask = mask_of_flash(inputs, present, self.record)
        return inputs.replaced(mask=self._biased(mask, queries, keys, present), kernel=self.kernel)

    def _arguments(self, tokens: CurrentTokens, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        present, mask = tokens.of(self.record), arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 4:
            raise DataError(f"{self.record}: the attention of this model takes a mask of {mask.ndim} axes, not of 4")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and self.eager:
            raise DataError(f"{self.record}: the attention of this model takes no mask that is added to the scores")
        hidden = next(value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point())
        dtype, columns = hidden.dtype, present.shape[1]
        key_count = mask.shape[-1] if isinstance(mask, Tensor) else _count_keys(part, arguments, present)
        queries, keys = self.selection(present, key_count)
        if self.bias == 0 or not bool(keys.any()):
            self.count.rows += int((queries & keys.any(1)[:, None])[:, present.fresh :].sum())
            return arguments
        if isinstance(mask, Tensor):
            mask = mask if mask.dtype != torch.bool else _float_mask(mask, dtype)
        else:
            mask = _float_mask(_causal(part, present, key_count, columns), dtype)
        arguments["attention_mask"] = self._biased(mask.to(hidden.device), queries, keys, present)
        return arguments

    def _biased(self, mask: Tensor, queries: Tensor, keys: Tensor, present: PassTokens) -> Tensor:
        lowest = torch.finfo(mask.dtype).min
        heads = self.of_heads
        mask = mask.expand(len(queries), max(len(heads), mask.shape[1]), *mask.shape[2:])
        chosen_pairs = (heads[None, :, None, None] & queries[:, None, :, None] & keys[:, None, None, :]).to(mask.device)
        visible = mask > _MASKED * lowest
        if self.bias == -inf:
            exempt = ~(visible & ~chosen_pairs).any(-1, keepdim=True) & (visible & chosen_pairs).any(-1, keepdim=True)
            new_mask = torch.where(visible & chosen_pairs & ~exempt, torch.full_like(mask, lowest), mask)
            self.count.exempt += int(exempt[..., 0].any(1)[:, present.fresh :].sum())
        else:
            new_mask = torch.where(visible & chosen_pairs, mask + self.bias, mask)
        rows = queries & (visible & chosen_pairs).any(-1).any(1).to(queries.device)
        fresh = rows[:, present.fresh :]
        self.count.rows += int(fresh.sum())
        return new_mask


def _count_keys(part: nn.Module, arguments: dict[str, Any], present: PassTokens) -> int:
    """Keys that the attention of a layer reads where it gets no mask."""
    cache = next((value for value in arguments.values() if hasattr(value, "get_mask_sizes")), None)
    layer = getattr(part, "layer_idx", None)
    if cache is None or layer is None:
        return present.cached + present.shape[1]
    return int(cache.get_mask_sizes(present.shape[1], layer)[0])


def _causal(part: nn.Module, present: PassTokens, key_count: int, columns: int) -> Bool[Tensor, "1 1 query key"]:
    """Keys that each query sees where the model leaves the mask to the kernel: all up to its own."""
    offset = max(0, present.cached + columns - key_count)
    query = present.cached + torch.arange(columns, device="cpu")[:, None]
    key = offset + torch.arange(key_count, device="cpu")[None]
    visible = key <= query if getattr(part, "is_causal", True) else torch.ones_like(key <= query)
    return visible[None, None]


def _float_mask(visible: Bool[Tensor, "batch head query key"], dtype: torch.dtype) -> Tensor:
    lowest = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, lowest)


class _BoundRedistribution(_BoundAttention):
    """Attention weights moved between keys, as a bias of the scores that depends on the row."""

    def __init__(self, record: RedistributeAttention, model: Model) -> None:
        check("keep", record.keep, at_least=0, at_most=1)
        super().__init__(record, model, record.keys)
        self.keep = float(record.keep)
        self.module_path = attention_call(model, record.layer)
        if getattr(model.module.get_submodule(self.module_path), "sinks", None) is not None:
            raise RequestError(
                f"layer {record.layer}: {model.architecture} has learned sinks, which take part of each row's weight, "
                "so redistribution is not defined; ScaleAttention and BiasAttention are"
            )

    def attach(self, module: nn.Module, tokens: CurrentTokens, stack: ExitStack) -> None:
        """Registers the change; see `Bound.attach`."""
        part = module.get_submodule(self.module_path)
        change = partial(self._redistribute, tokens)
        stack.enter_context(change_attention(attention_name(module), part, change))

    def _redistribute(self, tokens: CurrentTokens, inputs: AttentionInputs) -> AttentionInputs:
        present, key_count = tokens.of(self.record), inputs.key.shape[2]
        queries, keys = self.selection(present, key_count)
        if not bool(queries.any() & keys.any()):
            return inputs
        keep, device, lowest = self.keep, inputs.query.device, torch.finfo(inputs.query.dtype).min
        mask = mask_of_flash(inputs, present, self.record) if self.kernel else explicit_mask(inputs, present)
        mask = mask[..., :key_count].to(device).expand(len(queries), self.heads_of_layer, -1, -1)
        chosen_keys = keys[:, None, None, :].to(device)
        weights = torch.cat([block for _, block in pattern_blocks(_call_of(inputs, mask))], dim=2)
        mass = (weights * chosen_keys).sum(-1, keepdim=True)
        total = weights.sum(-1, keepdim=True)  # below 1 where the layer has a learned sink
        rest = total - mass
        ratio = keep * rest / (total - keep * mass).clamp(min=1e-30)
        heads = torch.zeros(self.heads_of_layer, dtype=torch.bool, device="cpu")
        heads[list(self.heads)] = True
        row = (heads[None, :, None, None] & queries[:, None, :, None]).to(device) & (mass > 0)
        exempt = row & (rest <= 1e-6 * total)
        bias = torch.where(ratio > 0, ratio.log(), torch.tensor(-inf, device=device))
        new_mask = torch.where(
            row & ~exempt & chosen_keys & (mask > _MASKED * lowest), mask + bias.to(mask.dtype), mask
        )
        self.count.rows += int(row[..., 0].any(1)[:, present.fresh :].sum())
        self.count.exempt += int(exempt[..., 0].any(1)[:, present.fresh :].sum())
        return inputs.replaced(mask=new_mask.clamp(min=lowest), kernel=self.kernel or inputs.kernel)


def _call_of(inputs: AttentionInputs, mask: Float[Tensor, "batch head query key"]) -> AttentionCall:
    query, value = inputs.query, inputs.value
    scaling, softcap = inputs.settings.get("scaling"), inputs.settings.get("softcap")
    return AttentionCall(
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        output=query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]),  # not read
        weights=None,
        mask=mask,
        scaling=inputs.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=False,
        softcap=softcap,
        position_bias=inputs.settings.get("position_bias"),
        sliding_window=None,
    )


def attention_site(model: Model, layer: int) -> Site:
    """Returns the site of a layer that shows its attention.

    Raises:
        RequestError: The model has no such layer, or no attention that is known there.
    """
    check("layer", layer, at_least=0, at_most=model.site_map.n_layers - 1, whole=True)
    for kind in ("pattern", "z"):
        for site in model.site_map.sites.values():
            if site.layer == layer and site.kind == kind and site.axes[0] == "head":
                return site
    raise RequestError(f"layer {layer} of {model.architecture} has no attention whose weights can be changed")


def attention_call(model: Model, layer: int) -> str:
    """Returns the path of the module whose attention call transformers makes in a layer.

    Raises:
        RequestError: The layer computes attention in its own way.
    """
    for site in model.site_map.sites.values():
        if site.layer == layer and site.tap.part in ("query", "key", "value", "weights"):
            return site.tap.path
    raise RequestError(
        f"layer {layer}: {model.architecture} computes attention without transformers.AttentionInterface, so queries "
        "and keys cannot be changed or read there; ScaleAttention and BiasAttention can"
    )


def attention_module(model: Model, site: Site) -> str:
    """Returns the path of the module at or above a site that takes an attention mask."""
    path = site.tap.path
    block = f"{model.site_map.blocks}.{site.layer}"
    while path.startswith(f"{block}."):
        if "attention_mask" in inspect.signature(model.module.get_submodule(path).forward).parameters:
            return path
        path = path.rpartition(".")[0]
    raise RequestError(f"layer {site.layer}: no module of attention in {model.architecture} takes an attention mask")


def explicit_mask(inputs: AttentionInputs, present: PassTokens) -> Float[Tensor, "batch head query key"]:
    """Returns the float mask of a call that has another form of it, or none, which means a causal kernel."""
    mask, dtype = inputs.mask, inputs.query.dtype
    if mask is not None and mask.ndim == 4:
        return mask if mask.dtype != torch.bool else _float_mask(mask, dtype)
    columns, key_count = inputs.query.shape[2], inputs.key.shape[2]
    visible = _causal(inputs.module, present, key_count, columns)
    return _float_mask(visible, dtype).to(inputs.query.device)


def mask_of_flash(
    inputs: AttentionInputs, present: PassTokens, record: Intervention
) -> Float[Tensor, "batch head query key"]:
    """Returns the float mask that stands for what flash attention gets: causal, a window, padding by two axes.

    Raises:
        RequestError: Scores with a soft-cap or a learned sink, which SDPA does not compute.
    """
    if inputs.settings.get("softcap") is not None or inputs.settings.get("s_aux") is not None:
        raise RequestError(
            f"{record}: SDPA, which would take the place of the model's attention kernel, computes no soft-cap and no "
            "learned sink; load the model with attn_implementation='eager'"
        )
    mask, columns, key_count = inputs.mask, inputs.query.shape[2], inputs.key.shape[2]
    if mask is not None and mask.ndim == 4:
        return explicit_mask(inputs, present)
    visible = _causal(inputs.module, present, key_count, columns)
    if window := inputs.settings.get("sliding_window"):
        offset = max(0, present.cached + columns - key_count)
        query = present.cached + torch.arange(columns, device="cpu")[:, None]
        visible = visible & (query - offset - torch.arange(key_count, device="cpu")[None] < window)
    if mask is not None:  # one of a static cache is shorter than the keys
        real = nn.functional.pad(mask.cpu().bool(), (0, max(0, key_count - mask.shape[1])))
        visible = visible & real[:, None, None, -key_count:]
    return _float_mask(visible, inputs.query.dtype).to(inputs.query.device)


def attention_heads(model: Model, layer: int, head: Head) -> tuple[int, ...]:
    """Returns the query heads that a record names. RequestError for one that the layer does not have."""
    count = query_heads(model, layer) or 0
    if head is None:
        return tuple(range(count))
    heads = tuple(head) if isinstance(head, Sequence) else (head,)
    if not heads or not all(map(whole, heads)) or not all(0 <= int(index) < count for index in heads):
        raise RequestError(f"head must be query heads from 0 to {count - 1} of layer {layer}, not {head!r}")
    return tuple(int(index) for index in heads)
