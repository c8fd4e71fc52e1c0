"""Precision of matrix products: which device multiplies bfloat16 fast, and true float32 for the exact path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("float32", "bfloat16")
"""Types of the first product: float32 is exact, bfloat16 gives upper bounds."""


def fast_bfloat16(device: torch.device) -> bool:
    """Returns True if the device multiplies bfloat16 fast enough for bounds to pay off."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(features.get("amx_bf16") or features.get("avx512_bf16"))


@contextmanager
def full_precision() -> Iterator[None]:
    """Runs the block with true float32 products, and bfloat16 products that accumulate in float32."""
    matmul = torch.backends.cuda.matmul
    newer = hasattr(matmul, "fp32_precision")  # if a user has set this one, reading the older one raises
    one_dnn = getattr(torch.backends.mkldnn, "matmul", None)  # torch declares it from 2.9 on
    kinds = [kind for kind in (matmul, one_dnn) if kind is not None] if newer else []
    precisions = [kind.fp32_precision for kind in kinds]
    older = None if newer else torch.get_float32_matmul_precision()
    reduced = matmul.allow_bf16_reduced_precision_reduction
    if hasattr(matmul, "allow_bf16_reduced_precision_reduction_split_k"):  # assigning the one resets the other
        reduced = reduced, matmul.allow_bf16_reduced_precision_reduction_split_k
    try:
        matmul.allow_bf16_reduced_precision_reduction = False
        for kind in kinds:
            kind.fp32_precision = "ieee"
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = reduced
        for kind, precision in zip(kinds, precisions, strict=True):
            kind.fp32_precision = precision
        if older is not None:
            torch.set_float32_matmul_precision(older)
