"""Arrays over the rows of a store whose values are computed from recorded sites where they are indexed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.store.reader import Store
from workbench.store.selected_rows import row_ids


@dataclass(frozen=True, eq=False, repr=False)
class ComputedArray:
    """One activation over all rows, axes (row, ...) in float32, computed from recorded sites where it is indexed.

    Indexed by rows as `ActivationArray`. Nothing is stored; memory and time are those of the rows that are read.
    """

    store: Store
    label: str
    """Name in messages: result.3."""
    axes: tuple[str, ...]
    """Axis names, `row` first."""
    row_shape: tuple[int, ...]
    compute: Callable[[Int64[np.ndarray, " selected"]], Float[Tensor, "selected ..."]]
    """Returns the values of rows, in their order."""

    def __repr__(self) -> str:
        shape = ", ".join(f"{axis} {length:,}" for axis, length in zip(self.axes, self.shape, strict=True))
        return f"{self.label} ({shape}), computed when read"

    def __len__(self) -> int:
        return self.store.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, ...)"""
        return (len(self), *self.row_shape)

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def __getitem__(self, index: Any) -> Float[Tensor, "*shape"]:
        """Returns values of a row, a slice, integers of any shape, a mask, or `Rows`. IndexError beyond the end."""
        ids = row_ids(index, self.store, self.label)
        return self.compute(ids.reshape(-1)).reshape(*ids.shape, *self.row_shape)

    def blocks(self, rows: int = 1024) -> Iterator[tuple[slice, Float[Tensor, "row ..."]]]:
        """Yields all rows in order, `rows` at a time, each block with its slice. Memory: one block."""
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            yield slice(start, stop), self[start:stop]
