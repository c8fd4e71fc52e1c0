"""Choice of the code that computes on a device: kernels in Triton where they work, torch's own operations elsewhere."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch

_LOG = logging.getLogger(__name__)


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """Returns `workbench.sae.triton_kernels` if its kernels compile and agree with torch on this device, else None."""
    if device.type != "cuda":
        return None
    try:
        from workbench.sae import triton_kernels as kernels

        x = torch.arange(6.0, device=device).view(2, 3)
        row, feature = torch.tensor([0, 1, 1], device=device), torch.tensor([1, 0, -1], device=device)
        if kernels.pair_products(x, x, row, feature).tolist() != [14.0, 14.0, 0.0]:
            raise RuntimeError("a product of 3 terms is wrong")
    except Exception as error:  # no Triton, no C compiler, an old driver: each raises its own kind
        _LOG.info(f"Triton kernels are not used on {device}: {type(error).__name__}: {error}")
        return None
    return kernels
