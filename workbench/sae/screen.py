"""Upper bounds of pre-activations from one bfloat16 product.

x·w - x̃·w̃ = x·(w - w̃) + (x - x̃)·w̃ for the rounded x̃ and w̃, so by Cauchy-Schwarz
|x·w - x̃·w̃| <= |x| |w - w̃| + |x - x̃| |w̃|. The norms are computed once per row and once per feature. Both vectors are
extended by the terms to add, (x̃, |x|, |x - x̃|, 1) and (w̃, |w - w̃|, |w̃|, b), so one product gives the bound itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Float32, Int64
from torch import Tensor

from workbench.io.torch_state import device_for_float64
from workbench.sae.choice import SAFE, Above, Linear, TopK
from workbench.sae.products import input_parts, pair_products

LEAST_NORM = 1e-13
"""Below it the squares of a row's rounding errors underflow, and its bounds are too low."""
TINY = torch.finfo(torch.float32).tiny
"""Least bound of a pre-activation above 0, or above its threshold."""
_MARGIN = 1.005  # outweighs the errors of a norm in float32 and of its rounding to bfloat16, at most 1/256 of it
_FLUSHED = 1e-16  # norm of what the squares of small errors lose to underflow
_FEATURES, _ROWS = 128, 64  # prepared at a time: they stay in the second cache


@dataclass(frozen=True)
class Screen:
    """Upper bounds of pre-activations, minus their thresholds if the choice has any, from one bfloat16 product."""

    weight: BFloat16[Tensor, "feature d_in_and_bounds"]
    """Per feature: rounded weights, norm of the rounding error, norm of the rounded weights, bias minus threshold."""
    parts: tuple[Float32[Tensor, "feature _"], ...]
    """The unrounded weights of neighbouring inputs, as `input_parts` returns them."""
    linear: Linear
    typical: Float32[Tensor, " 2"]
    """Mean over features of the two norms in `weight`."""

    def bounds(self, x: Float32[Tensor, "row d_in"]) -> BFloat16[Tensor, "row feature"]:
        """Returns a value >= pre-activation - threshold for any order of summation, rounded to bfloat16."""
        return self.extended(x, x.norm(dim=1)) @ self.weight.T

    def exact(
        self, x: Float32[Tensor, "row d_in"], row: Int64[Tensor, " entry"], feature: Int64[Tensor, " entry"]
    ) -> Float32[Tensor, " entry"]:
        """Returns selected pre-activations in float32; `row` ascends."""
        pre = pair_products(x, self.parts, row, feature)
        pre += self.linear.bias[feature]
        return pre if self.linear.scale is None else pre * self.linear.scale[feature]

    def extended(
        self, x: Float32[Tensor, "row d_in"], norm: Float32[Tensor, " row"]
    ) -> BFloat16[Tensor, "row d_in_and_bounds"]:
        """Returns the rows rounded, with the norms that belong to the norms of `weight`."""
        d_in = x.shape[1]
        longer, errors = self.weight.new_empty(len(x), self.weight.shape[1]), torch.empty_like(norm)
        step = _ROWS if x.device.type == "cpu" else max(1, len(x))
        for exact, rounded, error in zip(x.split(step), longer[:, :d_in].split(step), errors.split(step), strict=True):
            rounded.copy_(exact)
            error.copy_(torch.sub(exact, rounded).norm(dim=1))
        rounding = errors + norm * _accumulation(self.linear)
        longer[:, d_in] = norm * _MARGIN
        longer[:, d_in + 1] = rounding * _MARGIN
        longer[:, d_in + 2 : d_in + 5] = 1
        longer[:, d_in + 5 :] = 0
        return longer

    def width(self, extended: BFloat16[Tensor, "row d_in_and_bounds"]) -> Float32[Tensor, " row"]:
        """Returns by how much the bounds of a row exceed its pre-activations, in the mean over features."""
        d_in = self.linear.weight.shape[0]
        norms = slice(d_in, d_in + 2)
        return extended[:, norms].float() @ self.typical


def make_screen(linear: Linear, choice: Above | TopK) -> Screen:
    """Returns the bounds of these pre-activations; with `Above`, minus its thresholds."""
    d_in, features = linear.weight.shape
    bias = linear.bias if linear.scale is None else linear.bias * linear.scale
    below = (bias - choice.threshold if isinstance(choice, Above) else bias).clamp(-SAFE, SAFE)
    below = below + (below.abs() + bias.abs()) * _accumulation(linear) + TINY
    parts = input_parts(linear.weight)
    weight = linear.weight.new_zeros(features, -(-(d_in + 5) // 8) * 8, dtype=torch.bfloat16)
    for start in range(0, features, _FEATURES):
        block = slice(start, start + _FEATURES)
        exact = torch.cat([part[block] for part in parts], 1)
        if linear.scale is not None:
            place = device_for_float64(exact.device)
            exact = exact.to(place).double() * linear.scale[block, None].to(place)
        low = exact.bfloat16()
        weight[block, :d_in] = low
        low = low.to(exact.dtype)
        weight[block, d_in] = _norm(exact - low)
        weight[block, d_in + 1] = _norm(low)
    for index in range(3):  # a float32 is the sum of three bfloat16
        weight[:, d_in + 2 + index] = below
        below = below - weight[:, d_in + 2 + index]
    return Screen(weight, parts, linear, weight[:, d_in : d_in + 2].float().mean(0))


def _accumulation(linear: Linear) -> float:
    """Rounding error of a float32 sum of products relative to the product of the norms.

    A sum of n products in any order errs by at most n u sum |x_i w_i| <= n u |x| |w|, u = 2^-24, to first order. It is
    counted twice: for the bound's product, whose factors of 8 bits have exact products, and for the float32 product
    that is bounded. Either has up to 8 terms more than d_in. Matrix units of an accelerator align the products before
    they add, and cut off what does not fit: there the error is taken four times as large.
    """
    d_in = linear.weight.shape[0]
    return (2 if linear.weight.device.type == "cpu" else 8) * (d_in + 8) * 2**-24


def _norm(rows: Float[Tensor, "feature d_in"]) -> Float[Tensor, " feature"]:
    """At least the norms of the rows, also after they are rounded to bfloat16."""
    return rows.norm(dim=1) * _MARGIN + _FLUSHED
