"""One forward pass that hands over the activations of chosen sites, and stops when it has them all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from workbench.attention import AttentionCall, pattern_blocks, tap_attention
from workbench.errors import DataError
from workbench.forward import first_tensor, hook_tensor, run, text_config
from workbench.sites import Site

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
    A pattern comes in blocks of query positions, everything else in one piece. The tensors are the model's
    own: copy what is kept. All hooks are gone afterwards, exceptions included. Raises DataError when a site
    does not come exactly once.
    """
    waiting = {site.name for site in sites}
    if not waiting:
        return

    def deliver(site: Site, tensor: Tensor | None) -> None:
        if site.name not in waiting or tensor is None:
            raise DataError(f"site {site.short or site.name}: it ran twice, or without a tensor, in one forward pass")
        if site.tap.part == "returned_weights":
            tensor = rearrange(tensor, "batch head query key -> batch query head key")
            receive(site, tensor, 0)
        else:
            _give(site, tensor, ids.shape, receive)
        done(site)

    def done(site: Site) -> None:
        waiting.discard(site.name)
        if not waiting:
            raise _Enough

    def attended(wanted: Sequence[Site], call: AttentionCall) -> None:
        for site in wanted:
            if site.tap.part == "weights":
                for first, block in pattern_blocks(call):
                    receive(site, rearrange(block, "batch head query key -> batch query head key"), first)
                done(site)
            else:
                tensor = getattr(call, site.tap.part)
                deliver(site, tensor if site.tap.part == "output" else tensor.transpose(1, 2))

    calls: dict[nn.Module, list[Site]] = defaultdict(list)
    with ExitStack() as stack:
        for site in sites:
            part, path = site.tap.part, site.tap.path
            if part in ("in", "out", "returned_weights"):
                stack.enter_context(hook_tensor(module.get_submodule(path), part, partial(deliver, site)))
            elif part != "logits":
                calls[module.get_submodule(path)].append(site)
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


def _give(site: Site, tensor: Tensor, batch: tuple[int, ...], receive: Receive) -> None:
    """Some modules see batch and position as one axis, and fused heads come flat: both become `site.shape`."""
    rows = tensor.shape[:2] == batch or tensor.shape[:1] == (math.prod(batch),)
    if not rows or tensor.numel() != math.prod((*batch, *site.shape)):
        found = f"a tensor of shape {tuple(tensor.shape)} for a batch {tuple(batch)}"
        raise DataError(f"site {site.short or site.name}: {found}")
    receive(site, tensor.reshape(*batch, *site.shape), 0)
