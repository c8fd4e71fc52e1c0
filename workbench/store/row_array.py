"""Base of the arrays over the rows of a store: recorded, of several layers, or computed where they are indexed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from workbench.store.manifest import SiteRecord
    from workbench.store.reader import Store

_BLOCK_ROWS, _BLOCK_BYTES = 8192, 64 << 20  # of a default block, at most


@dataclass(frozen=True, eq=False, repr=False)
class RowArray(ABC):
    """One activation over all rows of a store, axes (row, ...), read where it is indexed.

    `array[3]`, slices, integers of any shape, masks and `Rows` give torch tensors. An array is also a dataset of torch:
    `DataLoader(array, batch_size=4096, shuffle=True)` reads each batch at once.
    """

    store: Store
    site: SiteRecord
    """Name, axes, lengths and type of what is read."""

    @abstractmethod
    def __getitem__(self, index: Any) -> Float[Tensor, "*shape"]:
        """Returns values of a row, a slice, integers of any shape, a mask, or `Rows`. IndexError beyond the end."""

    def __repr__(self) -> str:
        return f"{self.site.label} ({', '.join(f'{axis} {length}' for axis, length in self._lengths.items())})"

    def _repr_html_(self) -> str:
        from workbench.figures.markup import card

        size = len(self) * self.site.row_bytes / 1e6
        values = {"values": f"{self.site.dtype}, {size:,.1f} MB", "store": self.store.path}
        return card(f"{type(self).__name__} {self.site.label}", {"site": self.name, **self._lengths, **values})

    def __len__(self) -> int:
        return self.store.rows

    @property
    def name(self) -> str:
        """TransformerLens name of the site."""
        return self.site.name

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names, `row` first."""
        return self.site.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, ...)"""
        return (len(self), *self.site.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of tensors read; of a recorded site the stored one."""
        return getattr(torch, self.site.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all rows in memory for NumPy, in the stored type; bfloat16, which NumPy lacks, becomes float32."""
        if copy is False:
            raise ValueError(f"{self.site.label} is not in memory and cannot become an array without a copy")
        values = self[:]
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitems__(self, ids: list[int]) -> list[Float[Tensor, ...]]:
        """Returns rows one by one, read together: a DataLoader of torch asks for its batches in this way."""
        return list(self[ids])

    def to_numpy(self, rows: Any = slice(None), dtype: Any = np.float32) -> np.ndarray:
        """Returns rows, indexed as above, as a NumPy array; float32, because sums in float16 overflow at 65,504."""
        return self[rows].float().numpy().astype(dtype, copy=False)

    def blocks(self, rows: int | None = None) -> Iterator[tuple[slice, Float[Tensor, "row ..."]]]:
        """Yields all rows in order, `rows` at a time, each block with its slice. Memory: one block.

        Args:
            rows: Rows of a block. None: as many as fit in 64 MiB, at most 8,192.
        """
        rows = rows or max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // self.site.row_bytes))
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            yield slice(start, stop), self[start:stop]

    @property
    def _lengths(self) -> dict[str, str]:
        """Length of each axis, by name."""
        return {axis: f"{length:,}" for axis, length in zip(self.axes, self.shape, strict=True)}
