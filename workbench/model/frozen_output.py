"""Heads and neurons as parts of what attention and MLP add to the stream: the norm behind them keeps its scale, and the
number by which the block multiplies them is theirs, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from workbench.io.torch_state import plain_torch
from workbench.model.circuits import HeadOutput
from workbench.model.forward import the_tensor
from workbench.model.offload import real_copy
from workbench.model.unembed import centred, fit_norm, normalise


@dataclass(frozen=True)
class FrozenOutput:
    """Output projection of a layer, and what the block does to it before it adds it, in float64 on the CPU.

    The output's factor is known; see `circuits.check_added`.
    """

    output: HeadOutput

    @cached_property
    def _project(self) -> nn.Module:
        return real_copy(self.output.project).cpu().double().requires_grad_(False).eval()

    @cached_property
    def _norm(self) -> tuple[str, float, Tensor, Tensor] | None:
        if self.output.norm is None:
            return None
        with torch.no_grad():
            width = the_tensor(self._project(torch.zeros(1, 1, self._width, dtype=torch.float64))).shape[-1]
        kind, eps, gain, shift = fit_norm(self.output.norm, width, "behind the output of a block's part")
        return kind, eps, gain.cpu().double(), shift.cpu().double()

    @property
    def _width(self) -> int:
        return self.output.heads * self.output.d_head

    @property
    def _factor(self) -> float:
        assert self.output.factor is not None
        return self.output.factor

    @plain_torch()
    def added(self, inputs: Float[Tensor, "row inner"]) -> Float64[Tensor, "row d_model"]:
        """Returns what the whole part adds to the stream, from the inputs of its projection."""
        writes = self._projected(inputs)
        if self._norm is None:
            return self._factor * writes
        kind, eps, gain, shift = self._norm
        return self._factor * (normalise(writes, kind, eps) * gain + shift)

    @plain_torch()
    def contributions(
        self, inputs: Float[Tensor, "row inner"], directions: Float[Tensor, "row d_model"]
    ) -> tuple[Float64[Tensor, "row inner"], Float64[Tensor, " row"]]:
        """Returns the contribution of each input of the projection along a direction, and that of all biases.

        They sum to `added(inputs) . directions`. A norm behind the projection keeps the scale that it has for the row,
        so that it is linear. The projection's weights are read by its own backward pass, in whatever form it has them.
        """
        u = self._factor * directions.double()
        bias = torch.zeros(len(u), dtype=torch.float64)
        if self._norm is not None:
            kind, eps, gain, shift = self._norm
            writes = self._projected(inputs)
            bias = u @ shift
            u = u * gain
            u = centred(u, kind) * torch.rsqrt(centred(writes, kind).square().mean(-1, keepdim=True) + eps)
        zero = torch.zeros(len(u), 1, self._width, dtype=torch.float64, requires_grad=True)
        constant = the_tensor(self._project(zero))
        (weights,) = torch.autograd.grad(constant, zero, u[:, None])
        return inputs.double() * weights[:, 0], bias + (constant.detach()[:, 0] * u).sum(-1)

    @plain_torch()
    @torch.no_grad()
    def mean_write(self, inputs: Float[Tensor, "row inner"], heads: Sequence[int]) -> Float64[Tensor, " d_model"]:
        """Returns the mean over rows of what some heads together add to the stream, without biases.

        A norm behind the projection keeps the scale that it has for each row.
        """
        head_mask = torch.zeros(self.output.heads, 1, dtype=torch.float64)
        head_mask[list(heads)] = 1
        inputs, scale = inputs.double(), torch.ones(1, dtype=torch.float64)
        kind, gain = "none", scale
        if self._norm is not None:
            kind, eps, gain, _ = self._norm
            scale = torch.rsqrt(centred(self._projected(inputs), kind).square().mean(-1, keepdim=True) + eps)
        mean = (scale * inputs).mean(0).reshape(self.output.heads, -1) * head_mask
        writes, bias = self._projected(torch.stack([mean.flatten(), torch.zeros(self._width)]))
        return self._factor * gain * centred(writes - bias, kind)

    def _projected(self, inputs: Float[Tensor, "row inner"]) -> Float64[Tensor, "row d_model"]:
        with torch.no_grad():
            return the_tensor(self._project(inputs.double()[:, None]))[:, 0]
