"""Several layers of a kind of site as one array, on the disk until it is indexed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.checks import check
from workbench.io.errors import RequestError, nearest, shown
from workbench.sites.absent_sites import absence
from workbench.sites.grammar import SHORT_NAMES
from workbench.store.manifest import Manifest, SiteRecord, short_list
from workbench.store.row_array import RowArray

if TYPE_CHECKING:
    from workbench.store.reader import ActivationArray, Store

ANEW = "record it anew with all sites that are needed, into another out"
"""Advice for a store to which no site can be added."""


@dataclass(frozen=True, eq=False, repr=False)
class LayeredArray(RowArray):
    """One kind of site at several layers: axes (row, layer, ...); each layer costs one read of the indexed rows."""

    arrays: tuple[ActivationArray, ...]
    """The array of each layer."""
    layers: tuple[int, ...]
    """Layer of each entry of the second axis."""

    def __repr__(self) -> str:
        return f"{super().__repr__()} {self.site.dtype}, layers {', '.join(map(str, self.layers))}"

    def __getitem__(self, index: Any) -> Float[Tensor, "*shape"]:
        """Returns activations (row, layer, ...) of rows, or (layer, ...) of one row."""
        parts = [array[index] for array in self.arrays]
        return torch.stack(parts, parts[0].ndim - len(self.arrays[0].site.shape))


def layered_array(store: Store, kind: str, layers: slice | Sequence[int]) -> LayeredArray:
    """Returns one kind of site, such as resid_post, at several layers of a store.

    Raises:
        RequestError: No layer, one that was not recorded, or layers whose rows differ in shape or type.
    """
    numbers = select_layers(store.path, store.manifest, kind, layers)
    arrays = tuple(store[kind, number] for number in numbers)
    first, *other_sites = (array.site for array in arrays)
    for other_site in other_sites:
        if (other_site.shape, other_site.dtype) != (first.shape, first.dtype):
            raise RequestError(
                f"{other_site.label} has rows of {other_site.shape} {other_site.dtype} and {first.label} of "
                f"{first.shape} {first.dtype}; read layers of equal shape and type"
            )
    site = SiteRecord(kind, None, ("row", "layer", *first.axes[1:]), (len(numbers), *first.shape), first.dtype)
    return LayeredArray(store, site, arrays, numbers)


def layer_number(manifest: Manifest, layer: int) -> int:
    """Returns the number of a layer, which may be counted from the end."""
    n_layers = manifest.model.n_layers
    return layer + n_layers if -n_layers <= layer < 0 else layer


def known_layer(manifest: Manifest, layer: int) -> int:
    """Returns the number of a layer of the model, as `layer_number` does. RequestError for one that it lacks."""
    n_layers = manifest.model.n_layers
    check("layer", layer, at_least=-n_layers, at_most=n_layers - 1, whole=True)
    return layer_number(manifest, layer)


def select_layers(path: Path, manifest: Manifest, kind: str, layers: slice | Sequence[int]) -> tuple[int, ...]:
    """Returns the numbers of the layers that a slice or a list stands for.

    Raises:
        RequestError: No layer, or one that was not recorded.
    """
    if isinstance(layers, str) or not isinstance(layers, slice | Iterable):
        raise RequestError(f"layers of {kind} must be a number, a slice or a list of numbers, not {shown(layers)}")
    all_layers = range(manifest.model.n_layers)
    recorded = [layer for layer in all_layers if any(f"{kind}.{layer}" == site.short for site in manifest.sites)]
    if layers == slice(None):
        chosen = recorded or [0]
    elif isinstance(layers, slice):
        chosen = list(all_layers[layers])
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
        raise RequestError(f"{layers} selects no layer of {kind}; the model has layers 0 to {len(all_layers) - 1}")
    return tuple(chosen)


def not_recorded(path: Path, manifest: Manifest, label: str) -> RequestError:
    """Returns the error for a site that a store does not have, with the command that would record it."""
    known = [name for site in manifest.sites for name in (site.name, site.short) if name]
    recorded = f"recorded are {short_list([site.label for site in manifest.sites])}"
    text = f"{label} is not recorded in {path}"
    if layers := [site.label for site in manifest.sites if site.label.partition(".")[0] == label]:
        return RequestError(f"{label} is recorded by layer in {path}; name one, such as {layers[0]}")
    stem, layers = re.fullmatch(r"(\w+?)(\.-?\d+)?", label), manifest.model.n_layers
    if stem and stem[2] and not 0 <= int(stem[2][1:]) < layers:
        return RequestError(f"{label} is no site of {manifest.model.name}, whose layers are 0 to {layers - 1}")
    if stem and stem[1] in SHORT_NAMES:
        name, layer = manifest.model.name, None if stem[2] is None else int(stem[2][1:])
        if reason := absence(manifest.model.absent_sites, stem[1], layer):
            return RequestError(f"{text}, and {name} does not offer it: {reason}; {recorded}")
        if reason := fixed_sites(manifest):
            return RequestError(f"{text}, which {reason}, so that no site can be added; {recorded}; {ANEW}")
        command = f"workbench add {shlex.quote(str(path))} --sites {label}"
        return RequestError(f"{text}; {recorded}; to add it: {command}")
    return RequestError(f"{text}; {recorded}{nearest(label, known)}")


def fixed_sites(manifest: Manifest) -> str | None:
    """Returns why no site can be added to a store; None where some can."""
    if manifest.chosen:
        return "holds chosen rows alone"
    if manifest.interventions or manifest.gradient_of:
        return f"was recorded with {'interventions' if manifest.interventions else 'gradients'}"
    return None


def offered_label(manifest: Manifest, *kinds: str) -> str:
    """Returns the label of the first site of these kinds that the model offers; of the first kind where it has none."""
    model = manifest.model
    places = ((kind, layer) for kind in kinds for layer in range(model.n_layers))
    offered = (f"{kind}.{layer}" for kind, layer in places if not absence(model.absent_sites, kind, layer))
    return next(offered, f"{kinds[0]}.0")
