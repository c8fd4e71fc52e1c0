"""Sparse encoding of rows: the same support and values as `sae.encode` in float32, without its dense matrix.

Most autoencoders compute pre-activations x W + b and keep those above a threshold, or the k largest of each row. The
reference path computes that product in float32, in blocks of bounded size, and selects within each block. Where the
device multiplies bfloat16 much faster, a bfloat16 product first gives an upper bound of each pre-activation. Only
pre-activations whose bound is large enough are then computed in float32, and a row whose bounds do not decide the
selection takes the reference path. Autoencoders of another form (matching pursuit, temporal, modules with hooks) are
encoded by their own `encode`.

The bound: x·w - x̃·w̃ = x·(w - w̃) + (x - x̃)·w̃ for the rounded x̃ and w̃, so by Cauchy-Schwarz
|x·w - x̃·w̃| <= |x| |w - w̃| + |x - x̃| |w̃|. The norms are computed once per row and once per feature. Both vectors are
extended by the terms to add, (x̃, |x|, |x - x̃|, 1) and (w̃, |w - w̃|, |w̃|, b), so one product gives the bound itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int64
from torch import Tensor, nn

from workbench.io.checks import check_fields
from workbench.io.errors import DataError, RequestError
from workbench.io.torch_state import device_for_float64, fast_bfloat16, plain_torch
from workbench.sae.load import Sae
from workbench.sae.precision import PRECISIONS, full_precision

_BLOCK_BYTES = 40 << 20  # of dense pre-activations on a CPU: smaller blocks make the product slower
_ACCELERATOR_BLOCK_BYTES = 512 << 20
_LEAST_ROWS = 64  # with fewer, reading the weights dominates the product
_GATHER_BYTES = 32 << 20
_SAFE = 1e37  # below it no sum in float32 overflows
_LEAST_NORM = 1e-13  # below it the squares of a row's rounding errors underflow, and its bounds are too low
_MARGIN = 1.01  # outweighs rounding a norm to bfloat16
_HOPELESS = 0.5  # a larger share of unsettled rows in a block turns bounds off for the next blocks
_CROWDED = 8  # a row with more than 1/8 of its bounds above threshold gains nothing from screening


@dataclass(frozen=True)
class SparseRows:
    """Features of some rows as the three arrays of a CSR matrix, on the autoencoder's device."""

    indptr: Int64[Tensor, " row_plus_1"]
    """Index of each row's first entry; the last element is the number of entries."""
    feature: Int64[Tensor, " entry"]
    """Ascending within a row."""
    value: Float32[Tensor, " entry"]
    """Never 0."""
    unsettled: int = 0
    """Rows that took the float32 path because their bounds did not decide; 0 without bounds."""


class NotFinite(DataError):
    """A row, or its features, has NaN or infinite values. `row` counts from the first row of the call."""

    def __init__(self, row: int, features: bool) -> None:
        self.row, self.features = row, features
        super().__init__(f"row {row} {'gives features that are' if features else 'is'} not finite")


@dataclass(frozen=True)
class Above:
    """Selects pre-activations above a threshold per feature, as ReLU, JumpReLU and gated autoencoders do."""

    threshold: Float32[Tensor, " feature"]
    gain: Float32[Tensor, " feature"] | None = None
    """The activation is gain · pre-activation + shift, kept where it is above 0. None: the pre-activation itself."""
    shift: Float32[Tensor, " feature"] | None = None


@dataclass(frozen=True)
class TopK:
    """Selects the k largest pre-activations of each row, as far as they are above 0."""

    k: int

    def __post_init__(self) -> None:
        check_fields(self, "k", at_least=1)


@dataclass(frozen=True)
class AbsTopK(TopK):
    """Selects the k largest pre-activations of each row by magnitude and keeps their sign."""


@dataclass(frozen=True)
class Linear:
    """The pre-activations (x · weight + bias) · scale of rows that `Sae.prepared` returned."""

    weight: Float32[Tensor, "d_in feature"]
    bias: Float32[Tensor, " feature"]
    scale: Float32[Tensor, " feature"] | None = None
    reach: tuple[float, float] = field(init=False)
    """(slope, offset): |pre-activation| <= slope · |x| + offset for every row x and feature."""

    def __post_init__(self) -> None:
        scale = 1 if self.scale is None else self.scale.abs().max()
        reach = self.weight.norm(dim=0).max() * scale, self.bias.abs().max() * scale
        object.__setattr__(self, "reach", tuple(map(float, reach)))

    def pre(self, x: Float32[Tensor, "row d_in"], out: Tensor | None = None) -> Float32[Tensor, "row feature"]:
        """Returns all pre-activations of some rows, written into `out` if given."""
        pre = torch.addmm(self.bias, x, self.weight, out=out)
        return pre if self.scale is None else pre.mul_(self.scale)


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
        low = x.bfloat16()
        norm = x.norm(dim=1)
        rounding = (x - low.float()).norm(dim=1) + norm * _accumulation(x.shape[1])
        longer = low.new_zeros(len(x), self.weight.shape[0])
        longer[:, : x.shape[1]] = low
        longer[:, x.shape[1]] = norm * _MARGIN
        longer[:, x.shape[1] + 1] = rounding * _MARGIN
        longer[:, x.shape[1] + 2 : x.shape[1] + 5] = 1
        return longer @ self.weight

    def exact(
        self, x: Float32[Tensor, "row d_in"], row: Int64[Tensor, " entry"], feature: Int64[Tensor, " entry"]
    ) -> Float32[Tensor, " entry"]:
        """Returns selected pre-activations in float32; `row` ascends."""
        pre = (_products_in_place if x.device.type == "cpu" else _products)(x, self.rows, row, feature)
        pre += self.linear.bias[feature]
        return pre if self.linear.scale is None else pre * self.linear.scale[feature]


@dataclass(frozen=True)
class Encoder:
    """Encodes rows with one autoencoder. Create it with `encoder`."""

    sae: Sae
    linear: Linear | None
    """None: call `sae.encode` and keep the nonzero activations."""
    choice: Above | TopK | None
    screen: Screen | None
    """None: compute everything in float32."""

    @plain_torch()
    def __call__(self, rows: Float[Tensor, "row ..."], lengths: Sequence[int] | None = None) -> SparseRows:
        """Returns the sparse features of `rows`; leading axes after the first (heads) are flattened.

        Cost: one product with the encoder. Memory: the rows in float32, their features, and one dense block of 40 MiB
        (512 MiB on an accelerator) or 64 rows, whichever is larger; for a temporal autoencoder one sequence.

        Args:
            rows: Activations on any device.
            lengths: For a temporal autoencoder, the lengths of the consecutive sequences that make up `rows`, each
                from its first token. None: `rows` is one sequence.

        Raises:
            NotFinite: A row or its features has NaN or infinite values.
        """
        rows = rows.to(self.sae.device, torch.float32).flatten(1)
        if (bad := _first(~rows.isfinite().all(1))) is not None:
            raise NotFinite(bad, features=False)
        parts, start, sizes, current = [], 0, self._sizes(len(rows), lengths), self
        with torch.no_grad(), full_precision():
            x = rows if self.linear is None else self.sae.encoder_input(rows)
            out = x.new_empty(max(sizes, default=0), self.sae.d_sae) if self.linear and not self.screen else None
            for block in x.split(sizes):
                try:
                    part = self._encode_densely(block) if self.linear is None else current._select(block, out)
                except NotFinite as error:
                    raise NotFinite(start + error.row, error.features) from None
                if current is not self:
                    part = replace(part, unsettled=len(block))
                elif part.unsettled > _HOPELESS * len(block):
                    current = replace(self, screen=None)
                part.row.add_(start)
                parts.append(part)
                start += len(block)
        return _concatenate(parts, len(rows), rows.device)

    @property
    def block_rows(self) -> int:
        """Number of rows in a dense block."""
        room = _BLOCK_BYTES if self.sae.device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES
        return max(_LEAST_ROWS, room // (4 * self.sae.d_sae))

    def _sizes(self, rows: int, lengths: Sequence[int] | None) -> list[int]:
        """Rows per block: whole sequences if needed, else nearly equal numbers, as a small last block is slow."""
        if not self.sae.sequential:
            blocks = -(-rows // self.block_rows)
            return [(index + 1) * rows // blocks - index * rows // blocks for index in range(blocks)]
        sizes = [rows] if lengths is None else list(lengths)
        if sum(sizes) != rows or min(sizes, default=0) < 0:
            raise RequestError(f"lengths add up to {sum(sizes)} rows and there are {rows}; give one per sequence")
        return [size for size in sizes if size]

    def _encode_densely(self, rows: Float32[Tensor, "row d_in"]) -> _Entries:
        activations = self.sae.encode(rows)
        if (bad := _first(~activations.isfinite().all(1))) is not None:
            raise NotFinite(bad, features=True)
        row, feature = _places(activations != 0)
        return _Entries(row, feature, activations[row, feature])

    def _select(self, x: Float32[Tensor, "row d_in"], out: Tensor | None) -> _Entries:
        assert self.linear is not None
        assert self.choice is not None
        steepest, highest = self.linear.reach
        overflowing = ~(x.norm(dim=1) * steepest + highest < _SAFE)  # also where either is NaN
        if overflowing.any():
            pre = self.linear.pre(x)
            kept = pre.abs() if isinstance(self.choice, AbsTopK) else pre
            if (bad := _first(~(kept < torch.inf).all(1))) is not None:
                raise NotFinite(bad, features=True)
            return _choose(self.choice, pre)
        if self.screen is None:
            return _choose(self.choice, self.linear.pre(x, None if out is None else out[: len(x)]))
        tiny = x.norm(dim=1) < _LEAST_NORM
        if isinstance(self.choice, Above):
            entries, unsettled = _screened_above(self.choice, self.screen, x, tiny)
        else:
            entries, unsettled = _screened_top(self.choice, self.screen, x, tiny)
        if not len(unsettled):
            return entries
        dense = _choose(self.choice, self.linear.pre(x[unsettled]))
        dense.row.copy_(unsettled[dense.row])
        return _Entries(*_by_row(entries, dense), len(unsettled))


@plain_torch()
def encoder(sae: Sae, choice: TopK | Above | None = None, precision: str | None = None) -> Encoder:
    """Returns an encoder of rows with `sae`.

    Cost: the norms of the weights; for bfloat16 also a bfloat16 copy of them and, unless they are contiguous per
    feature already, a float32 copy.

    Args:
        sae: The autoencoder.
        choice: Selection of pre-activations in place of the SAE's activation function; for a gated autoencoder, of its
            magnitudes. None: the SAE's own.
        precision: "float32", or "bfloat16" for upper bounds first; the features are identical. None: bfloat16 where the
            device has fast instructions for it.

    Raises:
        RequestError: A choice for an SAE without pre-activations (matching pursuit, temporal, hooks), k > d_sae, or an
            unknown precision.
    """
    with torch.no_grad():
        form = _linear_form(sae, replaced=choice is not None)
        if form is None:
            if choice is not None:
                raise RequestError(
                    f"SAE {sae.name!r} ({sae.architecture}) has no pre-activations to select from; leave sparsity out"
                )
            return Encoder(sae, None, None, None)
        linear, default = form
        choice = choice or default
        if isinstance(choice, TopK) and choice.k > sae.d_sae:
            raise RequestError(f"k is {choice.k}, but SAE {sae.name!r} has only {sae.d_sae} features; give a smaller k")
        precision = precision or ("bfloat16" if fast_bfloat16(sae.device) else "float32")
        if precision not in PRECISIONS:
            raise RequestError(f"precision must be {' or '.join(PRECISIONS)}, not {precision!r}")
        finite = max(linear.reach) < _SAFE
        screened = precision == "bfloat16" and finite and not isinstance(choice, AbsTopK)
        return Encoder(sae, linear, choice, _screen(linear, choice) if screened else None)


def top(pre: Float[Tensor, "row feature"], k: int) -> tuple[Float[Tensor, "row k"], Int64[Tensor, "row k"]]:
    """Returns the k largest values of each row and their indices, unordered.

    Features are divided into groups of `size`. The k largest values all lie in the k groups with the largest maxima, so
    `torch.topk` runs on few candidates and only the maximum, which runs at memory speed, reads everything.
    """
    features = pre.shape[1]
    size = 1 << max(1, round(np.log2(max(1, features / k)) / 2))
    groups = features // size
    if groups < 2 * k:
        return pre.topk(k, dim=1, sorted=False)
    members = pre[:, : groups * size].unflatten(1, (size, groups))
    _, chosen = members.amax(1).topk(k, dim=1, sorted=False)
    rest = pre[:, groups * size :]
    several = members.gather(2, chosen[:, None].expand(-1, size, -1)).flatten(1)
    value, place = torch.cat([several, rest], 1).topk(k, dim=1, sorted=False)
    ends = place - size * k + size * groups
    return value, torch.where(place < size * k, place // k * groups + chosen.gather(1, place % k), ends)


@dataclass(frozen=True)
class _Entries:
    """Nonzero activations of a block, sorted by row and feature."""

    row: Int64[Tensor, " entry"]
    feature: Int64[Tensor, " entry"]
    value: Float32[Tensor, " entry"]
    unsettled: int = 0


def _choose(choice: Above | TopK, pre: Float32[Tensor, "row feature"]) -> _Entries:
    if isinstance(choice, Above):
        row, feature = _places(pre > choice.threshold)
        return _activated(choice, row, feature, pre[row, feature])
    _, feature = top(pre.abs() if isinstance(choice, AbsTopK) else pre, choice.k)
    feature = feature.sort(dim=1).values
    value = pre.gather(1, feature)
    on = value != 0 if isinstance(choice, AbsTopK) else value > 0
    return _Entries(_row_numbers(value)[on], feature[on], value[on])


def _screened_above(
    choice: Above, screen: Screen, x: Float32[Tensor, "row d_in"], left_out: Bool[Tensor, " row"]
) -> tuple[_Entries, Int64[Tensor, " unsettled"]]:
    """Entries found through bounds, and the rows for which bounds do not pay off or that are to be left out."""
    maybe = screen.bounds(x) > 0
    crowded = (_counts(maybe) > maybe.shape[1] / _CROWDED) | left_out
    maybe &= ~crowded[:, None]
    row, feature = _places(maybe)
    value = screen.exact(x, row, feature)
    on = value > choice.threshold[feature]
    return _activated(choice, row[on], feature[on], value[on]), crowded.nonzero()[:, 0]


def _screened_top(
    choice: TopK, screen: Screen, x: Float32[Tensor, "row d_in"], left_out: Bool[Tensor, " row"]
) -> tuple[_Entries, Int64[Tensor, " unsettled"]]:
    """Entries found through bounds, and the rows whose bounds do not decide or that are to be left out."""
    bounds = screen.bounds(x)
    bound, feature = top(bounds, min(choice.k + choice.k // 2 + 8, bounds.shape[1]))
    value = screen.exact(x, _row_numbers(feature).flatten(), feature.flatten()).view(feature.shape)
    value, place = value.topk(choice.k, dim=1)
    # no excluded pre-activation is larger than this; the product was rounded to bfloat16
    left = bound.amin(1).float()
    left += left.abs() / 128
    settled = ((value[:, -1] > left) | (left <= 0) | (feature.shape[1] == bounds.shape[1])) & ~left_out
    feature, order = feature.gather(1, place).sort(dim=1)
    value = value.gather(1, order)
    on = (value > 0) & settled[:, None]
    return _Entries(_row_numbers(value)[on], feature[on], value[on]), (~settled).nonzero()[:, 0]


def _activated(choice: Above, row: Tensor, feature: Tensor, value: Tensor) -> _Entries:
    if choice.gain is None or choice.shift is None:
        return _Entries(row, feature, value)
    value = value * choice.gain[feature] + choice.shift[feature]
    on = value > 0
    return _Entries(row[on], feature[on], value[on])


def _screen(linear: Linear, choice: Above | TopK) -> Screen:
    d_in, features = linear.weight.shape
    bias = linear.bias if linear.scale is None else linear.bias * linear.scale
    below = (bias - choice.threshold if isinstance(choice, Above) else bias).clamp(-_SAFE, _SAFE)
    below = below + (below.abs() + bias.abs()) * _accumulation(d_in) + torch.finfo(torch.float32).tiny
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


def _products(x: Tensor, weight: Tensor, row: Tensor, feature: Tensor) -> Float32[Tensor, " entry"]:
    """x[row] · weight[feature], gathered in chunks of bounded size."""
    products = x.new_empty(len(row))
    step = max(1, _GATHER_BYTES // (8 * x.shape[1]))
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        products[part] = torch.linalg.vecdot(x[row[part]], weight[feature[part]])
    return products


def _products_in_place(x: Tensor, weight: Tensor, row: Tensor, feature: Tensor) -> Float32[Tensor, " entry"]:
    """The same without copies, nine times faster on a CPU. `row` ascends."""
    indptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(torch.bincount(row, minlength=len(x)), 0, out=indptr[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch warns that CSR is in beta
        places = torch.sparse_csr_tensor(
            indptr, feature, x.new_zeros(len(row)), (len(x), len(weight)), check_invariants=False, device=x.device
        )
        return torch.sparse.sampled_addmm(places, x, weight.T, beta=0.0).values()


def _accumulation(terms: int) -> float:
    """Rounding error of a float32 sum of products relative to the product of norms, for any order of summation and the
    coarse additions of tensor cores, counted twice: for the bound's product and for the float32 product."""
    return 8 * (terms + 8) * 2**-24


def _linear_form(sae: Sae, replaced: bool) -> tuple[Linear, Above | TopK] | None:
    """The SAE's pre-activations and its selection; with `replaced`, those that another selection acts on. None: the SAE
    is not of that form."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    module: Any = sae.module  # each architecture has parameters of its own
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    if hooked or type(module) is not SAE_CLASS_REGISTRY.get(sae.architecture, (None,))[0]:
        return None
    if not all(parameter.isfinite().all() for parameter in module.parameters()):
        return None
    activation = module.activation_fn
    zero = sae.W_dec.new_zeros(sae.d_sae)
    if type(activation).__name__ in ("TopK", "AbsTopK") and sae.architecture in ("topk", "abstopk"):
        scale = module.W_dec.norm(dim=-1) if module.cfg.rescale_acts_by_decoder_norm else None
        kind = AbsTopK if type(activation).__name__ == "AbsTopK" else TopK
        return Linear(module.W_enc, module.b_enc, scale), kind(activation.k)
    if type(activation) is not nn.ReLU:
        return None
    if sae.architecture == "gated":
        if replaced:
            return Linear(module.W_enc * module.r_mag.exp(), module.b_mag), Above(zero)
        gain = module.r_mag.exp()
        if gain.max() == torch.inf:
            return None
        needed = torch.where(module.b_mag == 0, 0, -module.b_mag / gain)
        return Linear(module.W_enc, zero), Above(torch.maximum(-module.b_gate, needed), gain, module.b_mag)
    if sae.architecture in ("standard", "transcoder", "skip_transcoder"):
        return Linear(module.W_enc, module.b_enc), Above(zero)
    if sae.architecture in ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        return Linear(module.W_enc, module.b_enc), Above(module.threshold.clamp(min=0))
    return None


def _places(mask: Bool[Tensor, "row feature"]) -> tuple[Int64[Tensor, " entry"], Int64[Tensor, " entry"]]:
    """Row and feature of each True, in row order."""
    if mask.device.type != "cpu":
        row, feature = mask.nonzero().unbind(1)
        return row, feature
    flat = np.flatnonzero(mask.numpy())  # several times faster than torch's
    row = flat // mask.shape[1]
    return torch.from_numpy(row), torch.from_numpy(flat - row * mask.shape[1])


def _counts(mask: Bool[Tensor, "row feature"]) -> Int64[Tensor, " row"]:
    """Number of True values in each row."""
    if mask.device.type != "cpu":
        return mask.sum(1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))  # ten times faster than torch's sum


def _row_numbers(values: Float[Tensor, "row k"] | Int64[Tensor, "row k"]) -> Int64[Tensor, "row k"]:
    return torch.arange(len(values), device=values.device)[:, None].expand(values.shape)


def _by_row(*parts: _Entries) -> tuple[Tensor, Tensor, Tensor]:
    row = torch.cat([part.row for part in parts])
    order = row.argsort(stable=True)
    feature, value = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("feature", "value"))
    return row[order], feature, value


def _concatenate(parts: list[_Entries], rows: int, device: torch.device) -> SparseRows:
    indptr = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    if not parts:
        return SparseRows(indptr, indptr[:0], torch.zeros(0, dtype=torch.float32, device=device))
    row, feature, value = (torch.cat([getattr(part, name) for part in parts]) for name in ("row", "feature", "value"))
    torch.cumsum(torch.bincount(row, minlength=rows), 0, out=indptr[1:])
    return SparseRows(indptr, feature, value, sum(part.unsettled for part in parts))


def _first(bad: Bool[Tensor, " row"]) -> int | None:
    return int(bad.nonzero()[0]) if bad.any() else None
