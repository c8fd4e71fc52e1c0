"""One block as a sum over source tokens: attention at frozen norms, the feed-forward part by integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.circuits import head_outputs, mlp_outputs
from workbench.model.forward import fixed_shape, text_config, the_tensor
from workbench.model.load import Model
from workbench.model.offload import real_copy
from workbench.model.unembed import fit_norm
from workbench.sites.grammar import Site

_NODES = 32  # of Gauss and Legendre's rule, for gated activations
_BLOCK_BYTES = 64 << 20

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Affine:
    """x @ weight + bias."""

    weight: Float64[Tensor, "into out"]
    bias: Float64[Tensor, " out"]

    def times(self, factor: float) -> Affine:
        """Returns the map with its output multiplied."""
        return Affine(factor * self.weight, factor * self.bias)


@dataclass(frozen=True)
class FrozenNorm:
    """A norm that keeps the scale it has for the whole state, so that it is linear in parts of it."""

    kind: str
    eps: float
    gain: Float64[Tensor, " d_model"]
    shift: Float64[Tensor, " d_model"]

    def parts(self, x: Float64[Tensor, "row source d_model"]) -> Float64[Tensor, "row source d_model"]:
        """Returns the parts of the normed sum over sources; the shift is added to the last source, the biases."""
        total = x.sum(1, keepdim=True)
        if self.kind == "layer":
            x, total = x - x.mean(-1, keepdim=True), total - total.mean(-1, keepdim=True)
        scale = 1.0 if self.kind == "none" else torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps)
        x = x * scale * self.gain
        x[:, -1] += self.shift
        return x


@dataclass(frozen=True)
class BlockParts:
    """Weights of one sequential block: attention's output, the norm before the feed-forward part, and that part."""

    attend: Affine
    attend_norm: FrozenNorm | None
    norm: FrozenNorm
    gate: Affine
    linear: Affine | None
    """Of a gated feed-forward part; None: elementwise."""
    out: Affine
    out_norm: FrozenNorm | None
    activation: Activation


@dataclass(frozen=True)
class Contributions:
    """L2 norm of what each source token contributes to each row, the biases last."""

    attention: Float[np.ndarray, "row source"]
    """Attention and its residual."""
    feed_forward: Float[np.ndarray, "row source"]
    """Output of the feed-forward part."""
    block: Float[np.ndarray, "row source"]
    """Both."""
    total: Float64[Tensor, "row d_model"]
    """Sum over sources: the output of the block."""


def elementwise_parts(
    phi: Activation, u: Float64[Tensor, "*row source neuron"]
) -> Float64[Tensor, "*row source neuron"]:
    """Returns the integrated gradients of phi(sum of u) from zero, by source: u (phi(s) - phi(0)) / s, in closed form.

    They sum to phi(s) - phi(0).
    """
    total = u.sum(-2, keepdim=True)
    zero = torch.zeros_like(total)
    small = total.abs() < 1e-8
    ratio = (phi(total) - phi(zero)) / torch.where(small, 1, total)
    return u * torch.where(small, slope(phi, zero), ratio)


def gated_parts(
    phi: Activation, u: Float64[Tensor, "*row source neuron"], v: Float64[Tensor, "*row source neuron"]
) -> Float64[Tensor, "*row source neuron"]:
    """Returns the integrated gradients of phi(sum of u) x (sum of v) from zero along the ray, by source."""
    s, t = u.sum(-2, keepdim=True), v.sum(-2, keepdim=True)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    first, second = torch.zeros_like(s), torch.zeros_like(s)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        first += weight * slope(phi, node * s) * node * t
        second += weight * phi(node * s)
    return u * first + v * second


def slope(phi: Activation, x: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Returns the derivative of phi at x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(phi(x).sum(), x)
    return gradient


@plain_torch()
def contributions(
    parts: BlockParts,
    resid_pre: Float[Tensor, "row d_model"],
    pattern: Float[Tensor, "row head source"],
    values: Float[Tensor, "source kv_head d_head"],
) -> Contributions:
    """Returns what each source token contributes to each row of one sequence, before and after the feed-forward part.

    Computed in float64. Costs rows^2 x (d_model + 3 d_mlp) x d_model operations; memory is rows^2 x d_model numbers.

    Args:
        parts: The block's weights.
        resid_pre: Input of the block.
        pattern: Attention of each row.
        values: Values of each source token, biases of the projection included.
    """
    rows, d_model = resid_pre.shape
    pattern, values = pattern.double(), values.double()
    values = values.repeat_interleave(pattern.shape[1] // values.shape[1], 1)
    by_head = parts.attend.weight.reshape(pattern.shape[1], -1, d_model)
    head_writes = torch.einsum("shv,hvd->shd", values, by_head)
    after = torch.zeros(rows, rows + 1, d_model, dtype=torch.float64)
    after[:, :rows] = torch.einsum("rhs,shd->rsd", pattern, head_writes)
    after[:, -1] = parts.attend.bias
    if parts.attend_norm is not None:
        after = parts.attend_norm.parts(after)
    diagonal = torch.arange(rows)
    after[diagonal, diagonal] += resid_pre.double()
    step = max(1, _BLOCK_BYTES // (8 * (rows + 1) * parts.gate.weight.shape[1]))
    mlp_writes = torch.cat([_feed_forward(parts, block) for block in after.split(step)])
    whole = after + mlp_writes
    before, added, together = (part.norm(dim=2).numpy() for part in (after, mlp_writes, whole))
    return Contributions(before, added, together, whole.sum(1))


def _feed_forward(
    parts: BlockParts, after: Float64[Tensor, "row source d_model"]
) -> Float64[Tensor, "row source d_model"]:
    normed = parts.norm.parts(after.clone())
    u = normed @ parts.gate.weight
    u[:, -1] += parts.gate.bias
    if parts.linear is None:
        inner = elementwise_parts(parts.activation, u)
        inner[:, -1] += parts.activation(torch.zeros(1, dtype=torch.float64))
    else:
        v = normed @ parts.linear.weight
        v[:, -1] += parts.linear.bias
        inner = gated_parts(parts.activation, u, v)
    mlp_writes = inner @ parts.out.weight
    mlp_writes[:, -1] += parts.out.bias
    return mlp_writes if parts.out_norm is None else parts.out_norm.parts(mlp_writes)


# ---- weights of a model ---------------------------------------------------------------------------------


def block_parts(model: Model) -> Mapping[int, BlockParts]:
    """Returns the weights of each block whose parts run one after the other, read by running their modules.

    Raises:
        RequestError: The model has no such block: parts in parallel, experts, or no separate heads.
    """
    attention, neurons, blocks = head_outputs(model), mlp_outputs(model), {}
    phi = activation_of(model)
    for layer in sorted(attention.keys() & neurons.keys()):
        middle, norm, gate = (_site(model, layer, name) for name in ("hook_resid_mid", "ln2.hook_out", "mlp.hook_pre"))
        linear = _site(model, layer, "mlp.hook_pre_linear")
        attend, out = attention[layer], neurons[layer]
        if middle is None or gate is None or gate.tap.part != "out":
            continue
        if attend.factor is None or out.factor is None:
            continue
        d_model, d_mlp = fixed_shape(middle)[0], fixed_shape(gate)[0]
        blocks[layer] = BlockParts(
            affine(attend.project, attend.heads * attend.d_head).times(attend.factor),
            _norm(attend.norm, d_model),
            _norm(norm and model.module.get_submodule(norm.tap.path), d_model) or _no_norm(d_model),
            affine(model.module.get_submodule(gate.tap.path), d_model),
            None if linear is None else affine(model.module.get_submodule(linear.tap.path), d_model),
            affine(out.project, d_mlp).times(out.factor),
            _norm(out.norm, d_model),
            phi,
        )
    if not blocks:
        raise RequestError(
            f"model {model.name!r} ({model.architecture}) has no block with one feed-forward part after attention; "
            "this needs the sites resid_mid and mlp_pre"
        )
    return blocks


def activation_of(model: Model) -> Activation:
    """Returns the activation function that the config names. RequestError where it names none that is known."""
    from transformers.activations import ACT2FN  # seconds: transformers

    config = text_config(model.module)
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    name = next((value for key in names if isinstance(value := getattr(config, key, None), str)), None)
    if name not in ACT2FN:
        raise RequestError(f"model {model.name!r}: its config names no activation function that is known ({name})")
    return ACT2FN[name]


@torch.no_grad()
def affine(module: nn.Module, width: int) -> Affine:
    """Returns weight and bias of a linear module, by running a copy on unit vectors in float64."""
    copy = real_copy(module).cpu().double().eval()
    bias = the_tensor(copy(torch.zeros(1, 1, width, dtype=torch.float64)))[0, 0]
    weight = the_tensor(copy(torch.eye(width, dtype=torch.float64)[None]))[0] - bias
    return Affine(weight, bias)


def _norm(module: nn.Module | None, d_model: int) -> FrozenNorm | None:
    return None if module is None else _frozen(module, d_model)


def _no_norm(d_model: int) -> FrozenNorm:
    """Stands before a feed-forward part that reads the stream as it is, with its norm behind it (OLMo 2)."""
    gain = torch.ones(d_model, dtype=torch.float64)
    return FrozenNorm("none", 0.0, gain, torch.zeros_like(gain))


def _frozen(module: nn.Module, d_model: int) -> FrozenNorm:
    kind, eps, gain, shift = fit_norm(module, d_model, "in a block")
    return FrozenNorm(kind, eps, gain.cpu().double(), shift.cpu().double())


def _site(model: Model, layer: int, name: str) -> Site | None:
    sites, name = model.site_map, f"blocks.{layer}.{name}"
    return sites.sites.get(sites.synonyms.get(name, name))
