"""Conversion of a loaded model to another type, as loading its checkpoint in that type makes it."""

from __future__ import annotations

import torch
from torch import nn


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Converts a module's parameters and saved buffers to a floating-point type, in place, and returns it.

    `module.to(dtype)` would also round what the module computed when it was made, such as rotary frequencies, which
    stay in float32 where a checkpoint is loaded in another type: at position 128 bfloat16 turns them by up to a quarter
    of a radian.
    """
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module
