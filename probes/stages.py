"""Stages of inference: what deleting or swapping blocks costs, beside markers of stages by layer (Lad et al. 2024).

Deleting block l passes its input on as its output; swapping exchanges blocks l and l + 1, as wholes. On the same tokens
of the same texts, all with a token before and one after them:

    kl_delete(l) = mean KL(model ‖ without block l)        kl_swap(l) = mean KL(model ‖ blocks l and l + 1 exchanged)

in float64, with the share of tokens whose top-1 prediction stays (agreement) and the change of the loss. A model with
random weights survives deletion, too, so the same numbers of such a copy stand beside them. Markers by layer: attention
to the five tokens before the query (detokenisation); entropy of the logit lens and KL between the lenses of layers l
and l - 1 (ensembling, sharpening); neurons that raise or lower few tokens (prediction, suppression).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    MEASURES,
    NEUTRAL,
    Band,
    Change,
    LayerProbe,
    MeasuredRows,
    Model,
    RequestError,
    Result,
    SkipBlock,
    Store,
    SwapBlocks,
    Variable,
    blocks,
    change_effects,
    check_fields,
    clustered_means,
    counted,
    dataset,
    intervals,
    label,
    layer_bands,
    layers_of,
    load_unembed,
    log_axis,
    log_probabilities,
    mlp_outputs,
    model_label,
    plain_torch,
    predicting_rows,
    random_copy,
    recorded_ends,
    recorded_model,
    require_causal,
    usable_device,
    vocabulary_moments,
    with_interval,
    with_note,
)

_LAYER = ("layer",)
_RECENT = 5  # tokens before the query
_ROWS = 1000  # measured where row_limit is not set and the work below allows them
_CPU_WORK = 1.5e13  # operations of the changed passes where row_limit is not set: some minutes of two cores
_CHANGES = {"delete": "this block deleted", "swap": "this block and the next exchanged"}
_MEASURED = {"kl": ("kl", 0.0), "agreement": ("agreement", 1.0), "loss": ("loss", 0.0)}
"""Variable to the measure, and its value in the plain model, which effects leave out."""
_UNITS = {"kl": "nats", "agreement": "share of tokens", "loss": "nats"}
_MEANING = {
    "kl": "KL(model || changed) of the next token",
    "agreement": "tokens whose top-1 prediction stays",
    "loss": "change of the cross-entropy of the next token",
}


def _of_changes() -> Iterator[Variable]:
    for change, phrase in _CHANGES.items():
        for name in _MEASURED:
            variable, meaning = f"{name}_{change}", f"{_MEANING[name]}, {phrase}"
            yield from with_interval(Variable(variable, _LAYER, _UNITS[name], meaning, f"{variable}_random"))
            yield from with_interval(
                Variable(f"{variable}_random", _LAYER, _UNITS[name], "the same in a model with random weights")
            )


VARIABLES: tuple[Variable, ...] = (
    *_of_changes(),
    *with_interval(
        Variable(
            "recent", _LAYER, "attention", f"to the {_RECENT} tokens before the query, mean of heads", "recent_uniform"
        )
    ),
    Variable("recent_uniform", (), "attention", "of a head that attends to all visible keys equally"),
    *with_interval(Variable("entropy", _LAYER, "nats", "entropy of the logit lens", "ln(vocab)")),
    *with_interval(
        Variable("kl_lens", _LAYER, "nats", "KL(lens at this layer || lens at the one recorded before)", "0")
    ),
    Variable("prediction_neurons", _LAYER, "share of neurons", "kurtosis above 10, skew above 0", "0"),
    Variable("suppression_neurons", _LAYER, "share of neurons", "kurtosis above 10, skew below 0", "0"),
    Variable("neurons", _LAYER, "neurons", "neurons of the layer"),
    Variable("rows", (), "tokens", "tokens that are measured"),
)


@dataclass(frozen=True)
class Stages(LayerProbe):
    """Measures what deleting or swapping each block costs, beside markers of stages by layer."""

    name: ClassVar[str] = "stages"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Lad et al. 2024, The remarkable robustness of LLMs: stages of inference?, arXiv 2406.19384",
        "Gurnee et al. 2024, Universal neurons in GPT2 language models, arXiv 2401.12181",
    )
    variables: ClassVar[tuple[Variable, ...]] = (*VARIABLES, *LOST_VARIABLES)
    controls: ClassVar[Mapping[str, str]] = {
        "random weights": "the same changes in a model of the same shape with random weights, which survives them, too"
    }

    where: str | None = "NOT is_special"
    """SQL over the token table: tokens that are measured, as far as one stands before and one after them. None: all."""
    row_limit: int | None = None
    """Tokens that are measured, in whole sequences drawn at random. None: 1,000, or as many as some minutes of a CPU
    pay for."""
    markers_only: bool = False
    """True leaves deletion, swaps and neurons out, so that no model is needed."""
    control: bool = True
    """Run the changes in a model with random weights, too: as much memory and time again."""
    model: str | None = None
    """Folder or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the drawn sequences, the resamples and the random weights."""
    device: str | None = None
    """Device of a model that the probe loads and of products with W_U. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "row_limit", at_least=1, whole=True, optional=True)
        check_fields(self, "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `pattern` and `resid_post` as far as they were recorded, and runs the model.

        Costs 2 passes for each layer over about `row_limit` tokens, twice that with the control, and products of all
        neurons with W_U.

        Args:
            store: Its texts are measured; it names the model.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: No token is measured, values are NaN or infinite, nothing can be computed, or the model cannot
                be loaded, is another one, is not causal, or has a block that cannot be deleted or moved.
        """
        require_causal(store, self.name)
        lens = layers_of(store, "resid_post") if store.manifest.has_unembed else []
        attention = layers_of(store, "pattern")
        layers = self._layers(store.manifest.model.n_layers)
        limit, few_rows = self._limit(store, layers)
        rows = predicting_rows(store, self.where, limit, self.seed)
        lens, attention = ([layer for layer in known if layer in layers] for known in (lens, attention))
        sites = [f"resid_post.{layer}" for layer in lens] + [f"pattern.{layer}" for layer in attention]
        finite = self.finite_rows(store, sites, rows)
        arrays: dict[str, Any] = {"rows": len(finite.rows)}
        if attention:
            arrays |= self._recent(store, attention, layers, finite.rows)
        if lens:
            arrays |= self._lens(store, lens, layers, finite.rows)
        notes = [
            few_rows,
            "" if attention else "recent not computed: pattern was not recorded",
            "" if lens else "entropy not computed: resid_post or the unembedding was not recorded",
        ]
        if not self.markers_only:
            model = recorded_model(store, model or self.model, self.device)
            arrays |= self._changes(model, MeasuredRows(store, {"all": finite.rows}), layers)
            if self.control:
                random = self._changes(random_copy(model, self.seed), MeasuredRows(store, {"all": finite.rows}), layers)
                arrays |= {_of_random(name): values for name, values in random.items()}
            neurons, note = _neurons(store, model, layers, usable_device(self.device))
            arrays, notes = arrays | neurons, [*notes, note]
        elif len(arrays) == 1:
            raise RequestError("markers_only: neither pattern nor resid_post was recorded, so that nothing is measured")
        data = dataset(self.variables, {name: np.asarray(array) for name, array in arrays.items()}, {"layer": layers})
        names = [name for name in data if data[name].dims == _LAYER]
        return self.result(store, data, data[names].to_dataframe().reset_index(), finite, notes)

    def _limit(self, store: Store, layers: Sequence[int]) -> tuple[int, str]:
        """Number of tokens to measure, and a note where they are fewer for the sake of time."""
        if self.row_limit is not None or self.markers_only or usable_device(self.device).type != "cpu":
            return self.row_limit or _ROWS, ""
        sizes = store.manifest.model
        parameters = 12 * sizes.n_layers * sizes.d_model**2 + sizes.vocab * sizes.d_model
        passes = 2 * len(layers) * (1 + self.control)
        paid = max(1, int(_CPU_WORK // (2 * parameters * passes)))
        note = f"about {counted(paid, 'token')} measured, as many as some minutes allow; set row_limit to measure more"
        return (paid, note) if paid < _ROWS else (_ROWS, "")

    def _layers(self, n_layers: int) -> list[int]:
        chosen = range(n_layers) if self.layers is None else sorted({layer % n_layers for layer in self.layers})
        if self.layers is not None and not all(-n_layers <= layer < n_layers for layer in self.layers):
            raise RequestError(f"layers must be from 0 to {n_layers - 1}, or count back from -1")
        return list(chosen)

    def _changes(self, model: Model, rows: MeasuredRows, layers: Sequence[int]) -> dict[str, np.ndarray]:
        """Measures of every deletion and swap, by layer."""
        last = model.site_map.n_layers - 1
        records = {("delete", layer): SkipBlock(layer) for layer in layers}
        records |= {("swap", layer): SwapBlocks(layer, layer + 1) for layer in layers if layer < last}
        changes: dict[str, Change] = {
            str(record): lambda _batch, record=record: (record,) for record in records.values()
        }
        effects = change_effects(model, rows, changes, label="deleting and swapping blocks")
        mean, resampled = effects.effects(resamples=self.resamples, seed=self.seed)
        low, high = intervals(resampled)
        arrays: dict[str, np.ndarray] = {}
        for name, (measure, plain) in _MEASURED.items():
            column = list(MEASURES).index(measure)
            for end, values in (("", mean), ("_low", low), ("_high", high)):
                for kind in _CHANGES:
                    line = np.full(len(layers), np.nan)
                    for index, (change, layer) in enumerate(records):
                        if change == kind:
                            line[list(layers).index(layer)] = plain + values[index, 0, column]
                    arrays[f"{name}_{kind}{end}"] = line
        return arrays

    def _recent(
        self, store: Store, known: Sequence[int], layers: Sequence[int], rows: Int[np.ndarray, " row"]
    ) -> dict[str, np.ndarray]:
        """Attention to the tokens before the query, of queries that have as many, by layer."""
        position = store.tokens["position"].to_numpy().astype(np.int64)
        rows = rows[position[rows] >= _RECENT]
        values = np.full((len(rows), len(layers)), np.nan)
        keys = position[rows][:, None] - np.arange(1, _RECENT + 1)
        for layer in known if len(rows) else ():
            array = store["pattern", layer]
            for part in blocks(len(rows), int(np.prod(array.shape[1:]))):
                pattern = array[rows[part]].double()  # [row, head, key]
                at = torch.from_numpy(keys[part])[:, None].expand(-1, pattern.shape[1], -1)
                values[part, list(layers).index(layer)] = pattern.gather(2, at).sum(2).mean(1).numpy()
        uniform = (_RECENT / (1 + position[rows])).mean() if len(rows) else np.nan
        return self._means("recent", values, store, rows) | {"recent_uniform": np.asarray(uniform)}

    def _lens(
        self, store: Store, known: Sequence[int], layers: Sequence[int], rows: Int[np.ndarray, " row"]
    ) -> dict[str, np.ndarray]:
        """Entropy of the logit lens, and KL to the layer before, by layer."""
        unembed = load_unembed(store.path, usable_device(self.device))
        entropy, divergence = np.full((2, len(rows), len(layers)), np.nan)
        for block in blocks(len(rows), unembed.vocab):
            before = None
            for layer in known:
                column = list(layers).index(layer)
                log = log_probabilities(unembed, store["resid_post", layer][rows[block]])
                probability = log.exp()
                entropy[block, column] = -torch.where(probability > 0, probability * log, 0).sum(1).cpu().numpy()
                if before is not None:
                    step = torch.where(probability > 0, probability * (log - before), 0).sum(1)
                    divergence[block, column] = step.cpu().numpy()
                before = log
        return self._means("entropy", entropy, store, rows) | self._means("kl_lens", divergence, store, rows)

    def _means(
        self, name: str, values: Float[np.ndarray, "row layer"], store: Store, rows: Int[np.ndarray, " row"]
    ) -> dict[str, np.ndarray]:
        """Means over rows with their intervals; NaN at layers that were not recorded."""
        document = store.tokens["document"].to_numpy()[rows]
        mean, resampled = clustered_means(values, document, resamples=self.resamples, seed=self.seed)
        low, high = intervals(resampled)
        return {name: mean, f"{name}_low": low, f"{name}_high": high}

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the agreement after deletion and swap of the middle, first and last block, beside random weights."""
        data = result.data
        rows = counted(data["rows"], "token")
        if "agreement_delete" not in data:
            return with_note(f"Markers of stages at {counted(data.sizes['layer'], 'layer')}, {rows}.", result)
        layers = data["layer"].to_numpy()
        keep = 100 * data["agreement_delete"].to_numpy()
        swap = 100 * data["agreement_swap"].to_numpy()
        middle = slice(len(layers) // 4, max(len(layers) // 4 + 1, 3 * len(layers) // 4))
        text = "Top-1 predictions kept without one block: "
        if len(layers) > 2:
            text += f"{keep[middle].mean():z.0f} % on average in layers {layers[middle][0]} to {layers[middle][-1]}, "
        text += ", ".join(f"{keep[at]:z.0f} % for layer {layers[at]}" for at in sorted({0, len(layers) - 1}))
        if not np.isnan(swap[middle]).all():
            text += f"; with neighbours exchanged {np.nanmean(swap[middle]):z.0f} %"
            text += " in the same layers" * (len(layers) > 2)
        text += f"; mean KL without one block {float(data['kl_delete'].mean()):z.2f} nats"
        if "agreement_delete_random" in data:
            text += f"; random weights keep {100 * float(data['agreement_delete_random'].mean()):z.0f} %, KL "
            text += f"{float(data['kl_delete_random'].mean()):z.2f}"
        return with_note(f"{text} ({rows}).", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "agreement" and "kl" of deletion and swap by layer; "attention", "lens", "neurons", the markers."""
        data, figures = result.data, {}
        if "agreement_delete" in data:
            figures = {"agreement": _bands(result, "agreement"), "kl": _bands(result, "kl")}
        shown = (name for name, marker in _MARKERS.items() if any(variable in data for variable in marker.curves))
        return figures | {name: _marker(result, name) for name in shown}


# ---- markers --------------------------------------------------------------------------------------------


def _of_random(name: str) -> str:
    """Name of a variable of the model with random weights: "kl_swap_random_low" for "kl_swap_low"."""
    stem, end = next(((name.removesuffix(end), end) for end in ("_low", "_high") if name.endswith(end)), (name, ""))
    return f"{stem}_random{end}"


def _filled(layers: Sequence[int], values: Mapping[int, float]) -> np.ndarray:
    return np.array([values.get(layer, np.nan) for layer in layers])


def _neurons(store: Store, model: Model, layers: Sequence[int], device: Any) -> tuple[dict[str, np.ndarray], str]:
    """Shares of prediction and suppression neurons by layer, and a note where there are none."""
    if not store.manifest.has_unembed:
        return {}, "neurons not counted: the unembedding was not recorded"
    try:
        outputs = mlp_outputs(model)
    except RequestError as error:
        return {}, f"neurons not counted: {error}"
    unembed = load_unembed(store.path, device)
    moments = {
        layer: vocabulary_moments(outputs[layer].directions()[0].to(device), unembed)
        for layer in layers
        if layer in outputs
    }
    parts: dict[str, Callable[[Any], float]] = {
        "prediction_neurons": lambda moments: moments.prediction,
        "suppression_neurons": lambda moments: moments.suppression,
    }
    parts["neurons"] = lambda moments: float(len(moments.kurtosis))
    return {
        name: _filled(layers, {layer: part(values) for layer, values in moments.items()})
        for name, part in parts.items()
    }, ""


# ---- figures --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Marker:
    """A figure of variables over layers."""

    title: str
    unit: str
    curves: Mapping[str, str]
    """Variable to the name of its curve."""


_MARKERS = {
    "attention": _Marker(f"Attention to the {_RECENT} tokens before", "attention", {"recent": "mean of heads"}),
    "lens": _Marker(
        "Logit lens: entropy, and KL to the layer before",
        "nats",
        {"entropy": "entropy", "kl_lens": "KL(layer ‖ layer before)"},
    ),
    "neurons": _Marker(
        "Neurons for few tokens",
        "share of neurons",
        {"prediction_neurons": "prediction neurons", "suppression_neurons": "suppression neurons"},
    ),
}


def _marker(result: Result, name: str) -> go.Figure:
    data, marker = result.data, _MARKERS[name]
    bands = [
        Band(curve, data[variable].to_numpy(), recorded_ends(data, variable), CATEGORIES[number])
        for number, (variable, curve) in enumerate(marker.curves.items())
    ]
    drawn = any(band.ends is not None for band in bands)
    subtitle = f"mean over {counted(data['rows'], 'token')}" + "; bands: 95 % intervals over documents" * drawn
    if name == "attention":
        bands.append(Band("uniform attention", float(data["recent_uniform"]), None, NEUTRAL, "dash"))
    if name == "neurons":
        subtitle = "kurtosis of the logits above 10; skew above 0: prediction, below 0: suppression"
        if "neurons" in data:  # results of earlier versions have no number
            subtitle += f"; {counted(data['neurons'].max(), 'neuron')} a layer, all counted"
    figure = layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"{marker.title}, {model_label(result)}",
        subtitle=subtitle,
        unit=marker.unit,
    )
    return figure.update_yaxes(rangemode="tozero")


def _bands(result: Result, measure: str) -> go.Figure:
    data, bands = result.data, []
    for number, (change, name) in enumerate({"delete": "block deleted", "swap": "exchanged with the next"}.items()):
        variable = f"{measure}_{change}"
        bands.append(Band(name, data[variable].to_numpy(), recorded_ends(data, variable), CATEGORIES[number]))
        if (control := f"{variable}_random") in data:
            dash, ends = ("dash", "dot")[number], recorded_ends(data, control)
            bands.append(Band(f"{name}, random weights", data[control].to_numpy(), ends, NEUTRAL, dash))
    titles = {"agreement": "Top-1 predictions that stay", "kl": "KL(model || changed)"}
    figure = layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"{titles[measure]} when a block is deleted or moved, {label(str(result.provenance['model']), 40)}",
        subtitle=f"{counted(data['rows'], 'token')}; bands: 95 % intervals over documents",
        unit=_UNITS[measure],
    )
    if measure == "kl" and float(data["kl_delete"].max()) > 0:
        figure.update_yaxes(**log_axis(*(np.asarray(band.values, float) for band in bands)))
    return figure.update_yaxes(range=[0, 1.02]) if measure == "agreement" else figure
