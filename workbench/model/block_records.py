"""Records that change blocks as a whole: skipped, or with places exchanged."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from workbench.io.checks import check
from workbench.io.errors import RequestError
from workbench.model.forward import bypass, text_config
from workbench.model.intervene import Bound, CurrentTokens, Intervention
from workbench.model.load import Model
from workbench.sites.grammar import Tap

_LOG = logging.getLogger(__name__)

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose caches are of one kind, so that their blocks can change places."""


@dataclass(frozen=True)
class SkipBlock(Intervention):
    """Skips a block: its output is its input.

    The block still runs, and fills its part of the cache, so the cost stays.
    """

    layer: int

    def bind(self, model: Model) -> Bound:
        """Returns the record made ready for one model; see `Intervention.bind`."""
        return _BoundSkip(self, model)

    def __str__(self) -> str:
        return f"skip block {self.layer}"


class _BoundSkip(Bound):
    """A block of a model whose output is its input."""

    def __init__(self, record: SkipBlock, model: Model) -> None:
        super().__init__(record, f"block.{record.layer}")
        self.path = _block(model, "layer", record.layer)

    def attach(self, module: nn.Module, tokens: CurrentTokens, stack: ExitStack) -> None:
        """Registers the hook; see `Bound.attach`."""
        stack.enter_context(bypass(module.get_submodule(self.path), partial(self._skip, tokens)))

    def _skip(self, tokens: CurrentTokens, before: Tensor, after: Tensor) -> Tensor:
        present = tokens.of(self.record)
        mask = present.chosen(self.at)
        self.count.passes += 1
        if before.shape != after.shape:
            raise RequestError(f"{self.record}: its output of shape {tuple(after.shape)} is no stream like its input")
        fresh = mask.clone()
        fresh[:, : present.fresh] = False
        index = fresh.flatten().nonzero()[:, 0].to(after.device)
        flat = [
            tensor.detach().reshape(mask.numel(), -1)[index.to(tensor.device)].float() for tensor in (after, before)
        ]
        self.count.add(flat[0], flat[1].to(flat[0].device))
        return before.to(after.device)


@dataclass(frozen=True)
class SwapBlocks(Intervention):
    """Exchanges the places of two blocks, before all other records; afterwards layers mean places.

    Each block takes the mask and the rotary base of its new place. The module itself is changed until the end of the
    context, so other threads see it, and saving its weights is refused.
    """

    a: int
    b: int

    def bind(self, model: Model) -> Bound:
        """Returns the record made ready for one model; see `Intervention.bind`."""
        return _BoundSwap(self, model)

    def __str__(self) -> str:
        return f"swap blocks {self.a} and {self.b}"


class _BoundSwap(Bound):
    """Two blocks of a model with places exchanged."""

    first = True

    def __init__(self, record: SwapBlocks, model: Model) -> None:
        super().__init__(record, f"block.{record.a}, block.{record.b}")
        self.layers, self.list_path = (record.a, record.b), model.site_map.blocks
        self.paths = [_block(model, name, layer) for name, layer in zip("ab", self.layers, strict=True)]
        if record.a == record.b:
            raise RequestError(f"a and b are both {record.a}; name two blocks")
        kinds = getattr(text_config(model.module), "layer_types", None)
        if kinds and kinds[record.a] != kinds[record.b]:
            a_kind, b_kind = kinds[record.a], kinds[record.b]
            if a_kind not in _ATTENTION or b_kind not in _ATTENTION:
                raise RequestError(
                    f"blocks {record.a} ({a_kind}) and {record.b} ({b_kind}) keep different caches and "
                    "cannot change places"
                )
            _LOG.warning(
                f"{record}: block {record.a} is {a_kind} and block {record.b} {b_kind}; each takes the mask and the "
                "rotary base of its new place, which it was not trained with"
            )
        types = [type(model.module.get_submodule(path)) for path in self.paths]
        if types[0] is not types[1]:
            names = " and ".join(kind.__name__ for kind in types)
            raise RequestError(f"blocks {record.a} and {record.b} are of the classes {names} and cannot change places")

    def attach(self, module: nn.Module, tokens: CurrentTokens, stack: ExitStack) -> None:
        """Exchanges the blocks; see `Bound.attach`."""
        blocks = module.get_submodule(self.list_path)
        stack.callback(self._exchange, blocks)
        self._exchange(blocks)
        for part in {module, blocks}:
            stack.callback(part.register_state_dict_pre_hook(self._refuse_saving).remove)
        for path in self.paths:
            count = partial(self._count, tokens, path == self.paths[0])
            stack.enter_context(bypass(module.get_submodule(path), count))

    def _exchange(self, blocks: Any) -> None:
        a, b = self.layers
        a_block, b_block = blocks[a], blocks[b]
        indices = [_indices(part) for part in (a_block, b_block)]
        blocks[a], blocks[b] = b_block, a_block
        for parts, counterparts in zip(indices, (indices[1], indices[0]), strict=True):
            index = next((index for _, index in counterparts), None)
            for part, _ in parts:
                if index is not None:
                    part.layer_idx = index

    def _count(self, tokens: CurrentTokens, first: bool, _before: Tensor, after: Tensor) -> Tensor:
        if first:
            present = tokens.of(self.record)
            self.count.passes += 1
            self.count.rows += int(present.chosen(self.at)[:, present.fresh :].sum())
        return after

    def _refuse_saving(self, *_arguments: object) -> None:
        raise RequestError(f"{self.record}: weights are not saved while blocks have changed places; save outside")


def _indices(block: nn.Module) -> list[tuple[Any, int]]:
    """Modules of a block that know their layer, with its index."""
    indices = ((part, getattr(part, "layer_idx", None)) for part in block.modules())
    return [(part, index) for part, index in indices if isinstance(index, int)]


def _block(model: Model, name: str, layer: int) -> str:
    """Path of a block that runs once in a pass, from stream to stream."""
    sites = model.site_map
    check(name, layer, at_least=0, at_most=sites.n_layers - 1, whole=True)
    path = f"{sites.blocks}.{layer}"
    taps = {site.tap for site in sites.sites.values()}
    if Tap(path, "out") not in taps or Tap(path, "in") not in taps:
        raise RequestError(f"{name}: block {layer} of {model.architecture} does not run once from stream to stream")
    return path
