"""Conversion of a loaded model to another type, as loading its checkpoint in that type makes it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T", bound=nn.Module)


def in_dtype(module: T, dtype: torch.dtype) -> T:
    """Converts a module's parameters and saved buffers to a floating-point type, in place, and returns it.

    `module.to(dtype)` would also round what the module computed when it was made, such as rotary frequencies, which
    stay in float32 where a checkpoint is loaded in another type: at position 128 bfloat16 turns them by up to a quarter
    of a radian.
    """
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module
