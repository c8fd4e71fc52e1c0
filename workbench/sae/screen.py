"""Upper bounds of pre-activations from one bfloat16 product.

x·w - x̃·w̃ = x·(w - w̃) + (x - x̃)·w̃ for the rounded x̃ and w̃, so by Cauchy-Schwarz
|x·w - x̃·w̃| <= |x| |w - w̃| + |x - x̃| |w̃|. The norms are computed once per row and once per feature. Both vectors are
extended by the terms to add, (x̃, |x|, |x - x̃|, 1) and (w̃, |w - w̃|, |w̃|, b), so one product gives the bound itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float32, Int64
from torch import Tensor

from workbench.io.torch_state import device_for_float64
from workbench.sae.choice import SAFE, Above, Linear, TopK
from workbench.sae.products import group_size, pair_products, product_with_maxima, top

LEAST_NORM = 1e-13
"""Below it the squares of a row's rounding errors underflow, and its bounds are too low."""
_MARGIN = 1.01  # outweighs rounding a norm to bfloat16


@dataclass(frozen=True)
class Screen:
    """Upper bounds of pre-activations, minus their thresholds if the choice has any, from one bfloat16 product."""

    weight: BFloat16[Tensor, "d_in_and_bounds feature"]
    """Per feature: rounded weights, norm of the rounding error, norm of the rounded weights, bias minus threshold."""
    rows: Float32[Tensor, "feature d_in"]
    """The unrounded weights; those of one feature are contiguous."""
    linear: Linear

    def bounds(self, x: Float32[Tensor, "row d_in"]) -> BFloat16[Tensor, "row feature"]:
        """Returns a value >= pre-activation - threshold for any order of summation, rounded to bfloat16."""
        return self._extended(x) @ self.weight

    def largest(
        self, x: Float32[Tensor, "row d_in"], k: int
    ) -> tuple[BFloat16[Tensor, "row k"], Int64[Tensor, "row k"]]:
        """Returns the k largest bounds of each row and their features, unordered."""
        size = group_size(self.weight.shape[1], k)
        if size is None:
            return top(self.bounds(x), k)
        bounds, maxima = product_with_maxima(self._extended(x), self.weight, size)
        return top(bounds, k, maxima)

    def exact(
        self, x: Float32[Tensor, "row d_in"], row: Int64[Tensor, " entry"], feature: Int64[Tensor, " entry"]
    ) -> Float32[Tensor, " entry"]:
        """Returns selected pre-activations in float32; `row` ascends."""
        pre = pair_products(x, self.rows, row, feature)
        pre += self.linear.bias[feature]
        return pre if self.linear.scale is None else pre * self.linear.scale[feature]

    def _extended(self, x: Float32[Tensor, "row d_in"]) -> BFloat16[Tensor, "row d_in_and_bounds"]:
        low = x.bfloat16()
        norm = x.norm(dim=1)
        rounding = (x - low.float()).norm(dim=1) + norm * accumulation(x.shape[1])
        longer = low.new_zeros(len(x), self.weight.shape[0])
        longer[:, : x.shape[1]] = low
        longer[:, x.shape[1]] = norm * _MARGIN
        longer[:, x.shape[1] + 1] = rounding * _MARGIN
        longer[:, x.shape[1] + 2 : x.shape[1] + 5] = 1
        return longer


def make_screen(linear: Linear, choice: Above | TopK) -> Screen:
    """Returns the bounds of these pre-activations; with `Above`, minus its thresholds."""
    d_in, features = linear.weight.shape
    bias = linear.bias if linear.scale is None else linear.bias * linear.scale
    below = (bias - choice.threshold if isinstance(choice, Above) else bias).clamp(-SAFE, SAFE)
    below = below + (below.abs() + bias.abs()) * accumulation(d_in) + torch.finfo(torch.float32).tiny
    weight = linear.weight.new_zeros(-(-(d_in + 5) // 8) * 8, features, dtype=torch.bfloat16)
    for start in range(0, features, 4096):
        part = slice(start, start + 4096)
        exact = linear.weight[:, part].to(device_for_float64(linear.weight.device)).double()
        exact = exact if linear.scale is None else exact * linear.scale[part].to(exact.device)
        weight[:d_in, part] = low = exact.bfloat16()
        weight[d_in, part] = (exact - low).norm(dim=0) * _MARGIN
        weight[d_in + 1, part] = low.to(exact.device).double().norm(dim=0) * _MARGIN + torch.finfo(torch.float32).tiny
    for index in range(3):  # a float32 is the sum of three bfloat16
        weight[d_in + 2 + index] = below
        below = below - weight[d_in + 2 + index]
    return Screen(weight, linear.weight.T.contiguous(), linear)


def accumulation(terms: int) -> float:
    """Rounding error of a float32 sum of products relative to the product of norms, for any order of summation and the
    coarse additions of tensor cores, counted twice: for the bound's product and for the float32 product."""
    return 8 * (terms + 8) * 2**-24
