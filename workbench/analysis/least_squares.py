"""Least squares by documents: one pass over the rows gives the fit on all of them and on all but each fold."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

_RIDGE = 1e-12  # of the mean variance: keeps a singular system solvable, such as that of centred states


class FoldedLeastSquares:
    """Residuals of `targets ~ states + 1`, in sample and across folds of documents, from sums in float64.

    Memory: folds x d_model^2 numbers. Directions with less than 1e-12 of the mean variance are not used.
    """

    def __init__(self, d_model: int, targets: int, folds: int, device: str | torch.device = "cpu") -> None:
        options = {"dtype": torch.float64, "device": device}
        self._gram = torch.zeros(folds, d_model + 1, d_model + 1, **options)
        self._cross = torch.zeros(folds, d_model + 1, targets, **options)
        self._squares = torch.zeros(folds, targets, **options)
        self._rows = np.zeros(folds, np.int64)

    def add(self, fold: int, states: Float[Tensor, "row d_model"], targets: Float[Tensor, "row target"]) -> None:
        """Adds rows of one fold."""
        states = states.to(self._gram)
        states = torch.cat([states, torch.ones_like(states[:, :1])], 1)
        targets = targets.to(self._gram)
        self._gram[fold] += states.T @ states
        self._cross[fold] += states.T @ targets
        self._squares[fold] += targets.square().sum(0)
        self._rows[fold] += len(states)

    def in_sample(self, without: int | None = None) -> Float[np.ndarray, " target"]:
        """Returns the sum of squared residuals of the fit on all rows, or on all but a fold, on the rows of the fit."""
        folds = [fold for fold in range(len(self._gram)) if fold != without]
        return self._squared(self._fit(folds), folds)

    def held_out(self) -> Float[np.ndarray, " target"]:
        """Returns the sum of squared residuals of each fold under the fit on the others; NaN with fewer than two."""
        present = np.flatnonzero(self._rows).tolist()
        if len(present) < 2:
            return np.full(self._squares.shape[1], np.nan)
        parts = [self._squared(self._fit([f for f in present if f != fold]), [fold]) for fold in present]
        return np.sum(parts, axis=0)

    def _fit(self, folds: Iterable[int]) -> Tensor:
        index = torch.tensor(list(folds), device=self._gram.device)
        gram, cross = self._gram[index].sum(0), self._cross[index].sum(0)
        gram.diagonal()[:-1] += _RIDGE * gram.diagonal()[:-1].mean()
        return torch.linalg.solve(gram, cross)

    def _squared(self, fit: Tensor, folds: Iterable[int]) -> np.ndarray:
        index = torch.tensor(list(folds), device=self._gram.device)
        gram, cross, squares = (part[index].sum(0) for part in (self._gram, self._cross, self._squares))
        residual = squares - 2 * (fit * cross).sum(0) + (fit * (gram @ fit)).sum(0)
        return residual.clamp(min=0).cpu().numpy()


def document_folds(documents: Shaped[np.ndarray, " row"], folds: int, seed: int) -> Int[np.ndarray, " row"]:
    """Returns the fold of each row: whole documents, drawn at random, in folds of about equal numbers of documents."""
    unique_documents, index = np.unique(documents, return_inverse=True)
    fold = np.arange(len(unique_documents)) % folds
    return np.random.default_rng(seed).permutation(fold)[index]
