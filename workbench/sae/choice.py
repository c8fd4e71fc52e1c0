"""Autoencoders as one product and a choice: the pre-activations x W + b, and those of them that are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from workbench.io.checks import check_fields
from workbench.sae.autoencoder import Sae

SAFE = 1e37
"""Below it no sum in float32 overflows."""
_INPUTS = 64


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
        check_fields(self, "k", at_least=1, whole=True)


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
        # a block of inputs at a time: torch's norm over the first axis takes thirty times as long
        squares = sum((part.square().sum(0) for part in self.weight.split(_INPUTS)), torch.zeros_like(self.bias))
        reach = squares.sqrt().max() * scale, self.bias.abs().max() * scale
        object.__setattr__(self, "reach", tuple(map(float, reach)))

    def pre(self, x: Float32[Tensor, "row d_in"], out: Tensor | None = None) -> Float32[Tensor, "row feature"]:
        """Returns all pre-activations of some rows, written into `out` if given."""
        pre = torch.addmm(self.bias, x, self.weight, out=out)
        return pre if self.scale is None else pre.mul_(self.scale)


def linear_form(sae: Sae, replaced: bool) -> tuple[Linear, Above | TopK] | None:
    """The SAE's pre-activations and its selection; with `replaced`, those that another selection acts on. None: the SAE
    is not of that form."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    module: Any = sae.module  # each architecture has parameters of its own
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    if hooked or type(module) is not SAE_CLASS_REGISTRY.get(sae.architecture, (None,))[0]:
        return None
    rescaled = getattr(module.cfg, "rescale_acts_by_decoder_norm", False)
    if not all(_finite(part) for name, part in module.named_parameters() if name != "W_dec" or rescaled):
        return None
    activation = module.activation_fn
    zero = torch.zeros(sae.d_sae, device=sae.device)
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


def _finite(values: Tensor) -> bool:
    """True if all values are finite, as they are if their sum is; a sum is ten times faster, and may overflow."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
