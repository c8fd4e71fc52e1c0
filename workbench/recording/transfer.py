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
    """The real rows of one right-padded batch: which they are in the batch, and where they go in the segment."""

    def __init__(self, starts: Int[np.ndarray, " batch"], lengths: Int[np.ndarray, " batch"]) -> None:
        self.starts, self.lengths = starts, lengths

    def take(self, tensor: Tensor, first: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """From `[batch, position, ...]`, whose positions begin at `first`: real rows `[row, ...]`, and runs of
        (row in the segment, row here, how many)."""
        positions = tensor.shape[1]
        counts = np.clip(self.lengths - first, 0, positions)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        flat = tensor.flatten(0, 1)
        if offsets[-1] < len(flat):
            here = np.concatenate([np.arange(n) + i * positions for i, n in enumerate(counts)])
            flat = flat.index_select(0, torch.from_numpy(here).to(flat.device))
        runs = [
            (int(start + first), int(offset), int(n))
            for start, offset, n in zip(self.starts, offsets[:-1], counts, strict=True)
            if n
        ]
        return flat, runs


def to_stored_type(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | int, Tensor | int]:
    """`x` in the stored type, in memory of its own; how many finite values were beyond its range (they become
    its largest), and how many were not finite to begin with (they stay)."""
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
    """Starts the copy to host memory; the returned function waits for it. On a GPU the copy runs on its own
    stream into pinned memory, beside the next forward pass."""
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

    def arrived() -> tuple[np.ndarray, list[int]]:
        copied.synchronize()
        return as_numpy(host), [int(n) for n in counts]

    return arrived


_streams: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def as_numpy(x: Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits travel as uint16."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


@contextmanager
def backlog() -> Iterator[Callable[..., None]]:
    """Yields `submit(function, *arguments)`: run in order by one background thread, at most a few waiting, so
    a slow disk slows the model instead of filling memory. An error there is raised here."""
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
