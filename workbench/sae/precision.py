"""Precision of matrix products: true float32 for the exact path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("float32", "bfloat16")
"""Types of the first product: float32 is exact, bfloat16 gives upper bounds."""


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
