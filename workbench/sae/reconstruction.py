"""Fit of an autoencoder to rows of a site: sums per document, from which metrics and their intervals follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from workbench.io.torch_state import device_for_float64
from workbench.results.bootstrap import Interval, intervals, resampled_means, wilson
from workbench.sae.autoencoder import Sae
from workbench.sae.site import block_rows, encode_checked
from workbench.store.reader import ActivationArray

_BLOCK_BYTES = 64 << 20  # rows in float64, while their mean is taken

Ratio = tuple[Float[np.ndarray, " document"], Float[np.ndarray, " document"]]
"""A metric as a ratio of two sums over rows: numerator and denominator of each document."""


def ratio_intervals(ratios: Mapping[str, Ratio], resamples: int, seed: int) -> dict[str, Interval]:
    """Returns each ratio of sums with its 95 % interval by a bootstrap over documents.

    All ratios share their resamples. NaN if the denominator is 0; no interval, NaN, from one document.
    """
    totals, counts = (np.stack([ratio[side] for ratio in ratios.values()], axis=1) for side in (0, 1))
    mean, resampled = resampled_means(totals, counts, resamples=resamples, seed=seed)
    low, high = intervals(np.where(np.isfinite(resampled), resampled, np.nan))
    mean = np.where(np.isfinite(mean), mean, np.nan)
    return {name: Interval(*map(float, line)) for name, *line in zip(ratios, mean, low, high, strict=True)}


@dataclass(frozen=True)
class Documents:
    """The documents of the evaluated rows, numbered from 0."""

    ids: Int64[np.ndarray, " row"]
    """Evaluated rows, those of a document together."""
    number: Int64[np.ndarray, " row"]
    """Number of each row's document, ascending."""
    count: int

    @classmethod
    def of(cls, document: Int[np.ndarray, " all_rows"], ids: Int64[np.ndarray, " row"]) -> Documents:
        """Returns the documents of the rows `ids`, given the document of every row of the store."""
        different, number = np.unique(document[ids], return_inverse=True)
        order = np.argsort(number, kind="stable")
        return cls(ids[order], number[order], len(different))


def fit(
    array: ActivationArray, sae: Sae, documents: Documents
) -> tuple[dict[str, Ratio], FeatureCounts, Float[np.ndarray, " row"]]:
    """Returns the metrics as ratios of sums, the active rows of each feature, and |x - x̄|² of each row.

    Reads the rows twice: their mean is needed first.
    """
    mean = _mean(array, sae, documents.ids)
    sums = np.zeros((documents.count, len(_COLUMNS)))
    counts = FeatureCounts(sae.d_sae, sae.device)
    spread = np.zeros(len(documents.ids))
    step = block_rows(sae)
    for start in range(0, len(documents.ids), step):
        part = slice(start, start + step)
        values = array[documents.ids[part]]
        activations = encode_checked(array, sae, documents.ids[part], values)
        x, reconstruction = exact(sae.input_rows(values)), exact(sae.decode(activations))
        lines = _row_statistics(x, reconstruction, mean.to(x.device), activations)
        statistics = torch.stack(lines, dim=1).cpu().numpy()
        np.add.at(sums, documents.number[part], statistics)
        spread[part] = statistics[:, _COLUMNS.index("spread")]
        counts.add(activations != 0, documents.number[part])
    counts.finish()
    columns = dict(zip(_COLUMNS, sums.T, strict=True))
    return {name: (columns[above], columns[below]) for name, (above, below) in _RATIOS.items()}, counts, spread


_COLUMNS: tuple[str, ...] = (
    "rows", "active", "magnitude", "error", "spread", "explained", "by_row", "varied",
    "cosine", "ratio", "nonzero", "squared_output", "product",
)  # fmt: skip
_RATIOS = {
    "l0": ("active", "rows"),
    "l1": ("magnitude", "rows"),
    "explained_variance": ("explained", "spread"),
    "explained_variance_by_row": ("by_row", "varied"),
    "mse": ("error", "rows"),
    "cosine": ("cosine", "rows"),
    "l2_ratio": ("ratio", "nonzero"),
    "relative_bias": ("squared_output", "product"),
}


def _row_statistics(
    x: Float[Tensor, "row d_model"],
    y: Float[Tensor, "row d_model"],
    mean: Float[Tensor, " d_model"],
    activations: Float[Tensor, "row feature"],
) -> list[Float[Tensor, " row"]]:
    """The values of `_COLUMNS` for each row; y: its reconstruction."""
    error, spread = (x - y).square().sum(1), (x - mean).square().sum(1)
    norm, output, product = x.norm(dim=1), y.norm(dim=1), (x * y).sum(1)
    varied, nonzero = spread > 0, norm > 0
    active, magnitude = (torch.linalg.vector_norm(activations, order, dim=1).to(x) for order in (0, 1))
    none = torch.zeros_like(norm)
    return [
        torch.ones_like(norm),
        active,
        magnitude,
        error,
        spread,
        spread - error,
        torch.where(varied, 1 - error / spread, none),
        varied.to(x),
        torch.where((norm > 0) & (output > 0), product / (norm * output), none),
        torch.where(nonzero, output / norm, none),
        nonzero.to(x),
        output.square(),
        product,
    ]


def _mean(array: ActivationArray, sae: Sae, ids: Int64[np.ndarray, " row"]) -> Float[Tensor, " d_model"]:
    total = torch.zeros(sae.d_in, dtype=torch.float64, device="cpu")
    step = max(1, _BLOCK_BYTES // (8 * sae.d_in))
    for start in range(0, len(ids), step):
        total += exact(sae.input_rows(array[ids[start : start + step]])).sum(0).cpu()
    return total / len(ids)


def exact(rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    """Returns rows in float64, on the CPU if their device has no float64."""
    return rows.to(device_for_float64(rows.device)).double()


class FeatureCounts:
    """Active rows of each feature, and how they are spread over documents; rows come document by document.

    Memory: five numbers per feature.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        names = ("active", "squares", "products", "documents", "only", "_open")
        self._sums = {name: torch.zeros(features, dtype=torch.int64, device=device) for name in names}
        self._number, self._rows, self._lengths = -1, 0, []

    def add(self, active: Bool[Tensor, "row feature"], document: Int64[np.ndarray, " row"]) -> None:
        """Counts rows; `document`: number of each row's document, ascending over all calls."""
        for run in _runs(document):
            if document[run.start] != self._number:
                self.finish()
                self._number = int(document[run.start])
            self._sums["_open"] += active[run].sum(0, dtype=torch.int32)
            self._rows += run.stop - run.start

    def finish(self) -> None:
        """Closes the last document."""
        if not self._rows:
            return
        sums, count = self._sums, self._sums["_open"]
        sums["active"] += count
        sums["squares"] += count * count
        sums["products"] += count * self._rows
        sums["documents"] += count > 0
        sums["only"] = torch.where(count > 0, self._number, sums["only"])  # the document, if there is one alone
        self._lengths.append(self._rows)
        self._rows = 0
        count.zero_()

    def dead_share(self) -> Interval:
        """Returns the share of features active on no row, with a 95 % interval by the jackknife over documents.

        The interval is that of the share in as many other documents. A bootstrap would be wrong: a resample leaves out
        a third of the documents, so it has more dead features than any sample of that size.
        """
        documents, only = (self._sums[name].cpu().numpy() for name in ("documents", "only"))
        number, features = len(self._lengths), len(documents)
        dead = float((documents == 0).mean())
        if number < 2:
            return Interval(dead, float("nan"), float("nan"))
        single = np.bincount(only[documents == 1], minlength=number) / features
        half = 1.96 * float(np.sqrt((number - 1) / number * np.square(single - single.mean()).sum()))
        return Interval(dead, max(0.0, dead - half), min(1.0, dead + half))

    def table(self) -> pd.DataFrame:
        """Returns one line per feature: feature, active, density, low, high, as `SaeMetrics.density` states."""
        active, squares, products = (
            self._sums[name].cpu().numpy().astype(np.float64) for name in ("active", "squares", "products")
        )
        lengths = np.array(self._lengths, np.float64)
        rows, number = lengths.sum(), len(lengths)
        density = active / rows
        if number < 2:
            low = high = np.full(len(active), np.nan)
        else:
            residual = squares - 2 * density * products + density**2 * np.square(lengths).sum()
            variance = number / (number - 1) * residual.clip(0) / rows**2
            spread = density * (1 - density)
            independent = np.divide(spread, variance, out=np.full(len(active), float(number)), where=variance > 0)
            low, high = wilson(density, independent.clip(1, rows))
        columns = {"feature": np.arange(len(active)), "active": active.astype(np.int64), "density": density}
        return pd.DataFrame(columns | {"low": low, "high": high})


def _runs(number: Int64[np.ndarray, " row"]) -> Iterator[slice]:
    """Slices of equal numbers."""
    cuts = np.flatnonzero(np.diff(number)) + 1
    yield from map(slice, np.append(0, cuts).tolist(), np.append(cuts, len(number)).tolist())
