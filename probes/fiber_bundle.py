"""Fiber-bundle test: does the dimension of the cloud of token embeddings grow with the radius around a token?

Around a token, let N(r) be the number of embeddings within the distance r. On a manifold of d dimensions log N rises
with slope d over log r. On a fiber bundle, signal plus noise, the slope may fall once, from base and fiber to the base
alone, but never rise: a significant rise rejects it at that token (Robinson et al. 2025). With the sorted distances
r_1 < r_2 < ..., the spacings

    E_k = k ln(r_{k+1} / r_k),  k = 10 ... K

are independent and exponential with mean 1 / d, whatever the density, as long as it is constant over the ball. For a
split of k, the ratio of their means below and above it follows an F distribution under equal dimensions: p is one-sided
for a rise, Bonferroni-corrected over 4 splits, and by Holm's method over tokens. A gradient of the density bends the
curve as well, so every rate stands beside that of a Gaussian cloud with the covariance and the norms of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    NEUTRAL,
    Model,
    RequestError,
    Result,
    Store,
    Variable,
    Vocabulary,
    WeightsProbe,
    check_fields,
    counted,
    dataset,
    distinct,
    labelled_histogram,
    labelled_scatter,
    plain_torch,
    progress,
    read_vocabulary,
    with_note,
)

CLOUDS = ("embedding", "gaussian", "unit rows", "unit gaussian")
_JITTER = 1e-6  # relative, of distances: quantised rows have ties
_BLOCK = 1 << 24  # distances in memory at a time
_RADII, _WINDOW, _WELCH = 200, 10, 1e-3
_FIRST = 10  # neighbour: nearer ones may be near-duplicates
_SPLITS = 4  # p < 0.05 in 3.8 to 4.1 % under the null; 8 give 3.2 to 3.5 %
_LEAST = 200  # tokens
_SPACINGS = 50
_NULL, _DETECTOR_TRIALS = 4000, 400
_DETECTOR_POINTS = 3000
_TOKEN = ("cloud", "token")

VARIABLES = (
    Variable(
        "rejected",
        ("cloud",),
        "share of tokens",
        "share with a rise of the dimension at 0.05 after Holm's correction over tokens",
        "that of the Gaussian cloud",
    ),
    Variable("below", ("cloud",), "share of tokens", "share with p < 0.05, not corrected over tokens", "null_below"),
    Variable("null_below", (), "share of trials", "share with p < 0.05 around the centre of a uniform ball", "0.05"),
    Variable(
        "detector",
        ("cloud",),
        "share of tokens",
        "share that the usual sliding-window detector rejects at 0.001 on the same distances",
        "null_detector",
    ),
    Variable(
        "null_detector",
        (),
        "share of trials",
        "false positives of that detector around the centre of a uniform ball of 3,000 points, at its level of 0.001",
        "0.001",
    ),
    Variable("dimension", _TOKEN, "dimensions", "dimension over all radii, 1 / mean spacing"),
    Variable("small", _TOKEN, "dimensions", "dimension below the split with the most significant change"),
    Variable("large", _TOKEN, "dimensions", "dimension above it"),
    Variable("radius", _TOKEN, "L2 distance", "distance at that split"),
    Variable("p", _TOKEN, "probability", "one-sided p of a rise, corrected over splits", "uniform"),
    Variable("p_holm", _TOKEN, "probability", "the same, corrected over tokens by Holm's method"),
    Variable("neighbours", (), "tokens", "neighbours that the test reads around a token"),
    Variable("points", (), "tokens", "tokens of the cloud"),
)


@dataclass(frozen=True)
class FiberBundle(WeightsProbe):
    """Tests by a calibrated test if the embedding's dimension rises with the radius around tokens."""

    name: ClassVar[str] = "fiber-bundle"
    needs_model: ClassVar[bool] = True
    needs_store: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Robinson et al. 2025, arXiv 2504.01002",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "gaussian": "the same test on a Gaussian cloud with the covariance and the norms of the embedding",
        "null_below": "the test at its level, around the centre of a uniform ball",
        "null_detector": "the usual detector under the same null: far above its level",
    }

    row_limit: int = 1000
    """Tokens that are tested, drawn at random."""
    neighbours: int | None = None
    """Neighbours that the test reads. None: a fiftieth of the tokens, from 60 to 1,000."""
    seed: int = 0
    """Random seed of the drawn tokens, the Gaussian cloud and the simulated null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "row_limit", at_least=1, whole=True)
        if self.neighbours is not None:
            check_fields(self, "neighbours", at_least=_FIRST + _SPACINGS, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store | Model, *, model: Model | None = None) -> Result:
        """Tests tokens of a model, or of the model that a store was recorded from.

        Costs 4 x row_limit x tokens x d_embed multiplications in float64.

        Raises:
            RequestError: Fewer than 200 tokens have rows of their own, or fewer than the neighbours asked for.
        """
        vocabulary = read_vocabulary(store, model)
        token_ids, notes = _points(vocabulary)
        if len(token_ids) < _LEAST:
            raise RequestError(
                f"{counted(len(token_ids), 'token')} have embeddings of their own; fiber-bundle needs {_LEAST} or more"
            )
        number = self.neighbours or int(np.clip(len(token_ids) // 50, _FIRST + _SPACINGS, 1000))
        if number >= len(token_ids):
            raise RequestError(f"neighbours={number} of {counted(len(token_ids), 'token')}; choose fewer")
        if number > len(token_ids) // 50:
            notes.append(
                f"{counted(number, 'neighbour')} are over a fiftieth of {counted(len(token_ids), 'token')}: "
                "density gradients bend more"
            )
        draw = np.random.default_rng(self.seed)
        chosen = np.sort(draw.choice(len(token_ids), min(self.row_limit, len(token_ids)), replace=False))
        rows = vocabulary.embedding[torch.as_tensor(token_ids)]
        gaussian = _gaussian_cloud(rows, self.seed)
        clouds = dict(zip(CLOUDS, (rows, gaussian, _unit(rows), _unit(gaussian)), strict=True))
        parts = {}
        with progress("fiber bundle", len(CLOUDS) * len(chosen), "tokens") as tick:
            for cloud, points in clouds.items():
                distance = neighbour_distances(points, chosen, number + 1, self.seed, tick)
                parts[cloud] = _tested(distance)
        arrays = {name: np.stack([parts[cloud][name] for cloud in CLOUDS]) for name in parts[CLOUDS[0]]}
        usual = float(np.median(arrays["dimension"][0]))
        null = uniform_ball(len(token_ids), usual, number + 1, _NULL, self.seed)
        ball = uniform_ball(_DETECTOR_POINTS, usual, _DETECTOR_POINTS, _DETECTOR_TRIALS, self.seed)
        arrays |= {
            "null_below": float((dimension_change(null, _FIRST, _SPLITS).p < 0.05).mean()),
            "null_detector": float(window_detector(ball).mean()),
            "neighbours": number,
            "points": len(token_ids),
        }
        ids = token_ids[chosen]
        texts = np.array([vocabulary.texts[id] for id in ids], dtype=object)
        data = dataset(self.variables, arrays, {"cloud": list(CLOUDS), "token": ids, "text": ("token", texts)})
        return self.result(store, data, _table(data), notes)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the share of rejected tokens beside the Gaussian cloud, the level of the test, and the dimension."""
        data = result.data
        rejected, below, window = (100 * data[name].to_numpy() for name in ("rejected", "below", "detector"))
        dimension, gaussian = (float(data["dimension"][cloud].median()) for cloud in (0, 1))
        null, detector = (100 * float(data[name]) for name in ("null_below", "null_detector"))
        text = (
            f"A rise of the dimension rejects the fiber bundle at {rejected[0]:z.1f} % of "
            f"{counted(data['token'].size, 'token')} "
            f"(Gaussian cloud {rejected[1]:z.1f} %; unit rows {rejected[2]:z.1f} % and {rejected[3]:z.1f} %), after "
            f"Holm's correction; p < 0.05 at {below[0]:z.1f} % (Gaussian {below[1]:z.1f} %, exact null {null:z.1f} %). "
            f"Median dimension {dimension:z.1f} (Gaussian {gaussian:z.1f}). The usual window detector rejects "
            f"{window[0]:z.0f} % here and {detector:z.0f} % under the exact null."
        )
        return with_note(text, result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "change", small against large radii, "dimensions" and "p", their distributions by cloud."""
        data = result.data
        clouds = data["cloud"].to_numpy().tolist()
        tokens = (
            f"{data['token'].size:,} of {counted(data['points'], 'token')}, "
            f"{counted(data['neighbours'], 'neighbour')} each"
        )
        texts = data["text"].to_numpy().tolist()
        figures = {
            "change": labelled_scatter(
                {
                    cloud: (data["small"].sel(cloud=cloud).to_numpy(), data["large"].sel(cloud=cloud).to_numpy(), texts)
                    for cloud in clouds[1::-1]
                },
                title="Dimension at small and at large radii",
                subtitle=f"{tokens}; above the diagonal it rises, which a fiber bundle excludes",
                names=("dimension at small radii", "dimension at large radii"),
                diagonal=True,
            ),
            "dimensions": labelled_histogram(
                {cloud: data["dimension"].sel(cloud=cloud).to_numpy() for cloud in clouds},
                title="Dimension of the embedding around tokens",
                subtitle=tokens,
                unit="dimension over all radii",
            ),
            "p": labelled_histogram(
                {cloud: data["p"].sel(cloud=cloud).to_numpy() for cloud in clouds},
                title="p values of a rise of the dimension",
                subtitle=f"{tokens}; flat or rising to the right under the null",
                unit="p",
            ),
        }
        return {name: _coloured(figure) for name, figure in figures.items()}


def _coloured(figure: Any) -> Any:
    """Gives each cloud its colour in all figures; Gaussian clouds, the controls, are grey and dashed."""
    styles = dict(
        zip(
            CLOUDS,
            ((CATEGORIES[0], "solid"), (NEUTRAL, "dash"), (CATEGORIES[1], "solid"), (NEUTRAL, "dot")),
            strict=True,
        )
    )
    for trace in figure.data:
        cloud = str(trace.name).rpartition(" (")[0]  # a name ends with the number of points
        if cloud in styles:
            colour, dash = styles[cloud]
            trace.update(
                {"marker": {"color": colour}} if trace.mode == "markers" else {"line": {"color": colour, "dash": dash}}
            )
    return figure


def _points(vocabulary: Vocabulary) -> tuple[np.ndarray, list[str]]:
    """Ids of the tokens of the cloud: without special and unseen tokens, and one of each set of equal rows."""
    mask: Bool[np.ndarray, " token"] = vocabulary.ordinary.copy()
    if vocabulary.maybe_tokenizer is not None:
        mask &= ~vocabulary.never_seen
    ids = np.flatnonzero(mask)
    single = distinct(vocabulary.embedding[torch.as_tensor(ids)])
    notes = (
        [f"{counted(int((~single).sum()), 'token')} with the row of another one left out"] if not single.all() else []
    )
    return ids[single], notes


def _tested(distance: Float[np.ndarray, "token neighbour"]) -> dict[str, Any]:
    change = dimension_change(distance, _FIRST, _SPLITS)
    adjusted = holm(change.p)
    return {
        "rejected": float((adjusted < 0.05).mean()),
        "below": float((change.p < 0.05).mean()),
        "detector": float(window_detector(distance).mean()),
        "dimension": change.dimension,
        "small": change.small,
        "large": change.large,
        "radius": distance[np.arange(len(distance)), change.split - 1],
        "p": change.p,
        "p_holm": adjusted,
    }


def _gaussian_cloud(rows: Float[Tensor, "token d"], seed: int) -> Float[Tensor, "token d"]:
    """Rows of a Gaussian with the mean and covariance of `rows`, each scaled to the norm of its row."""
    exact = rows.double()
    mean = exact.mean(0)
    values, vectors = torch.linalg.eigh((exact - mean).T @ (exact - mean) / len(rows))
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64) * values.clamp_min(0).sqrt()
    return _unit(drawn @ vectors.T + mean) * exact.norm(dim=1, keepdim=True)


def _unit(rows: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
    return torch.nn.functional.normalize(rows.double(), dim=1)


def _table(data: Any) -> pd.DataFrame:
    """A line for each token: the test on the embedding and on unit rows, the most significant first."""
    columns = {"token_id": data["token"].to_numpy(), "token": data["text"].to_numpy()}
    for name in ("p", "p_holm", "small", "large", "radius", "dimension"):
        columns[name] = data[name].sel(cloud="embedding").to_numpy()
    for name in ("p", "p_holm", "small", "large"):
        columns[f"{name}_unit"] = data[name].sel(cloud="unit rows").to_numpy()
    return pd.DataFrame(columns).sort_values("p", ignore_index=True, kind="stable")


@dataclass(frozen=True)
class DimensionChange:
    """The most significant change of the dimension with the radius, around each point, and a test for its increase."""

    p: Float[np.ndarray, " point"]
    """One-sided p value of an increase, Bonferroni-corrected over the splits; uniform or larger without one."""
    small: Float[np.ndarray, " point"]
    """Dimension at the radii below the split."""
    large: Float[np.ndarray, " point"]
    """Dimension at the radii above it."""
    split: Int[np.ndarray, " point"]
    """Number of the neighbour at the split with the most significant change, up or down."""
    dimension: Float[np.ndarray, " point"]
    """Dimension over all radii."""


def neighbour_distances(
    points: Float[Tensor, "point d"],
    chosen: Int[np.ndarray, " chosen"],
    number: int,
    seed: int,
    tick: Callable[[int], None] = lambda _: None,
) -> Float[np.ndarray, "chosen neighbour"]:
    """Returns the distances of chosen points to their `number` nearest neighbours, ascending and without ties.

    Costs chosen x points x d multiplications in float64.

    Args:
        points: The cloud.
        chosen: Indices of the points whose neighbours are sought.
        number: Number of neighbours.
        seed: Random seed of the jitter, 1e-6 of a distance, that separates equal ones.
        tick: Called with the number of points after each block.
    """
    exact = points.double()
    squares = exact.square().sum(1)
    draw, distances = np.random.default_rng(seed), []
    for part in np.array_split(chosen, max(1, -(-len(chosen) * len(points) // _BLOCK))):
        index = torch.as_tensor(part)
        distance = squares[index, None] + squares - 2 * exact[index] @ exact.T
        distance[torch.arange(len(index)), index] = torch.inf
        nearest = distance.topk(number, largest=False, sorted=False).values.clamp_min(0).sqrt().numpy()
        floor = 1e-12 * np.maximum(nearest.max(1, keepdims=True), 1e-300)  # equal points
        jittered = np.maximum(nearest, floor) * (1 + _JITTER * draw.random(nearest.shape))
        distances.append(np.sort(jittered, axis=1))
        tick(len(part))
    return np.concatenate(distances)


def dimension_change(distance: Float[np.ndarray, "point neighbour"], first: int, splits: int) -> DimensionChange:
    """Returns the test for an increase of the dimension around each point, and its most significant change.

    For points of uniform density in d dimensions, the spacings E_k = k ln(r_{k+1} / r_k) are independent and
    exponential with mean 1 / d, whatever the density is. So the ratio of the means of E below and above a split follows
    an F distribution, and d is 1 / mean(E).

    Args:
        distance: Distances to the nearest neighbours, strictly ascending.
        first: Number of the first neighbour whose spacing counts: nearer ones may be duplicates.
        splits: Number of splits that are tried, spaced evenly in the logarithm of the neighbour's number.
    """
    last = distance.shape[1] - 1
    k = np.arange(first, last + 1)
    spacing = k * np.log(distance[:, first:] / distance[:, first - 1 : -1])
    total = spacing.cumsum(1)
    places = np.unique(np.geomspace(first + 1, last, splits + 2).round().astype(int)[1:-1])  # last k below the split
    below = places - first + 1
    above = len(k) - below
    means = total[:, below - 1] / below, (total[:, -1:] - total[:, below - 1]) / above
    p = stats.f.sf(means[0] / means[1], 2 * below, 2 * above)
    fall = stats.f.cdf(means[0] / means[1], 2 * below, 2 * above)
    strongest = np.minimum(p, fall).argmin(1)
    at = np.arange(len(p)), strongest
    corrected = np.minimum(1.0, p.min(1) * len(places))
    return DimensionChange(corrected, 1 / means[0][at], 1 / means[1][at], places[strongest], len(k) / total[:, -1])


def uniform_ball(
    points: int, dimension: float, number: int, trials: int, seed: int
) -> Float[np.ndarray, "trial neighbour"]:
    """Returns distances from the centre of a ball to the nearest of points that fill it uniformly: the exact null."""
    draw = np.random.default_rng(seed)
    distances = []
    for part in np.array_split(np.arange(trials), max(1, trials * points // _BLOCK)):
        # spacings of uniform order statistics, without drawing or sorting all points
        steps = draw.exponential(size=(len(part), number)).cumsum(1)
        rest = draw.gamma(points + 1 - number, size=(len(part), 1))
        distances.append((steps / (steps[:, -1:] + rest)) ** (1 / dimension))
    return np.concatenate(distances)


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Returns p values adjusted for their number by Holm's method: the family-wise error is kept."""
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    values = np.empty(len(p))
    values[order] = np.minimum(1.0, adjusted)
    return values


def window_detector(distance: Float[np.ndarray, "point neighbour"]) -> Float[np.ndarray, " point"]:
    """Returns 1 where the usual detector finds a change of slope, else 0: it is not calibrated, see `FiberBundle`.

    The slope of log N(r) over log r at 200 radii, evenly spaced in log r, by centred differences; two neighbouring
    windows of 10 slopes are compared by Welch's t-test at 0.001, at every place. The slopes of a cumulative count
    depend on each other, which the test ignores.
    """
    detections = np.zeros(len(distance))
    for row, r in enumerate(distance):
        radii = np.geomspace(r[0], r[-1], _RADII)
        slopes = np.gradient(np.log(np.searchsorted(r, radii, side="right")), np.log(radii))
        windows = np.lib.stride_tricks.sliding_window_view(slopes, _WINDOW)
        before, after = windows[:-_WINDOW], windows[_WINDOW:]
        with np.errstate(invalid="ignore", divide="ignore"):  # windows without a new neighbour
            gap = after.mean(1) - before.mean(1)
            parts = before.var(1, ddof=1) / _WINDOW, after.var(1, ddof=1) / _WINDOW
            t = gap / np.sqrt(parts[0] + parts[1])
            freedom = (parts[0] + parts[1]) ** 2 / ((parts[0] ** 2 + parts[1] ** 2) / (_WINDOW - 1))
        detections[row] = np.nanmin(stats.t.sf(t, freedom), initial=1.0) < _WELCH
    return detections
