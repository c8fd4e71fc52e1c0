"""Sparse encoding of rows: the same support and values as `sae.encode` in float32, without its dense matrix.

Most autoencoders compute pre-activations x W + b and keep those above a threshold, or the k largest of each row. The
reference path computes that product in float32, in blocks of bounded size, and selects within each block. Where the
device multiplies 16-bit numbers much faster, a product in bfloat16, on CUDA in float16, first bounds them all. Only
pre-activations whose bound is large enough are then computed in float32, and a row whose bounds do not decide the
selection takes the reference path. Autoencoders of another form (matching pursuit, temporal, modules with hooks) are
encoded by their own `encode`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from workbench.io.errors import DataError, RequestError
from workbench.io.torch_state import fast_bfloat16, plain_torch
from workbench.sae.autoencoder import Sae
from workbench.sae.choice import SAFE, Above, AbsTopK, Linear, TopK, linear_form
from workbench.sae.half_screen import HalfScreen, make_half_screen
from workbench.sae.layered import LayeredSae
from workbench.sae.precision import PRECISIONS, full_precision
from workbench.sae.products import places, row_starts
from workbench.sae.ruled import RuledSae, no_preactivations
from workbench.sae.screen import LEAST_NORM, Screen, make_screen
from workbench.sae.selection import Entries, Experience, choose, merge, screened_above, screened_top

_LOG = logging.getLogger(__name__)

_BLOCK_BYTES, _MOST_BLOCK_BYTES = 40 << 20, 80 << 20  # of pre-activations or their bounds on a CPU
_FEATURE_BYTES = 1_700  # the same for each feature: each block reads all weights, which 200 rows do not pay for
_ACCELERATOR_BLOCK_BYTES = 512 << 20
_FEW_ROWS = 2  # on a CPU: so few take less time without bounds
_LEAST_ROWS = 64  # with fewer, reading the weights dominates the product
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
"""Error of an accelerator; torch names it so from 2.5 on."""
_ARRAYS = "row", "feature", "value"
_HOPELESS = 0.5  # a larger share of unsettled rows in a block turns bounds off for some blocks


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
class Encoder:
    """Encodes rows with one autoencoder. Create it with `encoder`."""

    sae: Sae
    linear: Linear | None
    """None: call `sae.encode` and keep the nonzero activations."""
    choice: Above | TopK | None
    screen: Screen | HalfScreen | None
    """None: compute everything in float32."""
    experience: Experience = field(default_factory=Experience, compare=False)
    """Experience with the rows so far, which saves time with the next."""

    @plain_torch()
    def __call__(self, rows: Float[Tensor, "row ..."], lengths: Sequence[int] | None = None) -> SparseRows:
        """Returns the sparse features of `rows`; leading axes after the first (heads) are flattened.

        Cost: one product with the encoder. Memory: the rows in float32, their features, and one dense block of 40 to
        80 MiB (512 MiB on an accelerator) or of 64 rows, whichever is larger; for a temporal autoencoder one sequence.

        Args:
            rows: Activations on any device.
            lengths: For a temporal autoencoder, the lengths of the consecutive sequences that make up `rows`, each
                from its first token. None: `rows` is one sequence.

        Raises:
            NotFinite: A row or its features has NaN or infinite values.
        """
        rows = rows.to(self.sae.device, torch.float32).flatten(1)
        if (bad := _first_not_finite(rows)) is not None:
            raise NotFinite(bad, features=False)
        parts, start = [], 0
        with torch.no_grad(), full_precision():
            x = rows if self.linear is None else self.sae.encoder_input(rows)
            sizes = self._sizes(len(rows), lengths)
            out = None
            while sizes:
                try:
                    out = self._room_for(max(sizes)) if out is None else out
                    part = self._encode_block(x[start : start + sizes[0]], out)
                except NotFinite as error:
                    raise NotFinite(start + error.row, error.features) from None
                except OUT_OF_MEMORY:
                    if not self._halved(sizes[0]):
                        raise
                    sizes, out = self._sizes(len(rows) - start, None), None
                    continue
                part.row.add_(start)
                parts.append(part)
                start += sizes.pop(0)
        if out is not None and self.sae.device.type == "cpu":
            self.experience.rooms.append(out)
        return _concatenate(parts, len(rows), rows.device)

    def inexperienced(self) -> Encoder:
        """Returns the encoder without experience but that of memory: the same blocks of rows give the same bits."""
        known = self.experience
        return replace(self, experience=Experience(most_rows=known.most_rows, rooms=known.rooms))

    def above(self, threshold: Float32[Tensor, " feature"]) -> Encoder:
        """Returns an encoder that keeps pre-activations above a threshold per feature."""
        return replace(self, choice=Above(threshold))

    @property
    def block_rows(self) -> int:
        """Number of rows in a block."""
        return min(self._room(2 if self.screen else 4), self.experience.most_rows)

    def _room(self, width: int) -> int:
        """Number of rows in a block of numbers of this many bytes."""
        room = min(_MOST_BLOCK_BYTES, max(_BLOCK_BYTES, _FEATURE_BYTES * self.sae.d_sae))
        room = room if self.sae.device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES
        return max(_LEAST_ROWS, room // (width * self.sae.d_sae))

    def _sizes(self, rows: int, lengths: Sequence[int] | None) -> list[int]:
        """Rows per block: whole sequences if needed, else nearly equal numbers, as a small last block is slow."""
        if not self.sae.sequential:
            blocks = -(-rows // self.block_rows)
            return [(index + 1) * rows // blocks - index * rows // blocks for index in range(blocks)]
        sizes = [rows] if lengths is None else list(lengths)
        if sum(sizes) != rows or min(sizes, default=0) < 0:
            raise RequestError(f"lengths add up to {sum(sizes)} rows and there are {rows}; give one per sequence")
        return [size for size in sizes if size]

    def _halved(self, rows: int) -> bool:
        """Halves the blocks, after one of this many rows did not fit in memory; False if it cannot be halved."""
        if self.sae.sequential or rows < 2:
            return False
        if self.experience.most_rows == sys.maxsize:
            _LOG.info(f"{self.sae.device} ran out of memory with {rows:,} rows in a block; the blocks are halved")
        self.experience.most_rows = rows // 2
        return True

    def _encode_block(self, block: Float32[Tensor, "row d_in"], out: Tensor | None) -> Entries:
        return self._encode_densely(block) if self.linear is None else self._select(block, out)

    def _encode_densely(self, rows: Float32[Tensor, "row d_in"]) -> Entries:
        activations = self.sae.encode(rows)
        if (bad := _first(~activations.isfinite().all(1))) is not None:
            raise NotFinite(bad, features=True)
        row, feature = places(activations != 0)
        return Entries(row, feature, activations[row, feature])

    def _select(self, x: Float32[Tensor, "row d_in"], out: Tensor | None) -> Entries:
        assert self.linear is not None
        assert self.choice is not None
        steepest, highest = self.linear.reach
        norm = x.norm(dim=1)
        overflowing = ~(norm * steepest + highest < SAFE)  # also where either is NaN
        if overflowing.any():
            pre = self.linear.pre(x)
            values = pre.abs() if isinstance(self.choice, AbsTopK) else pre
            if (bad := _first(~(values < torch.inf).all(1))) is not None:
                raise NotFinite(bad, features=True)
            return choose(self.choice, pre)
        if self.screen is None or (len(x) <= _FEW_ROWS and x.device.type == "cpu"):
            out = None if self.screen else out
            return choose(self.choice, self.linear.pre(x, None if out is None else out[: len(x)]))
        if self.experience.skip:
            self.experience.skip -= 1
            return replace(self._dense(x), unsettled=len(x))
        assert out is not None
        return self._screened(self.screen, x, norm, out[: len(x)])

    def _screened(
        self, screen: Screen | HalfScreen, x: Float32[Tensor, "row d_in"], norm: Float32[Tensor, " row"], out: Tensor
    ) -> Entries:
        assert self.choice is not None
        if isinstance(screen, HalfScreen):
            entries, dense = screen.select(self.choice, x)
        elif isinstance(self.choice, TopK):
            entries, dense = screened_top(self.choice, screen, x, norm, out, self.experience)
        else:
            entries, dense = screened_above(self.choice, screen, x, norm, out)
        dense |= norm < LEAST_NORM
        unsettled = dense.nonzero()[:, 0]
        self.experience.note(len(unsettled) > _HOPELESS * len(x))
        if not len(unsettled):
            return entries
        exact = self._dense(x[unsettled])
        merged = merge(len(x), entries.where(~dense[entries.row]), replace(exact, row=unsettled[exact.row]))
        return replace(merged, unsettled=len(unsettled))

    def _dense(self, x: Float32[Tensor, "row d_in"]) -> Entries:
        """Entries from all pre-activations in float32."""
        assert self.linear is not None
        assert self.choice is not None
        step = self._room(4)
        parts = [choose(self.choice, self.linear.pre(x[at : at + step])) for at in range(0, len(x), step)]
        for number, part in enumerate(parts):
            part.row.add_(number * step)
        row, feature, value = (torch.cat([getattr(part, name) for part in parts]) for name in _ARRAYS)
        return Entries(row, feature, value)

    def _room_for(self, rows: int) -> Tensor | None:
        """Memory for the product of a block, used again for each: that of an earlier call where it is large enough."""
        if self.linear is None:
            return None
        with suppress(IndexError):  # no call has brought one back
            if len(room := self.experience.rooms.pop()) >= rows:
                return room
        rows = 0 if isinstance(self.screen, HalfScreen) else rows  # whose kernels return theirs
        kind = torch.bfloat16 if self.screen else torch.float32
        return torch.empty(rows, self.sae.d_sae, dtype=kind, device=self.sae.device)


@dataclass(frozen=True)
class LayeredEncoder:
    """Encodes rows of several sites, each with its own encoder; features of all layers have one numbering."""

    sae: LayeredSae
    parts: tuple[Encoder, ...]

    @plain_torch()
    def __call__(self, rows: Float[Tensor, "row site d_in"], lengths: Sequence[int] | None = None) -> SparseRows:
        """Returns the sparse features of `rows`; a row's are ascending, so those of its first site come first.

        Cost and memory: those of the parts, one after the other.

        Raises:
            NotFinite: A row or its features has NaN or infinite values.
        """
        rows = rows.unflatten(1, (len(self.parts), -1)) if rows.ndim == 2 else rows
        entries, unsettled = [], 0
        for index, (part, first) in enumerate(zip(self.parts, self.sae.firsts, strict=True)):
            encoded = part(rows[:, index])
            row = torch.arange(len(rows), device=encoded.indptr.device).repeat_interleave(encoded.indptr.diff())
            entries.append(Entries(row, encoded.feature + first, encoded.value))
            unsettled += encoded.unsettled
        row = torch.cat([part.row for part in entries])
        row, order = row.sort(stable=True)
        feature, value = (torch.cat([getattr(part, name) for part in entries])[order] for name in ("feature", "value"))
        return SparseRows(row_starts(row, len(rows)), feature, value, unsettled)

    def inexperienced(self) -> LayeredEncoder:
        """Returns the encoder without experience. Rows in the same blocks then give the same bits."""
        return replace(self, parts=tuple(part.inexperienced() for part in self.parts))

    @property
    def block_rows(self) -> int:
        """Number of rows in a dense block."""
        return min(part.block_rows for part in self.parts)

    def above(self, threshold: Float32[Tensor, " feature"]) -> LayeredEncoder:
        """Returns an encoder that keeps pre-activations above a threshold per feature."""
        thresholds = threshold.split([part.d_sae for part in self.sae.parts])
        return replace(self, parts=tuple(part.above(level) for part, level in zip(self.parts, thresholds, strict=True)))


@plain_torch()
def encoder(sae: Sae, choice: TopK | Above | None = None, precision: str | None = None) -> Encoder | LayeredEncoder:
    """Returns an encoder of rows with `sae`.

    Cost: the norms of the weights; for bfloat16 also a copy of them in 16 bits and, unless they are contiguous per
    feature already, a float32 copy.

    Args:
        sae: The autoencoder.
        choice: Selection of pre-activations in place of the SAE's activation function; for a gated autoencoder, of its
            magnitudes. None: the SAE's own.
        precision: "float32", or "bfloat16" for upper bounds first (on CUDA by float16 products, whose bounds are
            narrower); the features are identical. None: bfloat16 where the device has fast instructions for it.

    Raises:
        RequestError: A choice for an SAE without pre-activations (matching pursuit, temporal, hooks), k > d_sae, or an
            unknown precision.
    """
    if isinstance(sae, LayeredSae):
        return _layered_encoder(sae, choice, precision)
    if isinstance(sae, RuledSae):
        choice = choice or sae.rule
    with torch.no_grad():
        form = linear_form(sae, replaced=choice is not None)
        if form is None:
            if choice is not None:
                raise no_preactivations(sae)
            return Encoder(sae, None, None, None)
        linear, default = form
        choice = choice or default
        if isinstance(choice, TopK) and choice.k > sae.d_sae:
            raise RequestError(f"k is {choice.k}, but SAE {sae.name!r} has only {sae.d_sae} features; give a smaller k")
        precision = precision or ("bfloat16" if fast_bfloat16(sae.device) else "float32")
        if precision not in PRECISIONS:
            raise RequestError(f"precision must be {' or '.join(PRECISIONS)}, not {precision!r}")
        finite = max(linear.reach) < SAFE
        screened = precision == "bfloat16" and finite and not isinstance(choice, AbsTopK)
        make = make_half_screen if sae.device.type == "cuda" else make_screen
        return Encoder(sae, linear, choice, make(linear, choice) if screened else None)


def _layered_encoder(sae: LayeredSae, choice: TopK | Above | None, precision: str | None) -> LayeredEncoder:
    if isinstance(choice, TopK):
        raise RequestError(
            f"SAE {sae.name!r} has several layers, and TopK would choose among all; use MutualChoice or FeatureChoice"
        )
    parts = []
    for part in sae.parts:
        part_choice = None if choice is None else Above(torch.zeros(part.d_sae, device=part.device))
        encodes = encoder(part, part_choice, precision)
        assert isinstance(encodes, Encoder)
        parts.append(encodes)
    whole = LayeredEncoder(sae, tuple(parts))
    return whole if choice is None else whole.above(choice.threshold)


def _concatenate(parts: list[Entries], rows: int, device: torch.device) -> SparseRows:
    if not parts:
        none = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        return SparseRows(none, none[:0], torch.zeros(0, dtype=torch.float32, device=device))
    row, feature, value = (torch.cat([getattr(part, name) for part in parts]) for name in _ARRAYS)
    return SparseRows(row_starts(row, rows), feature, value, sum(part.unsettled for part in parts))


def _first_not_finite(rows: Float32[Tensor, "row d_in"]) -> int | None:
    """The first row that has NaN or infinite values; a norm is ten times faster than `isfinite`, and may overflow."""
    suspect = (~rows.norm(dim=1).isfinite()).nonzero()[:, 0]
    bad = suspect[~rows[suspect].isfinite().all(1)]
    return int(bad[0]) if len(bad) else None


def _first(bad: Bool[Tensor, " row"]) -> int | None:
    return int(bad.nonzero()[0]) if bad.any() else None
