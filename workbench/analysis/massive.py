"""Massive activations of one layer (Sun et al. 2024): where they are, and rows in which they are changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.analysis.token_attention import RaggedSequences
from workbench.store.reader import Store

_TOP = 3
_ROWS = 4096  # of values at a time
CHANGES = ("mean", "zero", "random")
"""Changes of massive activations: to their mean by dimension, and by first or later token; to 0; and as many other
dimensions of the same tokens to 0."""


@dataclass(frozen=True)
class MassivePlaces:
    """One layer: the largest |h| of each sequence, and the places of massive activations and of those largest."""

    top: Float[np.ndarray, "sequence rank"]
    """The three largest |h|, in falling order."""
    median: Float[np.ndarray, " sequence"]
    """Median |h|."""
    row: Int[np.ndarray, " place"]
    dimension: Int[np.ndarray, " place"]
    value: Float[np.ndarray, " place"]
    """h, with its sign."""
    massive: Bool[np.ndarray, " place"]
    """False for places that are among the largest of their sequence only."""
    first: Bool[np.ndarray, " place"]
    """True for the first token of a sequence."""

    def inside(
        self, sequences: RaggedSequences, chosen: Int[np.ndarray, " chosen"]
    ) -> Int[np.ndarray, "massive sequence_position_dimension_first"]:
        """Returns the massive activations of some sequences, which are counted among the chosen."""
        starts, ends = sequences.starts[chosen], (sequences.starts + sequences.lengths)[chosen]
        index = np.searchsorted(starts, self.row, side="right") - 1
        kept = self.massive & (index >= 0) & (self.row < ends[index.clip(0)])
        position = self.row - starts[index.clip(0)]
        return np.stack([index, position, self.dimension, self.first], 1)[kept]

    def changed_rows(
        self,
        rows: Float[Tensor, "sequence position d_model"],
        places: Int[np.ndarray, "massive sequence_position_dimension_first"],
        seed: int,
    ) -> tuple[Bool[Tensor, "sequence position"], dict[str, Float[Tensor, "sequence position d_model"]]]:
        """Returns the tokens with massive activations, and the rows under each of `CHANGES`.

        Args:
            rows: The rows as they are.
            places: What `inside` gives.
            seed: Random seed of the other dimensions.
        """
        at = torch.zeros(rows.shape[:2], dtype=torch.bool)
        changed = {name: rows.clone() for name in CHANGES}
        means = {}
        for dimension, first in {(int(one[2]), bool(one[3])) for one in places}:
            alike = self.massive & (self.dimension == dimension) & (self.first == first)
            means[dimension, first] = float(self.value[alike].mean(dtype=np.float64))
        others = np.setdiff1d(np.arange(rows.shape[2]), self.dimension[self.massive])
        draw, left = np.random.default_rng(seed), {}
        for sequence, position, dimension, first in places.tolist():
            at[sequence, position] = True
            changed["zero"][sequence, position, dimension] = 0.0
            changed["mean"][sequence, position, dimension] = means[dimension, bool(first)]
            order = left.setdefault((sequence, position), draw.permutation(others).tolist())
            if order:  # none where every dimension is massive somewhere
                changed["random"][sequence, position, order.pop()] = 0.0
        return at, changed


def find_massive(
    store: Store, layer: int, sequences: RaggedSequences, absolute: float, relative: float
) -> MassivePlaces:
    """Returns the massive activations of the output of a block: above `absolute` and `relative` times the median.

    Args:
        store: The recorded activations.
        layer: The block.
        sequences: The sequences; the median is that of each.
        absolute: Size that they exceed.
        relative: Multiple of the median |h| that they exceed.
    """
    array = store["resid_post", layer]
    tops, medians, parts = [], [], []
    for start, length in zip(sequences.starts.tolist(), sequences.lengths.tolist(), strict=True):
        hidden = array[start : start + length].float()
        size = hidden.abs()
        best = size.flatten().topk(min(_TOP, size.numel()))
        median = float(np.median(size.numpy()))
        massive = (size > max(absolute, relative * median)).flatten().nonzero()[:, 0]
        places = torch.cat([massive, best.indices[~torch.isin(best.indices, massive)]])
        row, dimension = places // hidden.shape[1], places % hidden.shape[1]
        known = torch.arange(len(places)) < len(massive)
        parts.append((start + row, dimension, hidden[row, dimension], known, row == 0))
        tops.append(best.values.numpy())
        medians.append(median)
    columns = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return MassivePlaces(np.array(tops, float), np.array(medians), *columns)


def mean_norms(store: Store, site: str, rows: Int[np.ndarray, " row"]) -> Float[np.ndarray, " head"]:
    """Returns the mean over rows of the L2 norm of each head's value, from `v_norm` or `v`."""
    total, array = np.zeros(1), store[site]
    for first in range(0, len(rows), _ROWS):
        values = array[rows[first : first + _ROWS]].double()
        total = total + (values.norm(dim=-1) if site.startswith("v.") else values).sum(0).numpy()
    return total / len(rows)
