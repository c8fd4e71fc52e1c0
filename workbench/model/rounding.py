"""Comparison of two ways to run one model: do their logits differ by rounding alone?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

_ROUNDED_16 = 0.05
"""Part of the logits that rounding may change in types of 16 bits and in quantised weights."""


def differ_by_rounding(
    module: nn.Module, logits: Float[Tensor, "*shape vocab"], reference: Float[Tensor, "*shape vocab"], part: float
) -> bool:
    """Returns True if two runs of a model have the same logits but for rounding.

    Args:
        module: The model, whose type says how much rounding may change.
        logits: Logits of one run.
        reference: Logits of the other.
        part: Part of the logits that rounding may change in float32: of their norm around each position's mean.
    """
    logits, reference = logits.cpu().double(), reference.cpu().double()
    exact = module.dtype in (torch.float32, torch.float64) and not getattr(module, "is_quantized", False)
    size = (reference - reference.mean(-1, keepdim=True)).norm()
    return bool((logits - reference).norm() <= (part if exact else _ROUNDED_16) * size)
