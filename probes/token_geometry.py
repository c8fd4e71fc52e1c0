"""Geometry of the token cloud: intrinsic dimension, overlap of neighbourhoods and cosine by layer (Viswanathan 2025).

The states of one sequence's N tokens after block l are a cloud of N points. With r_k the distance to a point's k-th
neighbour, its intrinsic dimension is estimated by maximum likelihood from the ratios

    mu = r_2n / r_n        at scales n = 1 (TwoNN), 2, 4, 8 (GRIDE)

and the overlap of consecutive layers is the mean share of the k = 2 nearest neighbours that a token keeps. Measures are
taken in each sequence and averaged. Beside them: a Gaussian cloud with the same covariance, whose dimension says what
the variances alone give; neighbours of a cloud whose tokens are permuted; and the correlation of log dimension with the
model's loss over sequences, within the groups of `group`. Equal points are dropped first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float, Int

from workbench.probing import (
    LOST_VARIABLES,
    NEUTRAL,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Sequences,
    Store,
    ThemedFigure,
    Variable,
    blocks,
    check,
    check_fields,
    clustered_ends,
    clustered_means,
    counted,
    dataset,
    distinct,
    error_bars,
    error_bars_of,
    gaussian_like,
    gride,
    integer_step,
    intervals,
    label,
    load_unembed,
    log_probabilities,
    mean_cosine,
    nearest_neighbours,
    neighbourhood_overlap,
    next_tokens,
    plain_torch,
    recorded_ends,
    require_causal,
    resampled_means,
    select_sequences,
    two_nn_first_fifth,
    usable_device,
    value_text,
    with_interval,
    with_note,
    with_progress,
)

_LAYER, _SCALE, _GROUP = ("layer",), ("layer", "scale"), ("group", "layer")
SCALES = (1, 2, 4, 8)
_LEAST = 2 * SCALES[-1] + 4  # points
_MEASURES = ("overlap", "overlap_permuted", "cosine", "two_nn", "gaussian_dimension", "duplicates")
_VARIABLES: tuple[Variable, ...] = (
    *with_interval(
        Variable("intrinsic_dimension", _SCALE, "dimensions", "GRIDE from neighbours n and 2n; n = 1: TwoNN")
    ),
    *with_interval(Variable("overlap", _LAYER, "share of neighbours", "nearest neighbours kept by the next layer")),
    Variable("overlap_permuted", _LAYER, "share of neighbours", "the same with tokens permuted", "k / (points - 1)"),
    *with_interval(Variable("cosine", _LAYER, "1", "mean cosine of different tokens, -1 to 1", "0")),
    Variable("two_nn", _LAYER, "dimensions", "TwoNN by regression on the smallest fifth of the ratios"),
    *with_interval(
        Variable("gaussian_dimension", _LAYER, "dimensions", "TwoNN of a Gaussian with the same covariance")
    ),
    Variable("duplicates", _LAYER, "share of tokens", "tokens whose state equals another's, dropped", "0"),
    *with_interval(
        Variable("loss_correlation", _LAYER, "1", "Pearson, log dimension (n = 1) and loss, in groups", "0")
    ),
    *with_interval(Variable("group_dimension", _GROUP, "dimensions", "intrinsic_dimension at n = 1 in each group")),
    Variable("group_overlap", _GROUP, "share of neighbours", "overlap in each group"),
    Variable("group_cosine", _GROUP, "1", "cosine in each group"),
    Variable("group_sequences", ("group",), "sequences", "sequences of each group"),
    Variable("sequences", (), "sequences", "sequences that count"),
    Variable("short_sequences", (), "sequences", "sequences left out because they are shorter than `length`"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class TokenGeometry(LayerProbe):
    """Measures intrinsic dimension, kept neighbours and cosine of a text's tokens at each layer, beside controls."""

    name: ClassVar[str] = "token-geometry"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Viswanathan et al. 2025, The geometry of tokens in internal representations of large language models, "
        "arXiv 2501.10573",
        "Facco et al. 2017, Estimating the intrinsic dimension of datasets by a minimal neighborhood information",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "gaussian_dimension": "a Gaussian cloud with the same covariance: what the variances alone give",
        "overlap_permuted": "overlap with tokens permuted: k / (points - 1)",
        "shuffled text": "the same tokens in a random order (wb.shuffled_blocks), as a group: its peak is higher",
        "random weights": "the same architecture with random weights",
    }

    length: int = 128
    """Tokens of each sequence that count, from its first on; shorter sequences are left out."""
    skip: int = 1
    """First tokens of each sequence that are left out: the first is an outlier in most models."""
    site: str = "resid_post"
    """Kind of site to read, at every layer that was recorded."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    group: str | None = None
    """Metadata column of groups, such as domain or shuffle: means in each, and loss is compared within. None: one."""
    neighbours: int = 2
    """Nearest neighbours whose overlap is measured."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the bootstrap, the permutation and the Gaussian clouds."""
    device: str | None = None
    """Device of the products with W_U: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "skip", "seed", at_least=0)
        check_fields(self, "neighbours", "resamples", at_least=1)
        if self.length - self.skip < _LEAST:
            raise RequestError(f"length {self.length} less skip {self.skip} must be {_LEAST} points or more")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads each site once; for losses the last `resid_post`.

        Costs layers x sequences x length^2 x d_model operations in float64, twice.

        Raises:
            RequestError: The site was not recorded, no sequence is long enough, the group is no column, values are NaN
                or infinite, or the model is not causal.
        """
        require_causal(store, self.name)
        layers, labels = self.recorded(store, self.site)
        sequences = select_sequences(store, self.length, self.where, self.group, least=self.skip + _LEAST)
        rows = self.finite_rows(store, labels, sequences.rows)
        sequences = sequences.without(rows.left_out)
        by_sequence = [
            _cloud_measures(self, store, labels, part[self.skip :], n)
            for n, part in enumerate(with_progress([*sequences.rows], "token geometry", "sequences"))
        ]
        values = {
            name: np.stack([measures[name] for measures in by_sequence]) for name in by_sequence[0]
        }  # [sequence, layer, ...]
        loss = _losses(self, store, sequences)
        arrays = _averages(self, values, sequences) | _correlations(self, values, loss, sequences)
        arrays |= {"sequences": len(sequences), "short_sequences": sequences.short}
        coords: dict[str, Any] = {"layer": layers, "scale": list(SCALES)}
        if sequences.domains:
            coords["group"] = list(sequences.domains)
        data = dataset(_VARIABLES, {name: np.asarray(array) for name, array in arrays.items()}, coords)
        documents = len(np.unique(sequences.document))
        notes = [f"intervals over {counted(documents, 'document')}, fewer than 10" * (documents < 10)]
        if loss is None:
            notes.append("loss not compared: the last resid_post or the unembedding was not recorded")
        return self.result(store, data, _table(values, loss, sequences, layers), rows, notes)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the peak of the dimension beside the Gaussian's, the least overlap, the cosine, and the loss."""
        data, settings = result.data, result.provenance["settings"]
        dimension = data["intrinsic_dimension"].sel(scale=1)
        peak = data.isel(layer=int(np.nanargmax(dimension.to_numpy())))
        text = (
            f"Intrinsic dimension of {counted(settings['length'] - settings['skip'], 'token')} (TwoNN, "
            f"{int(data['sequences'])} "
            f"sequences) peaks at layer {int(peak['layer'])} with "
            f"{value_text(peak.sel(scale=1), 'intrinsic_dimension', 1)}; a Gaussian with its covariance "
            f"has {float(peak['gaussian_dimension']):z.1f}; last layer {float(dimension[-1]):z.1f}"
        )
        if data["overlap"].notnull().any():
            least = data.isel(layer=int(np.nanargmin(data["overlap"].to_numpy())))
            text += (
                f"; fewest neighbours kept after layer {int(least['layer'])}: {value_text(least, 'overlap')}, permuted "
                f"{float(least['overlap_permuted']):z.2f}"
            )
        if "loss_correlation" in data:
            text += f"; log dimension and loss correlate at the peak by {value_text(peak, 'loss_correlation', 2)}"
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "dimension" by layer and scale, "overlap" with cosine, and with groups "groups"."""
        figures = {"dimension": _dimension(result), "overlap": _overlap(result)}
        return {**figures, "groups": _groups(result)} if "group" in result.data.sizes else figures


# ---- readings -------------------------------------------------------------------------------------------


def _cloud_measures(
    probe: TokenGeometry, store: Store, labels: list[str], rows: Int[np.ndarray, " point"], number: int
) -> dict[str, np.ndarray]:
    """Measures of one sequence at every layer, of the points that are distinct at all of them; overlap is with the next
    layer, NaN at the last."""
    clouds = [store[name][rows].float() for name in labels]
    first = [distinct(cloud) for cloud in clouds]
    common = torch.from_numpy(np.logical_and.reduce(first))
    points, layers = int(common.sum()), len(labels)
    empty = {"intrinsic_dimension": np.full((layers, len(SCALES)), np.nan)}
    measures = empty | {name: np.full(layers, np.nan) for name in _MEASURES}
    measures["cosine"] = np.array([mean_cosine(cloud) for cloud in clouds])
    measures["duplicates"] = np.array([1 - mask.mean() for mask in first])
    if points < _LEAST:
        return measures
    check("neighbours", probe.neighbours, at_most=points - 1)
    order = np.random.default_rng(probe.seed + number).permutation(points)
    near = []
    for layer, cloud in enumerate(clouds):
        neighbours = nearest_neighbours(cloud[common], max(2 * SCALES[-1], probe.neighbours))
        near.append(neighbours.index[:, : probe.neighbours])
        dimensions = [gride(neighbours.distance, scale, 2 * scale) for scale in SCALES]
        measures["intrinsic_dimension"][layer] = dimensions
        measures["two_nn"][layer] = two_nn_first_fifth(neighbours.distance)
        like = gaussian_like(cloud[common], probe.seed + number)
        measures["gaussian_dimension"][layer] = gride(nearest_neighbours(like, 2).distance, 1, 2)
    for layer, (before, after) in enumerate(itertools.pairwise(near)):
        measures["overlap"][layer] = neighbourhood_overlap(before, after)
        measures["overlap_permuted"][layer] = neighbourhood_overlap(before, np.argsort(order)[after[order]])
    return measures


def _losses(probe: TokenGeometry, store: Store, sequences: Sequences) -> Float[np.ndarray, " sequence"] | None:
    """Mean cross-entropy of the next token in each sequence; None where it cannot be had."""
    last = f"resid_post.{store.manifest.model.n_layers - 1}"
    if last not in [site.label for site in store.sites] or not store.manifest.has_unembed:
        return None
    unembed = load_unembed(store.path, usable_device(probe.device))
    rows = sequences.rows[:, :-1].ravel()
    targets, loss = next_tokens(store)[rows], np.full(len(rows), np.nan)
    for block in blocks(len(rows), unembed.vocab):
        log = log_probabilities(unembed, store[last][rows[block]])
        target = torch.from_numpy(targets[block]).to(log.device)
        value = -log.gather(1, target.clamp(min=0)[:, None])[:, 0].double().cpu().numpy()
        loss[block] = np.where(targets[block] < 0, np.nan, value)
    known = ~np.isnan(loss).reshape(len(sequences), -1)
    total = np.nansum(loss.reshape(len(sequences), -1), 1)
    return np.divide(total, known.sum(1), out=np.full(len(sequences), np.nan), where=known.any(1))


def _averages(probe: TokenGeometry, values: Mapping[str, np.ndarray], sequences: Sequences) -> dict[str, Any]:
    """Means over sequences with intervals over documents, and means in each group."""
    arrays: dict[str, Any] = {}
    for name, part in values.items():
        flat = part.reshape(len(part), -1)
        mean, resampled = clustered_means(flat, sequences.document, resamples=probe.resamples, seed=probe.seed)
        arrays[name] = mean.reshape(part.shape[1:])
        if name in ("intrinsic_dimension", "overlap", "cosine", "gaussian_dimension"):
            low, high = intervals(resampled)
            arrays |= {f"{name}_low": low.reshape(part.shape[1:]), f"{name}_high": high.reshape(part.shape[1:])}
    if sequences.domains:
        masks = [sequences.domain == group for group in range(len(sequences.domains))]
        parts = {"dimension": values["intrinsic_dimension"][..., 0]}
        parts |= {name: values[name] for name in ("overlap", "cosine")}
        for name, part in parts.items():
            arrays[f"group_{name}"] = np.stack([part[mask].mean(0) for mask in masks])
        settings = {"resamples": probe.resamples, "seed": probe.seed}
        parted = [clustered_ends(parts["dimension"][mask], sequences.document[mask], **settings) for mask in masks]
        arrays |= dict(zip(("group_dimension_low", "group_dimension_high"), np.stack(parted, 1), strict=True))
        arrays["group_sequences"] = [int(mask.sum()) for mask in masks]
    return arrays


def _correlations(
    probe: TokenGeometry, values: Mapping[str, np.ndarray], loss: np.ndarray | None, sequences: Sequences
) -> dict[str, Any]:
    """Pearson correlation of log dimension and loss over sequences, after the mean of its group is taken off each."""
    if loss is None or len(sequences) < 3:
        return {}
    x, y = np.log(values["intrinsic_dimension"][..., 0]), np.repeat(loss[:, None], values["overlap"].shape[1], 1)
    missing = np.isnan(x) | np.isnan(y)
    x, y = np.where(missing, np.nan, x), np.where(missing, np.nan, y)
    for group in np.unique(sequences.domain):
        mask = sequences.domain == group
        for part in (x, y):
            count = np.maximum((~missing[mask]).sum(0), 1)
            part[mask] -= np.nansum(part[mask], 0) / count
    clusters, index = np.unique(sequences.document, return_inverse=True)
    sums = np.zeros((3, len(clusters), x.shape[1]))
    for total, product in zip(sums, (x * y, x * x, y * y), strict=True):
        np.add.at(total, index, np.nan_to_num(product))
    counts = np.ones_like(sums[0])
    settings = {"resamples": probe.resamples, "seed": probe.seed}
    means, resampled = zip(*(resampled_means(total, counts, **settings) for total in sums), strict=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = intervals(resampled[0] / np.sqrt(resampled[1] * resampled[2]))
        correlation = means[0] / np.sqrt(means[1] * means[2])
    return {"loss_correlation": correlation, "loss_correlation_low": low, "loss_correlation_high": high}


def _table(
    values: Mapping[str, np.ndarray], loss: np.ndarray | None, sequences: Sequences, layers: list[int]
) -> pd.DataFrame:
    """A line for each sequence and layer."""
    n = len(layers)
    columns: dict[str, Any] = {"layer": np.tile(layers, len(sequences)), "first_row": np.repeat(sequences.starts, n)}
    columns["document"] = np.repeat(sequences.document, n)
    if sequences.domains:
        columns["group"] = np.repeat([sequences.domains[i] if i >= 0 else "" for i in sequences.domain], n)
    columns["intrinsic_dimension"] = values["intrinsic_dimension"][..., 0].ravel()
    columns |= {name: values[name].ravel() for name in _MEASURES}
    return pd.DataFrame(columns | ({} if loss is None else {"loss": np.repeat(loss, n)}))


# ---- figures --------------------------------------------------------------------------------------------


def _dimension(result: Result) -> go.Figure:
    data, lines = result.data, []
    for scale in data["scale"].to_numpy().tolist():
        at_scale, first = data.sel(scale=scale), scale == 1
        values, low, high = (at_scale[f"intrinsic_dimension{end}"].to_numpy() for end in ("", "_low", "_high"))
        error = error_bars(values, low, high) | {"visible": first}
        lines.append(_line(data, values, f"neighbours {scale} and {2 * scale}", error_y=error))
    lines.append(_reference(data, "gaussian_dimension", "Gaussian, 1 and 2"))
    figure = _curves(lines, result, "Intrinsic dimension", "intrinsic dimension")
    return figure.update_yaxes(rangemode="tozero")


def _overlap(result: Result) -> go.Figure:
    data, lines = result.data, []
    for name, legend in {"overlap": "neighbours kept", "cosine": "mean cosine"}.items():
        values, low, high = (data[f"{name}{end}"].to_numpy() for end in ("", "_low", "_high"))
        lines.append(_line(data, values, legend, error_y=error_bars(values, low, high)))
    lines.append(_reference(data, "overlap_permuted", "tokens permuted"))
    return _curves(lines, result, "Neighbours and cosine", "share, cosine")


def _groups(result: Result) -> go.Figure:
    data = result.data
    lines = []
    for name in data["group"].to_numpy().tolist():
        at, ends = data.sel(group=name), error_bars_of(data.sel(group=name), "group_dimension")
        lines.append(_line(data, at["group_dimension"], label(str(name)), error_y=ends))
    known = recorded_ends(data, "group_dimension") is not None
    return _curves(lines, result, "Intrinsic dimension by group", "intrinsic dimension", known)


def _line(data: xr.Dataset, values: Any, name: str, mode: str = "lines+markers", **style: Any) -> go.Scatter:
    return go.Scatter(x=data["layer"], y=values, name=name, mode=mode, hovertemplate="layer %{x}: %{y:.3f}", **style)


def _reference(data: xr.Dataset, variable: str, name: str) -> go.Scatter:
    return _line(data, data[variable], name, "lines", line={"color": NEUTRAL, "dash": "dash"})


def _curves(lines: Sequence[go.Scatter], result: Result, title: str, unit: str, known: bool = True) -> go.Figure:
    data, settings = result.data, result.provenance["settings"]
    points = f"{counted(settings['length'] - settings['skip'], 'token')} of {counted(data['sequences'], 'sequence')}"
    text = points + "; 95 % intervals over documents" * known
    layout = {
        "title": {"text": f"{title} in {label(str(result.provenance['model']), 60)}", "subtitle": {"text": text}},
        "margin": {"t": 120},
        "height": 440,
        "width": 760,
        "xaxis": {"title": {"text": "layer"}, "dtick": integer_step(data["layer"].to_numpy().tolist())},
        "yaxis": {"title": {"text": unit}},
    }
    return ThemedFigure(lines, layout)
