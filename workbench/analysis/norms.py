"""Norms at one position of a sequence against the other positions, and massive activations (Sun et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from workbench.analysis.received import layers_of
from workbench.analysis.sequences import Sequences
from workbench.store.reader import Store


def value_norms(
    store: Store, layer: int, sequences: Sequences, position: int
) -> Float[np.ndarray, "position_or_others head"]:
    """Returns the mean L2 norm of value vectors at a position and at the others, from `v_norm` or `v`.

    Heads are those of the values, of which several query heads may share one, where `v` is read.
    """
    kind = "v_norm" if layer in layers_of(store, "v_norm") else "v"
    array = store[kind, layer]
    sums = [
        _at_position_and_others(_norm(array[rows].double().numpy(), kind == "v"), position)
        for rows in sequences.blocks(int(np.prod(array.shape[1:])))
    ]
    return np.sum(sums, axis=0) / len(sequences)


def residual_norms(
    store: Store, layer: int, sequences: Sequences, position: int
) -> tuple[float, float, Float[np.ndarray, "sequence 4"]]:
    """Returns the mean norm of the residual stream at a position and at the others, and massive activations.

    The third is `massive_activation` of each sequence; it has no rows where only `resid_norm` was recorded.
    """
    kind = "resid_post" if layer in layers_of(store, "resid_post") else "resid_norm"
    array, sums, largest = store[kind, layer], [], []
    for rows in sequences.blocks(int(np.prod(array.shape[1:]))):
        hidden = array[rows].double().numpy()
        sums.append(_at_position_and_others(_norm(hidden, kind == "resid_post"), position))
        if kind == "resid_post":
            largest += [massive_activation(matrix.reshape(len(matrix), -1)) for matrix in hidden]
    at_position, others = (np.sum(sums, axis=0) / len(sequences)).reshape(2, -1).mean(1).tolist()
    return at_position, others, np.array(largest, dtype=np.float64).reshape(-1, 4)


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
    sink, others = np.full((2, len(layers), max(heads.values())), np.nan)
    for layer in norms.keys() & heads.keys():
        spread = np.repeat(norms[layer], heads[layer] // norms[layer].shape[1], axis=1)
        at = (layers.index(layer), slice(heads[layer]))
        sink[at], others[at] = spread
    if np.isnan(sink).all():
        return {}
    return {"value_norm_sink": sink, "value_norm_others": others, "value_norm_ratio": ratio(sink, others)}


def _norm(x: np.ndarray, vectors: bool) -> np.ndarray:
    return np.linalg.norm(x, axis=-1) if vectors else x


def _at_position_and_others(norms: Float[np.ndarray, "sequence place *head"], position: int) -> np.ndarray:
    """[position or others, *head]: summed over sequences, the others as their mean in each."""
    return np.stack([norms[:, position].sum(0), np.delete(norms, position, axis=1).mean(1).sum(0)])
