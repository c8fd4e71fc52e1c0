"""Measurement of a model's identity: what its forward pass computes with, and what it answers to a short fixed text."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from workbench.io.files import sha256_bytes
from workbench.io.torch_state import plain_torch
from workbench.model.fingerprint import weights_fingerprint
from workbench.model.forward import attention_name, hook_tensor, input_embedding, run
from workbench.store.identity import Identity

_IGNORED_HOOKS = ("workbench.model.", "transformers.", "accelerate.")
"""Packages whose hooks only read (those of a pass of ours, of output_hidden_states) or bring weights (offloading)."""
_IGNORED_FIELDS = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
}
"""Fields of a config that change no activation: origin, and what a pass returns beside its answer."""
TOKENS, _SAMPLES = 16, 5


@plain_torch()
def measure_identity(module: nn.Module, last_block: str, tokens: int = TOKENS) -> Identity:
    """Returns the identity of a Hugging Face module as it is now.

    Costs a checksum of the weights, about 1 s a gigabyte, and one forward pass over 16 tokens.

    Args:
        module: A Hugging Face model.
        last_block: Path of its last block.
        tokens: Length of the pass.
    """
    model = cast("Any", module)
    answers = _answers(
        module, last_block, tokens
    )  # first: a pass may set buffers, such as the frequencies of dynamic RoPE
    return Identity(
        weights=weights_fingerprint(model),
        config=dict(_config_fields(model.config)),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(attention_name(module)),
        adapters=_adapters(module),
        hooks=tuple(_hooks(module)),
        buffers=dict(_buffers(module)),
        answers=answers,
    )


def _config_fields(config: Any) -> Iterator[tuple[str, str]]:
    for name, value in config.to_diff_dict().items():
        if name not in _IGNORED_FIELDS:
            text = json.dumps(value, sort_keys=True, default=str)
            yield name, text if len(text) <= 200 else f"sha256 {sha256_bytes(text.encode())}"


def _adapters(module: nn.Module) -> tuple[str, ...]:
    """States of PEFT's adapters, read from their layers."""
    states: set[str] = set()
    for part in module.modules():
        active = getattr(part, "active_adapters", None)
        if not hasattr(part, "merged_adapters") or not isinstance(active, list | tuple):
            continue
        state = "disabled" if getattr(part, "disable_adapters", False) else "active"
        states.update(f"{state} {name}" for name in active)
        states.update(f"merged {name}" for name in cast("list[str]", part.merged_adapters))
    return tuple(sorted(states))


def _hooks(module: nn.Module) -> Iterator[str]:
    for table in (all_modules._global_forward_pre_hooks, all_modules._global_forward_hooks):
        yield from (f"all modules: {_qualified(hook)}" for hook in table.values())
    for path, part in module.named_modules():
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            name = _qualified(hook)
            if not name.startswith(_IGNORED_HOOKS):
                yield f"{path or 'the model'}: {name}"


def _qualified(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    definition = function if hasattr(function, "__qualname__") else type(function)
    return f"{definition.__module__}.{definition.__qualname__}"


def _buffers(module: nn.Module) -> Iterator[tuple[str, tuple[float, ...]]]:
    for path, part in module.named_modules():
        for name in sorted(part._non_persistent_buffers_set):
            buffer = part._buffers.get(name)
            if buffer is not None and buffer.device.type != "meta" and not buffer.is_complex():
                values, nonfinite = _finite(buffer.detach().cpu().double().flatten())
                ramp = torch.linspace(1, 2, len(values), dtype=torch.float64, device="cpu")
                summary = (values.mean(), (values * ramp).mean(), nonfinite) if len(values) else ()
                yield f"{path}.{name}".strip("."), (*map(float, buffer.shape), *(_rounded(float(x)) for x in summary))


def _answers(module: nn.Module, last_block: str, tokens: int) -> dict[str, tuple[float, ...]]:
    """Summaries of the last residual stream, whose scale a final norm hides, and of the logits, after a short pass."""
    ids = (torch.arange(tokens, device="cpu") * 7919 + 101) % input_embedding(module).shape[0]
    streams: list[Tensor | None] = []
    with hook_tensor(module.get_submodule(last_block), "out", streams.append):
        output = run(module, ids[None], torch.ones(1, tokens, dtype=torch.long, device="cpu"))
    answers = {"last residual stream": streams[-1] if streams else None, "logits": getattr(output, "logits", None)}
    return {name: _summary(tensor.detach()) for name, tensor in answers.items() if tensor is not None}


def _summary(tensor: Tensor) -> tuple[float, ...]:
    """Of every second position the largest value, the smallest, two sums with signs, and a few single values."""
    values = _finite(tensor.cpu().double())[0].flatten(0, 1).flatten(1)[::2]
    width = values.shape[1]
    index = torch.arange(width, device="cpu")
    signs = torch.stack([1.0 - 2.0 * ((index * factor) % 7 < 3) for factor in (1, 3)]).double()
    sums = values @ signs.T / width**0.5
    samples = values[:, (torch.arange(_SAMPLES, device="cpu") * 104_729 + 17) % width]
    summary = torch.cat([values.amax(1, keepdim=True), values.amin(1, keepdim=True), sums, samples], dim=1)
    return tuple(_rounded(value) for value in summary.flatten().tolist())


def _finite(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values with 0 for NaN and infinities, which JSON does not have, and the number of these."""
    finite = values.isfinite()
    return values.where(finite, 0.0), (~finite).sum()


def _rounded(value: float) -> float:
    """`value` to 7 digits, which a manifest keeps."""
    return float(f"{value:.7g}")
