"""Upper bounds of pre-activations from one float16 product, for accelerators.

Rows and features are scaled by powers of two before they are rounded: |p x| lies in [256, 512), |q w| in [32, 64), so
no product leaves the range of float16, and float16's 11 bits give bounds 8 times as narrow as bfloat16's 8 bits as far
as they come from rounding. With X = p x, W = q w and their rounded X~, W~:

    X·W = X~·W~ + X·(W - W~) + (X - X~)·W~ <= X~·W~ + |X| |W - W~| + |X - X~| |W~|    (Cauchy-Schwarz)

The norms of the differences are measured, so that float16's subnormal numbers and what is flushed to 0 are counted. The
products of 11-bit factors are exact in float32; the device's sum P of d of them errs by at most 4 (d + 8) u |X~| |W~|,
u = 2^-24, where matrix units align products before they add; the float32 pre-activation that is compared errs by at
most (d + 8) u |X| |W|. Both are added to |X - X~|. A bound of p Q (pre-activation - threshold), Q the least q, is then

    (P + |X| |W - W~| + (|X - X~| + 5 (d + 8) u |X|) |W~|) Q / q + p Q (bias - threshold)

Bounds below 0 are stored as 0, others rounded to float16, those above 0 never to 0 and those beyond its range to
infinity. Rounding keeps order: a stored bound below the rounded p Q v is the bound of a pre-activation below v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float16, Float32, Int32, Int64
from torch import Tensor

from workbench.io.torch_state import device_for_float64
from workbench.sae.choice import SAFE, Above, Linear, TopK
from workbench.sae.kernels import kernels_for
from workbench.sae.products import group_size, pair_products, row_starts
from workbench.sae.selection import CROWDED, Entries, activated, largest, merge

_MARGIN = 1.005  # outweighs the rounding of a norm in float32
_FLUSHED = 1e-16  # norm of what the squares of scaled errors lose to underflow
_LEAST = 2.0**-24  # the least number above 0 in float16
_SPREAD = 60  # powers of two between the norms of features, at most
_SLACK = 1.25  # widths below the k-th bound down to which pre-activations are computed at first
_LARGEST_GROUP = 128


@dataclass(frozen=True)
class HalfScreen:
    """Upper bounds of pre-activations, minus their thresholds if the choice has any."""

    weight: Float16[Tensor, "feature d_in"]
    """W~"""
    terms: Float32[Tensor, "4 feature"]
    """|W - W~|, |W~|, Q / q, and Q (bias - threshold)."""
    unit: float
    """Q"""
    rows: Float32[Tensor, "feature d_in"]
    """The unrounded weights; those of one feature are contiguous."""
    linear: Linear

    def bounds(
        self, x: Float32[Tensor, "row d_in"], size: int = _LARGEST_GROUP
    ) -> tuple[Float16[Tensor, "row feature"], Float16[Tensor, "row group"], Float32[Tensor, "3 row"]]:
        """Returns the stored bounds, their maxima over groups of `size` neighbouring features, and the rows' terms."""
        low, row_terms = _rounded(x)
        kernels = kernels_for(x.device)
        if kernels is not None:
            return (*kernels.bounds_with_maxima(low, self.weight, row_terms, self.terms, size), row_terms)
        stored = _combined(_product(low, self.weight), row_terms, self.terms)
        padded = torch.nn.functional.pad(stored, (0, -stored.shape[1] % size))
        return stored, padded.unflatten(1, (-1, size)).amax(2), row_terms

    def upper(self, x: Float32[Tensor, "row d_in"]) -> Float32[Tensor, "row feature"]:
        """Returns a value >= pre-activation - threshold, or 0, for any order of summation."""
        stored, _, (_, _, scale) = self.bounds(x)
        return (stored.float() * (1 + 2**-10) + _LEAST) / (scale * self.unit)[:, None]

    def exact(
        self, x: Float32[Tensor, "row d_in"], row: Int64[Tensor, " entry"], feature: Int64[Tensor, " entry"]
    ) -> Float32[Tensor, " entry"]:
        """Returns selected pre-activations in float32; `row` ascends. Those of the feature -1 are any numbers."""
        index, kernels = feature.clamp(min=0), kernels_for(x.device)
        if kernels is not None:
            pre = kernels.pair_products(x, self.rows, row, feature)
        else:
            pre, real = torch.zeros(len(row), device=x.device), feature >= 0
            pre[real] = pair_products(x, (self.rows,), row[real], feature[real])
        pre += self.linear.bias[index]
        return pre if self.linear.scale is None else pre * self.linear.scale[index]

    def select(self, choice: Above | TopK, x: Float32[Tensor, "row d_in"]) -> tuple[Entries, Bool[Tensor, " row"]]:
        """Returns the entries found through bounds, and a mask of the rows for which bounds do not pay off."""
        return self._top(choice, x) if isinstance(choice, TopK) else self._above(choice, x)

    def _above(self, choice: Above, x: Float32[Tensor, "row d_in"]) -> tuple[Entries, Bool[Tensor, " row"]]:
        stored, _, _ = self.bounds(x)
        least = stored.new_full((len(x),), _LEAST)
        row, feature, crowded = _listed(*_candidates(stored, least, stored.shape[1] // CROWDED))
        value = self.exact(x, row, feature)
        on = value > choice.threshold[feature]
        return activated(choice, row[on], feature[on], value[on]), crowded

    def _top(self, choice: TopK, x: Float32[Tensor, "row d_in"]) -> tuple[Entries, Bool[Tensor, " row"]]:
        """The host waits for the device where it needs numbers: of the rows to be tried again, and of the entries."""
        features, k = len(self.weight), choice.k
        stored, maxima, row_terms = self.bounds(x, min(group_size(features, k) or 1, _LARGEST_GROUP))
        norm, rounding, scale = row_terms
        error, size, relative, _ = self.terms
        width = norm * (error * relative).mean() + rounding * (size * relative).mean()
        high = maxima.topk(k, dim=1, sorted=False).values.amin(1)
        start = (high.float() - _SLACK * width).clamp(min=_LEAST).half()
        most = min(-(-(4 * k + 64) // 8) * 8, features)
        feature, count = _candidates(stored, start, most)
        row = torch.arange(len(x), device=x.device)[:, None].expand_as(feature)
        feature = feature.long()
        value = self.exact(x, row.reshape(-1), feature.reshape(-1)).view(feature.shape)
        value, place = value.masked_fill(feature < 0, -torch.inf).topk(k, dim=1)
        last = value[:, -1].clamp(min=0)
        needed = (last * scale * self.unit).clamp(min=_LEAST).half()
        crowded = count > most
        retried = crowded | (needed < start)
        feature, order = feature.gather(1, place).sort(dim=1)
        value = value.gather(1, order)
        on = (value > 0) & ~retried[:, None]
        entries = Entries(row[:, :k][on], feature[on], value[on])
        crowded = torch.zeros_like(crowded)
        rest = retried.nonzero()[:, 0]
        if len(rest):
            tried = _candidates(stored[rest], needed[rest], features // CROWDED)
            row, feature, over = _listed(*tried)
            more, _ = largest(choice, self.exact(x[rest], row, feature), row, feature, len(rest))
            entries = merge(len(x), entries, Entries(rest[more.row], more.feature, more.value))
            crowded[rest] = over
        return entries, crowded


def make_half_screen(linear: Linear, choice: Above | TopK) -> HalfScreen | None:
    """Returns the bounds of these pre-activations; with `Above`, minus its thresholds. None: features differ too much.

    Cost: a float16 and, unless the weights are contiguous per feature already, a float32 copy of them.
    """
    d_in, features = linear.weight.shape
    scale = torch.ones_like(linear.bias) if linear.scale is None else linear.scale
    place = device_for_float64(linear.weight.device)
    parts = [slice(start, start + 4096) for start in range(0, features, 4096)]

    def weights(part: slice) -> Tensor:
        return linear.weight[:, part].to(place).double() * scale[part].to(place).double()

    norm = torch.cat([weights(part).norm(dim=0) for part in parts])
    exponent = torch.frexp(norm).exponent
    exponents = exponent[norm > 0]
    highest = int(exponents.max()) if len(exponents) else 0
    if len(exponents) and highest - int(exponents.min()) > _SPREAD:
        return None
    exponent = torch.where(norm > 0, exponent, highest)
    low = torch.empty(features, d_in, dtype=torch.float16, device=linear.weight.device)
    terms = torch.empty(4, features, device=linear.weight.device)
    for part in parts:
        scaled = torch.ldexp(weights(part), 6 - exponent[part])
        rounded = scaled.half()
        low[part] = rounded.T
        terms[0, part] = ((scaled - rounded.double()).norm(dim=0) * _MARGIN + _FLUSHED).float()
        terms[1, part] = (rounded.double().norm(dim=0) * _MARGIN + _LEAST).float()
    ones = torch.ones(features, device=place)
    terms[2] = torch.ldexp(ones, exponent - highest)
    bias = linear.bias * scale
    below = (bias - choice.threshold if isinstance(choice, Above) else bias).clamp(-SAFE, SAFE)
    below = below + (below.abs() + bias.abs()) * 8 * (d_in + 8) * 2**-24
    terms[3] = below * 2.0 ** (6 - highest)
    return HalfScreen(low, terms, 2.0 ** (6 - highest), linear.weight.T.contiguous(), linear)


def _rounded(x: Float32[Tensor, "row d_in"]) -> tuple[Float16[Tensor, "row d_in"], Float32[Tensor, "3 row"]]:
    """X~, and of each row |X|, |X - X~| with the error of sums, and p."""
    norm = x.norm(dim=1)
    exponent = (9 - torch.frexp(norm).exponent).clamp(-120, 120)
    scale = torch.ldexp(torch.ones_like(norm), exponent)
    scaled = x * scale[:, None]
    low = scaled.half()
    size = norm * scale * _MARGIN
    sums = (2 if x.device.type == "cpu" else 5) * (x.shape[1] + 8) * 2**-24
    rounding = ((scaled - low.float()).norm(dim=1) + _FLUSHED) * _MARGIN + size * sums
    return low, torch.stack([size, rounding, scale])


def _product(x: Float16[Tensor, "row d_in"], weight: Float16[Tensor, "feature d_in"]) -> Float32[Tensor, "row feature"]:
    """The product with sums in float32, in which products of float16 are exact."""
    if x.device.type == "cuda":
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def _combined(
    product: Float32[Tensor, "row feature"], row_terms: Float32[Tensor, "3 row"], terms: Float32[Tensor, "4 feature"]
) -> Float16[Tensor, "row feature"]:
    """The bounds as they are stored."""
    norm, rounding, scale = row_terms[:, :, None]
    error, size, relative, below = terms
    bound = (product + norm * error + rounding * size) * relative + scale * below
    return torch.where(bound > 0, bound.clamp(min=_LEAST), 0.0).half()


def _candidates(
    stored: Float16[Tensor, "row feature"], least: Float16[Tensor, " row"], most: int
) -> tuple[Int32[Tensor, "row place"], Int32[Tensor, " row"]]:
    """Features of each row whose bound is at least `least`, in order, -1 after the last, and their number."""
    kernels = kernels_for(stored.device)
    if kernels is not None:
        return kernels.candidates(stored, least, most)
    row, feature = (stored >= least[:, None]).nonzero().unbind(1)
    start = row_starts(row, len(stored))
    place = torch.arange(len(row), device=row.device) - start[row]
    fits = place < most
    candidates = torch.full((len(stored), most), -1, dtype=torch.int32, device=row.device)
    candidates[row[fits], place[fits]] = feature[fits].int()
    return candidates, start.diff().int()


def _listed(
    feature: Int32[Tensor, "row place"], count: Int32[Tensor, " row"]
) -> tuple[Int64[Tensor, " entry"], Int64[Tensor, " entry"], Bool[Tensor, " row"]]:
    """Row and feature of each candidate, in row order, and the rows left out: they have more than there are places."""
    crowded = count > feature.shape[1]
    number = torch.where(crowded, 0, count).long()
    row = torch.repeat_interleave(torch.arange(len(count), device=count.device), number)
    place = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
    return row, feature[row, place].long(), crowded
