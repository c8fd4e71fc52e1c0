"""The unembedding of a model, stored with the activations so that lenses need no model.

`logits = softcap(scale * (W_U norm(h) + b_U))`. Architectures spell each part differently (gain or 1 + gain,
centred or not, multiplied or divided, a cap in the config or in the code). So the parts are measured on the model
instead of read from fields of its config: the final norm is fitted on random inputs, and scale and cap on a ramp that
replaces the head's output. The result is then compared with the model's own logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, cast

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.io.checksums import check_files
from workbench.io.errors import RequestError
from workbench.io.parse import load_json
from workbench.io.tensors import VERIFY, open_safetensors
from workbench.io.torch_state import plain_torch
from workbench.model.forward import change_tensor, evaluating, hook_tensor, run, text_config, the_tensor, trial_ids
from workbench.model.offload import real_copy, real_weight, running_device
from workbench.store.manifest import UNEMBED, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = ("weight", "bias", "gain", "shift")
_EPS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 0.0)


class NoUnembed(RequestError):
    """The logits are not a norm, a linear map and a cap of the last residual stream; the message gives the reason."""


@dataclass(frozen=True)
class Unembed:
    """Map from the residual stream to logits: final norm, W_U, b_U, scale and soft-cap.

    Called on rows (row, d_model) it returns logits (row, vocab) in float32: after the last block the model's own (to
    1e-4 in float32), after earlier ones the logit lens. Costs 2 d_model vocab operations and 4 vocab bytes a row.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None
    norm: Literal["layer", "rms", "none"]
    gain: Float[Tensor, " d_model"]
    shift: Float[Tensor, " d_model"]
    eps: float
    scale: float = 1.0
    softcap: float | None = None
    tokens: tuple[str, ...] | None = None
    """Text of each vocabulary entry; None for a model without a tokenizer."""

    def token(self, token_id: int) -> str:
        """Returns the text of a vocabulary entry, or its id in brackets if there is none."""
        return self.tokens[token_id] if self.tokens and token_id < len(self.tokens) else f"[{token_id}]"

    @plain_torch()
    def normed(self, resid: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """Returns the final norm of `resid`, with statistics of `resid` itself, in float32."""
        return normalise(resid.float(), self.norm, self.eps) * self.gain + self.shift

    @plain_torch()
    def __call__(self, resid: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
        logits = nn.functional.linear(self.normed(resid), self.weight, self.bias)
        logits = logits if self.scale == 1 else self.scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @plain_torch()
    def write(self, resid: Float[Tensor, "row d_model"], out: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """Writes the logits of rows into `out` and returns it, without gradients: new memory takes a CPU as long as a
        third of the product."""
        with torch.inference_mode():
            return self.write_normed(self.normed(resid), out)

    def write_normed(
        self, normed: Float[Tensor, "row d_model"], out: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """Writes the logits of rows that are normed already into `out` and returns it, without gradients."""
        with torch.no_grad():
            torch.mm(normed, self.weight.t(), out=out)
            if self.bias is not None:
                out += self.bias
            if self.scale != 1:
                out *= self.scale
            return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    @property
    def vocab(self) -> int:
        """Number of vocabulary entries."""
        return self.weight.shape[0]

    def to(self, device: str | torch.device) -> Unembed:
        """Returns the unembedding on another device."""
        tensors = {name: part.to(device) for name, part in _tensors(self).items()}
        return replace(self, **tensors)


def save_unembed(
    unembed: Unembed,
    path: str | Path,
    dtype: torch.dtype,
    more_tensors: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Writes a safetensors file, with W_U and b_U in `dtype`, the model's own type, so that nothing is lost.

    Args:
        unembed: The unembedding.
        path: A new file.
        dtype: Type of the model's head.
        more_tensors: More tensors of the file, by names that are none of the unembedding's.
    """
    scalars = {name: getattr(unembed, name) for name in ("norm", "eps", "scale", "softcap", "tokens")}
    tensors = {name: part.detach().cpu().contiguous() for name, part in _tensors(unembed).items()}
    tensors |= {name: tensors[name].to(dtype) for name in ("weight", "bias") if name in tensors}
    save_file(tensors | dict(more_tensors), str(path), metadata={"unembed": json.dumps(scalars, sort_keys=True)})


@plain_torch()
def load_unembed(store_path: str | Path, device: str | torch.device = "cpu") -> Unembed:
    """Reads the unembedding of a store, in float32.

    Raises:
        RequestError: The model had no unembedding of this form; the message gives the reason.
        DataError: The file is missing or damaged.
    """
    path = Path(store_path) / UNEMBED
    check_files([(path, _recorded_checksum(store_path))], VERIFY)
    with open_safetensors(path, VERIFY, str(device)) as file:  # which names the file in every error inside
        scalars = load_json(file.metadata()["unembed"])
        scalars["tokens"] = None if scalars["tokens"] is None else tuple(scalars["tokens"])
        names = [name for name in file.keys() if name in _PARTS]  # noqa: SIM118 (no mapping)
        tensors = {name: file.get_tensor(name).float() for name in names}
        unembed = Unembed(**{"bias": None, **tensors, **scalars})
        _check_shapes(unembed)
    return unembed


def final_norm(store_path: str | Path) -> tuple[str, float]:
    """Returns the kind ("layer", "rms" or "none") and epsilon of the final norm of a store's model; reads a header.

    Raises:
        RequestError: The model had no unembedding of this form; the message gives the reason.
        DataError: The file is missing or damaged.
    """
    _recorded_checksum(store_path)
    with open_safetensors(Path(store_path) / UNEMBED, VERIFY) as file:
        scalars = load_json(file.metadata()["unembed"])
        return str(scalars["norm"]), float(scalars["eps"])


def _recorded_checksum(store_path: str | Path) -> str:
    """Checksum of the file of the unembedding; RequestError where the store has none."""
    manifest = read_manifest(store_path)
    if not manifest.has_unembed or manifest.unembed is None:
        raise RequestError(f"store {Path(store_path).name} holds no unembedding: {manifest.unembed_reason}")
    return manifest.unembed


def _check_shapes(unembed: Unembed) -> None:
    """ValueError where the parts do not fit each other."""
    vocab, d_model = unembed.weight.shape
    shapes = {"gain": (d_model,), "shift": (d_model,)} | ({} if unembed.bias is None else {"bias": (vocab,)})
    for name, shape in shapes.items():
        if tuple(getattr(unembed, name).shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(getattr(unembed, name).shape)}, expected {shape}")
    if unembed.norm not in ("layer", "rms", "none"):
        raise ValueError(f"norm is {unembed.norm!r}")
    if not all(isinstance(number, int | float) for number in (unembed.eps, unembed.scale, unembed.softcap or 0)):
        raise ValueError("eps, scale or softcap is no number")
    if not all(isinstance(text, str) for text in unembed.tokens or ()):
        raise ValueError("a token is no text")


def measure_unembed(module: nn.Module, last_block: str) -> Unembed:
    """Measures the unembedding of a model. Costs two forward passes over 2 x 7 tokens.

    Args:
        module: A Hugging Face causal LM.
        last_block: Path of its last block.

    Raises:
        NoUnembed: The form does not fit.
    """
    head = cast("nn.Linear", cast("PreTrainedModel", module).get_output_embeddings())
    if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.ndim != 2:
        raise NoUnembed(f"{type(module).__name__} has no linear language-model head")
    ids, mask = _trial_tokens(module)
    resid, head_in, logits, norm = _last_steps(module, head, last_block, ids, mask)
    scale, softcap, vocab = _after_head(module, head, ids, mask)
    kind, eps, gain, shift = fit_norm(norm, resid.shape[-1]) if norm is not None else ("none", 0.0, None, None)
    gain = torch.ones(resid.shape[-1], device=resid.device) if gain is None else gain.to(resid.device)
    shift = torch.zeros_like(gain) if shift is None else shift.to(resid.device)
    bias = getattr(head, "bias", None)
    unembed = Unembed(
        weight=real_weight(head)[:vocab].float(),
        bias=None if bias is None else real_weight(head, "bias")[:vocab].float(),
        norm=kind,
        gain=gain,
        shift=shift,
        eps=eps,
        scale=scale,
        softcap=softcap,
    ).to(resid.device)
    ratio = _ratio(unembed.normed(resid), head_in)  # a model may rescale between its norm and its head
    unembed = replace(unembed, gain=unembed.gain * ratio, shift=unembed.shift * ratio)
    _compare(unembed(resid), logits, module)
    return unembed


def _compare(recomputed_logits: Tensor, logits: Tensor, module: nn.Module) -> None:
    error = (recomputed_logits - logits.float()).abs().max().item()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(logits.dtype, 0.05) * max(1.0, logits.abs().max().item())
    if not error <= tolerance:
        raise NoUnembed(
            f"{type(module).__name__}: norm, W_U and cap of the last residual stream miss its logits by {error:.2g}"
        )


def _last_steps(
    module: nn.Module, head: nn.Module, last_block: str, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, nn.Module | None]:
    """Last residual stream, input of the head, logits, and the norm between stream and head, from one pass."""
    blocks = last_block.rsplit(".", 1)[0]
    outside = {path: part for path, part in module.named_modules() if path and not f"{path}.".startswith(f"{blocks}.")}
    block, heads, steps = [], [], {path: ([], []) for path in outside}
    with ExitStack() as stack:
        for path, (inputs, outputs) in steps.items():
            stack.enter_context(hook_tensor(outside[path], "in", inputs.append))
            stack.enter_context(hook_tensor(outside[path], "out", outputs.append))
        stack.enter_context(hook_tensor(module.get_submodule(last_block), "out", block.append))
        stack.enter_context(hook_tensor(head, "in", heads.append))
        logits = run(module, ids, mask).logits
    if len(block) != 1 or len(heads) != 1 or block[0] is None or heads[0] is None:
        raise NoUnembed(f"{type(module).__name__}: its last block and head do not each run once in a forward pass")
    resid, head_in = block[0].float(), heads[0].float()
    if resid.shape != head_in.shape:
        raise NoUnembed(
            f"{type(module).__name__}: the head reads {tuple(head_in.shape)}, the stream is {tuple(resid.shape)}"
        )
    if _parallel(resid, head_in):
        return resid, head_in, logits, None
    for path, side_tensors in steps.items():
        layer_input, output = (tensors[-1] if tensors else None for tensors in side_tensors)
        if (
            layer_input is None
            or output is None
            or not layer_input.shape == output.shape == resid.shape
            or outside[path] is head
        ):
            continue
        if _close(layer_input, resid) and _parallel(output, head_in):
            return resid, head_in, logits, outside[path]
    raise NoUnembed(f"{type(module).__name__}: no single norm lies between its last block and its head")


def _after_head(module: nn.Module, head: nn.Linear, ids: Tensor, mask: Tensor) -> tuple[float, float | None, int]:
    """Scale, soft-cap and vocabulary that the model applies to its head's output, from a ramp that replaces it."""
    width = head.weight.shape[0]
    steps = torch.logspace(-2, 4, (width + 1) // 2, device=running_device(head))
    ramp = torch.stack([steps, -steps], dim=1).flatten()[:width]

    with change_tensor(head, "out", lambda output: ramp.to(output).expand_as(output)):
        output = run(module, ids, mask).logits
    vocab = output.shape[-1]
    inputs, answer = ramp[:vocab].to(output.dtype).cpu().double(), output[0, 0].cpu().double()
    coarse = output.dtype not in (torch.float32, torch.float64)
    scale = _snap((answer / inputs)[inputs.abs() < 0.1].median().item(), module, coarse)
    if torch.allclose(answer, scale * inputs, rtol=0.02 if coarse else 1e-4):
        return scale, None, vocab
    softcap = _snap(answer.abs().max().item(), module, coarse)
    if torch.allclose(answer, softcap * torch.tanh(scale * inputs / softcap), rtol=0.02 if coarse else 1e-4, atol=1e-3):
        return scale, softcap, vocab
    raise NoUnembed(f"{type(module).__name__}: what it does to its logits is neither a scale nor a tanh soft-cap")


def _snap(value: float, module: nn.Module, coarse: bool) -> float:
    """`value`, or the number of the config (or its reciprocal) that it equals up to rounding."""
    numbers = [v for v in text_config(module).to_dict().values() if isinstance(v, float | int) and v and v is not True]
    candidates = [1.0, *map(float, numbers), *(1.0 / v for v in numbers)]
    closest = min(candidates, key=lambda number: abs(number - value))
    return closest if abs(closest - value) <= (1e-2 if coarse else 1e-4) * abs(value) else value


def fit_norm(
    norm: nn.Module, d_model: int, place: str = "between the last block and the head"
) -> tuple[Literal["layer", "rms", "none"], float, Tensor, Tensor]:
    """Returns kind, epsilon, gain and bias of a norm, fitted to its outputs on random rows of very different size.

    Raises:
        NoUnembed: The module is neither a LayerNorm nor an RMSNorm.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(256, d_model, generator=generator, dtype=torch.float64, device="cpu")
    rows = (rows + 0.5) * torch.logspace(-3, 2, 256, dtype=torch.float64, device="cpu")[:, None]
    exact = real_copy(norm).cpu().double()  # not every device has float64
    with torch.no_grad(), evaluating(exact):
        answer = the_tensor(exact(rows[None])).double()[0]
    declared = [v for name, v in vars(norm).items() if "eps" in name and isinstance(v, float)]
    fits: list[tuple[float, Literal["rms", "layer"], float, Tensor, Tensor]] = []
    kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    for kind, eps in product(kinds, dict.fromkeys([*declared, *_EPS])):
        unit = normalise(rows, kind, eps)
        centred = unit - unit.mean(0)
        gain = (centred * answer).sum(0) / centred.square().sum(0)
        shift = answer.mean(0) - gain * unit.mean(0)
        error = (gain * unit + shift - answer).abs().max().item() / max(answer.abs().max().item(), 1e-30)
        fits.append((error, kind, eps, gain.float(), shift.float()))
    error, kind, eps, gain, shift = min(fits, key=lambda fit: fit[0])
    if error > 1e-4:
        raise NoUnembed(f"{type(norm).__name__} {place} is neither LayerNorm nor RMSNorm")
    return kind, eps, gain, torch.where(shift.abs() < 1e-6 * gain.abs().max(), 0.0, shift)


def normalise(x: Tensor, kind: str, eps: float) -> Tensor:
    """Returns `x` under a norm without weights over the last axis: "layer" (centred first), "rms" or "none"."""
    if kind == "none":
        return x
    x = centred(x, kind)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def centred(x: Tensor, kind: str) -> Tensor:
    """Returns `x` minus its mean over the last axis, as a norm of kind "layer" reads it; other kinds read `x`."""
    return x - x.mean(-1, keepdim=True) if kind == "layer" else x


def _tensors(unembed: Unembed) -> dict[str, Tensor]:
    parts = {name: getattr(unembed, name) for name in _PARTS}
    return {name: part for name, part in parts.items() if part is not None}


def _trial_tokens(module: nn.Module) -> tuple[Tensor, Tensor]:
    ids = trial_ids(module, 2, 7, seed=1)
    return ids, torch.ones_like(ids)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5))


def _ratio(a: Tensor, b: Tensor) -> float:
    """The factor that brings `a` closest to `b`; exactly 1 if it is within 1e-3 of that."""
    a, b = a.cpu().double(), b.cpu().double()
    ratio = ((a * b).sum() / a.square().sum()).item()
    return 1.0 if abs(ratio - 1) < 1e-3 else ratio


def _parallel(a: Tensor, b: Tensor) -> bool:
    return _close(a.float() * _ratio(a, b), b)
