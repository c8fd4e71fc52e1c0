"""One forward pass that delivers the activations of chosen sites, and stops when it has them all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from workbench.io.errors import DataError
from workbench.io.torch_state import plain_torch
from workbench.model import token_keys
from workbench.model.attention import AttentionCall, Columns, pattern_blocks, row_entropy, tap_attention
from workbench.model.forward import attention_name, first_tensor, fixed_shape, hook_tensor, run
from workbench.model.token_keys import QueryBlock
from workbench.sites.grammar import Site, Tap

_QUERY_ROWS = 256

_OF_QUERIES: Mapping[str | None, Callable[[QueryBlock], Tensor]] = {
    "pattern": lambda block: rearrange(block.attention, "batch head query key -> batch query head key"),
    "attn_entropy": lambda block: row_entropy(block.attention),
    "attn_first": token_keys.first,
    "attn_current": token_keys.current,
    "attn_previous": token_keys.previous,
    "attn_recent": token_keys.recent,
    "attn_duplicate": token_keys.duplicate,
    "attn_induction": token_keys.induction,
}
"""Activations of a site whose rows are queries, from a block of the pattern."""

_OF_KEYS: Mapping[str | None, Callable[[Columns], Tensor]] = {
    "attn_received": Columns.received,
    "attn_received_entropy": Columns.entropy,
}
"""Activations of a site whose rows are keys, from the sums over all blocks of the pattern."""

Receive = Callable[[Site, Tensor, int], None]
"""Takes a site, its activations (batch, position, *site.shape), and the position of the first of them."""


class _Enough(BaseException):
    """Leaves the forward pass after the last site. Not an Exception, so that no model code catches it."""


@plain_torch()
def capture(
    module: nn.Module,
    sites: Sequence[Site],
    ids: Int[Tensor, "batch position"],
    mask: Int[Tensor, "batch position"],
    receive: Receive,
) -> None:
    """Runs the model on right-padded sequences and passes the activations of each site to `receive`.

    The pass ends with the last requested site: later blocks, the final norm and the head are not computed. A pattern,
    and sites derived from it whose rows are queries, come in blocks of query positions, everything else in one piece; a
    pattern is computed once for all sites that need it. All hooks are removed afterwards, also after an exception.

    Args:
        module: A Hugging Face causal LM.
        sites: Sites of its site map.
        ids: Token ids.
        mask: 1 for tokens, 0 for padding.
        receive: Called with a site, its activations (padding included), and the position of the first of them. The
            tensors are the model's own: copy what is kept.

    Raises:
        DataError: A site does not come exactly once.
    """
    if not sites:
        return
    forward = _Pass(sites, ids, mask, receive)
    with ExitStack() as stack:
        forward.hook(module, stack)
        try:
            output = run(module, ids, mask)
            for site in sites:
                if site.tap.part == "logits":
                    forward.deliver(site, first_tensor(output.logits))
        except _Enough:
            return
    missing = ", ".join(sorted(forward.waiting))
    raise DataError(f"sites {missing} did not come up in a forward pass of {type(module).__name__}")


class _Pass:
    """One forward pass: the sites that have not come yet, and what is done when they come."""

    def __init__(
        self,
        sites: Sequence[Site],
        ids: Int[Tensor, "batch position"],
        mask: Int[Tensor, "batch position"],
        receive: Receive,
    ) -> None:
        self.sites, self.ids, self.mask, self.receive = sites, ids, mask, receive
        self.waiting = {site.name for site in sites}

    def hook(self, module: nn.Module, stack: ExitStack) -> None:
        """Hooks the modules of all sites but the logits, until `stack` closes."""
        calls: dict[nn.Module, list[Site]] = defaultdict(list)
        weights: dict[Tap, list[Site]] = defaultdict(list)
        for site in self.sites:
            part, path = site.tap.part, site.tap.path
            if part in ("in", "out"):
                stack.enter_context(hook_tensor(module.get_submodule(path), part, partial(self.deliver, site)))
            elif part == "returned_weights":
                weights[site.tap].append(site)
            elif part != "logits":
                calls[module.get_submodule(path)].append(site)
        for tap, sites in weights.items():
            receive = partial(self._deliver_weights, sites)
            stack.enter_context(hook_tensor(module.get_submodule(tap.path), "returned_weights", receive))
        callbacks = {part: partial(self._deliver_attention, sites) for part, sites in calls.items()}
        stack.enter_context(tap_attention(attention_name(module), callbacks))

    def deliver(self, site: Site, tensor: Tensor | None) -> None:
        _give(site, self._expect(site, tensor), tuple(self.ids.shape), self.receive)
        self._finish(site)

    def _expect(self, site: Site, tensor: Tensor | None) -> Tensor:
        if site.name not in self.waiting or tensor is None:
            raise DataError(f"site {site.short or site.name}: it ran twice, or without a tensor, in one forward pass")
        return tensor

    def _finish(self, *sites: Site) -> None:
        self.waiting.difference_update(site.name for site in sites)
        if not self.waiting:
            raise _Enough

    def _deliver_weights(self, sites: Sequence[Site], weights: Tensor | None) -> None:
        for site in sites:
            weights = self._expect(site, weights)
        if weights is not None:
            self._deliver_pattern(sites, [(0, weights)])

    def _deliver_attention(self, sites: Sequence[Site], call: AttentionCall) -> None:
        patterns = [site for site in sites if site.tap.part == "weights"]
        if patterns:
            self._deliver_pattern(patterns, pattern_blocks(call, _QUERY_ROWS))
        for site in sites:
            if site not in patterns:
                tensor = getattr(call, site.tap.part)
                self.deliver(site, tensor if site.tap.part == "output" else tensor.transpose(1, 2))

    def _deliver_pattern(self, sites: Sequence[Site], blocks: Iterable[tuple[int, Tensor]]) -> None:
        of_keys = [site for site in sites if site.kind in _OF_KEYS]
        columns = Columns(self.mask)
        for first, attention in _small(blocks):
            block = QueryBlock(attention, self.ids, first)
            for site in sites:
                if site not in of_keys:
                    kind = site.kind if site.of else "pattern"
                    self.receive(site, _OF_QUERIES[kind](block), first)
            if of_keys:
                columns.add(first, attention)
        for site in of_keys:
            self.receive(site, _OF_KEYS[site.kind](columns), 0)
        self._finish(*sites)


@contextmanager
def read_tensors(
    module: nn.Module, sites: Sequence[Site], receive: Callable[[Site, Tensor | None, bool], None]
) -> Iterator[None]:
    """Passes the tensors of sites on, as the model has them, each time they come up inside the block.

    Args:
        module: A Hugging Face causal LM, of which any part may run.
        sites: Sites that are inputs or outputs of modules, or parts of attention calls.
        receive: Called with a site, its tensor, and True if heads come before positions in it.
    """

    def see(sites: Sequence[Site], call: AttentionCall) -> None:
        for site in sites:
            receive(site, getattr(call, site.tap.part), site.tap.part != "output")

    attention: dict[nn.Module, list[Site]] = defaultdict(list)
    with ExitStack() as stack:
        for site in sites:
            part, path = site.tap.part, site.tap.path
            if part in ("in", "out"):
                place = module.get_submodule(path)
                stack.enter_context(hook_tensor(place, part, lambda tensor, site=site: receive(site, tensor, False)))
            else:
                attention[module.get_submodule(path)].append(site)
        callbacks = {part: partial(see, tapped) for part, tapped in attention.items()}
        stack.enter_context(tap_attention(attention_name(module), callbacks))
        yield


def _small(blocks: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """The same blocks in float32, of few rows also if the model made the whole pattern itself."""
    for first, block in blocks:
        for index, piece in enumerate(block.split(_QUERY_ROWS, dim=2)):
            yield first + index * _QUERY_ROWS, piece.float()


def _give(site: Site, tensor: Tensor, batch: tuple[int, ...], receive: Receive) -> None:
    """Delivers a tensor in the site's shape."""
    tensor = in_site_shape(site, tensor, batch)
    receive(site, _norms(site, tensor) if site.of else tensor, 0)


def in_site_shape(site: Site, tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Returns a tensor as (batch, position, *row): some modules merge batch and position, and fused heads come flat.

    Raises:
        DataError: The tensor has another number of values.
    """
    shape = fixed_shape(site.of or site)
    rows = tensor.shape[:2] == batch or tensor.shape[:1] == (math.prod(batch),)
    if not rows or tensor.numel() != math.prod((*batch, *shape)):
        raise DataError(
            f"site {site.short or site.name}: a tensor of shape {tuple(tensor.shape)} for a batch {tuple(batch)}"
        )
    return tensor.reshape(*batch, *shape)


def _norms(site: Site, tensor: Tensor) -> Tensor:
    """L2 norms along the last axis, in float32; the norm of a value repeats for each query head that reads it."""
    shape = fixed_shape(site)
    norms = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
    return norms.repeat_interleave(shape[0] // norms.shape[2], dim=2) if shape else norms
