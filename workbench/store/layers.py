"""Several layers of a kind of site as one array, on the disk until it is indexed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.errors import RequestError, nearest
from workbench.sites.grammar import SHORT_NAMES
from workbench.store.manifest import Manifest, short_list

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

    def __getitems__(self, ids: list[int]) -> list[Float[Tensor, "layer ..."]]:
        """Returns rows one by one, read together: a DataLoader of torch asks for its batches in this way."""
        return list(self[ids])

    def to_numpy(self, rows: Any = slice(None), dtype: Any = np.float32) -> np.ndarray:
        """Returns rows, indexed as above, as a NumPy array; float32, because sums in float16 overflow at 65,504."""
        return self[rows].float().numpy().astype(dtype, copy=False)

    def blocks(self, rows: int = 8192) -> Iterator[tuple[slice, Float[Tensor, "row layer ..."]]]:
        """Yields all rows in order, `rows` at a time, each block with its slice. Memory: one block of all layers."""
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            yield slice(start, stop), self[start:stop]


def layer_number(manifest: Manifest, layer: int) -> int:
    """Returns the number of a layer, which may be counted from the end."""
    n_layers = manifest.model.n_layers
    return layer + n_layers if -n_layers <= layer < 0 else layer


def select_layers(path: Path, manifest: Manifest, kind: str, layers: slice | Sequence[int]) -> tuple[int, ...]:
    """Returns the numbers of the layers that a slice or a list stands for.

    Raises:
        RequestError: No layer, or one that was not recorded.
    """
    every = range(manifest.model.n_layers)
    recorded = [layer for layer in every if any(f"{kind}.{layer}" == site.short for site in manifest.sites)]
    if layers == slice(None):
        chosen = recorded or [0]
    elif isinstance(layers, slice):
        chosen = list(every[layers])
    else:
        chosen = [layer_number(manifest, int(layer)) for layer in layers]
    if missing := [layer for layer in chosen if layer not in recorded]:
        if not recorded:
            raise not_recorded(path, manifest, f"{kind}.{missing[0]}")
        raise RequestError(
            f"layer {missing[0]} of {kind} is not recorded in {path}; recorded layers are "
            f"{', '.join(map(str, recorded))}"
        )
    if not chosen:
        raise RequestError(f"{layers} selects no layer of {kind}; the model has layers 0 to {len(every) - 1}")
    return tuple(chosen)


def not_recorded(path: Path, manifest: Manifest, label: str) -> RequestError:
    """Returns the error for a site that a store does not have, with the command that would record it."""
    known = [name for site in manifest.sites for name in (site.name, site.short) if name]
    text = f"{label} is not recorded in {path}; recorded are {short_list([site.label for site in manifest.sites])}"
    if layers := [site.label for site in manifest.sites if site.label.partition(".")[0] == label]:
        return RequestError(f"{label} is recorded by layer in {path}; name one, such as {layers[0]}")
    stem, layers = re.fullmatch(r"(\w+?)(\.-?\d+)?", label), manifest.model.n_layers
    if stem and stem[2] and not 0 <= int(stem[2][1:]) < layers:
        return RequestError(f"{label} is no site of {manifest.model.name}, whose layers are 0 to {layers - 1}")
    if stem and stem[1] in SHORT_NAMES:
        name = manifest.model.name
        return RequestError(f"{text}; to record it: workbench record {name} TEXT --sites {label} --out ANOTHER_STORE")
    return RequestError(f"{text}{nearest(label, known)}")
