"""Checks of what the names of a block mean, on the tensors of a trial pass.

A name may lead to a tensor that exists and is another one than documented: `resid_mid` behind the MLP of a post-norm
block, an `attn_out` that the block multiplies before it adds it. So the documented sums are computed:

    resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post     (blocks in sequence)
    resid_pre + attn_out + mlp_out = resid_post                            (attention and MLP in parallel)
    norm(resid_pre + attn_out) = resid_mid, which the MLP reads            (post-norm)

Neurons are neither what the MLP reads nor what it writes.

A name that fails is not offered, or leads to the tensor that fits. What cannot be compared is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from workbench.model.trial import Trial
from workbench.sites.grammar import Tap

_ATTENTIONS = ("hook_attn_out", "attn.o.hook_out", "attn.hook_out")
_MLPS = ("hook_mlp_out", "mlp.out.hook_out", "mlp.hook_out")
_MIDS = ("hook_resid_mid", "mlp.hook_in", "mlp.in.hook_in")
_NEURONS = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")
"""Names whose tensors may be the one that the first name stands for, the first one first."""


@dataclass(frozen=True)
class _Meaning:
    """Finding about one name of a block."""

    name: str | None = None
    """Name whose tensor it stands for. None: its own."""
    reason: str | None = None
    """Reason why it is not offered."""
    factor: float | None = None
    """Number by which the block multiplies the tensor before it adds it, where that is the reason."""


@dataclass(frozen=True)
class _Block:
    """Tensors of one block by the ends of their names, at the real tokens of a trial pass."""

    prefix: str
    taps: Mapping[str, Tap]
    trial: Trial

    def tap(self, name: str) -> Tap | None:
        return self.taps.get(f"{self.prefix}.{name}")

    def value(self, name: str) -> Tensor | None:
        tap = self.tap(name)
        return None if tap is None else self.trial.rows(tap)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Values by name, each once: of several names of one tap the first."""
        first: dict[Tap, str] = {}
        for name in names:
            if (tap := self.tap(name)) is not None:
                first.setdefault(tap, name)
        return {name: value for name in first.values() if (value := self.value(name)) is not None}

    def after(self, name: str, names: Iterable[str]) -> bool:
        """True if the tensor of `name` comes later in the pass than one of `others`."""
        order, tap = self.trial.order, self.tap(name)
        earlier = (order[other_tap] for other_tap in map(self.tap, names) if other_tap in order)
        return tap in order and order[tap] > min(earlier, default=len(order))


def check_block(
    layer: int, taps: Mapping[str, Tap], trial: Trial
) -> tuple[dict[str, Tap], dict[str, str], dict[str, float]]:
    """Returns the taps that names of a block take in place of theirs, the reason for each name that fails, and the
    number by which the block multiplies what a name should stand for, where that is the reason."""
    block = _Block(f"blocks.{layer}", taps, trial)
    meanings = {name: _Meaning(reason=_no_neurons(block, name)) for name in _NEURONS}
    pre, post = block.value("hook_resid_pre"), block.value("hook_resid_post")
    if pre is not None and post is not None:
        meanings |= _stream_names(block, pre, post)
    moved_taps = {
        f"{block.prefix}.{name}": block.tap(meaning.name)
        for name, meaning in meanings.items()
        if meaning.name and meaning.name != name
    }
    reasons = {f"{block.prefix}.{name}": meaning.reason for name, meaning in meanings.items() if meaning.reason}
    factors = {
        f"{block.prefix}.{name}": meaning.factor for name, meaning in meanings.items() if meaning.factor is not None
    }
    claimed = {name: tap for name, tap in moved_taps.items() if name in taps and tap is not None}
    return claimed, reasons, factors


def _stream_names(block: _Block, pre: Tensor, post: Tensor) -> dict[str, _Meaning]:
    """The meaning of each name between `pre` and `post`."""
    attentions, mlps = block.values(_ATTENTIONS), block.values(_MLPS)
    mids = {name: value for name, value in block.values(_MIDS).items() if not block.after(name, _MLPS)}
    norm_inputs = block.values(("ln1.hook_in", "ln2.hook_in"))
    after_attention = [*mids.values(), *norm_inputs.values(), *(post.double() - mlp.double() for mlp in mlps.values())]
    before_mlp = [
        *mids.values(),
        *norm_inputs.values(),
        *(pre.double() + attention.double() for attention in attentions.values()),
    ]
    mid = next((name for name, value in mids.items() if _is_mid(block, value, attentions, mlps)), None)
    no_mid = mid is None and block.tap(_MIDS[0]) in block.trial.values
    return {
        _ATTENTIONS[0]: _added("attention", attentions, [pre], after_attention),
        _MLPS[0]: _added("the MLP", mlps, before_mlp, [post, *norm_inputs.values()]),
        _MIDS[0]: _Meaning(mid, _no_mid(block.value(_MIDS[0]), pre) if no_mid else None),
        "ln1.hook_out": _Meaning(reason=_first_norm(block, pre)),
        "ln2.hook_out": _Meaning(reason=_second_norm(block)),
    }


def _no_neurons(block: _Block, name: str) -> str | None:
    """The reason where a name of neurons leads to what the whole MLP reads or writes, as in a mixture of experts."""
    tap = block.tap(name)
    for end, meaning in (("mlp.hook_in", "input"), ("mlp.hook_out", "output")):
        if tap is not None and tap == block.tap(end):
            return (
                f"it leads to the {meaning} of the whole MLP, as in a mixture of experts, where each token has neurons "
                f"of its own; record {block.prefix}.{end}"
            )
    return None


def _added(part: str, candidates: Mapping[str, Tensor], bases: list[Tensor], totals: list[Tensor]) -> _Meaning:
    """Name of the tensor that a part of the block adds to the stream, or the reason why the first name is not it."""
    if not candidates or not totals:
        return _Meaning()
    scaled: dict[str, float] = {}
    for name, value in candidates.items():
        for base, total in product(bases, totals):
            factor = _factor(base, value, total)
            if factor == 1.0:
                return _Meaning(name)
            if factor is not None:
                scaled.setdefault(name, factor)
    if scaled:
        name, factor = next(reversed(scaled.items()))
        reason = (
            f"the block multiplies the output of {part} by {factor:.4g} before it adds it; record blocks.N.{name} and "
            "multiply by that"
        )
        return _Meaning(reason=reason, factor=factor)
    return _Meaning(reason=f"the stream does not change by the output of {part} alone")


def _is_mid(block: _Block, mid: Tensor, attentions: Mapping[str, Tensor], mlps: Mapping[str, Tensor]) -> bool:
    """True if `mid` is the stream plus attention's output, or the norm of that sum, or what the MLP's is added to."""
    pre, post = block.value("hook_resid_pre"), block.value("hook_resid_post")
    norm_in, norm_out = block.value("ln1.hook_in"), block.value("ln1.hook_out")
    if (
        norm_out is not None
        and _equal(norm_out, mid)
        and any(_factor(pre, part, norm_in) for part in attentions.values())
    ):
        return True
    sums = [*((pre, part, mid) for part in attentions.values()), *((mid, part, post) for part in mlps.values())]
    return not sums or any(_factor(*terms) for terms in sums)


def _no_mid(claimed: Tensor | None, pre: Tensor) -> str:
    if claimed is not None and _equal(claimed, pre):
        return "attention and MLP read the same stream: there is none between them"
    return "no tensor between attention and MLP is the stream plus what attention adds to it"


def _first_norm(block: _Block, pre: Tensor) -> str | None:
    read = block.value("ln1.hook_in")
    if read is None or not block.after("ln1.hook_in", _ATTENTIONS[1:]):
        return None
    if any(_factor(pre, part, read) for part in block.values(_ATTENTIONS).values()):
        return "in this post-norm block the norm after attention writes the stream itself; record resid_mid"
    return "its norm comes after attention, not before it; record attn_out"


def _second_norm(block: _Block) -> str | None:
    norm_in, norm_out, post = block.value("ln2.hook_in"), block.value("ln2.hook_out"), block.value("hook_resid_post")
    if norm_in is None or not block.after("ln2.hook_in", _MLPS):
        return None
    if norm_out is not None and post is not None and _equal(norm_out, post):
        return "in this post-norm block the norm after the MLP writes the stream itself; record resid_post"
    return "its norm comes after the MLP, not before it; record mlp_out"


# ---- sums within rounding -------------------------------------------------------------------------------


def _factor(base: Tensor | None, part: Tensor | None, total: Tensor | None) -> float | None:
    """The number k with base + k part = total, exactly 1.0 within rounding; None if there is none."""
    if base is None or part is None or total is None or not base.shape == part.shape == total.shape:
        return None
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (base, part, total))
    base, part, total = base.double(), part.double(), total.double()
    change = total - base
    slack = 2 * eps * torch.maximum(base.norm(dim=-1), total.norm(dim=-1))
    fitted_factor = ((change * part).sum() / part.square().sum().clamp(min=1e-300)).item()
    for factor in (1.0, fitted_factor):
        size, error = abs(factor) * part.norm(dim=-1), (change - factor * part).norm(dim=-1)
        if bool((error <= slack + 4 * eps * size).all()) and (factor == 1.0 or bool((size > slack).any())):
            return factor
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (a, b))
    a, b = a.double(), b.double()
    return a.shape == b.shape and bool(((a - b).norm(dim=-1) <= eps * b.norm(dim=-1)).all())
