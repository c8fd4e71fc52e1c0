"""Weights that accelerate keeps elsewhere, on the CPU or the disk, with placeholders on the meta device in the model.

`accelerate.cpu_offload`, a `device_map` with "cpu" or "disk" entries and `device="auto"` make such models. Their hooks
bring the weights when a module runs. What reads weights without running the module reads them here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def placeholders(module: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Returns, for each placeholder in `module`, by its dotted name, a function that reads its values."""
    readers = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for hook in _hooks(part):
            values = getattr(hook, "weights_map", None) or {}
            for name in _placeholder_names(part, recurse=bool(getattr(hook, "place_submodules", False))):
                if values:
                    readers.setdefault(f"{path}.{name}".strip("."), partial(values.__getitem__, name))
    return readers


def real_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """Returns the values of a parameter of `module`, also where the module holds a placeholder."""
    tensor = module.get_parameter(name).detach()
    return placeholders(module)[name]().detach() if tensor.device.type == "meta" else tensor


def real_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of `module` that holds its values, has no hooks of accelerate, and runs where `module` runs."""
    readers, device = placeholders(module), running_device(module)
    hooks = [hook for part in module.modules() for hook in _hooks(part, single=True)]
    twin = copy.deepcopy(module, {id(hook): None for hook in hooks})
    for path, part in twin.named_modules():
        if _hooks(module.get_submodule(path)):
            for name in ("_hf_hook", "_old_forward", "forward"):  # bound to the original
                vars(part).pop(name, None)
        for name in _placeholder_names(part):
            values = readers[f"{path}.{name}".strip(".")]().to(device)
            table: dict[str, Any] = part._parameters if name in part._parameters else part._buffers
            table[name] = nn.Parameter(values, requires_grad=False) if table is part._parameters else values
    return twin


def running_device(module: nn.Module) -> torch.device:
    """Returns the device on which `module` computes: of its weights or, for placeholders, of accelerate's hook."""
    tensors = (*module.parameters(), *module.buffers())
    device = next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)
    if device is not None:
        return device
    devices = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    device = next((device for device in devices if device is not None), tensors[0].device if tensors else "cpu")
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _placeholder_names(part: nn.Module, recurse: bool = False) -> Iterator[str]:
    for tensors in (part.named_parameters, part.named_buffers):
        for name, tensor in tensors(recurse=recurse, remove_duplicate=False):
            if tensor.device.type == "meta":
                yield name


def _hooks(part: nn.Module, single: bool = False) -> tuple[Any, ...]:
    """The hooks of accelerate on a module; `single`: the one object that holds them."""
    hook = getattr(part, "_hf_hook", None)
    if hook is None:
        return ()
    return (hook,) if single else tuple(getattr(hook, "hooks", (hook,)))
