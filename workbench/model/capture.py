"""One forward pass that hands over the activations of chosen sites, and stops when it has them all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from workbench.io.errors import DataError
from workbench.model.attention import AttentionCall, Columns, pattern_blocks, row_entropy, tap_attention
from workbench.model.forward import first_tensor, hook_tensor, run, text_config
from workbench.sites.grammar import Site, Tap

_QUERY_ROWS = 256

_OF_QUERIES: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    "pattern": lambda block: rearrange(block, "batch head query key -> batch query head key"),
    "attn_entropy": row_entropy,
    "attn_first": lambda block: rearrange(block[..., 0], "batch head query -> batch query head"),
}
"""What a block of query rows is to a site whose rows are queries."""

_OF_KEYS: Mapping[str | None, Callable[[Columns], Tensor]] = {
    "attn_received": Columns.received,
    "attn_received_entropy": Columns.entropy,
}
"""What all blocks together are to a site whose rows are keys."""

Receive = Callable[[Site, Tensor, int], None]
"""Gets a site, its activations `[batch, position, *site.shape]`, and the position the first of them has."""


class _Enough(BaseException):
    """Every site has been seen: leaves the forward pass. Not an Exception, so no model code can catch it."""


def capture(
    module: nn.Module,
    sites: Sequence[Site],
    ids: Int[Tensor, "batch position"],
    mask: Int[Tensor, "batch position"],
    receive: Receive,
) -> None:
    """Runs the model on right-padded `ids` and gives each site's activations to `receive`, padding included.

    The pass ends with the last site asked for: blocks behind it, the final norm and the head are not computed.
    A pattern comes in blocks of query positions, as do the sites derived from it that speak of queries; everything else
    comes in one piece. A pattern is computed once for all that is asked of it. The tensors are the model's own: copy
    what is kept. All hooks are gone afterwards, exceptions included. Raises DataError when a site does not come exactly
    once.
    """
    waiting = {site.name for site in sites}
    if not waiting:
        return

    def expect(site: Site, tensor: Tensor | None) -> Tensor:
        if site.name not in waiting or tensor is None:
            raise DataError(f"site {site.short or site.name}: it ran twice, or without a tensor, in one forward pass")
        return tensor

    def deliver(site: Site, tensor: Tensor | None) -> None:
        _give(site, expect(site, tensor), ids.shape, receive)
        done(site)

    def done(*seen: Site) -> None:
        waiting.difference_update(site.name for site in seen)
        if not waiting:
            raise _Enough

    def patterned(wanted: Sequence[Site], blocks: Iterable[tuple[int, Tensor]]) -> None:
        of_keys = [site for site in wanted if site.kind in _OF_KEYS]
        columns = Columns(mask)
        for first, block in _small(blocks):
            for site in wanted:
                if site not in of_keys:
                    kind = site.kind if site.of else "pattern"
                    receive(site, _OF_QUERIES[kind](block), first)
            if of_keys:
                columns.add(first, block)
        for site in of_keys:
            receive(site, _OF_KEYS[site.kind](columns), 0)
        done(*wanted)

    def returned(wanted: Sequence[Site], weights: Tensor | None) -> None:
        for site in wanted:
            expect(site, weights)
        patterned(wanted, [(0, weights)])

    def attended(wanted: Sequence[Site], call: AttentionCall) -> None:
        patterns = [site for site in wanted if site.tap.part == "weights"]
        if patterns:
            patterned(patterns, pattern_blocks(call, _QUERY_ROWS))
        for site in wanted:
            if site not in patterns:
                tensor = getattr(call, site.tap.part)
                deliver(site, tensor if site.tap.part == "output" else tensor.transpose(1, 2))

    calls: dict[nn.Module, list[Site]] = defaultdict(list)
    weights: dict[Tap, list[Site]] = defaultdict(list)
    with ExitStack() as stack:
        for site in sites:
            part, path = site.tap.part, site.tap.path
            if part in ("in", "out"):
                stack.enter_context(hook_tensor(module.get_submodule(path), part, partial(deliver, site)))
            elif part == "returned_weights":
                weights[site.tap].append(site)
            elif part != "logits":
                calls[module.get_submodule(path)].append(site)
        for tap, wanted in weights.items():
            stack.enter_context(hook_tensor(module.get_submodule(tap.path), tap.part, partial(returned, wanted)))
        callbacks = {part: partial(attended, wanted) for part, wanted in calls.items()}
        stack.enter_context(tap_attention(text_config(module)._attn_implementation, callbacks))
        try:
            output = run(module, ids, mask)
            for site in sites:
                if site.tap.part == "logits":
                    deliver(site, first_tensor(output.logits))
        except _Enough:
            return
    raise DataError(f"sites {', '.join(sorted(waiting))} did not come up in a forward pass of {type(module).__name__}")


def _small(blocks: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """The same blocks in float32, of few rows also where the model made the whole pattern itself."""
    for first, block in blocks:
        for index, piece in enumerate(block.split(_QUERY_ROWS, dim=2)):
            yield first + index * _QUERY_ROWS, piece.float()


def _give(site: Site, tensor: Tensor, batch: tuple[int, ...], receive: Receive) -> None:
    """Some modules see batch and position as one axis, and fused heads come flat: both become the site's shape."""
    passes = site.of or site
    rows = tensor.shape[:2] == batch or tensor.shape[:1] == (math.prod(batch),)
    if not rows or tensor.numel() != math.prod((*batch, *passes.shape)):
        found = f"a tensor of shape {tuple(tensor.shape)} for a batch {tuple(batch)}"
        raise DataError(f"site {site.short or site.name}: {found}")
    tensor = tensor.reshape(*batch, *passes.shape)
    receive(site, _norms(site, tensor) if site.of else tensor, 0)


def _norms(site: Site, tensor: Tensor) -> Tensor:
    """L2 norms along the last axis, in float32; a value's once for each query head that reads it."""
    norms = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
    return norms.repeat_interleave(site.shape[0] // norms.shape[2], dim=2) if site.shape else norms
