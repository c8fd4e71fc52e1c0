"""Directions from rows of a store: the difference of two means, and principal components."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64

from workbench.io.checks import check, check_kind
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.model.direction import Direction
from workbench.store.lost_values import lost_values, refuse_nonfinite
from workbench.store.reader import Rows

_BLOCK_BYTES = 32 << 20  # of rows in float64
_ROWS = "rows of a store, such as store.where('position > 0')"


def mean_difference(a: Rows, b: Rows, site: str, layer: int | None = None, *, name: str | None = None) -> Direction:
    """Returns the mean of a site over rows `a` minus its mean over rows `b`, computed in float64.

    wb.mean_difference(store.where("quoted"), store.where("NOT quoted"), "resid_post", 12)

    Costs one pass over the rows.

    Args:
        a: Rows that the direction points to.
        b: Rows that it points away from; of the same store, or of another one of the same model.
        site: A site, `resid_post.12`, or its kind, `resid_post`, with `layer`.
        layer: Layer of the site.
        name: Name of the direction. None: "mean difference".

    Raises:
        RequestError: No rows, NaN or infinite values, a site that was not recorded, or stores of two models.
    """
    for argument, rows in (("a", a), ("b", b)):
        check_kind(argument, rows, Rows, _ROWS)
        if not len(rows):
            raise RequestError(f"{argument} has no rows; a mean needs one or more")
    label = _label(a, site, layer)
    if difference := a.store.manifest.model.difference(b.store.manifest.model):
        raise RequestError(f"b is of another model than a: {difference}; take rows of one model")
    means = [_mean(rows, label) for rows in (a, b)]
    if means[0].shape != means[1].shape:
        raise RequestError(f"{label} has rows of {means[0].shape} in a and of {means[1].shape} in b; take one site")
    made_of = _made_of(a, "mean difference") | {"rows": len(a), "other_rows": len(b)}
    made_of["other_store_fingerprint"] = b.store.manifest.fingerprint
    return Direction(label, means[0] - means[1], name or "mean difference", made_of)


def principal_directions(rows: Rows, site: str, layer: int | None = None, n: int = 3) -> tuple[Direction, ...]:
    """Returns the `n` principal components of a site over rows, as unit vectors, largest variance first.

    The mean is subtracted first. Signs are chosen so that the entry with the largest absolute value is positive.
    `made_of["explained"]` is a component's share of the variance, 0 to 1; under isotropic noise, 1 / dimensions. Costs
    two passes over the rows, and an eigendecomposition of dimensions x dimensions in float64.

    Args:
        rows: The rows.
        site: A site, `resid_post.12`, or its kind, `resid_post`, with `layer`.
        layer: Layer of the site.
        n: Number of components.

    Raises:
        RequestError: Too few rows, no variance, NaN or infinite values, or a site that was not recorded.
    """
    check_kind("rows", rows, Rows, _ROWS)
    label = _label(rows, site, layer)
    mean = _mean(rows, label)
    size = mean.size
    check("n", n, at_least=1, at_most=min(size, max(1, len(rows) - 1)), whole=True)
    covariance = np.zeros((size, size))
    for block in _blocks(rows, label):
        centred = (block - mean).reshape(len(block), size)
        covariance += centred.T @ centred
    covariance /= len(rows)
    total = float(np.trace(covariance))
    if not total:
        raise RequestError(f"{label} is the same on all {counted(len(rows), 'row')} and has no principal directions")
    values, vectors = np.linalg.eigh(covariance)
    directions = []
    for place in range(n):
        value, vector = float(values[-1 - place]), vectors[:, -1 - place]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        made_of = _made_of(rows, "principal component") | {"component": place + 1, "rows": len(rows)}
        made_of |= {"variance": value, "explained": max(0.0, value) / total}
        directions.append(Direction(label, vector.reshape(mean.shape), f"component {place + 1}", made_of))
    return tuple(directions)


def _label(rows: Rows, site: str, layer: int | None) -> str:
    array = rows.store[site if layer is None else (site, layer)]
    if not array.site.shape:
        raise RequestError(f"{array.site.label} has one number a row; a site with a vector a row is needed")
    return array.site.label


def _blocks(rows: Rows, label: str) -> Iterator[Float64[np.ndarray, "row ..."]]:
    array = rows.store[label]
    step = max(1, _BLOCK_BYTES // (8 * int(np.prod(array.site.shape))))
    for first in range(0, len(rows), step):
        yield array[rows.ids[first : first + step]].double().numpy()


def _mean(rows: Rows, label: str) -> Float64[np.ndarray, ...]:
    refuse_nonfinite(lost_values(rows.store, [label], rows.ids), len(rows))
    total: Any = 0.0
    for block in _blocks(rows, label):
        total = total + block.sum(0)
    if not len(rows):
        raise RequestError("rows is empty; one or more are needed")
    return total / len(rows)


def _made_of(rows: Rows, method: str) -> dict[str, Any]:
    manifest = rows.store.manifest
    return {
        "method": method,
        "model": manifest.model.name,
        "model_fingerprint": manifest.model.fingerprint,
        "store_fingerprint": manifest.fingerprint,
    }
