"""Linear softmax probes: a matrix from a state to a distribution over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.io.torch_state import plain_torch

_SCALE_ROWS = 20_000
_PATIENCE = 2
_CONSTANT = 2e-3  # deviation over size, above what the rounding of bfloat16 makes of a constant

States = Callable[[np.ndarray], Tensor]
"""From row ids to states `[row, d_model]`."""


@dataclass(frozen=True)
class SoftmaxFit:
    """Training of a softmax probe: AdamW over rows in random order, the learning rate decayed linearly to 0."""

    epochs: int = 8
    """Maximum epochs; training ends after two in a row that improve no probe on the validation rows."""
    batch: int = 1024
    learning_rate: float = 1e-2
    weight_decay: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class SoftmaxProbes:
    """Maps without bias, several on the same states: the logits of `classes` are `(states / scale) @ weight`."""

    weight: Float[Tensor, "probe d_model class"]
    scale: Float[Tensor, " d_model"]
    classes: Int[np.ndarray, " class"]
    """Token ids, ascending."""

    def to(self, device: str | torch.device) -> SoftmaxProbes:
        """Returns the probes on another device."""
        return SoftmaxProbes(self.weight.to(device), self.scale.to(device), self.classes)

    def log_probabilities(self, probe: int, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row class"]:
        """Returns the log-probabilities of one probe, in nats."""
        return ((states.float() / self.scale) @ self.weight[probe]).log_softmax(1)

    def class_of(self, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Returns the index of token ids among the classes; -1 for those that the training rows do not have."""
        index = np.searchsorted(self.classes, ids).clip(max=len(self.classes) - 1)
        return np.where(self.classes[index] == ids, index, -1)


@plain_torch()
def fit_softmax(
    states: States,
    training: Int[np.ndarray, " row"],
    targets: Int[np.ndarray, "probe row"],
    validation: Int[np.ndarray, " held_row"],
    held_targets: Int[np.ndarray, "probe held_row"],
    settings: SoftmaxFit,
    *,
    tick: Callable[[int], object] = lambda steps: None,
) -> SoftmaxProbes:
    """Returns one map without bias for each row of `targets`, fitted by softmax cross-entropy.

    States are divided by their standard deviation first, which the map could learn but AdamW finds slowly; a dimension
    that does not vary by its size, so that it serves as a bias. Each probe keeps its best epoch on the validation rows.
    The classes are the targets of the training rows. Costs epochs x rows x probes products with the map; memory is a
    batch of logits and the maps.

    Args:
        states: Reads the states of rows.
        training: Ids of the training rows.
        targets: Token ids for each probe and training row, -1 for none.
        validation: Ids of the validation rows.
        held_targets: Token ids for each probe and validation row, -1 for none.
        settings: The training.
        tick: Called with 1 after each step.
    """
    classes = np.unique(targets[targets >= 0])
    sample = states(training[:: max(1, len(training) // _SCALE_ROWS)]).float()
    scale = _scale(sample)
    weight = torch.zeros(len(targets), sample.shape[1], len(classes), device=sample.device, requires_grad=True)
    probes = SoftmaxProbes(weight, scale, classes)
    optimizer = torch.optim.AdamW([weight], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(training) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    draw = np.random.default_rng(settings.seed)
    training_classes, held_out_classes = (
        torch.from_numpy(probes.class_of(part)).to(sample.device) for part in (targets, held_targets)
    )
    best, best_weight = torch.full((len(targets),), torch.inf, device=sample.device), weight.detach().clone()
    since = 0
    for _ in range(settings.epochs):
        for part in _batches(draw.permutation(len(training)), settings.batch):
            x = states(training[part])
            losses = [_loss(probes, index, x, training_classes[index, part]) for index in range(len(targets))]
            sum(losses[1:], start=losses[0]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            tick(1)
        loss = _held_out_loss(probes, states, validation, held_out_classes, settings.batch)
        better = loss < best
        best_weight[better] = weight.detach()[better]
        best = torch.minimum(best, loss)
        since = 0 if better.any() else since + 1
        if since >= _PATIENCE:
            break
    return SoftmaxProbes(best_weight, scale, classes)


def _scale(states: Float[Tensor, "row d_model"]) -> Float[Tensor, " d_model"]:
    """Standard deviation of each dimension; the root mean square of one that does not vary."""
    deviation, size = states.std(0, correction=0), states.square().mean(0).sqrt()
    return torch.where(deviation > _CONSTANT * size, deviation, size).clamp(min=1e-6)


def _batches(order: np.ndarray, batch: int) -> Sequence[np.ndarray]:
    return [np.sort(part) for part in np.split(order, range(batch, len(order), batch))]


def _loss(probes: SoftmaxProbes, index: int, x: Tensor, target: Tensor) -> Tensor:
    """Mean over rows with a target; 0 if none has one."""
    total = torch.nn.functional.nll_loss(probes.log_probabilities(index, x), target, ignore_index=-1, reduction="sum")
    return total / (target >= 0).sum().clamp(min=1)


@torch.no_grad()
def _held_out_loss(
    probes: SoftmaxProbes, states: States, rows: np.ndarray, held_out_classes: Tensor, batch: int
) -> Tensor:
    total = torch.zeros(len(held_out_classes), device=held_out_classes.device)
    for part in _batches(np.arange(len(rows)), batch):
        x = states(rows[part])
        for index, target in enumerate(held_out_classes):
            total[index] += _loss(probes, index, x, target[part]) * len(part)
    return total / max(len(rows), 1)
