"""Selection of the active features of a block of rows, from all pre-activations or from their upper bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from workbench.sae.choice import Above, AbsTopK, TopK
from workbench.sae.products import counts, places, top
from workbench.sae.screen import Screen

_CROWDED = 8  # a row with more than 1/8 of its bounds above threshold gains nothing from screening


@dataclass(frozen=True)
class Entries:
    """Nonzero activations of a block, sorted by row and feature."""

    row: Int64[Tensor, " entry"]
    feature: Int64[Tensor, " entry"]
    value: Float32[Tensor, " entry"]
    unsettled: int = 0


def choose(choice: Above | TopK, pre: Float32[Tensor, "row feature"]) -> Entries:
    if isinstance(choice, Above):
        row, feature = places(pre > choice.threshold)
        return _activated(choice, row, feature, pre[row, feature])
    _, feature = top(pre.abs() if isinstance(choice, AbsTopK) else pre, choice.k)
    feature = feature.sort(dim=1).values
    value = pre.gather(1, feature)
    on = value != 0 if isinstance(choice, AbsTopK) else value > 0
    return Entries(_row_numbers(value)[on], feature[on], value[on])


def screened_above(
    choice: Above, screen: Screen, x: Float32[Tensor, "row d_in"], left_out: Bool[Tensor, " row"]
) -> tuple[Entries, Int64[Tensor, " unsettled"]]:
    """Entries found through bounds, and the rows for which bounds do not pay off or that are to be left out."""
    maybe = screen.bounds(x) > 0
    crowded = (counts(maybe) > maybe.shape[1] / _CROWDED) | left_out
    maybe &= ~crowded[:, None]
    row, feature = places(maybe)
    value = screen.exact(x, row, feature)
    on = value > choice.threshold[feature]
    return _activated(choice, row[on], feature[on], value[on]), crowded.nonzero()[:, 0]


def screened_top(
    choice: TopK, screen: Screen, x: Float32[Tensor, "row d_in"], left_out: Bool[Tensor, " row"]
) -> tuple[Entries, Int64[Tensor, " unsettled"]]:
    """Entries found through bounds, and the rows whose bounds do not decide or that are to be left out."""
    features = screen.weight.shape[1]
    bound, feature = screen.largest(x, min(choice.k + choice.k // 2 + 8, features))
    value = screen.exact(x, _row_numbers(feature).flatten(), feature.flatten()).view(feature.shape)
    value, place = value.topk(choice.k, dim=1)
    # no excluded pre-activation is larger than this; the product was rounded to bfloat16
    left = bound.amin(1).float()
    left += left.abs() / 128
    settled = ((value[:, -1] > left) | (left <= 0) | (feature.shape[1] == features)) & ~left_out
    feature, order = feature.gather(1, place).sort(dim=1)
    value = value.gather(1, order)
    on = (value > 0) & settled[:, None]
    return Entries(_row_numbers(value)[on], feature[on], value[on]), (~settled).nonzero()[:, 0]


def _activated(choice: Above, row: Tensor, feature: Tensor, value: Tensor) -> Entries:
    if choice.gain is None or choice.shift is None:
        return Entries(row, feature, value)
    value = value * choice.gain[feature] + choice.shift[feature]
    on = value > 0
    return Entries(row[on], feature[on], value[on])


def _row_numbers(values: Float[Tensor, "row k"] | Int64[Tensor, "row k"]) -> Int64[Tensor, "row k"]:
    return torch.arange(len(values), device=values.device)[:, None].expand(values.shape)
