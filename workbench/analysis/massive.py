"""Massive activations of one layer (Sun et al. 2024): where they are, and rows in which they are changed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.analysis.change_effects import Change
from workbench.analysis.token_attention import RaggedSequences
from workbench.model.capture import capture
from workbench.model.load import Model
from workbench.model.row_records import Set
from workbench.sae.spliced_loss import Batch
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

    def changed(
        self,
        rows: Float[Tensor, "batch position d_model"],
        ids: Int[Tensor, "batch position"],
        change: str,
        seed: int,
    ) -> tuple[Float[Tensor, "batch position d_model"], Bool[Tensor, "batch position"]]:
        """Returns rows with their massive activations changed, and the mask of those that are.

        Args:
            rows: The rows as they are.
            ids: Their ids in the store.
            change: One of `CHANGES`.
            seed: Random seed of the other dimensions.
        """
        rows, at = rows.clone(), torch.isin(ids, torch.from_numpy(np.unique(self.row[self.massive])))
        other_dimensions = np.setdiff1d(np.arange(rows.shape[2]), self.dimension[self.massive])
        for sequence, position in at.nonzero().tolist():
            row = int(ids[sequence, position])
            places = np.flatnonzero(self.massive & (self.row == row))
            dimensions = self.dimension[places].tolist()
            if change == "random":
                drawn_dimensions = np.random.default_rng((seed, row)).permutation(other_dimensions)[: len(dimensions)]
                rows[sequence, position, drawn_dimensions] = 0.0
            elif change == "zero":
                rows[sequence, position, dimensions] = 0.0
            else:
                means = [self._mean(self.dimension[place], self.first[place]) for place in places]
                rows[sequence, position, dimensions] = torch.tensor(means, dtype=rows.dtype)
        return rows, at

    def _mean(self, dimension: np.integer, first: np.bool) -> float:
        alike = self.massive & (self.dimension == dimension) & (self.first == first)
        return float(self.value[alike].mean(dtype=np.float64))


def massive_changes(model: Model, layer: int, places: MassivePlaces, seed: int) -> dict[str, Change]:
    """Returns each of `CHANGES` at the output of a block, for `change_effects`; a batch is read once for all of them.

    Args:
        model: The recorded model.
        layer: The block.
        places: Its massive activations.
        seed: Random seed of the control.
    """
    site = model.site_map.select([f"resid_post.{layer}"])
    cache: list[tuple[Batch, Tensor]] = []

    def plain(batch: Batch) -> Tensor:
        if not cache or cache[0][0] is not batch:
            rows: list[Tensor] = []
            capture(model.module, site, batch.ids, batch.mask, lambda _site, tensor, _first: rows.append(tensor.cpu()))
            cache[:] = [(batch, rows[0])]
        return cache[0][1]

    def change(name: str, batch: Batch) -> list[Set]:
        rows, at = places.changed(plain(batch), batch.row, name, seed)
        return [Set(site[0].name, rows, at=at)] if bool(at.any()) else []

    return {name: partial(change, name) for name in CHANGES}


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
        is_massive = torch.arange(len(places)) < len(massive)
        parts.append((start + row, dimension, hidden[row, dimension], is_massive, row == 0))
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
