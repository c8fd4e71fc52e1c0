"""Several layers of a kind of site as one array, on the disk until it is indexed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.errors import RequestError

if TYPE_CHECKING:
    from workbench.store.reader import ActivationArray, Store


@dataclass(frozen=True, eq=False, repr=False)
class LayeredArray:
    """One kind of site at several layers: axes (row, layer, ...), read from the disk where it is indexed.

    Indexed by rows as `ActivationArray`; each layer costs one read of these rows.
    """

    store: Store
    kind: str
    """Kind of site: resid_post."""
    layers: tuple[int, ...]
    """Layer of each entry of the second axis."""

    def __post_init__(self) -> None:
        first, *others = (array.site for array in self.arrays)
        for other in others:
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise RequestError(
                    f"{other.label} has rows of {other.shape} {other.dtype} and {first.label} of {first.shape} "
                    f"{first.dtype}; read layers of equal shape and type"
                )

    def __repr__(self) -> str:
        shape = ", ".join(f"{axis} {length:,}" for axis, length in zip(self.axes, self.shape, strict=True))
        return f"{self.kind} ({shape}) {self.arrays[0].site.dtype}, layers {', '.join(map(str, self.layers))}"

    def __len__(self) -> int:
        return self.store.rows

    @cached_property
    def arrays(self) -> tuple[ActivationArray, ...]:
        """The array of each layer."""
        return tuple(self.store[self.kind, layer] for layer in self.layers)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names: row, layer, and those of the site."""
        return ("row", "layer", *self.arrays[0].axes[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, layers, ...)"""
        return (len(self), len(self.layers), *self.arrays[0].site.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Stored type, which is also that of tensors read."""
        return self.arrays[0].dtype

    def __getitem__(self, index: Any) -> Float[Tensor, "*shape"]:
        """Returns activations (row, layer, ...) of rows, or (layer, ...) of one row."""
        parts = [array[index] for array in self.arrays]
        return torch.stack(parts, parts[0].ndim - len(self.arrays[0].site.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all rows in memory for NumPy; bfloat16 becomes float32."""
        if copy is False:
            raise ValueError(f"{self.kind} is on the disk and cannot become an array without a copy")
        return np.stack([np.asarray(array, dtype) for array in self.arrays], 1)

    def blocks(self, rows: int = 8192) -> Iterator[tuple[slice, Float[Tensor, "row layer ..."]]]:
        """Yields all rows in order, `rows` at a time, each block with its slice. Memory: one block of all layers."""
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            yield slice(start, stop), self[start:stop]
