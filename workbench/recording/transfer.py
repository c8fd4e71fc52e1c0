"""Activations on their way to the disk: real rows, stored type, copy to the host, and a bounded backlog."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

_BACKLOG = 8
_COUNTS = 16  # bytes of two integers


class BatchRows:
    """Rows of one right-padded batch without its padding: their places in the batch and in the segment."""

    def __init__(self, starts: Int[np.ndarray, " batch"], lengths: Int[np.ndarray, " batch"]) -> None:
        self.starts, self.lengths = starts, lengths
        self._indices: dict[tuple[int, int, torch.device], Tensor] = {}

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
            flat = flat.index_select(0, self._real(counts, first, positions, flat.device))
        runs = [
            (int(start + first), int(offset), int(n))
            for start, offset, n in zip(self.starts, offsets[:-1], counts, strict=True)
            if n
        ]
        return flat, runs

    def _real(self, counts: np.ndarray, first: int, positions: int, device: torch.device) -> Tensor:
        """Places of the rows without padding, copied to the device once for all sites of the batch."""
        key = first, positions, device
        if key not in self._indices:
            indices = torch.from_numpy(np.concatenate([np.arange(n) + i * positions for i, n in enumerate(counts)]))
            if device.type == "cuda":
                indices = indices.pin_memory()  # else the copy waits for all that the device has to do
            self._indices[key] = indices.to(device, non_blocking=device.type == "cuda")
        return self._indices[key]


class ChosenRows(BatchRows):
    """Chosen rows of one right-padded batch: `starts` are the segment's rows of the first chosen of each sequence."""

    def __init__(self, starts: Int[np.ndarray, " batch"], chosen: Sequence[Int[np.ndarray, " _"]]) -> None:
        super().__init__(starts, np.array([len(positions) for positions in chosen]))
        self.chosen = chosen

    def take(self, tensor: Tensor, first: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Returns the chosen rows of a tensor, and where they belong, as `BatchRows.take` does."""
        positions, key = tensor.shape[1], (first, tensor.shape[1], tensor.device)
        bounds = [np.searchsorted(rows, [first, first + positions]) for rows in self.chosen]
        if key not in self._indices:
            inside = [
                rows[low:high] - first + i * positions
                for i, (rows, (low, high)) in enumerate(zip(self.chosen, bounds, strict=True))
            ]
            self._indices[key] = torch.from_numpy(np.concatenate(inside).astype(np.int64)).to(tensor.device)
        runs, offset = [], 0
        for start, (low, high) in zip(self.starts, bounds, strict=True):
            if high > low:
                runs.append((int(start + low), offset, int(high - low)))
                offset += int(high - low)
        return tensor.flatten(0, 1).index_select(0, self._indices[key]), runs


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
    clamped, beyond, nonfinite = _clamped(x, limit)
    return clamped.to(dtype, **fresh), beyond, nonfinite


def _clamped(x: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """`x` with finite values moved into the range, the number of those moved, and the number of those not finite."""
    finite = torch.isfinite(x)
    beyond = finite & (x.abs() > limit)
    return torch.where(finite, x.clamp(-limit, limit), x), beyond.sum(), (~finite).sum()


def to_host(x: Tensor, dtype: torch.dtype) -> Callable[[], tuple[np.ndarray, list[int]]]:
    """Starts the conversion to the stored type and the copy to host memory, and returns a function that waits for both.

    From another device, rows and counts travel as one buffer. On CUDA it is copied on a stream of its own into pinned
    memory, during the next forward pass; nothing waits for the device before the returned function is called.

    Returns:
        A function that returns the rows in the stored type, and the counts [beyond the range, not finite] of
        `to_stored_type`.
    """
    if x.device.type == "cpu":
        stored, *counts = to_stored_type(x, dtype)
        return lambda: (as_numpy(stored), [int(n) for n in counts])
    clamped, *counts = _clamped(x, torch.finfo(dtype).max)
    buffer = torch.empty(_COUNTS + x.numel() * dtype.itemsize, dtype=torch.uint8, device=x.device)
    rows, totals = _parts(buffer, x.shape, dtype)
    rows.copy_(clamped)
    totals.copy_(torch.stack(counts))
    arrived = _copy(buffer) if x.device.type == "cuda" else buffer.cpu

    def wait() -> tuple[np.ndarray, list[int]]:
        rows, totals = _parts(arrived(), x.shape, dtype)
        return as_numpy(rows), totals.tolist()

    return wait


def _parts(buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows and the two counts in a buffer of bytes; the counts come first, where they are aligned."""
    return buffer[_COUNTS:].view(dtype).view(shape), buffer[:_COUNTS].view(torch.int64)


def _copy(buffer: Tensor) -> Callable[[], Tensor]:
    """Starts the copy of a buffer from a CUDA device; returns a function that waits for it."""
    stream = _copy_stream(buffer.device)
    stream.wait_stream(torch.cuda.current_stream(buffer.device))
    host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(buffer, non_blocking=True)
        buffer.record_stream(stream)
        copied = torch.cuda.Event()
        copied.record(stream)

    def wait() -> Tensor:
        copied.synchronize()
        return host

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


@contextmanager
def one_behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yields `later(work)`, which runs works in order in one background thread, beside what follows the call.

    A call waits for the work before it. An error of a work is raised by the next call or at the end of the block.
    """
    waiting: list[Future] = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="finisher") as pool:

        def later(work: Callable[[], None]) -> None:
            if waiting:
                waiting.pop().result()
            waiting.append(pool.submit(work))

        yield later
        if waiting:
            waiting.pop().result()
