"""Value-aware importance: attention received times the size of the value (VATP, Guo et al. 2024).

For key k of a head, with A the attention and v the value that the query head reads, before W_O:

    S_k = sum over queries i of A[i, k]        I_k = S_k * ||v_k||_1

A token that receives much attention may have a value near 0, as attention sinks do: then S calls it important and I
does not. Which of the two is closer to what the head does is measured, where patterns, values and the model are there,
by the change of the head's output when the key is hidden and each query's attention is renormalised.
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
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    TOKEN_CLASSES,
    Band,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Sequences,
    Store,
    ThemedFigure,
    Variable,
    attention_source,
    axis_title,
    check,
    check_fields,
    clustered_interval,
    clustered_means,
    colour_limits,
    counted,
    dataset,
    error_bars,
    for_query_heads,
    head_grid,
    head_hover,
    head_name,
    head_outputs,
    intervals,
    layer_bands,
    layers_of,
    model_label,
    output_maps,
    plain_torch,
    rank_correlation,
    read_alpha,
    received_sequences,
    recorded_ends,
    recorded_model,
    removal_effects,
    require_causal,
    resampled_means,
    stack_heads,
    token_classes,
    top_overlap,
    usable_device,
    value_text,
    with_interval,
    with_note,
    with_progress,
)

_HEAD = ("layer", "head")
_CLASS = ("class", "layer")
_RANK = "rank among positions, 1 = largest"
_EFFECT = "and the change of the head's output when a key is hidden"
_VARIABLES: tuple[Variable, ...] = (
    *with_interval(Variable("overlap_top", _HEAD, "share of keys", "of the top keys by S, those on top by I", "1")),
    *with_interval(Variable("spearman", _HEAD, "1", "rank correlation of S and I over positions", "1")),
    Variable("overlap_shuffled", _HEAD, "share of keys", "the same with value norms permuted over positions"),
    Variable("spearman_shuffled", _HEAD, "1", "the same with value norms permuted over positions"),
    Variable("overlap_top_mean", _HEAD, "share of keys", "overlap_top of means over the queries that see a key", "1"),
    Variable("spearman_mean", _HEAD, "1", "rank correlation of means over the queries that see a key", "1"),
    Variable("sink_rank_attention", _HEAD, "rank", f"of the position `sink` by S; {_RANK}", "1"),
    Variable("sink_rank_value", _HEAD, "rank", f"of the position `sink` by I; {_RANK}", "1"),
    Variable("effect_attention", _HEAD, "1", f"rank correlation of S {_EFFECT}", "0"),
    Variable("effect_value", _HEAD, "1", f"rank correlation of I {_EFFECT}", "0"),
    Variable("effect_shuffled", _HEAD, "1", f"rank correlation of I with permuted norms {_EFFECT}", "0"),
    *with_interval(Variable("overlap", (), "share of keys", "overlap_top, mean over heads", "1")),
    *with_interval(Variable("effect_gain", (), "1", "effect_value less effect_attention, mean over heads", "0")),
    *with_interval(
        Variable(
            "class_norm", _CLASS, "times the mean", "L1 norm of the values of a class of tokens / that of all", "1"
        )
    ),
    Variable("class_tokens", ("class",), "tokens", "tokens of the class"),
    Variable("top_keys", (), "keys", "keys on top, in each sequence and head"),
    Variable("effect_sequences", (), "sequences", "sequences of which the change of the output was computed"),
    Variable("sequences", (), "sequences", "sequences that count"),
    Variable("short_sequences", (), "sequences", "sequences left out because they are shorter than `length`"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class ValueAwareImportance(LayerProbe):
    """Measures whether attention alone ranks tokens as attention times the size of their values does."""

    name: ClassVar[str] = "value-aware-importance"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Guo et al. 2024, Attention score is not all you need for token importance indicator in KV cache reduction, "
        "arXiv 2406.12335",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "overlap_shuffled": "value norms permuted over positions: the disagreement that their spread alone makes",
        "effect_shuffled": "I with permuted norms against the change of the output",
        "random weights": "the same architecture with random weights: values of like size, so S and I agree",
    }

    length: int = 64
    """Tokens of each sequence that count, from its first on; shorter sequences are left out."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    top: float = 0.1
    """Share of the keys that are on top."""
    sink: int = 0
    """Position whose rank is reported."""
    model: str | None = None
    """Folder or name of the recorded model, for W_O. None: no change of outputs, unless a loaded model is given."""
    effect_sequences: int = 32
    """Number of sequences of which the change of the output is computed."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of resamples and permutations."""
    device: str | None = None
    """Device of products with W_O: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("length", self.length, at_least=3)
        check("top", self.top, above=0, below=1)
        check_fields(self, "resamples", "effect_sequences", at_least=1)
        check_fields(self, "seed", at_least=0)
        if not 0 <= self.sink < self.length:
            raise RequestError(f"sink must be from 0 to {self.length - 1}, one of {counted(self.length, 'token')}")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `v`, and `attn_received` or `pattern`; for the change of outputs `pattern` and the model's W_O.

        Costs one pass over these; memory is blocks of 64 MiB and a few numbers for each sequence and head.

        Raises:
            RequestError: Attention or values were not recorded, no sequence is long enough, derived attention was
                summed over longer sequences than `length`, values are NaN or infinite, or the model is not causal or
                another one.
        """
        require_causal(store, self.name)
        source, attended = attention_source(store, self.layers)
        layers = [layer for layer in attended if layer in layers_of(store, "v")]
        missing = [layer for layer in attended if layer not in layers]
        if missing and (self.layers is not None or not layers):
            store.require(f"v.{missing[0]}")
        kind = "pattern" if source == "pattern" else "attn_received"
        sequences = received_sequences(store, source, self.length, self.where)
        sites = [site for layer in layers for site in (f"{kind}.{layer}", f"v.{layer}")]
        rows = self.finite_rows(store, sites, sequences.rows)
        sequences = sequences.without(rows.left_out)
        classes = token_classes(store, sequences.rows.ravel())[1].reshape(sequences.rows.shape)
        maps, notes = _maps(self, store, model, source, layers)
        read = {
            layer: _read(self, store, source, layer, sequences, classes, maps.get(layer))
            for layer in with_progress(layers, "value-aware importance", "layers")
        }
        arrays = _summary(self, read, sequences, classes)
        if sequences.short:
            notes.append(
                f"{counted(sequences.short, 'sequence')} of fewer than {counted(self.length, 'token')} left out"
            )
        heads = max(part["spearman"].shape[1] for part in read.values())
        coords = {"layer": layers, "head": np.arange(heads), "class": list(TOKEN_CLASSES)}
        data = dataset(_VARIABLES, arrays, coords)
        return self.result(store, data, _table(data), rows, [*notes, self.note_layers(store)])

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the overlap of both rankings beside permuted norms, the sink's ranks, and which outputs follow."""
        data, settings = result.data, result.provenance["settings"]
        ranks = [float(data[f"sink_rank_{name}"].median()) for name in ("attention", "value")]
        text = (
            f"The top {100 * settings['top']:g} % of keys by attention and by attention times value size overlap by "
            f"{value_text(data, 'overlap')} (mean over heads; permuted value sizes "
            f"{float(data['overlap_shuffled'].mean()):z.2f}); position {settings['sink']} ranks {ranks[0]:z.0f} of "
            f"{settings['length']} by attention and {ranks[1]:z.0f} with values (medians over heads)"
        )
        if "effect_gain" in data:
            means = [float(data[f"effect_{name}"].mean()) for name in ("value", "attention", "shuffled")]
            text += (
                f"; rank correlation with the change of the head's output when a key is hidden: {means[0]:z.2f} with "
                f"values, {means[1]:z.2f} without, gain {value_text(data, 'effect_gain')}, permuted {means[2]:z.2f}"
            )
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "heads", the overlap by layer and head; "classes", value sizes by layer; with the model "effect"."""
        figures = {"heads": _heads(result), "classes": _classes(result)}
        return {**figures, "effect": _effect(result)} if "effect_value" in result.data else figures


# ---- readings -------------------------------------------------------------------------------------------


def _maps(
    probe: ValueAwareImportance, store: Store, model: Model | None, source: str, layers: list[int]
) -> tuple[dict[int, torch.Tensor], list[str]]:
    """Maps of W_O of the layers whose change of outputs can be computed; and why others cannot."""
    if model is None and probe.model is None:
        return {}, ["change of outputs not computed: it needs the model (model=, --model), for W_O"]
    if source != "pattern":
        return {}, ["change of outputs not computed: it needs pattern"]
    outputs = head_outputs(recorded_model(store, model or probe.model, usable_device(probe.device)))
    return {layer: output_maps(outputs[layer].weights()) for layer in layers if layer in outputs}, []


def _read(
    probe: ValueAwareImportance,
    store: Store,
    source: str,
    layer: int,
    sequences: Sequences,
    classes: np.ndarray,
    maps: torch.Tensor | None,
) -> dict[str, np.ndarray]:
    """Measures of each sequence and head of one layer [sequence, head]; "norms", sums by class [sequence, class]."""
    kind, draw = "pattern" if source == "pattern" else "attn_received", np.random.default_rng((probe.seed, layer))
    shape, width = store[kind, layer].shape[1:], int(np.prod(store["v", layer].shape[1:]))
    visible, k = np.arange(probe.length, 0, -1)[:, None], max(1, round(probe.top * probe.length))
    parts, norms_of_class, first = [], np.zeros((len(sequences), len(TOKEN_CLASSES))), 0
    for rows in sequences.blocks(max(int(np.prod(shape)), width)):
        alpha, values = read_alpha(store, source, layer, rows), store["v", layer][rows].double()
        norms = for_query_heads(values, shape[0]).abs().sum(-1).numpy()
        mixed = draw.permuted(norms, axis=1)
        sums = alpha * visible
        mass, importance, blind = sums, sums * norms, sums * mixed
        part = {
            "overlap_top": top_overlap(mass, importance, k),
            "spearman": rank_correlation(mass, importance),
            "overlap_shuffled": top_overlap(mass, blind, k),
            "spearman_shuffled": rank_correlation(mass, blind),
            "overlap_top_mean": top_overlap(alpha, alpha * norms, k),
            "spearman_mean": rank_correlation(alpha, alpha * norms),
            "sink_rank_attention": _rank(mass, probe.sink),
            "sink_rank_value": _rank(importance, probe.sink),
        }
        known = slice(0, max(0, min(len(rows), probe.effect_sequences - first)))
        if maps is not None and known.stop:
            pattern = store["pattern", layer][rows[known]][..., : probe.length]
            effect = removal_effects(pattern, values[known], maps)
            for name, scores in (("attention", mass), ("value", importance), ("shuffled", blind)):
                part[f"effect_{name}"] = rank_correlation(scores[known], effect)
        numbers = first + np.arange(len(rows))
        np.add.at(norms_of_class, (numbers[:, None], classes[numbers]), norms.mean(-1))
        parts.append(part)
        first += len(rows)
    names = dict.fromkeys(name for part in parts for name in part)
    read = {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}
    return read | {"norms": norms_of_class}


def _rank(values: np.ndarray, position: int) -> np.ndarray:
    """Rank of a position, 1 for the largest, [sequence, head]; the mean of the best and worst at ties."""
    at = values[:, position][:, None]
    return 1 + (values > at).sum(1) + ((values == at).sum(1) - 1) / 2


def _summary(
    probe: ValueAwareImportance, read: Mapping[int, Mapping[str, np.ndarray]], sequences: Sequences, classes: np.ndarray
) -> dict[str, Any]:
    """Means over sequences with intervals, means over heads, and value norms by class."""
    settings = {"resamples": probe.resamples, "seed": probe.seed}
    means: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in read}
    for layer, part in read.items():
        for name, values in part.items():
            if name == "norms":
                continue
            mean, resampled = clustered_means(values, sequences.document[: len(values)], **settings)
            means[layer][name] = mean
            if name in ("overlap_top", "spearman"):
                ends = intervals(resampled, len(np.unique(sequences.document)))
                means[layer] |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
    arrays: dict[str, Any] = stack_heads(
        list(read), means, [variable.name for variable in _VARIABLES if variable.dims == _HEAD]
    )
    by_layer = {name: [part[name] for part in read.values() if name in part] for name in next(iter(read.values()))}
    scalars = {"overlap": np.concatenate(by_layer["overlap_top"], 1)}
    if "effect_value" in by_layer:
        scalars["effect_gain"] = np.concatenate(by_layer["effect_value"], 1) - np.concatenate(
            by_layer["effect_attention"], 1
        )
    for name, values in scalars.items():
        known = np.isfinite(values).any(1)
        mean = np.nanmean(values[known], 1)
        interval = clustered_interval(mean, sequences.document[: len(values)][known], **settings)
        arrays |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
    arrays |= _class_norms(np.stack(by_layer["norms"], 2), classes, sequences.document, settings)
    arrays |= {"top_keys": max(1, round(probe.top * probe.length))}
    effects = len(by_layer["effect_value"][0]) if "effect_value" in by_layer else 0
    arrays |= {"effect_sequences": effects, "sequences": len(sequences), "short_sequences": sequences.short}
    return {name: np.asarray(value) for name, value in arrays.items()}


def _class_norms(
    norms: Float[np.ndarray, "sequence class layer"],
    classes: Int[np.ndarray, "sequence position"],
    document: Int[np.ndarray, " sequence"],
    settings: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """Mean norm of each class by the mean of all tokens, with intervals; numbers of tokens."""
    documents, index = np.unique(document, return_inverse=True)
    totals = np.zeros((len(documents), norms.shape[1] + 1, norms.shape[2]))
    np.add.at(totals[:, :-1], index, norms)
    totals[:, -1] = totals[:, :-1].sum(1)
    counts = np.zeros(totals.shape[:2])
    np.add.at(counts[:, :-1], (index[:, None], classes), 1)
    counts[:, -1] = counts[:, :-1].sum(1)
    tokens = np.broadcast_to(counts[:, :, None], totals.shape)
    flat = (part.reshape(len(documents), -1) for part in (totals, tokens))
    mean, resampled = resampled_means(*flat, **settings)
    parts = mean.reshape(totals.shape[1:]), resampled.reshape(-1, *totals.shape[1:])
    share, resampled_share = (part[..., :-1, :] / part[..., -1:, :] for part in parts)
    low, high = intervals(resampled_share)
    size = counts[:, :-1].sum(0).astype(np.int64)
    return {"class_norm": share, "class_norm_low": low, "class_norm_high": high, "class_tokens": size}


def _table(data: xr.Dataset) -> pd.DataFrame:
    """A line for each layer and head, the least agreement first."""
    layer, head = (axis.ravel() for axis in np.meshgrid(data["layer"], data["head"], indexing="ij"))
    columns = {str(name): part.to_numpy().ravel() for name, part in data.items() if part.dims == _HEAD}
    table = pd.DataFrame({"layer": layer, "head": head, **columns})
    known = table.loc[table["overlap_top"].notna()]
    return known.sort_values(["overlap_top", "spearman"], kind="stable", ignore_index=True)


# ---- figures --------------------------------------------------------------------------------------------


def _heads(result: Result) -> go.Figure:
    data, layers = result.data, result.data["layer"].to_numpy().tolist()
    lines = {(line["layer"], line["head"]): _hover(line) for line in result.table.to_dict("records")}
    return head_grid(
        data["overlap_top"].to_numpy(),
        hover=[[lines.get((layer, head), "") for head in data["head"].to_numpy().tolist()] for layer in layers],
        layers=layers,
        title=f"Attention and value-aware importance in {model_label(result)}: overlap {value_text(data, 'overlap')}",
        subtitle=f"share of the {int(data['top_keys'])} keys with most attention that are on top with value sizes; "
        f"{counted(data['sequences'], 'sequence')}",
        unit=axis_title(data["overlap_top"].attrs, "overlap"),
        limits=colour_limits(data["overlap_top"].to_numpy()),
    )


def _hover(line: Mapping[str, Any]) -> str:
    names = ("overlap_top", "spearman", "sink_rank_attention", "sink_rank_value", "effect_attention", "effect_value")
    return head_hover(line, names)


def _classes(result: Result) -> go.Figure:
    data, bands = result.data, []
    for name in data["class"].to_numpy().tolist():
        at = data.sel({"class": name})
        if int(at["class_tokens"]):
            dash = "dash" if len(bands) >= len(CATEGORIES) else "solid"  # colours begin again
            colour = CATEGORIES[len(bands) % len(CATEGORIES)]
            curve = f"{name} ({int(at['class_tokens']):,})"
            bands.append(Band(curve, at["class_norm"].to_numpy(), recorded_ends(at, "class_norm"), colour, dash))
    drawn = any(band.ends is not None for band in bands)
    figure = layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"Value size by class of token in {model_label(result)}",
        subtitle=f"tokens of {counted(data['sequences'], 'sequence')}; in brackets: tokens of the class"
        + "; bands: 95 % intervals over documents" * drawn,
        unit=axis_title(data["class_norm"].attrs, "L1 norm"),
    )
    figure.update_yaxes(rangemode="tozero")
    return figure.update_layout(
        width=900, legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    )


def _effect(result: Result) -> go.Figure:
    table, data = result.table, result.data
    names = [head_name(layer, head) for layer, head in zip(table["layer"], table["head"], strict=True)]
    figure = ThemedFigure(
        go.Scatter(
            x=table["effect_attention"],
            y=table["effect_value"],
            text=names,
            name="heads",
            mode="markers",
            marker={"size": 6},
            hovertemplate="%{text}: %{x:.2f} without values, %{y:.2f} with<extra></extra>",
        )
    )
    least = float(np.nanmin(table[["effect_attention", "effect_value"]].to_numpy(), initial=0.9))
    ends = [np.floor(10 * least) / 10, 1]
    dashes = {"color": NEUTRAL, "dash": "dash"}
    figure.add_scatter(x=ends, y=ends, mode="lines", line=dashes, name="equal", hoverinfo="skip")
    without = float(data["effect_attention"].mean())
    gained = [np.array([without + float(data[f"effect_gain{end}"])]) for end in ("", "_low", "_high")]
    figure.add_scatter(
        x=[without],
        y=gained[0],
        error_y=error_bars(*gained) | {"thickness": 2},
        name="mean of heads, 95 % interval of the gain",
        mode="markers",
        marker={"size": 11, "symbol": "diamond", "color": CATEGORIES[1]},
        hovertemplate="mean: %{x:.2f} without values, %{y:.2f} with<extra></extra>",
    )
    title: dict[str, Any] = {"text": f"Which importance the heads' outputs follow in {model_label(result)}"}
    title["subtitle"] = {"text": "rank correlation with the change of the output when a key is hidden; a dot a head"}
    figure.update_layout(title=title, height=560, width=620, margin={"t": 110})
    figure.update_xaxes(title="attention alone", range=[ends[0] - 0.02, 1.02])
    return figure.update_yaxes(title="attention times value size", range=[ends[0] - 0.02, 1.02])
