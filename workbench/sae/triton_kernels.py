"""Kernels in Triton, which comes with CUDA builds of torch. Import this module only where `available` is true.

On a CPU the same kernels run interpreted: `pip install triton` and TRITON_INTERPRET=1 before the first import.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # CUDA builds of torch bring it
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float16, Float32, Int32, Int64
from torch import Tensor

_TILE = {"BLOCK_ROWS": 128, "BLOCK_FEATURES": 128, "BLOCK_K": 64}
_OPTIONS = {"num_warps": 8, "num_stages": 3}
_INTERPRETED = {"BLOCK_ROWS": 32, "BLOCK_FEATURES": 128, "BLOCK_K": 64}
_PAIRS, _PAIR_WIDTH = 8, 128
_SCAN = 1024
LARGEST_GROUP = _TILE["BLOCK_FEATURES"]
"""Features of a tile: most of a group whose maximum one program can take."""


def bounds_with_maxima(
    x: Float16[Tensor, "row d_in"],
    weight: Float16[Tensor, "feature d_in"],
    row_terms: Float32[Tensor, "3 row"],
    feature_terms: Float32[Tensor, "4 feature"],
    size: int,
) -> tuple[Float16[Tensor, "row feature"], Float16[Tensor, "row group"]]:
    """Returns the bounds of `workbench.sae.half_screen`, and the maxima of groups of `size` neighbouring features.

    One pass: the product on matrix units with sums in float32, its terms and the maxima in registers.

    Args:
        x: Rounded rows.
        weight: Rounded weights.
        row_terms: Norm, rounding error and scale of each row.
        feature_terms: Rounding error, norm, scale and bias minus threshold of each feature.
        size: A power of two, at most `LARGEST_GROUP`. The last group may be smaller.
    """
    x, weight, row_terms, feature_terms = _in_rows(x, weight, row_terms, feature_terms)
    (rows, d_in), features = x.shape, len(weight)
    groups = -(-features // size)
    out = torch.empty(rows, features, dtype=torch.float16, device=x.device)
    maxima = torch.empty(rows, groups, dtype=torch.float16, device=x.device)
    tile = _TILE if x.device.type == "cuda" else _INTERPRETED
    blocks = triton.cdiv(rows, tile["BLOCK_ROWS"]), triton.cdiv(features, tile["BLOCK_FEATURES"])
    options = _OPTIONS if x.device.type == "cuda" else {}
    sizes = rows, features, d_in, groups
    arguments = x, weight, row_terms, feature_terms, out, maxima, *sizes
    kernel: Any = _bounds  # a kernel is launched by its index, a grid
    kernel[(blocks[0] * blocks[1],)](*arguments, GROUP=size, **tile, **options)
    return out, maxima


def candidates(
    bounds: Float16[Tensor, "row feature"], least: Float16[Tensor, " row"], most: int
) -> tuple[Int32[Tensor, "row place"], Int32[Tensor, " row"]]:
    """Returns, in one pass, the features of each row whose bound is at least `least`, and their number.

    Features ascend; -1 stands in the places after the last. A row may have more than `most`, of which the first `most`
    are returned.
    """
    bounds, least = _in_rows(bounds, least)
    feature = torch.full((len(bounds), most), -1, dtype=torch.int32, device=bounds.device)
    count = torch.empty(len(bounds), dtype=torch.int32, device=bounds.device)
    kernel: Any = _candidates
    kernel[(len(bounds),)](bounds, least, feature, count, bounds.shape[1], most, BLOCK=_SCAN)
    return feature, count


def pair_products(
    x: Float32[Tensor, "row d_in"],
    weight: Float32[Tensor, "feature d_in"],
    row: Int64[Tensor, " entry"] | Int32[Tensor, " entry"],
    feature: Int64[Tensor, " entry"] | Int32[Tensor, " entry"],
) -> Float32[Tensor, " entry"]:
    """Returns x[row] · weight[feature] in float32, without copies of rows; 0 where a feature is -1.

    A product does not depend on the other pairs. Its sum has 128 parts, so its error is that of d_in / 128 + 8 terms.
    """
    x, weight, row, feature = _in_rows(x, weight, row, feature)
    products = torch.empty(len(row), dtype=torch.float32, device=x.device)
    if len(row):
        blocks = triton.cdiv(len(row), _PAIRS)
        sizes = len(row), x.shape[1]
        kernel: Any = _pairs
        kernel[(blocks,)](x, weight, row, feature, products, *sizes, PAIRS=_PAIRS, WIDTH=_PAIR_WIDTH)
    return products


def _in_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the kernels read them: row after row in memory."""
    return tuple(tensor.contiguous() for tensor in tensors)


@triton.jit
def _bounds(
    x, weight, row_terms, feature_terms, out, maxima, rows, features, d_in, groups,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    feature_blocks = tl.cdiv(features, BLOCK_FEATURES)
    # eight blocks of rows share the weights in the cache
    band = 8 * feature_blocks
    first = tl.program_id(0) // band * 8
    height = tl.minimum(row_blocks - first, 8)
    row = (first + tl.program_id(0) % band % height) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = tl.program_id(0) % band // height
    feature = block * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    is_row, is_feature = row < rows, feature < features
    x_row = x + row[:, None].to(tl.int64) * d_in
    w_row = weight + feature[None, :].to(tl.int64) * d_in
    total = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)
    for start in range(0, d_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x_row + k[None, :], mask=is_row[:, None] & (k < d_in)[None, :], other=0.0)
        b = tl.load(w_row + k[:, None], mask=is_feature[None, :] & (k < d_in)[:, None], other=0.0)
        total = tl.dot(a, b, total)
    norm = tl.load(row_terms + row, mask=is_row, other=0.0)
    rounding = tl.load(row_terms + rows + row, mask=is_row, other=0.0)
    scale = tl.load(row_terms + 2 * rows + row, mask=is_row, other=0.0)
    error = tl.load(feature_terms + feature, mask=is_feature, other=0.0)
    size = tl.load(feature_terms + features + feature, mask=is_feature, other=0.0)
    relative = tl.load(feature_terms + 2 * features + feature, mask=is_feature, other=0.0)
    below = tl.load(feature_terms + 3 * features + feature, mask=is_feature, other=0.0)
    total += norm[:, None] * error[None, :] + rounding[:, None] * size[None, :]
    total = total * relative[None, :] + scale[:, None] * below[None, :]
    total = tl.where((total > 0) & is_feature[None, :], tl.maximum(total, 5.9604644775390625e-08), 0.0)
    half = total.to(tl.float16)
    place = row[:, None].to(tl.int64) * features + feature[None, :]
    tl.store(out + place, half, mask=is_row[:, None] & is_feature[None, :])
    most = tl.max(tl.reshape(half, (BLOCK_ROWS, BLOCK_FEATURES // GROUP, GROUP)), axis=2)
    group = block * (BLOCK_FEATURES // GROUP) + tl.arange(0, BLOCK_FEATURES // GROUP)
    place = row[:, None].to(tl.int64) * groups + group[None, :]
    tl.store(maxima + place, most, mask=is_row[:, None] & (group < groups)[None, :])


@triton.jit
def _candidates(bounds, least, ids, count, features, most, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    border = tl.load(least + row)
    number = 0
    for start in range(0, features, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        bound = tl.load(bounds + row * features + feature, mask=feature < features, other=0.0)
        fits = ((bound >= border) & (feature < features)).to(tl.int32)
        place = number + tl.cumsum(fits, 0) - 1
        tl.store(ids + row * most + place, feature, mask=(fits > 0) & (place < most))
        number += tl.sum(fits, 0)
    tl.store(count + row, number)


@triton.jit
def _pairs(x, weight, row, feature, products, pairs, d_in, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    at = tl.load(row + pair, mask=pair < pairs, other=0).to(tl.int64)
    of = tl.load(feature + pair, mask=pair < pairs, other=-1).to(tl.int64)
    total = tl.zeros((PAIRS, WIDTH), dtype=tl.float32)
    if tl.max(of, 0) >= 0:
        for start in range(0, d_in, WIDTH):
            k = start + tl.arange(0, WIDTH)
            inside = (of >= 0)[:, None] & (k < d_in)[None, :]
            a = tl.load(x + at[:, None] * d_in + k[None, :], mask=inside, other=0.0)
            b = tl.load(weight + of[:, None] * d_in + k[None, :], mask=inside, other=0.0)
            total += a * b
    tl.store(products + pair, tl.sum(total, 1), mask=pair < pairs)
