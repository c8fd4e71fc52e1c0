"""A pretend accelerator: computes on the CPU, names a device of its own, and refuses what a real one refuses.

Its tensors are a subclass, and a mode moves and refuses them. It has no streams. It refuses calls that mix devices, as
CUDA does, and NumPy views of its tensors; as "mps" it refuses float64 as well. `waits` counts the calls for which a
real accelerator makes the program wait, by the function that calls them.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_Tensor = torch.Tensor
_MAY_MIX = {_Tensor.copy_, _Tensor.__setitem__, _Tensor.to, _Tensor.type_as, _Tensor.data.__set__, _Tensor.__repr__}
"""Calls that copy between devices."""
_INDEXED = {_Tensor.__getitem__, _Tensor.index_put_}
"""Calls that take indices from the CPU for a tensor on the device, not the other way round."""
_WAITS = {
    *(_Tensor.item, _Tensor.tolist, _Tensor.__bool__, _Tensor.__int__, _Tensor.__float__, _Tensor.__index__),
    *(_Tensor.nonzero, torch.nonzero, _Tensor.masked_select, torch.masked_select, _Tensor.unique, torch.unique),
    *(torch.bincount, _Tensor.bincount, torch.equal, _Tensor.equal, torch.allclose, _Tensor.allclose),
}
"""Calls whose result has a size or a value that the program needs before it goes on."""


class OnDevice(torch.Tensor):
    """A tensor that lies on the pretend device."""


class PretendDevice(TorchFunctionMode):
    """Inside, tensors can be moved to the device of this name and made there, and compute there."""

    def __init__(self, kind: str = "xpu") -> None:
        super().__init__()
        self.kind, self.float64 = kind, kind != "mps"
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        flat = [*args, *kwargs.values()]
        nested = [part for value in flat for part in (value if isinstance(value, list | tuple) else [value])]
        on_device = any(isinstance(part, OnDevice) for part in nested)
        if func == torch.Tensor.device.__get__:  # made anew at each access
            return torch.device(self.kind) if on_device else func(*args)
        if on_device and func in (torch.Tensor.is_cpu.__get__, torch._has_compatible_shallow_copy_type):
            return func is not torch.Tensor.is_cpu.__get__ and all(isinstance(part, OnDevice) for part in nested)
        if func is torch.Tensor.__deepcopy__ and on_device:
            copied = args[0].as_subclass(torch.Tensor).detach().clone().as_subclass(OnDevice)
            args[1][id(args[0])] = result = nn.Parameter(copied, False) if isinstance(args[0], nn.Parameter) else copied
            return result
        moved = any(self._named(value, self.kind) for value in flat)
        to_cpu = func is torch.Tensor.cpu or any(self._named(value, "cpu") for value in flat)
        if on_device:
            self._check(func, args, nested, to_cpu)
        with torch._C.DisableTorchFunctionSubclass():
            args = tuple(self._on_cpu(value) for value in args)
            kwargs = {name: self._on_cpu(value) for name, value in kwargs.items()}
            result = func(*args, **kwargs)
        # copied between devices
        if args and result is args[0] and ((moved and not on_device) or (to_cpu and on_device)):
            result = result.clone()
        if to_cpu and not moved:
            return self._as(result, torch.Tensor)
        if moved and isinstance(result, torch.Tensor) and result.requires_grad and result.is_leaf:  # made there
            return self._as(result.detach(), OnDevice).requires_grad_()
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            return self._as(result, OnDevice if isinstance(args[1], OnDevice) else torch.Tensor)
        return self._as(result, OnDevice) if moved or (on_device and not self._is_cpu_result(func, args)) else result

    def _check(self, func: Any, args: tuple, nested: list[Any], to_cpu: bool) -> None:
        """Refuses what an accelerator refuses, and counts what it waits for."""
        if func is torch.Tensor.numpy or func is torch.Tensor.__array__:
            raise TypeError(f"can't convert {self.kind}:0 device type tensor to numpy")
        if func in _MAY_MIX or (func in _INDEXED and isinstance(args[0], OnDevice)):
            pass
        elif any(type(part) in (torch.Tensor, nn.Parameter) and part.dim() and not is_there(part) for part in nested):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two, {self.kind}:0 and cpu, in "
                f"{getattr(func, '__name__', func)}"
            )
        masked = func is torch.Tensor.__getitem__ and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for part in (args[1] if isinstance(args[1], tuple) else [args[1]])
        )
        if func in _WAITS or to_cpu or masked:
            self.waits[_caller()] += 1

    def _named(self, value: Any, kind: str) -> bool:
        return (isinstance(value, torch.device) and value.type == kind) or (
            isinstance(value, str) and value.partition(":")[0] == kind
        )

    def _on_cpu(self, value: Any) -> Any:
        return torch.device("cpu") if self._named(value, self.kind) else value

    @staticmethod
    def _is_cpu_result(func: Any, args: tuple) -> bool:
        """True for a call into a tensor on the CPU, which stays there."""
        return func in _MAY_MIX and not isinstance(args[0], OnDevice)

    def _as(self, value: Any, kind: type) -> Any:
        if isinstance(value, torch.Tensor):
            if kind is OnDevice and value.dtype == torch.float64 and not self.float64:
                raise TypeError(f"Cannot convert a {self.kind} Tensor to float64 dtype as it doesn't support float64")
            return value if type(value) in (kind, nn.Parameter) else value.as_subclass(kind)
        if isinstance(value, tuple | list):
            parts = [self._as(part, kind) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value


def is_there(value: Any) -> bool:
    """Returns True for a tensor on the pretend device."""
    return isinstance(value, OnDevice)


def _caller() -> str:
    """The nearest function of the workbench on the stack, as "module:function"."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("workbench."):
            return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
