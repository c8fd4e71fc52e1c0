"""Prediction and suppression neurons: whether a neuron's output raises or lowers a few tokens (Gurnee et al. 2024)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.io.torch_state import plain_torch
from workbench.model.unembed import Unembed

KURTOSIS = 10.0
"""Minimum kurtosis of a prediction or suppression neuron; 3 is that of a normal distribution."""

_BLOCK_BYTES = 64 << 20


class VocabularyMoments(NamedTuple):
    """Moments over the vocabulary of cos(W_out of a neuron, direction of a token in the unembedding)."""

    kurtosis: Float[Tensor, " neuron"]
    """Fourth standardised moment, 3 for a normal distribution."""
    skew: Float[Tensor, " neuron"]
    """Third standardised moment: above 0, few tokens are raised (prediction); below 0, lowered (suppression)."""
    variance: Float[Tensor, " neuron"]
    """Second central moment; small for a neuron that W_U hardly reads, which acts through the final norm."""

    @property
    def prediction(self) -> float:
        """Share of prediction neurons: kurtosis above `KURTOSIS`, skew above 0."""
        return float(((self.kurtosis > KURTOSIS) & (self.skew > 0)).double().mean())

    @property
    def suppression(self) -> float:
        """Share of suppression neurons: kurtosis above `KURTOSIS`, skew below 0."""
        return float(((self.kurtosis > KURTOSIS) & (self.skew < 0)).double().mean())


@plain_torch()
@torch.inference_mode()
def vocabulary_moments(outputs: Float[Tensor, "neuron d_model"], unembed: Unembed) -> VocabularyMoments:
    """Returns kurtosis, skew and variance of the cosines between each neuron's output and all tokens.

    A token's direction is its row of W_U times the gain of the final norm. Costs 2 neurons x d_model x vocab products.

    Args:
        outputs: W_out of each neuron.
        unembed: The unembedding.
    """
    tokens = nn.functional.normalize(unembed.weight.float() * unembed.gain.float(), dim=1)
    step = max(1, _BLOCK_BYTES // (4 * len(tokens)))
    kurtosis, skew, variances = [], [], []
    for part in outputs.to(tokens).split(step):
        cosine = nn.functional.normalize(part, dim=1) @ tokens.T
        centred = cosine - cosine.mean(1, keepdim=True)
        square = centred * centred
        variance = square.mean(1)
        variances.append(variance)
        skew.append((square * centred).mean(1) / variance**1.5)
        kurtosis.append((square * square).mean(1) / variance**2)
    return VocabularyMoments(*(torch.cat(part).cpu() for part in (kurtosis, skew, variances)))
