"""Norms at one position of a sequence against the other positions, and massive activations (Sun et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from workbench.analysis.read_layers import layers_of
from workbench.analysis.sequences import Sequences
from workbench.results.bootstrap import clustered_ends
from workbench.store.reader import Store


def value_site(store: Store, layer: int) -> str:
    """Returns the site that `value_norms` reads at a layer: v_norm where it was recorded, else v."""
    return f"v_norm.{layer}" if layer in layers_of(store, "v_norm") else f"v.{layer}"


def residual_site(store: Store, layer: int) -> str:
    """Returns the site that `residual_norms` reads at a layer: resid_post where it was recorded, else resid_norm."""
    return f"resid_post.{layer}" if layer in layers_of(store, "resid_post") else f"resid_norm.{layer}"


def value_norms(
    store: Store, layer: int, sequences: Sequences, position: int
) -> Float[np.ndarray, "position_or_others head"]:
    """Returns the mean L2 norm of value vectors at a position and at the others, from `v_norm` or `v`.

    Heads are those of the values, of which several query heads may share one, where `v` is read.
    """
    site = value_site(store, layer)
    array, vectors = store[site], site.startswith("v.")
    sums = [
        _at_position_and_others(_norm(array[rows].double().numpy(), vectors), position).sum(1)
        for rows in sequences.blocks(int(np.prod(array.shape[1:])))
    ]
    return np.sum(sums, axis=0) / len(sequences)


def residual_norms(
    store: Store,
    layer: int,
    sequences: Sequences,
    position: int,
    *,
    absolute: float,
    relative: float,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Returns mean norms of the residual stream with 95 % intervals over documents, and `massive_shares`.

    The norms are those at a position and at the others, and their ratio. The shares are left out where only
    `resid_norm` was recorded.
    """
    site = residual_site(store, layer)
    array, whole, parts, largest = store[site], site.startswith("resid_post."), [], []
    for rows in sequences.blocks(int(np.prod(array.shape[1:]))):
        hidden = array[rows].double().numpy()
        parts.append(_at_position_and_others(_norm(hidden, whole), position).reshape(2, len(rows), -1).mean(2))
        if whole:
            largest += [massive_activation(matrix.reshape(len(matrix), -1)) for matrix in hidden]
    by_sequence = np.concatenate(parts, 1).T
    ends = clustered_ends(by_sequence, sequences.document, resamples=resamples, seed=seed)
    norms = {}
    for end, values in zip(("", "_low", "_high"), (by_sequence.mean(0), *ends), strict=True):
        norms |= {f"residual_norm_sink{end}": float(values[0]), f"residual_norm_others{end}": float(values[1])}
    norms["residual_norm_ratio"] = ratio(norms["residual_norm_sink"], norms["residual_norm_others"])
    return norms | (massive_shares(np.array(largest, dtype=np.float64), absolute, relative) if largest else {})


def massive_activation(hidden: Float[np.ndarray, "position d_model"]) -> tuple[float, float, int, int]:
    """Returns the largest |h| of one sequence's residual stream, the median |h|, and the largest's position and
    dimension."""
    size = np.abs(hidden)
    position, dimension = np.unravel_index(int(size.argmax()), size.shape)
    return float(size.max()), float(np.median(size)), int(position), int(dimension)


def massive_shares(largest: Float[np.ndarray, "sequence 4"], absolute: float, relative: float) -> dict[str, float]:
    """Returns size, place and frequency of massive activations over sequences.

    Args:
        largest: `massive_activation` of each sequence.
        absolute: Minimum size.
        relative: Minimum ratio to the median.
    """
    top, median, position, dimension = largest.T
    large, rare = top > absolute, top > relative * median
    return {
        "massive_top": float(top.mean()),
        "massive_median": float(median.mean()),
        "massive_position": float(np.bincount(position.astype(int)).argmax()),
        "massive_dimension": float(np.bincount(dimension.astype(int)).argmax()),
        "massive_above_absolute": float(large.mean()),
        "massive_above_ratio": float(rare.mean()),
        "massive": float((large & rare).mean()),
    }


def massive_text(data: xr.Dataset) -> str:
    """Returns the massive activations of the layer that has most, the largest if equal, as a phrase.

    Without any it is the largest activation of all.
    """
    names = [f"massive{part}" for part in ("", "_top", "_median", "_position", "_dimension")]
    layers = data[names].dropna("layer")
    at = layers.isel(layer=int(np.lexsort((layers["massive_top"].to_numpy(), layers["massive"].to_numpy()))[-1]))
    share, size, median, position, dimension = (float(at[name]) for name in names)
    times = f", {size / median:z,.0f} times the median" if median else ""
    place = f"layer {int(at['layer'])}, position {position:z.0f}, dimension {dimension:z.0f}"
    summary = f"massive activations in {100 * share:z.0f} % of sequences" if share else "no massive activations"
    mean = f"{size:z,.0f}" if size >= 1000 else f"{size:.3g}"
    return f"{summary}: the largest of a sequence is {mean} on average{times} ({place})"


def ratio(values: Any, others: Any) -> Any:
    """Returns `values / others`; NaN for 0 / 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(values, others)


def stack_value_norms(
    layers: Sequence[int], heads: Mapping[int, int], norms: Mapping[int, Float[np.ndarray, "position_or_others head"]]
) -> dict[str, Float[np.ndarray, "layer query_head"]]:
    """Returns value norms over (layer, query head) and their ratio; several query heads may read one value.

    Args:
        layers: Layers of the first axis.
        heads: Layer to its number of query heads.
        norms: Layer to its `value_norms`; NaN stands for a layer without. Without any the result is empty.
    """
    sink_norms, other_norms = np.full((2, len(layers), max(heads.values())), np.nan)
    for layer in norms.keys() & heads.keys():
        spread = np.repeat(norms[layer], heads[layer] // norms[layer].shape[1], axis=1)
        at = (layers.index(layer), slice(heads[layer]))
        sink_norms[at], other_norms[at] = spread
    if np.isnan(sink_norms).all():
        return {}
    return {
        "value_norm_sink": sink_norms,
        "value_norm_others": other_norms,
        "value_norm_ratio": ratio(sink_norms, other_norms),
    }


def _norm(x: np.ndarray, vectors: bool) -> np.ndarray:
    return np.linalg.norm(x, axis=-1) if vectors else x


def _at_position_and_others(norms: Float[np.ndarray, "sequence place *head"], position: int) -> np.ndarray:
    """[position or others, sequence, *head], the others as their mean in each sequence."""
    return np.stack([norms[:, position], np.delete(norms, position, axis=1).mean(1)])
