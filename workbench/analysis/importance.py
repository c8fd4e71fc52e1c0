"""Importance of keys for a head: rank agreement of two measures, and what hiding a key does to the output."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from workbench.analysis.value_outputs import for_query_heads


def rank_correlation(
    a: Float[np.ndarray, "sequence position head"], b: Float[np.ndarray, "sequence position head"]
) -> Float[np.ndarray, "sequence head"]:
    """Returns Spearman's correlation over positions, ties at their mean rank; NaN where one side is constant."""
    x, y = (rankdata(part, axis=1) for part in (a, b))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide((x * y).sum(1), size, out=np.full(size.shape, np.nan), where=size > 0)


def top_overlap(
    a: Float[np.ndarray, "sequence position head"], b: Float[np.ndarray, "sequence position head"], k: int
) -> Float[np.ndarray, "sequence head"]:
    """Returns the share of the k largest positions of `a` that are among those of `b`; earlier ones first at ties."""
    first, second = (np.argsort(np.argsort(-part, axis=1, kind="stable"), axis=1) < k for part in (a, b))
    return (first & second).sum(1) / k


def removal_effects(
    pattern: Float[Tensor, "sequence query head key"],
    values: Float[Tensor, "sequence key kv_head d_head"],
    maps: Float[Tensor, "head d_head d_head"],
) -> Float[np.ndarray, "sequence key head"]:
    """Returns by how much a head's output changes, summed over queries, when one key is hidden from all of them.

    A query that pays a_k to key k and whose row is renormalised over the other keys changes by
    a_k / (1 - a_k) * ||(o - v_k) W_O||, with o the mix of values before. A query without another key is left out.

    Args:
        pattern: Attention.
        values: Values, of which several query heads may share one.
        maps: `output_maps` of the layer.
    """
    weights = pattern.double().to(maps.device)
    writes = torch.einsum("skhd,hde->skhe", for_query_heads(values.double(), len(maps)).to(maps.device), maps)
    mixed = torch.einsum("sqhk,skhe->sqhe", weights, writes)
    squares = mixed.square().sum(-1)[..., None] + writes.square().sum(-1).transpose(1, 2)[:, None]
    distance = (squares - 2 * torch.einsum("sqhe,skhe->sqhk", mixed, writes)).clamp(min=0).sqrt()
    rest = 1 - weights
    factor = torch.where(rest > 1e-6, weights / rest, 0)
    return (factor * distance).sum(1).transpose(1, 2).cpu().numpy()
