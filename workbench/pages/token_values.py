"""Values that colour the tokens of a text: norms of activations, arrays over rows, variables of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int64

from workbench.features.feature_store import Features
from workbench.io.errors import RequestError, nearest
from workbench.store.reader import Store


@dataclass(frozen=True)
class TokenValues:
    """Values of tokens by layer."""

    name: str
    layers: list[str]
    """Names of the layers, in order; "" for values without layers."""
    read: Callable[[Int64[np.ndarray, " row"]], Float[np.ndarray, "layer row"]]
    """Returns the values of row ids."""


def token_values(store: Store, values: str | xr.DataArray | np.ndarray | None) -> TokenValues:
    """Returns the values of a store's tokens that a view shows; `values` as `TokenView` takes them.

    Raises:
        RequestError: For a site that was not recorded, or an array of another shape.
    """
    if isinstance(values, xr.DataArray):
        return _labelled_values(values)
    if isinstance(values, np.ndarray):
        array = np.atleast_2d(values)
        if array.ndim != 2 or array.shape[1] != store.rows:
            raise RequestError(f"values has shape {values.shape}; expected ({store.rows},) or (layers, {store.rows})")
        layers = _array_layers(store, len(array)) if values.ndim > 1 else [""]
        return TokenValues("value", layers, lambda ids: array[:, ids].astype(np.float32))
    return _norms(store, values)


def full_activations(features: Features) -> Float[np.ndarray, " feature"]:
    """Returns the activation at which the colour of each feature is full; 0 of features that are never active.

    It is the 99 % quantile over the active tokens of the store: the smallest activation that at most 1 % exceed; the
    maximum for at most 100 active tokens. Cost: one value per feature is read.
    """
    full, active, counts = np.zeros(features.shape[1], np.float32), features.counts > 0, features.counts
    strongest = features.by_feature["indptr"][:-1] + (counts - 1) // 100
    full[active] = features.by_feature["value"][strongest[active]]
    return full


def _array_layers(store: Store, count: int) -> list[str]:
    """Numbers of the recorded layers, or of all layers of the model, if there are `count`; else places in the array."""
    numbers = (site.label.partition(".")[2] for site in store.sites)
    recorded = sorted({int(number) for number in numbers if number.isdecimal()})
    for layers in (recorded, range(store.manifest.model.n_layers)):
        if len(layers) == count:
            return [str(layer) for layer in layers]
    return [f"line {place} of values" for place in range(count)]


def _labelled_values(values: xr.DataArray) -> TokenValues:
    if set(values.dims) not in ({"row"}, {"layer", "row"}) or "row" not in values.coords:
        raise RequestError(
            f"values has axes {values.dims}; expected (row) or (layer, row), with row ids as coordinates"
        )
    ordered = values.transpose(..., "row")
    layers = [str(layer) for layer in values["layer"].values] if "layer" in values.dims else [""]
    unit = values.attrs.get("units", "")
    return TokenValues(
        f"{values.name or 'value'}{f' ({unit})' if unit else ''}",
        layers,
        lambda ids: np.atleast_2d(ordered.reindex(row=ids).to_numpy()).astype(np.float32),
    )


def _norms(store: Store, kind: str | None) -> TokenValues:
    """L2 norms at every recorded layer of a kind of site."""
    names = [site.label for site in store.sites]
    kind = (names[0] if kind is None else kind).partition(".")[0]
    sites = [name for name in names if name.partition(".")[0] == kind]
    if not sites:
        raise RequestError(f"values: no site of kind {kind!r} was recorded{nearest(kind, names)}")
    return TokenValues(
        f"L2 norm of {kind}",
        [name.partition(".")[2] for name in sites],
        lambda ids: np.stack([store[name][ids].float().flatten(1).norm(dim=1).numpy() for name in sites]),
    )
