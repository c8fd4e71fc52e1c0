"""Geometry of a cloud of points: nearest neighbours, intrinsic dimension, overlap of neighbourhoods, mean cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from torch import Tensor

_LARGEST = 1e6  # dimension beyond which none is looked for
_SPARE = 8  # candidates for nearest neighbours beyond those asked for


@dataclass(frozen=True)
class Neighbours:
    """Nearest neighbours of each point, the nearest first, without the point itself."""

    distance: Float[np.ndarray, "point neighbour"]
    index: Int[np.ndarray, "point neighbour"]


def distinct(points: Float[Tensor, "point d"]) -> Bool[np.ndarray, " point"]:
    """Returns which points are the first of those that equal each other exactly."""
    _, first = np.unique(points.numpy(), axis=0, return_index=True)
    mask = np.zeros(len(points), bool)
    mask[first] = True
    return mask


def nearest_neighbours(points: Float[Tensor, "point d"], number: int) -> Neighbours:
    """Returns the `number` nearest neighbours by Euclidean distance, in float64.

    Inner products choose some candidates for each point, whose distances are computed from differences; where rounding
    might have hidden a nearer one, all are. Costs points^2 x d operations, as one product of matrices.
    """
    exact = points.double()
    centred = exact - exact.mean(0)
    norms = centred.square().sum(1)
    squares = (norms[:, None] + norms - 2 * centred @ centred.T).fill_diagonal_(torch.inf)
    near = squares.topk(min(number + _SPARE, len(exact) - 1), largest=False)
    rounding = 1e4 * torch.finfo(torch.float64).eps * norms.max()
    distances, indices = (np.empty((len(exact), number), kind) for kind in (np.float64, np.int64))
    for point, (candidates, limit) in enumerate(zip(near.indices, near.values[:, -1] - rounding, strict=True)):
        distance = (exact[candidates] - exact[point]).norm(dim=1)
        if len(candidates) < len(exact) - 1 and distance.kthvalue(number).values ** 2 > limit:
            distance = (exact - exact[point]).norm(dim=1)
            distance[point] = torch.inf
            candidates = torch.arange(len(exact), device=exact.device)
        nearest = distance.topk(number, largest=False)
        distances[point], indices[point] = nearest.values.numpy(), candidates[nearest.indices].numpy()
    return Neighbours(distances, indices)


def gride(distance: Float[np.ndarray, "point neighbour"], near: int, far: int) -> float:
    """Returns the intrinsic dimension by maximum likelihood from the distances to two neighbours (GRIDE, Denti 2022).

    With (1, 2) it is n / sum log(r_2 / r_1), TwoNN by maximum likelihood (Facco 2017). It assumes a constant density up
    to the far neighbour; dimensions above about 10 are underestimated. NaN where all ratios are 1.

    Args:
        distance: Distances to the nearest neighbours, the nearest first, none of them 0.
        near: Number of the near neighbour, from 1.
        far: Number of the far neighbour.
    """
    logs = np.log(distance[:, far - 1] / distance[:, near - 1])
    logs = logs[np.isfinite(logs)]
    total, between = logs.sum(), far - near - 1
    if not total > 0:
        return float("nan")
    if not between:
        return len(logs) / total

    positive = logs[logs > 0]

    def slope(dimension: float) -> float:  # of the log-likelihood, falling
        return len(logs) / dimension + between * (positive / -np.expm1(-dimension * positive)).sum() - (far - 1) * total

    if slope(_LARGEST) >= 0:
        return float("nan")
    root: Any = brentq(slope, 1e-6, _LARGEST)  # declared as a number or a pair
    return float(root)


def two_nn_first_fifth(distance: Float[np.ndarray, "point neighbour"]) -> float:
    """Returns the TwoNN dimension as the slope of -log(1 - F) on log(r_2 / r_1) through the origin, over the smallest
    fifth of the ratios: the estimator of LLM-Microscope's code."""
    logs = np.sort(np.log(distance[:, 1] / distance[:, 0]))
    rank = np.arange(1, len(logs) + 1) / len(logs)
    x, y = logs[: len(logs) // 5], -np.log1p(-rank[: len(logs) // 5])
    size = (x * x).sum()
    return float((x * y).sum() / size) if size else float("nan")


def neighbourhood_overlap(one: Int[np.ndarray, "point neighbour"], other: Int[np.ndarray, "point neighbour"]) -> float:
    """Returns the mean share of neighbours that a point has in both clouds; k / (points - 1) for independent ones."""
    return float((one[:, :, None] == other[:, None]).any(-1).mean())


def mean_cosine(points: Float[Tensor, "point d"]) -> float:
    """Returns the mean cosine similarity over all pairs of different points."""
    units = torch.nn.functional.normalize(points.double(), dim=1)
    n = len(units)
    return float((units.sum(0).square().sum() - n) / (n * (n - 1)))


def gaussian_like(points: Float[Tensor, "point d"], seed: int) -> Float[Tensor, "point d"]:
    """Returns as many points of a Gaussian with the covariance of `points`: the same variances, no other structure."""
    centred = points.double() - points.double().mean(0)
    generator = torch.Generator("cpu").manual_seed(seed)
    mixed = torch.randn(len(points), len(points), generator=generator, dtype=torch.float64) @ centred
    return mixed / np.sqrt(len(points) - 1)
