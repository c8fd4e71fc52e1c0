"""A pretend device without float64, as Apple's MPS: its tensors are a subclass, and a mode moves and refuses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")


class OnMps(torch.Tensor):
    """A tensor that lies on the pretend device."""


def _names_device(value: Any, kind: str) -> bool:
    return (isinstance(value, torch.device) and value.type == kind) or (isinstance(value, str) and value == kind)


class PretendMps(TorchFunctionMode):
    """Inside, tensors can be moved to "mps" and made there, compute there, and refuse float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        flat = [*args, *kwargs.values()]
        nested = [part for value in flat for part in (value if isinstance(value, list | tuple) else [value])]
        on_mps = any(isinstance(part, OnMps) for part in nested)
        if func == torch.Tensor.device.__get__:  # made anew at each access
            return MPS if on_mps else func(*args)
        if func is torch.Tensor.__deepcopy__ and on_mps:
            copied = args[0].as_subclass(torch.Tensor).detach().clone().as_subclass(OnMps)
            args[1][id(args[0])] = result = nn.Parameter(copied, False) if isinstance(args[0], nn.Parameter) else copied
            return result
        to_mps = any(_names_device(value, "mps") for value in flat)
        to_cpu = func is torch.Tensor.cpu or any(_names_device(value, "cpu") for value in flat)
        if on_mps and func is torch.Tensor.numpy:
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        with torch._C.DisableTorchFunctionSubclass():
            args = tuple(torch.device("cpu") if _names_device(value, "mps") else value for value in args)
            kwargs = {
                name: torch.device("cpu") if _names_device(value, "mps") else value for name, value in kwargs.items()
            }
            result = func(*args, **kwargs)
        if to_cpu and not to_mps:
            return _as(result, torch.Tensor)
        return _as(result, OnMps) if on_mps or to_mps else result


def _as(value: Any, kind: type) -> Any:
    if isinstance(value, torch.Tensor):
        if kind is OnMps and value.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return value if type(value) in (kind, nn.Parameter) else value.as_subclass(kind)
    if isinstance(value, tuple | list):
        parts = [_as(part, kind) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def move_to_mps(module: nn.Module) -> None:
    """Moves a model's weights to the pretend device."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(weight.detach().as_subclass(OnMps), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.as_subclass(OnMps)
