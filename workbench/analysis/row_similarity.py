"""Similarity of two representations of the same rows: unbiased CKA, SVCCA, and overlap of principal subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.store.reader import Rows, Store

_BLOCK_BYTES = 64 << 20  # of all Gram matrices' rows in memory at a time
_ROWS_PER_DIRECTION = 10


def matching_rows(
    a: Store, b: Store, rows: Int[np.ndarray, " row"]
) -> tuple[Int[np.ndarray, " match"], Int[np.ndarray, " match"]]:
    """Returns the rows of two stores whose tokens end at the same character of the same document.

    Tokenizers may differ: a token of one store has no match where the other's ends elsewhere. Special tokens, and
    tokens that share their end with others, have none. Without characters, positions with the same id match.

    Args:
        a: A store.
        b: A store of the same texts, in the same order.
        rows: Ids of rows of `a`, ascending.

    Returns:
        Ids of rows of `a`, ascending, and of `b`.

    Raises:
        RequestError: The texts differ, or nothing matches.
    """
    keys = [_ends(a, rows), _ends(b, np.arange(b.rows))]
    _, a_index, b_index = np.intersect1d(*(key for key, _, _ in keys), assume_unique=True, return_indices=True)
    order = np.argsort(keys[0][1][a_index])
    a_index, b_index = a_index[order], b_index[order]
    ends = [last[index] for (_, _, last), index in zip(keys, (a_index, b_index), strict=True)]
    if not len(a_index) or np.mean(ends[0] == ends[1]) < 0.9:
        raise RequestError(
            f"{a.path.name} and {b.path.name} hold different texts: {len(a_index):,} of "
            f"{counted(len(rows), 'token')} end at "
            "the same character of the same document; record both from the same texts in the same order"
        )
    return keys[0][1][a_index], keys[1][1][b_index]


def _ends(store: Store, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document and last character of each token that has its own, as one number; its row; what the two must share."""
    tokens = Rows(store, rows).tokens
    end = tokens["char_end"]
    place = (tokens["position"] if end.null_count == len(end) else end.fill_null(-1)).to_numpy()
    ordinary = (place >= 0) & ~tokens["is_special"].to_numpy()
    key = (tokens["document"].to_numpy().astype(np.int64) << 32) + place
    if end.null_count == len(end):
        shared = tokens["token_id"].to_numpy().astype(object)
    else:
        shared = np.array([str(text)[-1:] for text in tokens["token"].to_pylist()], dtype=object)
    key, rows, shared = key[ordinary], rows[ordinary], shared[ordinary]
    _, first, number = np.unique(key, return_index=True, return_counts=True)
    unique = np.sort(first[number == 1])
    return key[unique], rows[unique], shared[unique]


@dataclass(frozen=True)
class Principal:
    """Centred rows by their singular vectors."""

    scores: Float64[Tensor, "row direction"]
    """Orthonormal columns: left singular vectors, the largest first."""
    directions: Float64[Tensor, "d_model direction"]
    """Right singular vectors."""
    kept: int
    """Directions that SVCCA keeps."""


def unbiased_cka(
    a: Sequence[Float[Tensor, "row _"]], b: Sequence[Float[Tensor, "row _"]]
) -> Float64[np.ndarray, "layer other_layer"]:
    """Returns the unbiased linear CKA of every representation in `a` with every one in `b`, at most 1.

    HSIC is the U-statistic of Song et al. 2012 (JMLR 13, eq. 5), whose mean is 0 for independent rows; the biased one
    grows with d_model / rows. Computed in float64, in blocks of rows of the Gram matrices. Costs
    (len(a) + len(b)) x rows² x d_model operations.

    Args:
        a: Centred rows, 4 or more.
        b: Centred rows, the same number.
    """
    rows = len(a[0])
    all_parts = [*a, *b]
    sums = torch.zeros(len(all_parts), rows, dtype=torch.float64)
    products = torch.zeros(len(a), len(b), dtype=torch.float64)
    squares = torch.zeros(len(all_parts), dtype=torch.float64)
    step = max(1, _BLOCK_BYTES // (8 * rows * len(all_parts)))
    with progress("CKA", rows, "rows") as advance:
        for first in range(0, rows, step):
            block = slice(first, min(first + step, rows))
            grams = torch.stack([_gram(part, block) for part in all_parts])
            sums[:, block] = grams.sum(2)
            flat = grams.flatten(1)
            products += flat[: len(a)] @ flat[len(a) :].T
            squares += flat.square().sum(1)
            advance(block.stop - block.start)

    def hsic(product: Tensor, a_sums: Tensor, b_sums: Tensor) -> Tensor:
        totals = a_sums.sum(-1) * b_sums.sum(-1) / ((rows - 1) * (rows - 2))
        return (product + totals - 2 / (rows - 2) * (a_sums * b_sums).sum(-1)) / (rows * (rows - 3))

    scale = hsic(squares, sums, sums).clamp(min=0).sqrt()
    cross = hsic(products, sums[: len(a), None], sums[None, len(a) :])
    return (cross / (scale[: len(a), None] * scale[None, len(a) :])).numpy()


def _gram(x: Tensor, block: slice) -> Tensor:
    """Some rows of the Gram matrix, its diagonal 0."""
    gram = x[block].double() @ x.double().T
    gram[torch.arange(len(gram)), torch.arange(len(x))[block]] = 0
    return gram


def principal(x: Float[Tensor, "row d_model"], variance: float, subspace: int) -> Principal:
    """Returns the singular vectors of centred rows.

    Args:
        x: Centred rows.
        variance: Share of the variance that the directions kept for SVCCA hold; at most a tenth as many as rows.
        subspace: Minimum number of directions returned, if there are as many.
    """
    x = x.double()
    small = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    values, vectors = torch.linalg.eigh(small)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    share = values.cumsum(0) / values.sum()
    svcca_rank = min(int((share < variance).sum()) + 1, max(1, len(x) // _ROWS_PER_DIRECTION))
    rank = int((values > 1e-10 * values[0]).sum())
    number = min(max(svcca_rank, subspace), rank)
    vectors, scale = vectors[:, :number], values[:number].sqrt()
    if x.shape[0] >= x.shape[1]:
        return Principal(x @ vectors / scale, vectors, min(svcca_rank, number))
    return Principal(vectors, x.T @ vectors / scale, min(svcca_rank, number))


def svcca(a: Principal, b: Principal, order: Int[np.ndarray, " row"] | None = None) -> float:
    """Returns the mean canonical correlation of the kept directions, 0 to 1 (Raghu et al. 2017, arXiv 1706.05806).

    Args:
        a: One representation.
        b: Another of the same rows.
        order: Order of the rows of `b`, for a control.
    """
    b_scores = b.scores[:, : b.kept] if order is None else b.scores[torch.as_tensor(order), : b.kept]
    correlations = torch.linalg.svdvals(a.scores[:, : a.kept].T @ b_scores)
    return float(correlations.clamp(max=1).mean())


def subspace_overlap(a: Principal, b: Principal, number: int) -> float:
    """Returns ‖A^T B‖² / number of the first `number` principal directions, 0 to 1; NaN for other widths or fewer.

    1: the same subspace. Random subspaces have number / d_model.
    """
    if a.directions.shape[0] != b.directions.shape[0] or min(a.directions.shape[1], b.directions.shape[1]) < number:
        return float("nan")
    return float((a.directions[:, :number].T @ b.directions[:, :number]).square().sum() / number)
