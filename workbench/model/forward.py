"""Forward passes of an unchanged Hugging Face model: the call itself, hooks for one tensor, eval mode."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from workbench.io.torch_state import plain_torch
from workbench.model.offload import running_device
from workbench.model.passes import bound, one_pass
from workbench.sites.grammar import Site

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def text_config(module: nn.Module) -> PretrainedConfig:
    """Returns the config of the language model, which composite models keep inside theirs."""
    return cast("PreTrainedModel", module).config.get_text_config(decoder=True)


def attention_name(module: nn.Module) -> str:
    """Returns the name of the attention implementation that the language model uses, such as sdpa."""
    return cast("str", text_config(module)._attn_implementation)


def input_embedding(module: nn.Module) -> Tensor:
    """Returns the weights of the token embedding, axes (vocab, d_embed)."""
    return cast("nn.Embedding", cast("PreTrainedModel", module).get_input_embeddings()).weight


def input_device(module: nn.Module) -> torch.device:
    """Returns the device that takes the token ids."""
    return running_device(cast("PreTrainedModel", module).get_input_embeddings())


def fixed_shape(site: Site) -> tuple[int, ...]:
    """Returns the shape of a row of a site whose shape does not depend on the context, which all but patterns are."""
    return tuple(length for length in site.shape if length is not None)


@plain_torch()
def run(
    module: nn.Module,
    ids: Int[Tensor, "batch position"],
    mask: Int[Tensor, "batch seen"],
    *,
    gradients: bool = False,
    cache: Any = False,
) -> Any:
    """Runs one forward pass, without dropout, and returns the model's output.

    A compiled model runs uncompiled: every hook would break its graph, and leaving it early its guards.

    Args:
        module: A Hugging Face causal LM.
        ids: Token ids.
        mask: 1 for tokens, 0 for padding; with a cache also for the tokens in it.
        gradients: Compute gradients, too.
        cache: True keeps keys and values, in the output's `past_key_values`; those of earlier tokens are continued, and
            change.
    """
    device = input_device(module)
    inputs = {"attention_mask": mask.to(device), "use_cache": cache is not False, "return_dict": True}
    inputs |= {} if isinstance(cache, bool) else {"past_key_values": cache}
    accepted = inspect.signature(module.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    accepted_inputs = {name: value for name, value in inputs.items() if open_ended or name in accepted}
    gradient_mode = torch.enable_grad() if gradients else torch.inference_mode()
    with one_pass(module), evaluating(module), gradient_mode, _uncompiled():
        return module(input_ids=ids.to(device), **accepted_inputs)


def trial_ids(module: nn.Module, batch: int, positions: int, seed: int) -> Int[Tensor, "batch position"]:
    """Returns random token ids for a trial pass, without the first few ids, which are often special."""
    vocab = input_embedding(module).shape[0]
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(min(8, vocab - 1), min(vocab, 4096), (batch, positions), generator=generator, device="cpu")


def _uncompiled() -> AbstractContextManager:
    """Keeps compiled code unused inside. If nothing was compiled, setting this would import the compiler: seconds."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode inside the block, and every submodule back into its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def generating(module: nn.Module) -> Iterator[None]:
    """Lets the model's `generate` do inside the block what its arguments say alone: in eval mode, without gradients.

    transformers adds the model's own generation settings to them: penalties of repetition, forced and suppressed
    tokens, beams. Its end tokens are to be given.
    """
    from transformers import GenerationConfig  # seconds

    configs = [
        (part, vars(part)["generation_config"]) for part in module.modules() if "generation_config" in vars(part)
    ]
    try:
        for part, _ in configs:
            setattr(part, "generation_config", GenerationConfig())  # noqa: B010  # no tensor or module, as its type says
        with evaluating(module), torch.no_grad():
            yield
    finally:
        for part, config in configs:
            part.generation_config = config


@contextmanager
def hook_tensor(
    module: nn.Module,
    side: Literal["in", "out", "returned_weights"],
    receive: Callable[[Tensor | None], None],
) -> Iterator[None]:
    """Passes a tensor of `module` to `receive` each time it runs inside the block.

    Args:
        module: A submodule of a model.
        side: "in": its first input tensor; "out": its first output tensor; "returned_weights": the attention weights
            that it returns with its output.
        receive: Called with the tensor, or with None if there is none.
    """
    pick = attention_weights if side == "returned_weights" else first_tensor

    def before(_module, args, kwargs):
        receive(first_tensor(args) if args else first_tensor(list(kwargs.values())))

    def after(_module, _args, output):
        receive(pick(output))

    with _hooked(module, before if side == "in" else None, after):
        yield


@contextmanager
def hook_output(module: nn.Module, receive: Callable[[Any], None]) -> Iterator[None]:
    """Passes the whole output of `module` to `receive` each time it runs inside the block."""
    with _hooked(module, None, lambda _module, _args, output: receive(output)):
        yield


@contextmanager
def change_tensor(module: nn.Module, side: Literal["in", "out"], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces the first input or output tensor of `module` by `change` of it, each time it runs inside the block."""

    def before(_module, args, kwargs):
        return (_changed(args, change), kwargs) if args else (args, _changed(kwargs, change))

    def after(_module, _args, output):
        return _changed(output, change)

    with _hooked(module, before if side == "in" else None, after):
        yield


@contextmanager
def change_arguments(module: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Replaces the arguments of `module`, by their names, by `change` of them, each time it runs inside the block."""
    signature = inspect.signature(module.forward)
    variadic = [
        parameter.name for parameter in signature.parameters.values() if parameter.kind is parameter.VAR_KEYWORD
    ]

    def before(_module, args, kwargs):
        arguments = signature.bind_partial(*args, **kwargs).arguments
        for name in variadic:
            arguments |= arguments.pop(name, {})
        return (), change(dict(arguments))

    with _hooked(module, before, before):
        yield


@contextmanager
def bypass(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Replaces the first output tensor of `module` by `change` of its first input and output, inside the block."""
    in_pass = bound()

    def after(_module, args, kwargs, output):
        if not in_pass():
            return None
        before = first_tensor(args) if args else first_tensor(list(kwargs.values()))
        return _changed(output, lambda tensor: change(tensor if before is None else before, tensor))

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hooked(module: nn.Module, before: Callable | None, after: Callable) -> Iterator[None]:
    """Registers a hook inside the block, `before` the module runs or, if that is None, `after` it, for one pass."""
    in_pass = bound()
    if before is None:
        handle = module.register_forward_hook(lambda *call: after(*call) if in_pass() else None)
    else:
        handle = module.register_forward_pre_hook(lambda *call: before(*call) if in_pass() else None, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Input or output of a module, with its first tensor replaced by `change` of it."""
    first = first_tensor(value)
    if isinstance(value, Tensor) or first is None:
        return value if first is None else change(value)
    if isinstance(value, dict):
        key = next(key for key, part in value.items() if part is first)
        new_value = value.copy()
        new_value[key] = change(first)
        return new_value
    return type(value)(change(part) if part is first else part for part in value)


def first_tensor(value: Any) -> Tensor | None:
    """Returns the tensor itself, or the first one in a tuple, list or mapping; None if there is none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((part for part in value if isinstance(part, Tensor)), None)
    return None


def the_tensor(value: Any) -> Tensor:
    """Returns `first_tensor` of an output that must have one. Raises TypeError if it has none."""
    tensor = first_tensor(value)
    if tensor is None:
        raise TypeError(f"a module returned {type(value).__name__} without a tensor")
    return tensor


def attention_weights(output: Any) -> Tensor | None:
    """Returns the (batch, head, query, key) tensor that an eager attention module returns with its output, or None."""
    other_outputs = output[1:] if isinstance(output, tuple | list) else ()
    square = (part for part in other_outputs if isinstance(part, Tensor) and part.ndim == 4)
    return next((part for part in square if part.shape[2] == part.shape[3]), None)
