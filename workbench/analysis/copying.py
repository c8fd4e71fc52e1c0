"""Copying from weights: how much a head raises the logit of the very token that it attends to."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.io.torch_state import plain_torch
from workbench.model.circuits import direct_logits, first_mlp, head_outputs, head_writes
from workbench.model.load import Model
from workbench.model.unembed import Unembed


@plain_torch()
@torch.inference_mode()
def copying_scores(
    model: Model, unembed: Unembed, ids: Int[Tensor, " token"], layers: Collection[int] | None = None
) -> dict[int, dict[str, Float[np.ndarray, " head"]]]:
    """Returns for each layer, by head, how its OV circuit W_U W_O W_V norm(W_E) treats the attended token.

    "copying" is the share of the tokens whose own direct logit is strictly the largest among `ids`; 1 / tokens for a
    head that does not copy. "copying_eigen" is sum(lambda) / sum |lambda| over the eigenvalues of the circuit
    restricted to `ids`, -1 to 1; 0 on average for random weights (Elhage et al. 2021). Its non-zero eigenvalues are
    those of a d_head x d_head matrix, so the tokens x tokens circuit is not formed for them. Costs one pass over the
    tokens and heads x tokens^2 x d_model operations a layer.

    Args:
        model: The model.
        unembed: Its unembedding.
        ids: Different tokens, which are both attended to and predicted.
        layers: Layers to score. None: all.
    """
    x = first_mlp(model, ids, "none")
    sizes = {layer: output.d_head for layer, output in head_outputs(model).items()}
    read = (unembed.gain * unembed.weight[ids.to(unembed.weight.device)]).double()
    if unembed.norm == "layer":
        read = read - read.mean(1, keepdim=True)
    scores = {}
    for layer, writes in head_writes(model, x, layers):
        unembedding, targets = unembed.to(writes.device), ids.to(writes.device)
        right, eigen = [], []
        for write in writes.transpose(0, 1):
            logits = direct_logits(unembedding, write, targets)
            right_logits = logits.diagonal().clone()
            logits.fill_diagonal_(-torch.inf)
            right.append((right_logits > logits.max(1).values).double().mean().item())
            eigen.append(_eigen_share(write.double(), read.to(write.device), sizes[layer]))
        scores[layer] = {"copying": np.array(right), "copying_eigen": np.array(eigen)}
    return scores


def _eigen_share(write: Float[Tensor, "token d_model"], read: Float[Tensor, "token d_model"], rank: int) -> float:
    """sum(lambda) / sum |lambda| of `write @ read.T`, where `write` has at most this rank."""
    generator = torch.Generator("cpu").manual_seed(0)
    mixed = write.T @ torch.randn(len(write), rank, generator=generator, dtype=torch.float64).to(write.device)
    basis = torch.linalg.qr(mixed).Q  # spans the rows of `write`
    values = torch.linalg.eigvals((basis.T @ read.T) @ (write @ basis))
    size = values.abs().sum().item()
    return values.sum().real.item() / size if size else float("nan")
