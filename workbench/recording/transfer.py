"""Activations on their way to the disk: real rows, stored type, copy to the host, and a bounded backlog."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

_BACKLOG = 8


class BatchRows:
    """Rows of one right-padded batch without its padding: their places in the batch and in the segment."""

    def __init__(self, starts: Int[np.ndarray, " batch"], lengths: Int[np.ndarray, " batch"]) -> None:
        self.starts, self.lengths = starts, lengths

    def take(self, tensor: Tensor, first: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Returns the rows of a tensor without padding, and where they belong.

        Args:
            tensor: Activations (batch, position, ...).
            first: Position of the sequences at which the tensor begins.

        Returns:
            Rows (row, ...), and runs of consecutive ones: (row in the segment, row in the result, number of rows).
        """
        positions = tensor.shape[1]
        counts = np.clip(self.lengths - first, 0, positions)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        flat = tensor.flatten(0, 1)
        if offsets[-1] < len(flat):
            indices = np.concatenate([np.arange(n) + i * positions for i, n in enumerate(counts)])
            flat = flat.index_select(0, torch.from_numpy(indices).to(flat.device))
        runs = [
            (int(start + first), int(offset), int(n))
            for start, offset, n in zip(self.starts, offsets[:-1], counts, strict=True)
            if n
        ]
        return flat, runs


def to_stored_type(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | int, Tensor | int]:
    """Returns a copy of `x` in the stored type, the number of values beyond its range, and of values not finite.

    A finite value beyond the range becomes the type's largest; a value that is not finite stays as it is.
    """
    limit = torch.finfo(dtype).max
    fresh = {"copy": True, "memory_format": torch.contiguous_format}  # heads of a lone sequence may come as a view
    if x.device.type == "cpu" and x.numel():
        low, high = torch.aminmax(x)
        if low >= -limit and high <= limit:  # false for NaN too
            return x.to(dtype, **fresh), 0, 0
    finite = torch.isfinite(x)
    beyond = finite & (x.abs() > limit)
    clamped = torch.where(finite, x.clamp(-limit, limit), x)
    return clamped.to(dtype, **fresh), beyond.sum(), (~finite).sum()


def to_host(x: Tensor, *counts: Tensor | int) -> Callable[[], tuple[np.ndarray, list[int]]]:
    """Starts the copy to host memory and returns a function that waits for it.

    On a GPU the copy runs on its own stream into pinned memory, during the next forward pass.
    """
    if x.device.type != "cuda":
        return lambda: (as_numpy(x.cpu()), [int(n) for n in counts])
    stream = _copy_stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(x, non_blocking=True)
        x.record_stream(stream)
        copied = torch.cuda.Event()
        copied.record(stream)

    def wait() -> tuple[np.ndarray, list[int]]:
        copied.synchronize()
        return as_numpy(host), [int(n) for n in counts]

    return wait


_streams: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def as_numpy(x: Tensor) -> np.ndarray:
    """Returns a NumPy view of `x`; bfloat16, which NumPy lacks, as its bits in uint16."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


@contextmanager
def backlog() -> Iterator[Callable[..., None]]:
    """Yields `submit(function, *arguments)`, which runs calls in order in one background thread.

    At most 8 calls wait, so that a slow disk slows the model down instead of filling memory. An error of a call is
    raised by a later `submit` or at the end of the block.
    """
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as pool:

        def submit(function: Callable, *arguments: Any) -> None:
            while len(waiting) >= _BACKLOG:
                waiting.popleft().result()
            waiting.append(pool.submit(function, *arguments))

        try:
            yield submit
            while waiting:
                waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
