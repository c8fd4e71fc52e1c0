"""Selection of the active features of a block of rows, from all pre-activations or from their upper bounds."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from workbench.sae.choice import Above, AbsTopK, TopK
from workbench.sae.products import (
    group_size,
    kth_largest,
    kth_of_row,
    places_above,
    places_from,
    product_with_maxima,
    row_starts,
    top,
)
from workbench.sae.screen import TINY, Screen

CROWDED = 8  # a row with more than 1/8 of its features to be computed is computed as a whole
_FIRST_SLACK = 1.1
_SKIPPED, _MOST_SKIPPED = 4, 64  # blocks without bounds: at first, and at most after further hopeless ones
_SHARE, _MORE = 0.9, 1.02  # of the rows to be decided by their first pre-activations, and a little more slack


@dataclass(frozen=True)
class Entries:
    """Nonzero activations of a block, sorted by row and feature."""

    row: Int64[Tensor, " entry"]
    feature: Int64[Tensor, " entry"]
    value: Float32[Tensor, " entry"]
    unsettled: int = 0

    def where(self, mask: Bool[Tensor, " entry"]) -> Entries:
        """Returns the entries that a mask selects."""
        return Entries(self.row[mask], self.feature[mask], self.value[mask])


@dataclass
class Experience:
    """Experience with earlier blocks. It changes the time that a block takes, and nothing that is selected."""

    slack: float = _FIRST_SLACK
    """Distance of the k-th pre-activation below the k-th bound, relative to `Screen.width`, in nearly all rows."""
    skip: int = 0
    """Blocks that are to be encoded without bounds."""
    after: int = _SKIPPED
    """The same after the next block whose bounds do not pay off."""

    most_rows: int = sys.maxsize
    """Rows in a block that fit in memory, as far as is known."""
    rooms: list[Tensor] = field(default_factory=list)
    """Memory of blocks for the next calls on a CPU, where fresh memory takes as long as the product. A call takes one
    out and brings it back: calls in several threads share none."""

    def note(self, hopeless: bool) -> None:
        """Notes that bounds paid off in a block, or did not. Sooner or later they are tried again."""
        if hopeless:
            self.skip, self.after = self.after, min(2 * self.after, _MOST_SKIPPED)
        else:
            self.after = _SKIPPED


def choose(choice: Above | TopK, pre: Float32[Tensor, "row feature"]) -> Entries:
    """Returns the active features among all pre-activations."""
    if isinstance(choice, Above):
        row, feature = places_above(pre, choice.threshold)
        return activated(choice, row, feature, pre[row, feature])
    _, feature = top(pre.abs() if isinstance(choice, AbsTopK) else pre, choice.k)
    feature = feature.sort(dim=1).values
    value = pre.gather(1, feature)
    on = value != 0 if isinstance(choice, AbsTopK) else value > 0
    row = torch.arange(len(value), device=value.device)[:, None].expand(value.shape)
    return Entries(row[on], feature[on], value[on])


def screened_above(
    choice: Above, screen: Screen, x: Float32[Tensor, "row d_in"], norm: Float32[Tensor, " row"], out: Tensor
) -> tuple[Entries, Bool[Tensor, " row"]]:
    """Returns the entries found through bounds, and a mask of the rows for which bounds do not pay off."""
    bounds = torch.mm(screen.extended(x, norm), screen.weight.T, out=out)
    row, feature, crowded = places_from(bounds, _positive(bounds), bounds.shape[1] // CROWDED)
    value = screen.exact(x, row, feature)
    on = value > choice.threshold[feature]
    return activated(choice, row[on], feature[on], value[on]), crowded


def screened_top(
    choice: TopK,
    screen: Screen,
    x: Float32[Tensor, "row d_in"],
    norm: Float32[Tensor, " row"],
    out: Tensor,
    experience: Experience,
) -> tuple[Entries, Bool[Tensor, " row"]]:
    """Returns the entries found through bounds, and a mask of the rows for which bounds do not pay off.

    The k-th largest maximum of a group is at most the k-th largest bound. Pre-activations whose bounds reach a little
    below it are computed: at least k. The k-th largest of them decides which bounds remain to be tried: mostly none.
    """
    extended = screen.extended(x, norm)
    size = group_size(len(screen.weight), choice.k) or 1
    bounds, maxima = product_with_maxima(extended, screen.weight, size, out)
    least = _positive(bounds)
    high, width = kth_largest(maxima, choice.k).float(), screen.width(extended)
    start = torch.maximum((high - experience.slack * width).bfloat16(), least)
    most = bounds.shape[1] // CROWDED
    row, feature, crowded = places_from(bounds, start, most)
    entries, last = largest(choice, screen.exact(x, row, feature), row, feature, len(x))
    # rounding keeps order, so bounds below the rounded k-th are bounds of smaller pre-activations
    needed = torch.maximum(last.bfloat16(), least)
    retried = ((needed < start) & ~crowded).nonzero()[:, 0]
    known = (last > 0) & ~crowded
    if known.any():
        experience.slack = max(0.0, _MORE * float(torch.quantile(((high - last) / width)[known], _SHARE)))
    if len(retried):
        row, feature, over = places_from(bounds[retried], needed[retried], most)
        more, _ = largest(choice, screen.exact(x[retried], row, feature), row, feature, len(retried))
        first = entries.where(torch.ones_like(crowded).index_fill_(0, retried, False)[entries.row])
        entries = merge(len(x), first, Entries(retried[more.row], more.feature, more.value))
        crowded[retried] = over
    return entries, crowded


def merge(rows: int, first: Entries, second: Entries) -> Entries:
    """Returns the entries of both, which have no row in common."""
    if not len(second.row) or not len(first.row):
        return first if len(first.row) else second
    starts = row_starts(first.row, rows), row_starts(second.row, rows)
    parts, place = (first, second), []
    for part, before in zip(parts, reversed(starts), strict=True):
        place.append(torch.arange(len(part.row), device=part.row.device) + before[part.row])
    place = torch.cat(place)

    def merged(name: str) -> Tensor:
        values = torch.cat([getattr(part, name) for part in parts])
        return torch.empty_like(values).index_copy_(0, place, values)

    return Entries(merged("row"), merged("feature"), merged("value"))


def largest(
    choice: TopK, value: Float32[Tensor, " entry"], row: Int64[Tensor, " entry"], feature: Tensor, rows: int
) -> tuple[Entries, Float32[Tensor, " row"]]:
    """Returns the k largest of these pre-activations of each row, and the k-th, at least 0."""
    last = kth_of_row(value, row, rows, choice.k)
    border = last[row]
    larger, tied = value > border, (value == border) & (border > 0)
    start = row_starts(row, rows)
    running_count = torch.zeros(len(row) + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(larger, 0, out=running_count[1:])
    free = choice.k - (running_count[start[1:]] - running_count[start[:-1]])
    torch.cumsum(tied, 0, out=running_count[1:])
    rank = running_count[1:] - running_count[start[:-1]][row]
    mask = larger | (tied & (rank <= free[row]))  # of equal ones the first
    return Entries(row, feature, value).where(mask), last


def _positive(bounds: Tensor) -> Tensor:
    """For each row the least bound of a pre-activation above 0."""
    return bounds.new_full((len(bounds),), TINY)


def activated(choice: Above, row: Tensor, feature: Tensor, value: Tensor) -> Entries:
    """Returns the activations above 0 of pre-activations above their thresholds."""
    if choice.gain is None or choice.shift is None:
        return Entries(row, feature, value)
    value = value * choice.gain[feature] + choice.shift[feature]
    on = value > 0
    return Entries(row[on], feature[on], value[on])
