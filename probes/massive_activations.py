"""Massive activations: a few values of the residual stream that are far larger than all others (Sun et al. 2024).

For the output h of a block over one sequence, a matrix (position, dimension), an activation is massive if

    |h[i, d]| > 100   and   |h[i, d]| > 1000 x median |h|

with the median over the whole matrix. Both rules are shown apart, too: where the median grows with depth the ratio
rule ends before the values do. `top` is the mean over sequences of the three largest |h|. With the model, the massive
activations of the block where they first appear are set to 0, to their mean (by dimension, and first token or later
one), and, as a control, as many other dimensions of the same tokens are set to 0; the loss of the text says what each
change does. Tokens with massive activations have small values in the next block (value drain), which is measured where
v_norm or v was recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.probing import (
    CATEGORIES,
    CHANGES,
    LOST_VARIABLES,
    NEUTRAL,
    Band,
    LayerProbe,
    MassivePlaces,
    MeasuredRows,
    Model,
    RaggedSequences,
    RequestError,
    Result,
    Store,
    Variable,
    change_effects,
    check_fields,
    clustered_ends,
    colour_limits,
    counted,
    dataset,
    find_massive,
    group_intervals,
    head_grid,
    head_name,
    intervals,
    layer_bands,
    layers_of,
    log_axis,
    massive_changes,
    mean_norms,
    model_label,
    plain_torch,
    predicting_rows,
    ratio,
    recorded_ends,
    recorded_model,
    stack_heads,
    usable_device,
    value_site,
    whole_sequences,
    with_interval,
    with_note,
)

_LAYER, _HEAD, _CHANGE = ("layer",), ("layer", "head"), ("change",)

VARIABLES = (
    *with_interval(
        Variable("top", ("layer", "rank"), "|h|", "largest, second and third |h| of a sequence, mean over sequences")
    ),
    *with_interval(Variable("median", _LAYER, "|h|", "median |h| of a sequence, mean over sequences")),
    Variable("largest", _LAYER, "|h|", "largest of all sequences"),
    *with_interval(Variable("massive", _LAYER, "share of sequences", "sequences with a massive activation", "0")),
    Variable("above_absolute", _LAYER, "share of sequences", "largest |h| above `absolute`", "0"),
    Variable("above_ratio", _LAYER, "share of sequences", "largest |h| above `relative` times the median", "0"),
    Variable("tokens", _LAYER, "share of tokens", "tokens with a massive activation", "0"),
    Variable("first_tokens", _LAYER, "share of those tokens", "massive tokens that are the first of their sequence"),
    Variable("dimensions", _LAYER, "dimensions", "different dimensions with a massive activation", "0"),
    Variable("value_norm_massive", _HEAD, "L2 norm", "mean norm of values at tokens that enter the block massive"),
    Variable("value_norm_others", _HEAD, "L2 norm", "the same at all other tokens"),
    Variable("value_norm_ratio", _HEAD, "1", "their ratio: below 1 is value drain", "1"),
    *with_interval(
        Variable("loss", _CHANGE, "nats", "mean cross-entropy of the next token, by change", "that of none")
    ),
    *with_interval(Variable("loss_change", _CHANGE, "nats", "loss less that of the unchanged run", "that of random")),
)


@dataclass(frozen=True)
class MassiveActivations(LayerProbe):
    """Finds massive activations: layers, tokens and dimensions, the values behind them, and what removing them does."""

    name: ClassVar[str] = "massive-activations"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = (
        "Sun et al. 2024, Massive activations in large language models, arXiv 2402.17762",
        "Guo et al. 2024, Active-dormant attention heads (value drain), arXiv 2410.13835",
    )
    variables: ClassVar[tuple[Variable, ...]] = (*VARIABLES, *LOST_VARIABLES)
    controls: ClassVar[Mapping[str, str]] = {
        "random": "as many other dimensions of the same tokens set to 0: what removing any values there does",
        "median": "the median |h| of the same block output, which the largest are compared with",
        "random weights": "a model of the same shape with random weights: none",
    }

    absolute: float = 100.0
    """Size that a massive activation exceeds."""
    relative: float = 1000.0
    """Multiple of the median |h| of its sequence and layer that it exceeds, too."""
    where: str | None = None
    """SQL over the token table; a sequence is used if it holds for its first token. None: all."""
    detail: int = 10
    """Places (dimension and token) of each layer in the table, the most frequent first."""
    change_layer: int | None = None
    """Block whose output is changed. None: the first recorded one with massive activations in at least half as many
    sequences as the layer with most."""
    row_limit: int = 4096
    """Maximum number of tokens of the sequences that the changed model runs on."""
    model: str | None = None
    """Directory or name of the recorded model, for the effect. None: no effect, unless a loaded model is given."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the control's dimensions and of the resamples."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "absolute", "relative", at_least=0)
        check_fields(self, "detail", "row_limit", "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `resid_post` of every layer; for value drain `v_norm` or `v`; for the effect runs the model.

        Costs one pass over the rows of each layer, and four passes of the model over `row_limit` tokens; memory is one
        sequence, and a few numbers for each massive activation.

        Args:
            store: The recorded activations, of whole sequences.
            model: The recorded model. None: it is loaded if the setting `model` names it.

        Raises:
            RequestError: resid_post was not recorded, values are NaN or infinite, or the model is another one.
        """
        layers, labels = self.recorded(store, "resid_post")
        sequences = whole_sequences(store, self.where)
        values = [layer for layer in layers if layer - 1 in layers and layer in layers_of(store, "v", "v_norm")]
        value_sites = [value_site(store, layer) for layer in values]
        rows = self.finite_rows(store, [*labels, *value_sites], sequences.rows)
        sequences = sequences.without(rows.left_out)
        if not len(sequences):
            raise RequestError("no sequence is left; change where, or record sequences without infinite values")
        by_layer = {layer: find_massive(store, layer, sequences, self.absolute, self.relative) for layer in layers}
        arrays = _by_layer(self, by_layer, sequences)
        coords: dict[str, Any] = {"layer": layers, "rank": [1, 2, 3][: by_layer[layers[0]].top.shape[1]]}
        notes = []
        drains = _value_drain(store, by_layer, values, sequences)
        if drains:
            names = ("value_norm_massive", "value_norm_others", "value_norm_ratio")
            arrays |= stack_heads(layers, drains, names)
            coords["head"] = np.arange(arrays["value_norm_ratio"].shape[1])
        else:
            notes.append("value drain not computed: no massive token enters a block whose v_norm or v was recorded")
        if model is not None or self.model is not None:
            effect, note = _effect(self, store, model, by_layer, sequences, arrays["massive"])
            notes.append(note)
            arrays, coords = arrays | effect, coords | ({"change": ["none", *CHANGES]} if effect else {})
        data = dataset(self.variables, arrays, coords)
        data.attrs["sequences"] = len(sequences)
        return self.result(store, data, _table(self, store, by_layer), rows, notes)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns layers, size, dimension and token of the massive activations, the value drain and the effect."""
        data, table = result.data, result.table
        layers = data["layer"].to_numpy()
        share, top = data["massive"].to_numpy(), data["top"].to_numpy()[:, 0]
        at = int(np.lexsort((top, share))[-1])
        line = table.loc[table["layer"] == layers[at]].iloc[0]
        median = float(data["median"][at])
        times = f", {top[at] / median:z,.0f} times the median" if median > 1e-9 * top[at] else ""
        size = f"{top[at]:z,.0f}" if top[at] >= 100 else f"{top[at]:.3g}"
        place = f"dimension {int(line['dimension'])}, {line['position']} token {str(line['token'])!r}"
        if share[at] == 0:
            text = f"No massive activations: the largest |h| is {size} on average{times} (layer {layers[at]}, {place})"
        else:
            span = _span(layers[share > 0])
            text = (
                f"Massive activations at {span}: the largest of a sequence is {size} on average{times} (layer "
                f"{layers[at]}, {place}), in {100 * share[at]:z.0f} % of "
                f"{counted(data.attrs['sequences'], 'sequence')} and "
                f"{100 * float(data['tokens'][at]):.2g} % of tokens"
            )
        if "value_norm_ratio" in data:
            text += (
                f"; values of such tokens have {float(data['value_norm_ratio'].median()):z.2f} times the norm of others"
            )
        if "loss" in data:
            loss = {change: float(data["loss"].sel(change=change)) for change in ("none", *CHANGES)}
            text += (
                f"; loss {loss['none']:z.2f} nats, set to their mean {loss['mean']:z.2f}, set to 0 "
                f"{loss['zero']:z.2f}, "
                f"other dimensions of the same tokens set to 0 {loss['random']:z.2f}"
            )
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "layers", the largest |h| and the median by layer; "values", value drain by head; "effect", loss."""
        figures = {"layers": _layers(result)}
        if "value_norm_ratio" in result.data:
            figures["values"] = _values(result)
        return {**figures, "effect": _effects(result)} if "loss" in result.data else figures


# ---- readings -------------------------------------------------------------------------------------------


def _by_layer(
    probe: MassiveActivations, by_layer: Mapping[int, MassivePlaces], sequences: RaggedSequences
) -> dict[str, np.ndarray]:
    """The variables over layers."""
    columns: dict[str, list[Any]] = {}
    for activations in by_layer.values():
        largest = activations.top[:, 0]
        absolute, rare = largest > probe.absolute, largest > probe.relative * activations.median
        massive, ranks = absolute & rare, activations.top.shape[1]
        values = np.column_stack([activations.top, activations.median, massive])
        low, high = clustered_ends(values, sequences.document, resamples=probe.resamples, seed=probe.seed)
        rows, first = np.unique(activations.row[activations.massive], return_index=True)
        line = {
            "top": activations.top.mean(0),
            "top_low": low[:ranks],
            "top_high": high[:ranks],
            "median": activations.median.mean(),
            "median_low": low[ranks],
            "median_high": high[ranks],
            "largest": largest.max(),
            "massive": massive.mean(),
            "massive_low": low[-1],
            "massive_high": high[-1],
            "above_absolute": absolute.mean(),
            "above_ratio": rare.mean(),
            "tokens": len(rows) / sequences.lengths.sum(),
            "first_tokens": activations.first[activations.massive][first].mean() if len(rows) else np.nan,
            "dimensions": len(np.unique(activations.dimension[activations.massive])),
        }
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in columns.items()}


def _value_drain(
    store: Store, by_layer: Mapping[int, MassivePlaces], layers: Sequence[int], sequences: RaggedSequences
) -> dict[int, dict[str, np.ndarray]]:
    """Norms of values by layer, at tokens that are massive in the output of the block before and at all others."""
    drains = {}
    for layer in layers:
        before = by_layer[layer - 1]
        chosen = np.unique(before.row[before.massive])
        rest = np.setdiff1d(sequences.rows, chosen)
        if not len(chosen) or not len(rest):
            continue
        site = value_site(store, layer)
        norms = [mean_norms(store, site, rows) for rows in (chosen, rest)]
        parts = (*norms, ratio(*norms))
        drains[layer] = dict(zip(("value_norm_massive", "value_norm_others", "value_norm_ratio"), parts, strict=True))
    return drains


def _effect(
    probe: MassiveActivations,
    store: Store,
    model: Model | None,
    by_layer: Mapping[int, MassivePlaces],
    sequences: RaggedSequences,
    share: np.ndarray,
) -> tuple[dict[str, np.ndarray], str]:
    """Losses of the unchanged and the changed runs, and a note."""
    layers = list(by_layer)
    if probe.change_layer is not None and probe.change_layer not in layers:
        raise RequestError(f"change_layer: layer {probe.change_layer} was not recorded; recorded are {layers}")
    if not share.max():
        return {}, "effect not computed: no massive activations"
    layer = layers[int(np.argmax(share >= share.max() / 2))] if probe.change_layer is None else probe.change_layer
    activations = by_layer[layer]
    if not activations.massive.any():
        return {}, f"effect not computed: no massive activations at layer {layer}"
    ids = predicting_rows(store, None, probe.row_limit if probe.where is None else store.rows, probe.seed)
    ids = ids[np.isin(ids, sequences.rows)][: probe.row_limit]
    if not len(ids):
        return {}, "effect not computed: no selected sequence has two tokens"
    loaded = recorded_model(store, model or probe.model, usable_device(probe.device))
    changes = massive_changes(loaded, layer, activations, probe.seed)
    effects = change_effects(loaded, MeasuredRows(store, {"text": ids}), changes, label="massive activations")
    arrays = {}
    for name, read in (("loss", effects.means), ("loss_change", effects.effects)):
        mean, resampled = read(resamples=probe.resamples, seed=probe.seed)
        low, high = intervals(resampled[..., 0, 0])
        parts = zip(("", "_low", "_high"), (mean[:, 0, 0], low, high), strict=True)
        arrays |= {f"{name}{end}": values if name == "loss" else np.append(0.0, values) for end, values in parts}
    return arrays, f"effect of changes at the output of block {layer} on {counted(len(ids), 'prediction')}"


def _table(probe: MassiveActivations, store: Store, by_layer: Mapping[int, MassivePlaces]) -> pd.DataFrame:
    """The most frequent places of each layer: massive ones first, else the largest of the sequences."""
    tokens, parts = store.tokens["token"], []
    for layer, activations in by_layer.items():
        places = pd.DataFrame(
            {
                "layer": layer,
                "dimension": activations.dimension,
                "position": np.where(activations.first, "first", "later"),
                "token": tokens.take(activations.row).to_pylist(),
                "massive": activations.massive,
                "value": activations.value.astype(float),
                "size": np.abs(activations.value).astype(float),
            }
        )
        keys = ["layer", "dimension", "position", "token"]
        lines = places.groupby(keys, sort=True, dropna=False).agg(
            massive=("massive", "sum"),
            count=("massive", "size"),
            mean=("value", "mean"),
            standard_deviation=("value", lambda values: values.std(ddof=0)),
            largest=("size", "max"),
        )
        order = ["massive", "largest"]
        parts.append(lines.sort_values(order, ascending=False, kind="stable").head(probe.detail).reset_index())
    return pd.concat(parts, ignore_index=True)


# ---- figures --------------------------------------------------------------------------------------------


def _layers(result: Result) -> go.Figure:
    data = result.data
    layers = data["layer"].to_numpy()
    ends, median_ends = recorded_ends(data, "top"), recorded_ends(data, "median")
    curves = [
        Band(name, data["top"][:, rank].to_numpy(), ends and (ends[0][:, rank], ends[1][:, rank]), CATEGORIES[rank])
        for rank, name in enumerate(("largest", "second", "third")[: data.sizes["rank"]])
    ]
    median = np.where(data["median"] > 0, data["median"], np.nan)
    curves.append(Band("median", median, median_ends, NEUTRAL, "dash"))
    absolute = result.provenance["settings"]["absolute"]
    text = f"|h| of block outputs, mean over {counted(data.attrs['sequences'], 'sequence')}; dotted: |h| = {absolute:g}"
    figure = layer_bands(
        curves,
        layers=layers.tolist(),
        title=f"Largest activations of {model_label(result)}",
        subtitle=f"{text}; bands: 95 % intervals over documents" if ends else text,
        unit="|h|",
    )
    figure.update_traces(hovertemplate="layer %{x}: %{y:.4g}", selector={"hoverinfo": None})
    figure.update_yaxes(**log_axis(data["top"].to_numpy(), median, np.array([absolute], float)))
    if absolute > 0:
        figure.add_hline(y=absolute, line={"dash": "dot", "width": 1, "color": NEUTRAL})
    return figure


def _values(result: Result) -> go.Figure:
    data = result.data.dropna("layer", how="all", subset=["value_norm_ratio"])
    layers, heads = data["layer"].to_numpy().tolist(), data["head"].to_numpy().tolist()
    values = data["value_norm_ratio"].to_numpy()
    hover = [
        [f"<b>{head_name(layer, head)}</b><br>ratio {values[row, head]:z.3f}" for head in heads]
        for row, layer in enumerate(layers)
    ]
    return head_grid(
        values,
        hover=hover,
        layers=layers,
        title=f"Value norm at massive tokens of {model_label(result)}",
        subtitle="mean L2 norm of values at tokens that enter the block massive, divided by that at others",
        unit="ratio",
        limits=colour_limits(values),
    )


def _effects(result: Result) -> go.Figure:
    data = result.data
    names = {
        "none": "unchanged",
        "mean": "set to their mean",
        "zero": "set to 0",
        "random": "other dimensions set to 0",
    }
    ends = np.stack([data[f"loss{end}"].to_numpy() for end in ("", "_low", "_high")])
    return group_intervals(
        {"loss": ends},
        categories=[names[change] for change in data["change"].to_numpy().tolist()],
        hover="%{x}",
        title=f"Loss of {model_label(result)} with changed massive activations",
        subtitle="mean cross-entropy of the next token, 95 % CI over documents",
    ).update_yaxes(title="nats")


def _span(layers: np.ndarray) -> str:
    """Returns layers as text: "layer 3", "layers 3 to 9", "5 layers from 3 to 9"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    whole = layers[-1] - layers[0] + 1 == len(layers)
    return (
        f"layers {layers[0]} to {layers[-1]}"
        if whole
        else f"{counted(len(layers), 'layer')} from {layers[0]} to {layers[-1]}"
    )
