"""Mean Jacobians from each block's output to the last one's: the average first-order effect of a state on the output.

    J_l = mean over prompts of 1/|V| sum_{t in V} sum_{t' in V, t' >= t} d h_final,t' / d h_l,t

V are the positions of a prompt after the first `skip`, without the last. Effects on later positions are summed, sources
and prompts averaged; h_final is the last block's output, before the final norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.torch_state import plain_torch
from workbench.model.forward import change_tensor, run
from workbench.model.load import Model

_TOKENS = 512  # of a pass, whose graph is kept while gradients are computed
_CPU_WORK, _GPU_WORK = 2e13, 4e15  # operations of a fit whose number of prompts is not given
_MOST = 100  # prompts of such a fit


@dataclass(frozen=True)
class MeanJacobians:
    """J of each layer but the last, whose J is the identity."""

    layers: tuple[int, ...]
    jacobian: Float[Tensor, "layer d_model d_model"]
    """d h_final / d h_l, in float32: a row is a dimension of the output."""
    split_half: Float[np.ndarray, " layer"]
    """Cosine of J - I of the even and of the odd prompts, at most 1: near 0 for noise, NaN for one prompt."""


def affordable_prompts(model: Model, length: int) -> int:
    """Returns the number of prompts, 1 to 100, whose Jacobians take some minutes on the model's device."""
    weights = sum(part.numel() for part in model.module.get_submodule(model.site_map.blocks).parameters())
    work = 2 * weights * length * model.d_model
    limit = _CPU_WORK if model.device.type == "cpu" else _GPU_WORK
    return int(min(_MOST, max(1, limit // work)))


@plain_torch()
def mean_jacobians(model: Model, prompts: Sequence[Sequence[int]], *, skip: int) -> MeanJacobians:
    """Computes the mean Jacobians of all layers but the last by backward passes, one for each output dimension.

    Costs prompts x d_model backward passes through the blocks, on activations alone; memory is the graph of a pass over
    512 tokens, and two d_model x d_model arrays a layer.

    Args:
        model: The model; gradients are in its own type, their means in float32.
        prompts: Token ids of each prompt, more than `skip` + 1.
        skip: First positions that are neither sources nor targets.

    Raises:
        RequestError: The model has a single block.
    """
    layers, d_model = tuple(range(model.site_map.n_layers - 1)), model.d_model
    if not layers:
        raise RequestError(
            f"model {model.name!r} has one block; a Jacobian lens leads from earlier blocks to the last one"
        )
    halves = [torch.zeros(len(layers), d_model, d_model, device="cpu") for _ in range(2)]
    with progress("Jacobian lens", len(prompts) * d_model, "gradients") as tick, _frozen(model.module):
        for number, ids in enumerate(prompts):
            for first, rows in _jacobian(model, ids, skip, layers):
                halves[number % 2][:, first : first + rows.shape[1]] += rows
                tick(rows.shape[1])
    counts = (len(prompts) + 1) // 2, len(prompts) // 2
    mean = (halves[0] + halves[1]) / len(prompts)
    identity = torch.eye(d_model, device="cpu")
    even, odd = (
        (half / max(1, count) - identity).flatten(1).double() for half, count in zip(halves, counts, strict=True)
    )
    split = torch.nn.functional.cosine_similarity(even, odd) if counts[1] else torch.full((len(layers),), torch.nan)
    return MeanJacobians(layers, mean, split.numpy().astype(float))


def _jacobian(
    model: Model, ids: Sequence[int], skip: int, layers: Sequence[int]
) -> Iterator[tuple[int, Float[Tensor, "layer dimension d_model"]]]:
    """Yields rows of the Jacobian of one prompt, some output dimensions at a time, with the first of them."""
    d_model = model.d_model
    batch = max(1, min(d_model, _TOKENS // len(ids)))
    streams = _streams(model, torch.tensor([list(ids)] * batch, device="cpu"), layers)
    final = streams.pop()
    counted_positions = slice(skip, len(ids) - 1)
    for first in range(0, d_model, batch):
        number = min(batch, d_model - first)
        cotangent = torch.zeros_like(final)
        for place in range(number):
            cotangent[place, counted_positions, first + place] = 1
        last = first + number == d_model
        gradients = torch.autograd.grad(final, streams, cotangent, retain_graph=not last, materialize_grads=True)
        yield first, torch.stack([gradient[:number, counted_positions].float().mean(1).cpu() for gradient in gradients])


class _Enough(BaseException):
    """Leaves the forward pass after the last block. Not an Exception, so that no model code catches it."""


def _streams(model: Model, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Output of each of these blocks and of the last one in one graph, whose root is the first of them."""
    sites = model.site_map.select([f"resid_post.{layer}" for layer in (*layers, layers[-1] + 1)])
    streams: list[Tensor] = []

    def keep(tensor: Tensor, *, last: bool) -> Tensor:
        streams.append(tensor if streams else tensor.detach().requires_grad_())
        if last:
            raise _Enough
        return streams[-1]

    with ExitStack() as stack:
        for site in sites:
            part = "in" if site.tap.part == "in" else "out"
            place = model.module.get_submodule(site.tap.path)
            stack.enter_context(change_tensor(place, part, partial(keep, last=site is sites[-1])))
        with suppress(_Enough):
            run(model.module, ids, torch.ones_like(ids), gradients=True)
    return streams


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Keeps the weights out of the graph, whose memory would hold their inputs, inside the block."""
    trained = [part for part in module.parameters() if part.requires_grad]
    for part in trained:
        part.requires_grad_(False)
    try:
        yield
    finally:
        for part in trained:
            part.requires_grad_(True)
