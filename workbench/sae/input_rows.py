"""Rows as an autoencoder reads them, where they are not one recorded site as it is.

An autoencoder may read one head of a site, the stream before the MLP as the norm without its weights leaves it, or
several sites of a row at once. A `Reading` says which recorded sites these are and what is computed of them, exactly
up to float32, whether their rows lie in a store or have just left the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
from workbench.store.reader import ActivationArray, Store, open_store

_LAYER = re.compile(r"(blocks\.)(\d+)(\..+)")


@dataclass(frozen=True)
class Norm:
    """A LayerNorm ("layer") or RMSNorm ("rms") without weights."""

    kind: str
    eps: float


@dataclass(frozen=True)
class Reading:
    """Input rows of an autoencoder, made of recorded sites."""

    site: SiteRecord
    """The rows: a name, axes and a type."""
    parts: tuple[Reading, ...] = ()
    """What they are made of. None: `site` is recorded as it is."""
    head: int | None = None
    norm: Norm | None = None

    @property
    def recorded(self) -> tuple[SiteRecord, ...]:
        """The recorded sites, in the order of the input."""
        return tuple(site for part in self.parts for site in part.recorded) if self.parts else (self.site,)

    def rows(self, rows_of: Callable[[SiteRecord], Float[Tensor, "*row ..."]]) -> Float[Tensor, "*row ..."]:
        """Returns the rows; of several sites with an axis `site` before the last.

        Args:
            rows_of: Returns rows of a recorded site.
        """
        if not self.parts:
            return rows_of(self.site)
        rows = [part.rows(rows_of) for part in self.parts]
        if self.head is not None:
            rows = [part[..., self.head, :] for part in rows]
        if self.norm is not None:
            rows = [normalise(part.float(), self.norm.kind, self.norm.eps) for part in rows]
        if len(self.site.shape) == 1:
            return rows[0]
        return torch.stack([part.to(getattr(torch, self.site.dtype)) for part in rows], -2)


@dataclass(frozen=True, eq=False, repr=False)
class InputRows(ActivationArray):
    """An array that is made of recorded ones where it is indexed. Create it with `open_reading`."""

    reading: Reading

    def __getitem__(self, index: Any) -> Float[Tensor, "*shape"]:
        """Returns rows as `ActivationArray` does; of several sites with an axis `site` before the last."""
        return self.reading.rows(lambda site: ActivationArray(self.store, site)[index])

    def view(self, segment: int) -> Shaped[np.ndarray, "row ..."]:
        """Refuses: the rows are not in a file."""
        raise RequestError(f"{self.site.label} is made of recorded arrays when it is read; index it")


def open_reading(store: Store, reading: Reading) -> ActivationArray:
    """Returns the input rows of an autoencoder as an array over all rows of a store that has the recorded sites."""
    return InputRows(store, reading.site, reading) if reading.parts else ActivationArray(store, reading.site)


def reading_of(array: ActivationArray) -> Reading:
    """Returns what an array is made of."""
    return array.reading if isinstance(array, InputRows) else Reading(array.site)


@dataclass(frozen=True)
class PackedArray:
    """An array sent to another process, which may not see its store. Made by `pack`."""

    store: Path
    reading: Reading

    def open(self) -> ActivationArray:
        """Returns the array; raises as `open_store` does."""
        return open_reading(open_store(self.store), self.reading)


def pack(array: ActivationArray) -> PackedArray:
    """Returns what another process needs to read an array."""
    return PackedArray(array.store.path, reading_of(array))


def head_of(site: SiteRecord, head: int) -> Reading:
    """Returns the reading of one head of a site with axes (row, head, ...).

    Raises:
        RequestError: The site has no axis of heads, or not so many.
    """
    if "head" not in site.axes[1:2] or len(site.shape) != 2 or head not in range(site.shape[0]):
        axes = ", ".join(f"{axis} {length}" for axis, length in zip(site.axes[1:], site.shape, strict=True))
        raise RequestError(f"head {head} of {site.label} does not exist: a row has the axes {axes}")
    head_site = replace(site, axes=("row", site.axes[2]), shape=site.shape[1:])
    return Reading(head_site, (Reading(site),), head)


def normalised(site: SiteRecord, norm: Norm, name: str) -> Reading:
    """Returns the reading of a site under a norm without weights, as the site `name`."""
    return Reading(replace(site, name=name, short=None, dtype="float32"), (Reading(site),), norm=norm)


def renamed(site: SiteRecord, name: str) -> Reading:
    """Returns the reading of a site as the site `name`, whose rows are the same."""
    return Reading(replace(site, name=name, short=None), (Reading(site),))


def side_by_side(parts: Sequence[Reading]) -> Reading:
    """Returns several readings of one width as one with axes (row, site, d).

    Raises:
        RequestError: Readings of other widths, or with heads.
    """
    first, *other_sites = (part.site for part in parts)
    if misfit := next(
        (site for site in (first, *other_sites) if site.shape != first.shape or len(first.shape) != 1), None
    ):
        raise RequestError(
            f"{first.label} and {misfit.label} cannot be read side by side: their rows have other shapes"
        )
    types = {part.site.dtype for part in parts}
    dtype = types.pop() if len(types) == 1 else "float32"
    name = joint_name([part.site.name for part in parts])
    site = SiteRecord(name, None, ("row", "site", first.axes[1]), (len(parts), *first.shape), dtype)
    return Reading(site, tuple(parts))


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
