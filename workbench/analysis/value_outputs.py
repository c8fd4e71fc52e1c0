"""Sizes of what heads write to the residual stream for single values, from stored values and the weights of W_O."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def output_maps(weights: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head d_head d_head"]:
    """Returns R of each head such that the norm of v R is that of v W_O, in float64 and d_model / d_head times cheaper.

    Args:
        weights: W_O of each head.
    """
    return torch.linalg.qr(weights.double().transpose(1, 2), mode="r").R.transpose(1, 2)


def for_query_heads(values: Float[Tensor, "*row kv_head d_head"], heads: int) -> Float[Tensor, "*row head d_head"]:
    """Returns the value that each query head reads; several may share one (GQA)."""
    return values.repeat_interleave(heads // values.shape[-2], dim=-2)


def written_norms(
    values: Float[Tensor, "*row kv_head d_head"], maps: Float[Tensor, "head d_head d_head"]
) -> Float[Tensor, "*row head"]:
    """Returns the L2 norm of v W_O for each row and query head, in float64.

    Args:
        values: Values, of which several query heads may share one.
        maps: `output_maps` of the layer.
    """
    spread = for_query_heads(values.double(), len(maps)).to(maps.device)
    return torch.einsum("...hd,hde->...he", spread, maps).norm(dim=-1).cpu()
