"""A law of next-token prediction: how well a linear map of each layer gives the next token (He and Su 2024).

For layer l with states h_t and the *integer id* y_t of the token that follows, by least squares with intercept,

    residual(l) = mean (y_t - fit_l(h_t))^2 / var(y) = 1 - R^2        law: log10 residual(l) is linear in l

so that each layer multiplies the residual by rho = 10^slope. All layers pass through the model's kind of final norm
without its gain. An id is a number whose order the tokenizer chose (by frequency, as a rule), so the same is measured
with the ids of the vocabulary shuffled; and on documents that the map was not fitted on, because noise alone has a
residual of 1 - d / (n - 1) in sample. A correlation near -1 is no test of the law: shuffled ids have nearly the same.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    FoldedLeastSquares,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Store,
    ThemedFigure,
    Variable,
    axis_title,
    central,
    check,
    check_fields,
    counted,
    dataset,
    document_folds,
    final_norm,
    integer_step,
    interval_suffix,
    label,
    normalise,
    plain_torch,
    require_causal,
    selected_rows,
    tokens_at,
    usable_device,
    with_note,
    with_progress,
)

_LAYER = ("layer",)
_SHARE = "share of variance"
_BLOCK = 8192
_EXACT = 1e-9  # rounding: an exact fit has no logarithm
_VARIABLES: tuple[Variable, ...] = (
    Variable("residual", _LAYER, _SHARE, "of the next token's id that the linear map leaves, in sample", "`noise`"),
    Variable("residual_heldout", _LAYER, _SHARE, "the same on documents that the map was not fitted on", "1"),
    Variable("residual_shuffled", _LAYER, _SHARE, "`residual` with the vocabulary's ids shuffled, mean of shuffles"),
    Variable("residual_shuffled_low", _LAYER, _SHARE, "lower end of the central 95 % of the shuffles"),
    Variable("residual_shuffled_high", _LAYER, _SHARE, "upper end of the central 95 % of the shuffles"),
    Variable("shuffled_heldout", _LAYER, _SHARE, "residual_heldout with shuffled ids, mean of shuffles", "1"),
    Variable("slope", (), "log10 per layer", "slope of log10 residual over layers", "0"),
    Variable("slope_low", (), "log10 per layer", "lower end of its 95 % interval, jackknife over folds of documents"),
    Variable("slope_high", (), "log10 per layer", "upper end of its 95 % interval, jackknife over folds of documents"),
    Variable("rho", (), "factor per layer", "10^slope: what a layer multiplies the residual by", "1"),
    Variable("pearson", (), "1", "correlation of log10 residual and layer, -1 to 1"),
    Variable("slope_heldout", (), "log10 per layer", "slope of log10 residual_heldout", "0"),
    Variable("slope_shuffled", (), "log10 per layer", "mean slope with shuffled ids"),
    Variable("pearson_shuffled", (), "1", "mean correlation with shuffled ids"),
    Variable("noise", (), _SHARE, "expected residual in sample if states had nothing to do with ids"),
    Variable("id_frequency", (), "1", "rank correlation of a token's id and its count in the rows, -1 to 1", "0"),
    Variable("rows", (), "tokens", "tokens that the maps are fitted on"),
    Variable("documents", (), "documents", "documents they are of"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class NextTokenLaw(LayerProbe):
    """Measures by how much each layer improves a linear prediction of the next token's id, beside shuffled ids."""

    name: ClassVar[str] = "next-token-law"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "He and Su 2024, A law of next-token prediction in large language models, arXiv 2408.13442",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "residual_shuffled": "the same with the vocabulary's ids in a random order",
        "residual_heldout": "on documents that the map was not fitted on",
        "noise": "residual in sample of states that have nothing to do with the ids",
        "random weights": "the same architecture with random weights: no fall over layers",
    }

    site: str = "resid_post"
    """Kind of site to read, at every layer that was recorded."""
    where: str | None = "NOT is_special AND position > 0"
    """SQL over the token table: the tokens to read. BOS rows are outliers of norm and of label."""
    offset: int = 1
    """Token whose id is predicted, relative to the row: 1 the next, 0 the row's own, -1 the one before."""
    norm: str = "final"
    """Norm of the states: final, the kind of the model's final norm without its gain; none."""
    shuffles: int = 10
    """Random orders of the vocabulary's ids."""
    folds: int = 5
    """Parts of the documents, each held out once."""
    rows_per_dimension: int = 20
    """Minimum tokens for each dimension of a state; fewer are refused, because maps fit noise."""
    seed: int = 0
    """Random seed of shuffles and folds."""
    device: str | None = None
    """Device of the products: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("norm", self.norm, one_of=("final", "none"))
        check_fields(self, "shuffles", "rows_per_dimension", at_least=1)
        check_fields(self, "folds", at_least=2, at_most=100)
        check_fields(self, "seed", at_least=0)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads each site once. Costs layers x rows x d_model^2 operations in float64; memory folds x d_model^2.

        Raises:
            RequestError: The site was not recorded, tokens are too few, all ids are equal, the store has no unembedding
                and norm is "final", values are NaN or infinite, or the model is not causal.
        """
        require_causal(store, self.name)
        layers, labels = self.recorded(store, self.site)
        kind, eps = final_norm(store.path) if self.norm == "final" else ("none", 0.0)
        ids = tokens_at(store, self.offset)
        chosen = selected_rows(store, self.where)
        rows = self.finite_rows(store, labels, chosen[ids[chosen] >= 0])
        targets, d_model = ids[rows.rows], store[labels[0]].shape[1]
        _check_rows(self, targets, d_model)
        documents = store.tokens["document"].to_numpy()[rows.rows]
        ends = _targets(self, targets, store.manifest.model.vocab)
        folds = document_folds(documents, self.folds, self.seed)
        parts = [
            _residuals(self, store, name, rows.rows, ends, folds, (kind, eps))
            for name in with_progress(labels, "next-token law", "layers")
        ]
        arrays = _arrays({name: np.stack([part[name] for part in parts]) for name in parts[0]}, layers, self.folds)
        arrays |= {"noise": 1 - d_model / (len(targets) - 1), "id_frequency": _id_frequency(targets)}
        number = len(np.unique(documents))
        arrays |= {"rows": len(targets), "documents": number}
        data = dataset(_VARIABLES, {name: np.asarray(array) for name, array in arrays.items()}, {"layer": layers})
        names = [name for name in data if data[name].dims == _LAYER]
        few = f"held-out residuals over {counted(number, 'document')}" if number < 2 * self.folds else ""
        exact = bool((data["residual"] <= _EXACT).any())
        flat = "no slope: a layer leaves nothing, which has no logarithm" if exact else ""
        flat = flat or ("" if len(layers) > 2 else "slope of fewer than three layers")
        return self.result(store, data, data[names].to_dataframe().reset_index(), rows, [few, flat])

    @staticmethod
    def headline(result: Result) -> str:
        """Returns residuals of first and last layer, factor and correlation, beside held-out and shuffled ones."""
        data, layers = result.data, result.data["layer"].to_numpy()
        ends = {name: data[name].to_numpy()[[0, -1]] for name in ("residual", "residual_heldout", "residual_shuffled")}
        low, high = (10 ** float(data[name]) for name in ("slope_low", "slope_high"))
        shuffled = f"shuffled ids {ends['residual_shuffled'][0]:z.2f} and {ends['residual_shuffled'][1]:z.2f}"
        held_out = ends["residual_heldout"]
        beside = "none held out" if np.isnan(held_out).any() else f"held out {held_out[0]:z.2f} and {held_out[1]:z.2f}"
        text = "; ".join(
            [
                f"Residual of a linear map to the next token's id: {ends['residual'][0]:z.2f} at layer {layers[0]}"
                + (f", {ends['residual'][1]:z.2f} at layer {layers[-1]}" if len(layers) > 1 else "")
                + f" ({beside})",
                *_line_text(data, "", " a layer" + interval_suffix(low, high, ".3f")),
                ", ".join([shuffled, *_line_text(data, "_shuffled")]),
                f"noise alone {float(data['noise']):z.2f}",
            ]
        )
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "law", the residuals by layer on a log scale, with the fitted line."""
        return {"law": _law(result)}


# ---- readings -------------------------------------------------------------------------------------------


def _check_rows(probe: NextTokenLaw, targets: Int[np.ndarray, " row"], d_model: int) -> None:
    needed = probe.rows_per_dimension * d_model
    if len(targets) < max(needed, d_model + 2):
        raise RequestError(
            f"{counted(len(targets), 'token')} are too few for maps of {d_model} dimensions, which need "
            f"{needed:,}; record more "
            "or lower rows_per_dimension (then read residual_heldout)"
        )
    if (targets == targets[0]).all():
        raise RequestError("all target ids are equal; select other tokens by where")


def _line_text(data: xr.Dataset, end: str, more: str = "") -> list[str]:
    """Factor and correlation of the line over layers; nothing where there is none."""
    factor, pearson = 10 ** float(data[f"slope{end}"]), float(data[f"pearson{end}"])
    if np.isnan(factor):
        return []
    return [f"factor {factor:z.3f}{more}" + ("" if np.isnan(pearson) else f", Pearson {pearson:z.2f}")]


def _targets(probe: NextTokenLaw, targets: Int[np.ndarray, " row"], vocab: int) -> Float[np.ndarray, "row target"]:
    """Ids, and the same ids under each shuffle, with mean 0 and variance 1."""
    draw, size = np.random.default_rng(probe.seed), max(vocab, int(targets.max()) + 1)
    columns = [targets.astype(float), *(draw.permutation(size)[targets].astype(float) for _ in range(probe.shuffles))]
    ends = np.stack(columns, 1)
    return (ends - ends.mean(0)) / ends.std(0)


def _residuals(
    probe: NextTokenLaw,
    store: Store,
    site: str,
    rows: Int[np.ndarray, " row"],
    ends: Float[np.ndarray, "row target"],
    folds: Int[np.ndarray, " row"],
    norm: tuple[str, float],
) -> dict[str, np.ndarray]:
    """Residuals of one layer for each target: in sample, held out, and in sample without each fold (true ids)."""
    array, device = store[site], usable_device(probe.device)
    fits = FoldedLeastSquares(array.shape[1], ends.shape[1], probe.folds, device)
    for fold in range(probe.folds):
        held_out = np.flatnonzero(folds == fold)
        for first in range(0, len(held_out), _BLOCK):
            at = held_out[first : first + _BLOCK]
            states = normalise(array[rows[at]].to(device).double(), *norm)
            fits.add(fold, states, torch.from_numpy(ends[at]).to(device))
    n, present = len(rows), np.unique(folds)
    without = np.full(probe.folds, np.nan)
    for fold in present.tolist() if len(present) > 1 else []:
        rest = ends[folds != fold, 0]
        without[fold] = fits.in_sample(fold)[0] / (len(rest) * rest.var())
    return {"in_sample": fits.in_sample() / n, "held_out": fits.held_out() / n, "without": without}


def _arrays(parts: Mapping[str, np.ndarray], layers: list[int], folds: int) -> dict[str, Any]:
    """Variables from residuals [layer, target] and [layer, fold]."""
    inside, outside = parts["in_sample"], parts["held_out"]
    arrays: dict[str, Any] = {"residual": inside[:, 0], "residual_heldout": outside[:, 0]}
    ends = np.array([central(shuffled) for shuffled in inside[:, 1:]]).T
    arrays |= {"residual_shuffled": inside[:, 1:].mean(1), "shuffled_heldout": outside[:, 1:].mean(1)}
    arrays |= {"residual_shuffled_low": ends[0], "residual_shuffled_high": ends[1]}
    arrays["slope"], arrays["pearson"] = _line(inside[:, 0], layers)
    arrays["rho"] = 10 ** arrays["slope"]
    arrays["slope_heldout"] = _line(outside[:, 0], layers)[0]
    lines = np.array([_line(shuffled, layers) for shuffled in inside[:, 1:].T])
    arrays["slope_shuffled"], arrays["pearson_shuffled"] = lines.mean(0)
    slopes = np.array([_line(column, layers)[0] for column in parts["without"].T])
    slopes = slopes[~np.isnan(slopes)]
    error = np.sqrt((len(slopes) - 1) / len(slopes) * ((slopes - slopes.mean()) ** 2).sum()) if len(slopes) else np.nan
    return arrays | {"slope_low": arrays["slope"] - 1.96 * error, "slope_high": arrays["slope"] + 1.96 * error}


def _line(residual: Float[np.ndarray, " layer"], layers: list[int]) -> tuple[float, float]:
    """Slope and correlation of log10 residual over layers; NaN with fewer than two, or where one is 0."""
    if len(layers) < 2 or not (residual > _EXACT).all():
        return np.nan, np.nan
    x, y = np.array(layers, float) - np.mean(layers), np.log10(residual)
    y = y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / (x @ x)), float(x @ y / size) if size else np.nan


def _id_frequency(targets: Int[np.ndarray, " row"]) -> float:
    """Rank correlation of id and count over the ids that occur."""
    _, counts = np.unique(targets, return_counts=True)
    ranks = pd.Series(counts).rank().to_numpy()
    return float(np.corrcoef(np.arange(len(counts)), ranks)[0, 1]) if ranks.std() else float("nan")


# ---- figures --------------------------------------------------------------------------------------------


def _law(result: Result) -> go.Figure:
    data, layers = result.data, result.data["layer"].to_numpy()
    high, low = data["residual_shuffled_high"].to_numpy(), data["residual_shuffled_low"].to_numpy()
    band = {"x": [*layers, *layers[::-1]], "y": [*high, *low[::-1]], "fill": "toself", "line": {"width": 0}}
    figure = ThemedFigure(go.Scatter(band, mode="lines", fillcolor="rgba(154,161,173,0.3)", name="95 % of shuffles"))
    curves = {"next token": "residual", "held out": "residual_heldout", "shuffled ids": "residual_shuffled"}
    for name, variable in curves.items():
        style = {"color": NEUTRAL, "dash": "dash"} if name == "shuffled ids" else {}
        figure.add_scatter(x=layers, y=data[variable], name=name, mode="lines+markers", line=style)
    figure.update_traces(hovertemplate="layer %{x}: %{y:.4f}")
    lines = [*_line_text(data, "", " a layer"), *(f"shuffled ids {text}" for text in _line_text(data, "_shuffled"))]
    text = "; ".join([*lines, f"{counted(data['rows'], 'token')}"])
    title = f"Law of next-token prediction in {label(str(result.provenance['model']), 60)}"
    figure.update_layout(
        title={"text": title, "subtitle": {"text": text}},
        margin={"t": 110},
        height=460,
        width=760,
    )
    figure.update_xaxes(title="layer", dtick=integer_step(layers.tolist()))
    values = np.concatenate([data[name].to_numpy() for name in curves.values()])
    wide = np.nanmax(values) > 5 * max(np.nanmin(values), _EXACT)
    return figure.update_yaxes(
        type="log", title=axis_title(data["residual"].attrs), dtick="D2" if wide else "D1", tickformat="~r"
    )
