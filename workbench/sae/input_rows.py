"""Rows as an autoencoder reads them, where they are not one recorded array as it is.

An autoencoder may read one head of a site, the stream before the MLP as the norm without its weights leaves it, or
several sites of a row at once. The rows come from the recorded arrays, exactly up to float32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.model.unembed import normalise
from workbench.store.manifest import SiteRecord
from workbench.store.reader import ActivationArray, open_store

_LAYER = re.compile(r"(blocks\.)(\d+)(\..+)")


@dataclass(frozen=True)
class Norm:
    """A LayerNorm ("layer") or RMSNorm ("rms") without weights."""

    kind: str
    eps: float


@dataclass(frozen=True, eq=False, repr=False)
class InputRows(ActivationArray):
    """An array that is made of recorded ones where it is indexed. Create it with the functions of this module."""

    parts: tuple[ActivationArray, ...]
    """The recorded arrays."""
    head: int | None = None
    norm: Norm | None = None

    def __getitem__(self, index: Any) -> Float[Tensor, "*shape"]:
        """Returns rows as `ActivationArray` does; of several sites with an axis `site` before the last."""
        rows = [part[index] for part in self.parts]
        if self.head is not None:
            rows = [part[..., self.head, :] for part in rows]
        if self.norm is not None:
            rows = [normalise(part.float(), self.norm.kind, self.norm.eps) for part in rows]
        return rows[0] if len(self.site.shape) == 1 else torch.stack([part.to(self.dtype) for part in rows], -2)

    def view(self, segment: int) -> Shaped[np.ndarray, "row ..."]:
        """Refuses: the rows are not in a file."""
        raise RequestError(f"{self.site.label} is made of recorded arrays when it is read; index it")


@dataclass(frozen=True)
class PackedArray:
    """An array sent to another process, which may not see its store. Made by `pack`."""

    store: Path
    site: SiteRecord
    parts: tuple[SiteRecord, ...]
    """The recorded sites that it is made of; none: it is one itself."""
    head: int | None = None
    norm: Norm | None = None

    def open(self) -> ActivationArray:
        """Returns the array; raises as `open_store` does."""
        store = open_store(self.store)
        if not self.parts:
            return ActivationArray(store, self.site)
        parts = tuple(ActivationArray(store, site) for site in self.parts)
        return InputRows(store, self.site, parts, self.head, self.norm)


def pack(array: ActivationArray) -> PackedArray:
    """Returns what another process needs to read an array."""
    if not isinstance(array, InputRows):
        return PackedArray(array.store.path, array.site, ())
    return PackedArray(array.store.path, array.site, tuple(part.site for part in array.parts), array.head, array.norm)


def recorded(array: ActivationArray) -> tuple[ActivationArray, ...]:
    """Returns the recorded arrays that an array is made of."""
    return array.parts if isinstance(array, InputRows) else (array,)


def head_of(array: ActivationArray, head: int) -> InputRows:
    """Returns one head of an array with axes (row, head, ...).

    Raises:
        RequestError: The array has no axis of heads, or not so many.
    """
    site = array.site
    if "head" not in site.axes[1:2] or len(site.shape) != 2 or head not in range(site.shape[0]):
        axes = ", ".join(f"{axis} {length}" for axis, length in zip(site.axes[1:], site.shape, strict=True))
        raise RequestError(f"head {head} of {site.label} does not exist: a row has the axes {axes}")
    one = replace(site, axes=("row", site.axes[2]), shape=site.shape[1:])
    return InputRows(array.store, one, (array,), head)


def normalised(array: ActivationArray, norm: Norm, name: str) -> InputRows:
    """Returns an array under a norm without weights, as the site `name`."""
    site = replace(array.site, name=name, short=None, dtype="float32")
    return InputRows(array.store, site, (array,), norm=norm)


def renamed(array: ActivationArray, name: str) -> InputRows:
    """Returns an array as the site `name`, whose rows are the same."""
    return InputRows(array.store, replace(array.site, name=name, short=None), (array,))


def side_by_side(arrays: Sequence[ActivationArray]) -> InputRows:
    """Returns several arrays of one width as one with axes (row, site, d).

    Raises:
        RequestError: Arrays of other widths, or with heads.
    """
    first = arrays[0].site
    if other := next(
        (array.site for array in arrays if array.site.shape != first.shape or len(first.shape) != 1), None
    ):
        raise RequestError(f"{first.label} and {other.label} cannot be read side by side: their rows have other shapes")
    types = {array.site.dtype for array in arrays}
    dtype = types.pop() if len(types) == 1 else "float32"
    site = SiteRecord(
        joint_name([array.name for array in arrays]),
        None,
        ("row", "site", first.axes[1]),
        (len(arrays), *first.shape),
        dtype,
    )
    return InputRows(arrays[0].store, site, tuple(arrays))


def joint_name(names: Sequence[str]) -> str:
    """Returns a name for several sites: `blocks.0-25.hook_resid_mid`, `blocks.7_13.hook_resid_post`, or all names."""
    matches = [_LAYER.fullmatch(name) for name in names]
    kinds = {(match[1], match[3]) for match in matches if match}
    if None in matches or len(kinds) != 1:
        return "-and-".join(names)
    layers = [int(match[2]) for match in matches if match]
    ascending = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    text = f"{layers[0]}-{layers[-1]}" if ascending else "_".join(map(str, layers))
    ((start, end),) = kinds
    return f"{start}{text}{end}"
