"""Auxiliary loss for features that are active less often than Zipf's law expects, for SAELens' TopK training classes.

A TopK autoencoder trains the features that it selects; one that is never selected gets no gradient and stays dead. The
auxiliary loss lets features below their expected density reconstruct what the others leave, as the aux-k loss of Gao et
al. 2024 does for dead features alone. The expected densities are a Zipf-Mandelbrot law fitted to the more frequent half
of the features, since densities of trained autoencoders follow it except for the rarest (Ayonrinde 2024,
arXiv:2411.02124, which names the loss and leaves its formula open: the choices here are ours).
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, act_times_W_dec
from torch import Tensor

from workbench.io.errors import RequestError

WEIGHT = 1 / 32
"""Weight of the auxiliary loss beside the reconstruction's, both relative (that of aux-k)."""
_DECAY = 0.99  # of the running densities, per step
_REFIT = 10  # steps between fits of the law
_BELOW = 0.5  # share of the expected density below which a feature takes part
_OFFSETS = np.concatenate([[0.0], np.geomspace(0.5, 1e4, 40)])  # tried for b

Kind = TypeVar("Kind", bound=type)


def expected_densities(density: Float[np.ndarray, " feature"]) -> Float[np.ndarray, " feature"]:
    """Returns the density that Zipf's law c / (rank + b)^a expects of each feature at its own rank, from 1.

    a, b and c are least squares of the logarithm over the features of ranks 1 to half their number that are active at
    all; of fewer than three such features, NaN.

    Args:
        density: Share of rows on which each feature is active, 0 to 1.
    """
    order = np.argsort(-density, kind="stable")
    head = density[order[: max(1, len(density) // 2)]]
    known = np.flatnonzero(head > 0)
    expected = np.full(len(density), np.nan)
    if len(known) < 3:
        return expected
    target, ranks = np.log(head[known]), np.arange(1, len(density) + 1)
    best, law = np.inf, expected
    for offset in _OFFSETS:
        steps = np.stack([np.ones(len(known)), -np.log(known + 1 + offset)], axis=1)
        solution = np.linalg.lstsq(steps, target, rcond=None)[0]
        error = float(np.square(steps @ solution - target).sum())
        if error < best * (1 - 1e-9):
            best, law = error, np.exp(solution[0] - solution[1] * np.log(ranks + offset))
    expected[order] = law
    return expected


def below_expectation(density: Float[np.ndarray, " feature"]) -> Bool[np.ndarray, " feature"]:
    """Returns a mask of the features less than half as dense as Zipf's law expects; without a law, the dead ones."""
    expected = expected_densities(density)
    return np.where(np.isnan(expected), density == 0, density < _BELOW * expected)


def aux_zipf_loss(error: Float[Tensor, "row d_in"], reconstruction: Float[Tensor, "row d_in"]) -> Float[Tensor, ""]:
    """Returns Σ|e - ê|² / Σ|e|²: 0 if the under-used features reconstruct the error e, 1 if they add nothing."""
    return (error - reconstruction).square().sum() / error.square().sum().clamp(min=torch.finfo(error.dtype).tiny)


def with_zipf_loss(kind: Kind) -> Kind:
    """Returns a TopK training class of SAELens with the auxiliary loss of this module in place of its own.

    Added to a step: 1/32 of `aux_zipf_loss` times the batch's variance per row, so that it has the same weight beside
    the relative reconstruction error whatever the scale. Features below expectation take part with their d_in / 2
    largest pre-activations of a row.

    Raises:
        RequestError: A class whose selection is not TopK's.
    """
    if not issubclass(kind, TopKTrainingSAE) or kind.calculate_aux_loss is not TopKTrainingSAE.calculate_aux_loss:
        raise RequestError(f"aux_loss 'zipf' is for topk and batchtopk, not {kind.__name__}; leave it out")
    return type(f"Zipf{kind.__name__}", (_ZipfLoss, kind), {})  # pyright: ignore[reportReturnType]


class _ZipfLoss(TopKTrainingSAE):
    """Running densities, the features below expectation, and their loss. The state is not saved."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._density = torch.zeros(self.cfg.d_sae, device=self.W_dec.device)
        self._steps, self._below = 0, torch.zeros(self.cfg.d_sae, dtype=torch.bool, device=self.W_dec.device)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Returns SAELens' output of the step, and counts the active rows of each feature."""
        output = super().training_forward_pass(step_input)
        with torch.no_grad():
            active = output.feature_acts.to_dense() if output.feature_acts.is_sparse else output.feature_acts
            self._density.lerp_((active != 0).float().mean(0), 1 - _DECAY)
            self._steps += 1
            if self._steps % _REFIT == 0:
                density = self._density.double().cpu().numpy() / (1 - _DECAY**self._steps)
                self._below = torch.from_numpy(below_expectation(density)).to(self._density.device)
        return output

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """Returns the loss of the features below expectation, by its name in the training log."""
        name, number = "aux_zipf_loss", int(self._below.sum())
        if not number:
            return {name: sae_out.new_tensor(0.0)}
        rows = step_input.sae_in
        chosen = torch.where(self._below, hidden_pre, -torch.inf).topk(
            min(number, max(1, rows.shape[-1] // 2)), sorted=False
        )
        activations = torch.zeros_like(hidden_pre).scatter(-1, chosen.indices, chosen.values)
        reconstruction = act_times_W_dec(activations, self.W_dec, self.cfg.rescale_acts_by_decoder_norm)
        reconstruction = self.reshape_fn_out(reconstruction, self.d_head)
        variance = (rows - rows.mean(0)).square().sum(-1).mean().detach()
        return {name: WEIGHT * variance * aux_zipf_loss((rows - sae_out).detach(), reconstruction)}
