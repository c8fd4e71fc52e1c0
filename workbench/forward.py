"""Runs a Hugging Face model once, unchanged: the forward call, hooks that hand over one tensor, eval mode."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn


def text_config(module: nn.Module) -> Any:
    """The config of the language model; composite models keep it inside."""
    return module.config.get_text_config(decoder=True)


def run(module: nn.Module, ids: Int[Tensor, "batch position"], mask: Int[Tensor, "batch position"]) -> Any:
    """One forward pass without gradients, cache or dropout. The attention mask is always given.

    A compiled model runs its own code uncompiled: every hook would break its graph, and leaving it early its guards.
    """
    device = module.get_input_embeddings().weight.device
    wanted = {"attention_mask": mask.to(device), "use_cache": False, "return_dict": True}
    accepted = inspect.signature(module.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    given = {name: value for name, value in wanted.items() if open_ended or name in accepted}
    with evaluating(module), torch.inference_mode(), _uncompiled():
        return module(input_ids=ids.to(device), **given)


def trial_ids(module: nn.Module, batch: int, positions: int, seed: int) -> Int[Tensor, "batch position"]:
    """Random ordinary token ids to try a model on, the same for a seed; the first few are often special."""
    vocab = module.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(8, vocab - 1), min(vocab, 4096), (batch, positions), generator=generator)


def _uncompiled() -> AbstractContextManager:
    """Compiled code stays unused inside. Where nothing was compiled, saying so would import the compiler: seconds."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards every submodule is in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def hook_tensor(
    module: nn.Module,
    side: Literal["in", "out", "returned_weights"],
    receive: Callable[[Tensor | None], None],
) -> Iterator[None]:
    """Inside, each time `module` runs, `receive` gets the first tensor that goes into it or comes out of it, or the
    attention weights that come with its output."""
    pick = attention_weights if side == "returned_weights" else first_tensor

    def before(_module, args, kwargs):
        receive(first_tensor(args) if args else first_tensor(list(kwargs.values())))

    def after(_module, _args, output):
        receive(pick(output))

    if side == "in":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first one in a tuple, list or mapping: block outputs come as either."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((part for part in value if isinstance(part, Tensor)), None)
    return None


def attention_weights(output: Any) -> Tensor | None:
    """The `[batch, head, query, key]` tensor that an eager attention module returns behind its output, if it does."""
    behind = output[1:] if isinstance(output, tuple | list) else ()
    square = (part for part in behind if isinstance(part, Tensor) and part.ndim == 4)
    return next((part for part in square if part.shape[2] == part.shape[3]), None)
