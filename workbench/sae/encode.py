"""Rows to sparse features: the support and the values of `sae.encode` in float32, without its dense matrix.

Most autoencoders are one product and a choice: pre-activations x W + b, of which a row keeps those above a threshold,
or its k largest. The reference is that product in float32, a block of bounded size at a time, and the choice on each
block. Where the device multiplies bfloat16 much faster, a product in bfloat16 gives an upper bound of each instead;
only those whose bound reaches far enough are computed in float32, and a row that its bounds do not settle is encoded
the first way. What is no product and choice (matching pursuit, temporal, an autoencoder with hooks) goes through its
own `encode`.

The bound: x·w - x̃·w̃ = x·(w - w̃) + (x - x̃)·w̃ for the rounded x̃ and w̃, so by Cauchy and Schwarz
|x·w - x̃·w̃| <= |x| |w - w̃| + |x - x̃| |w̃|. The norms are computed once a row and once a feature. The product is that of
vectors longer by what must be added, (x̃, |x|, |x - x̃|, 1) and (w̃, |w - w̃|, |w̃|, b), so its result is the bound.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int64
from torch import Tensor, nn

from workbench.io.errors import DataError, RequestError
from workbench.sae.load import Sae

PRECISIONS = ("float32", "bfloat16")
"""Types of the first product: float32 is exact, bfloat16 gives bounds."""

_BLOCK_BYTES = 40 << 20  # of dense pre-activations on a CPU: smaller blocks make the product slower
_ACCELERATOR_BLOCK_BYTES = 512 << 20
_LEAST_ROWS = 64  # with fewer at a time the product waits for the weights
_GATHER_BYTES = 32 << 20
_SAFE = 1e37  # below it no sum in float32 overflows
_MORE = 1.01  # outweighs rounding a norm to bfloat16
_HOPELESS = 0.5  # with a larger share of a block's rows not settled, the next ones are not tried
_CROWDED = 8  # with more than one in so many above its threshold, screening a row saves nothing


@dataclass(frozen=True)
class SparseRows:
    """Features of some rows, as the three arrays of a CSR matrix, on the autoencoder's device."""

    indptr: Int64[Tensor, " row_plus_1"]
    """Where each row's entries begin; the last is their number."""
    feature: Int64[Tensor, " entry"]
    """Ascending within a row."""
    value: Float32[Tensor, " entry"]
    """Never 0."""
    unsettled: int = 0
    """Rows that their bounds did not settle, so they were encoded in float32; 0 where there are no bounds."""


class NotFinite(DataError):
    """A row is NaN or infinite somewhere, or its features are. `row` counts from the first of the rows encoded."""

    def __init__(self, row: int, features: bool) -> None:
        self.row, self.features = row, features
        super().__init__(f"row {row} {'gives features that are' if features else 'is'} not finite")


@dataclass(frozen=True)
class Above:
    """A choice of pre-activations: those above a threshold, feature by feature, as in ReLU, JumpReLU and gates."""

    threshold: Float32[Tensor, " feature"]
    gain: Float32[Tensor, " feature"] | None = None
    """The activation is gain · pre-activation + shift, and must be above 0 too. None: the pre-activation itself."""
    shift: Float32[Tensor, " feature"] | None = None


@dataclass(frozen=True)
class TopK:
    """A choice of pre-activations: the k largest of each row, those of them that are above 0."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RequestError(f"k must be at least 1, not {self.k}")


@dataclass(frozen=True)
class AbsTopK(TopK):
    """A choice of pre-activations: the k largest of each row in magnitude, with their sign."""


@dataclass(frozen=True)
class Linear:
    """Pre-activations (x · weight + bias) · scale, of rows as `Sae.prepared` gives them."""

    weight: Float32[Tensor, "d_in feature"]
    bias: Float32[Tensor, " feature"]
    scale: Float32[Tensor, " feature"] | None = None
    reach: tuple[float, float] = field(init=False)
    """No pre-activation of a row x is beyond reach[0] · |x| + reach[1]."""

    def __post_init__(self) -> None:
        scale = 1 if self.scale is None else self.scale.abs().max()
        reach = self.weight.norm(dim=0).max() * scale, self.bias.abs().max() * scale
        object.__setattr__(self, "reach", tuple(map(float, reach)))

    def pre(self, x: Float32[Tensor, "row d_in"], out: Tensor | None = None) -> Float32[Tensor, "row feature"]:
        """Every pre-activation of some rows, in `out` where that is given."""
        pre = torch.addmm(self.bias, x, self.weight, out=out)
        return pre if self.scale is None else pre.mul_(self.scale)


@dataclass(frozen=True)
class Screen:
    """Upper bounds of pre-activations, less their thresholds where the choice has some, by a product in bfloat16."""

    weight: BFloat16[Tensor, "d_in_and_bounds feature"]
    """Of each feature the rounded weights, norms of what rounding took and of what it left, bias less threshold."""
    rows: Float32[Tensor, "feature d_in"]
    """The weights as they are, those of a feature side by side."""
    linear: Linear

    def bounds(self, x: Float32[Tensor, "row d_in"]) -> BFloat16[Tensor, "row feature"]:
        """At least the pre-activation less the threshold, whatever the order of summation, then rounded to bfloat16."""
        low = x.bfloat16()
        norm = x.norm(dim=1)
        lost = (x - low.float()).norm(dim=1) + norm * _accumulation(x.shape[1])
        longer = low.new_zeros(len(x), self.weight.shape[0])
        longer[:, : x.shape[1]] = low
        longer[:, x.shape[1]] = norm * _MORE
        longer[:, x.shape[1] + 1] = lost * _MORE
        longer[:, x.shape[1] + 2 : x.shape[1] + 5] = 1
        return longer @ self.weight

    def exact(
        self, x: Float32[Tensor, "row d_in"], row: Int64[Tensor, " entry"], feature: Int64[Tensor, " entry"]
    ) -> Float32[Tensor, " entry"]:
        """Some pre-activations in float32, row by row."""
        found = (_products_in_place if x.device.type == "cpu" else _products)(x, self.rows, row, feature)
        found += self.linear.bias[feature]
        return found if self.linear.scale is None else found * self.linear.scale[feature]


@dataclass(frozen=True)
class Encoder:
    """Encodes rows with one autoencoder. Made by `encoder`."""

    sae: Sae
    linear: Linear | None
    """None: the autoencoder's own `encode` is called."""
    choice: Above | TopK | None
    screen: Screen | None
    """None: everything is computed in float32."""

    def __call__(self, rows: Float[Tensor, "row ..."], lengths: Sequence[int] | None = None) -> SparseRows:
        """Features of `rows`, which may lie anywhere. Heads are flattened.

        `lengths`: what a temporal autoencoder must know, lengths of the sequences that the rows are, one after another
        and each from its beginning. None: they are one.

        Costs one product with the encoder, and the memory of the rows in float32, of their features, and of one dense
        block: 40 MiB (512 MiB on an accelerator) or 64 rows, whichever is more; of a temporal one a sequence. Raises
        NotFinite.
        """
        rows = rows.to(self.sae.device, torch.float32).flatten(1)
        if (bad := _first(~rows.isfinite().all(1))) is not None:
            raise NotFinite(bad, features=False)
        found, start, sizes, making = [], 0, self._sizes(len(rows), lengths), self
        with torch.no_grad(), _full_precision():
            x = rows if self.linear is None else self.sae.prepared(rows)
            out = x.new_empty(max(sizes, default=0), self.sae.d_sae) if self.linear and not self.screen else None
            for block in x.split(sizes):
                try:
                    found.append(self._dense_own(block) if self.linear is None else making._chosen(block, out))
                except NotFinite as error:
                    raise NotFinite(start + error.row, error.features) from None
                if making is not self:
                    found[-1] = replace(found[-1], unsettled=len(block))
                elif found[-1].unsettled > _HOPELESS * len(block):
                    making = replace(self, screen=None)
                found[-1].row.add_(start)
                start += len(block)
        return _joined(found, len(rows), rows.device)

    @property
    def block_rows(self) -> int:
        """Rows in a dense block."""
        room = _BLOCK_BYTES if self.sae.device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES
        return max(_LEAST_ROWS, room // (4 * self.sae.d_sae))

    def _sizes(self, rows: int, lengths: Sequence[int] | None) -> list[int]:
        """Of blocks: sequences where they are needed whole, else about the same, because a small last one is slow."""
        if not self.sae.sequential:
            blocks = -(-rows // self.block_rows)
            return [(index + 1) * rows // blocks - index * rows // blocks for index in range(blocks)]
        sizes = [rows] if lengths is None else list(lengths)
        if sum(sizes) != rows or min(sizes, default=0) < 0:
            raise RequestError(f"lengths make {sum(sizes)} rows, and there are {rows}")
        return [size for size in sizes if size]

    def _dense_own(self, rows: Float32[Tensor, "row d_in"]) -> _Found:
        activations = self.sae.encode(rows)
        if (bad := _first(~activations.isfinite().all(1))) is not None:
            raise NotFinite(bad, features=True)
        row, feature = _places(activations != 0)
        return _Found(row, feature, activations[row, feature])

    def _chosen(self, x: Float32[Tensor, "row d_in"], out: Tensor | None) -> _Found:
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
        choose = _screened_above if isinstance(self.choice, Above) else _screened_top
        found, unsettled = choose(self.choice, self.screen, x)
        if not len(unsettled):
            return found
        dense = _choose(self.choice, self.linear.pre(x[unsettled]))
        dense.row.copy_(unsettled[dense.row])
        return _Found(*_by_row(found, dense), len(unsettled))


def encoder(sae: Sae, choice: TopK | Above | None = None, precision: str | None = None) -> Encoder:
    """What encodes rows with `sae`.

    `choice`: another one of its pre-activations than its own activation function makes; of a gated autoencoder those of
    its magnitudes. `precision`: float32, or bfloat16 for bounds first; the features are the same. None: bfloat16 where
    the device has fast instructions for it.

    Costs the norms of the weights, for bfloat16 a copy of them in that and, unless they lie so already, in float32.
    Raises RequestError: a choice where there are no pre-activations (matching pursuit, temporal, hooks), k > d_sae.
    """
    with torch.no_grad():
        found = _linear(sae, own=choice is None)
        if found is None:
            if choice is not None:
                raise RequestError(f"SAE {sae.name!r} ({sae.architecture}) has no pre-activations to choose among")
            return Encoder(sae, None, None, None)
        linear, own = found
        choice = choice or own
        if isinstance(choice, TopK) and choice.k > sae.d_sae:
            raise RequestError(f"k is {choice.k} and SAE {sae.name!r} has {sae.d_sae} features")
        precision = precision or ("bfloat16" if fast_bfloat16(sae.device) else "float32")
        if precision not in PRECISIONS:
            raise RequestError(f"precision must be {' or '.join(PRECISIONS)}, not {precision!r}")
        finite = max(linear.reach) < _SAFE
        screened = precision == "bfloat16" and finite and not isinstance(choice, AbsTopK)
        return Encoder(sae, linear, choice, _screen(linear, choice) if screened else None)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32 by a factor that pays for bounds."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def top(pre: Float[Tensor, "row feature"], k: int) -> tuple[Float[Tensor, "row k"], Int64[Tensor, "row k"]]:
    """The k largest of each row and where they are, in no order.

    `torch.topk` on few: features are dealt to groups of `size`, and the k largest all lie in the k groups with the
    largest maxima. Reading everything is left to the maximum, which runs at the speed of memory.
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
class _Found:
    """Entries of a block, sorted by row and feature."""

    row: Int64[Tensor, " entry"]
    feature: Int64[Tensor, " entry"]
    value: Float32[Tensor, " entry"]
    unsettled: int = 0


def _choose(choice: Above | TopK, pre: Float32[Tensor, "row feature"]) -> _Found:
    if isinstance(choice, Above):
        row, feature = _places(pre > choice.threshold)
        return _activated(choice, row, feature, pre[row, feature])
    _, feature = top(pre.abs() if isinstance(choice, AbsTopK) else pre, choice.k)
    feature = feature.sort(dim=1).values
    value = pre.gather(1, feature)
    on = value != 0 if isinstance(choice, AbsTopK) else value > 0
    return _Found(_row_numbers(value)[on], feature[on], value[on])


def _screened_above(
    choice: Above, screen: Screen, x: Float32[Tensor, "row d_in"]
) -> tuple[_Found, Int64[Tensor, " unsettled"]]:
    """Entries by way of bounds, and the rows for which that is not worth it."""
    maybe = screen.bounds(x) > 0
    crowded = _counts(maybe) > maybe.shape[1] / _CROWDED
    maybe &= ~crowded[:, None]
    row, feature = _places(maybe)
    value = screen.exact(x, row, feature)
    on = value > choice.threshold[feature]
    return _activated(choice, row[on], feature[on], value[on]), crowded.nonzero()[:, 0]


def _screened_top(
    choice: TopK, screen: Screen, x: Float32[Tensor, "row d_in"]
) -> tuple[_Found, Int64[Tensor, " unsettled"]]:
    """Entries by way of bounds, and the rows that they do not settle."""
    bounds = screen.bounds(x)
    bound, feature = top(bounds, min(choice.k + choice.k // 2 + 8, bounds.shape[1]))
    value = screen.exact(x, _row_numbers(feature).flatten(), feature.flatten()).view(feature.shape)
    value, place = value.topk(choice.k, dim=1)
    # what was left out is no larger than this; the product came rounded to bfloat16
    left = bound.amin(1).float()
    left += left.abs() / 128
    settled = (value[:, -1] > left) | (left <= 0) | (feature.shape[1] == bounds.shape[1])
    feature, order = feature.gather(1, place).sort(dim=1)
    value = value.gather(1, order)
    on = (value > 0) & settled[:, None]
    return _Found(_row_numbers(value)[on], feature[on], value[on]), (~settled).nonzero()[:, 0]


def _activated(choice: Above, row: Tensor, feature: Tensor, value: Tensor) -> _Found:
    if choice.gain is None or choice.shift is None:
        return _Found(row, feature, value)
    value = value * choice.gain[feature] + choice.shift[feature]
    on = value > 0
    return _Found(row[on], feature[on], value[on])


def _screen(linear: Linear, choice: Above | TopK) -> Screen:
    d_in, features = linear.weight.shape
    bias = linear.bias if linear.scale is None else linear.bias * linear.scale
    below = (bias - choice.threshold if isinstance(choice, Above) else bias).clamp(-_SAFE, _SAFE)
    below = below + (below.abs() + bias.abs()) * _accumulation(d_in) + torch.finfo(torch.float32).tiny
    weight = linear.weight.new_zeros(-(-(d_in + 5) // 8) * 8, features, dtype=torch.bfloat16)
    for start in range(0, features, 4096):
        part = slice(start, start + 4096)
        own = linear.weight[:, part].double()
        own = own if linear.scale is None else own * linear.scale[part]
        weight[:d_in, part] = low = own.bfloat16()
        weight[d_in, part] = (own - low).norm(dim=0) * _MORE
        weight[d_in + 1, part] = low.double().norm(dim=0) * _MORE + torch.finfo(torch.float32).tiny
    for index in range(3):  # a float32 is the sum of three bfloat16
        weight[d_in + 2 + index] = below
        below = below - weight[d_in + 2 + index]
    return Screen(weight, linear.weight.T.contiguous(), linear)


def _products(x: Tensor, weight: Tensor, row: Tensor, feature: Tensor) -> Float32[Tensor, " entry"]:
    """x[row] · weight[feature], copying some of both at a time."""
    found = x.new_empty(len(row))
    step = max(1, _GATHER_BYTES // (8 * x.shape[1]))
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        found[part] = torch.linalg.vecdot(x[row[part]], weight[feature[part]])
    return found


def _products_in_place(x: Tensor, weight: Tensor, row: Tensor, feature: Tensor) -> Float32[Tensor, " entry"]:
    """The same without copies, nine times as fast on a CPU. `row` ascends."""
    indptr = torch.zeros(len(x) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=len(x)), 0, out=indptr[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # CSR is in beta, says torch
        places = torch.sparse_csr_tensor(
            indptr, feature, x.new_zeros(len(row)), (len(x), len(weight)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(places, x, weight.T, beta=0.0).values()


def _accumulation(terms: int) -> float:
    """Error of a sum of products in float32, as a share of the product of norms, in any order and with the coarse
    additions of tensor cores, twice: for the bound's product and for that in float32."""
    return 8 * (terms + 8) * 2**-24


def _linear(sae: Sae, own: bool) -> tuple[Linear, Above | TopK] | None:
    """Pre-activations of an autoencoder and its own choice among them; without `own`, those that another may choose
    among. None: what it does is not of that form."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    module: nn.Module = sae.module
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
        if not own:
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
    """Row and feature of what is true, row by row."""
    if mask.device.type != "cpu":
        row, feature = mask.nonzero().unbind(1)
        return row, feature
    flat = np.flatnonzero(mask.numpy())  # several times as fast as torch's
    row = flat // mask.shape[1]
    return torch.from_numpy(row), torch.from_numpy(flat - row * mask.shape[1])


def _counts(mask: Bool[Tensor, "row feature"]) -> Int64[Tensor, " row"]:
    """How much of each row is true."""
    if mask.device.type != "cpu":
        return mask.sum(1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))  # ten times as fast as torch's sum


def _row_numbers(values: Float[Tensor, "row k"] | Int64[Tensor, "row k"]) -> Int64[Tensor, "row k"]:
    return torch.arange(len(values), device=values.device)[:, None].expand(values.shape)


def _by_row(*parts: _Found) -> tuple[Tensor, Tensor, Tensor]:
    row = torch.cat([part.row for part in parts])
    order = row.argsort(stable=True)
    return row[order], *(torch.cat([getattr(p, name) for p in parts])[order] for name in ("feature", "value"))


def _joined(found: list[_Found], rows: int, device: torch.device) -> SparseRows:
    indptr = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    if not found:
        return SparseRows(indptr, indptr[:0], torch.zeros(0, device=device))
    row, feature, value = (torch.cat([getattr(part, name) for part in found]) for name in ("row", "feature", "value"))
    torch.cumsum(torch.bincount(row, minlength=rows), 0, out=indptr[1:])
    return SparseRows(indptr, feature, value, sum(part.unsettled for part in found))


def _first(bad: Bool[Tensor, " row"]) -> int | None:
    return int(bad.nonzero()[0]) if bad.any() else None


@contextmanager
def _full_precision() -> Iterator[None]:
    """Inside, products in float32 are just that, and sums of products in bfloat16 are in float32."""
    matmul = torch.backends.cuda.matmul
    newer = hasattr(matmul, "fp32_precision")  # where a user has set this one, asking for the older one raises
    kinds = (matmul, torch.backends.mkldnn.matmul) if newer else ()
    precisions = [kind.fp32_precision for kind in kinds]
    older = None if newer else torch.get_float32_matmul_precision()
    reduced = matmul.allow_bf16_reduced_precision_reduction
    if hasattr(matmul, "allow_bf16_reduced_precision_reduction_split_k"):  # assigning the one resets the other
        reduced = reduced, matmul.allow_bf16_reduced_precision_reduction_split_k
    try:
        matmul.allow_bf16_reduced_precision_reduction = False
        for kind in kinds:
            kind.fp32_precision = "ieee"
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = reduced
        for kind, precision in zip(kinds, precisions, strict=True):
            kind.fp32_precision = precision
        if older is not None:
            torch.set_float32_matmul_precision(older)
