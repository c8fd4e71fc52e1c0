"""Masked sinks: what a model loses when later tokens cannot attend to a head's sink (after Rulli et al. 2025).

A sink is built by early layers and used by later tokens. Hidden from *all* queries it is no test: the model runs as if
the text began one token later. So for each head the key with the largest mean attention among the first `later`
positions is hidden (score minus infinity) from queries at position `later` and after it, alone. The scope is named,
since removing the sink of every head at once is far stronger than of one: all heads, all heads of one layer, one head.

    effect = mean over tokens at positions >= later of  loss(changed) - loss(model)

The control hides a random key of positions 1 to later - 1 from the same queries; `other_head` hides the top key of the
next head of the layer, which is the same key where heads share their sink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool, Int64
from torch import Tensor

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
    Received,
    Result,
    ScaleAttention,
    Store,
    Variable,
    attention_source,
    change_effects,
    change_keys,
    check_fields,
    colour_limits,
    counted,
    dataset,
    head_grid,
    head_name,
    interval_text,
    intervals,
    label,
    layer_bands,
    plain_torch,
    predicting_rows,
    read_received,
    recorded_model,
    require_causal,
    with_interval,
    with_note,
)

KINDS = ("sink", "random", "other_head")
_UNITS = {"loss": "nats", "kl": "nats", "agreement": "share of tokens"}
_MEANING = {
    "loss": "increase of the cross-entropy of the next token",
    "kl": "KL(model || changed) of the next token",
    "agreement": "change of the tokens whose top-1 prediction stays, at most 0",
}


def _variables() -> list[Variable]:
    variables = []
    for name, units in _UNITS.items():
        null = "that of kind random"
        variables += with_interval(Variable(name, ("kind",), units, f"{_MEANING[name]}; all heads of all layers", null))
        variables += with_interval(
            Variable(f"{name}_layer", ("kind", "layer"), units, f"{_MEANING[name]}; all heads of the layer", null)
        )
        variables.append(
            Variable(
                f"{name}_head", ("kind", "layer", "head"), units, f"{_MEANING[name]}; one head, NaN: not run", null
            )
        )
    return [
        *variables,
        Variable("alpha", ("layer", "head"), "attention", "mean attention that the head's top key receives"),
        Variable("at_first", ("layer", "head"), "share of sequences", "sequences in which the top key is position 0"),
        Variable("rows", (), "tokens", "tokens that are measured"),
        Variable("documents", (), "documents", "documents of these tokens"),
    ]


@dataclass(frozen=True)
class MaskedSinks(LayerProbe):
    """Hides each head's sink from later tokens: effect on loss and predictions, beside random keys."""

    name: ClassVar[str] = "masked-sinks"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Rulli et al. 2025, Attention sinks in diffusion language models, arXiv 2510.15731",
        "Xiao et al. 2024, Efficient streaming language models with attention sinks, arXiv 2309.17453",
    )
    variables: ClassVar[tuple[Variable, ...]] = (*_variables(), *LOST_VARIABLES)
    controls: ClassVar[Mapping[str, str]] = {
        "random": "a random key of positions 1 to later - 1, the same queries and heads",
        "other_head": "the top key of the next head of the layer",
    }

    later: int = 16
    """First position whose queries cannot attend to the hidden key."""
    where: str | None = "NOT is_special"
    """SQL over the token table: tokens that are measured, from position `later` on. None: all."""
    row_limit: int = 1000
    """Tokens that are measured, in whole sequences drawn at random."""
    layers_too: bool = True
    """Hide the sinks of one layer at a time, too: two passes for each."""
    heads: int = 8
    """Heads, those with the largest alpha, whose sink is hidden alone: two passes for each."""
    draws: int = 3
    """Random keys for each sequence, one after another, where all heads are changed."""
    model: str | None = None
    """Folder or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the drawn sequences, the random keys and the resamples."""
    device: str | None = None
    """Device of a model that the probe loads. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "later", at_least=2, whole=True)
        check_fields(self, "row_limit", "resamples", "draws", at_least=1, whole=True)
        check_fields(self, "heads", "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `pattern` or `attn_received`, and runs the model.

        Costs 3 + draws + 2 x layers + 2 x heads passes over about `row_limit` tokens and what stands before them.

        Args:
            store: Its texts are measured; it names the model.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: No attention was recorded, no sequence is long enough, or the model cannot be loaded, is
                another one, is not causal, or takes no change of its attention scores.
        """
        require_causal(store, self.name)
        where = f"position >= {self.later}" + (f" AND ({self.where})" if self.where else "")
        rows = predicting_rows(store, where, self.row_limit, self.seed)
        received = read_received(store, rows, self.layers)
        kind = "pattern" if attention_source(store, self.layers)[0] == "pattern" else "attn_received"
        finite = self.finite_rows(store, [f"{kind}.{layer}" for layer in received.layers], rows)
        model = recorded_model(store, model or self.model, self.device)
        top = received.top_keys(self.later)
        alpha, at_first = _summary(received, top)
        places = _strongest(alpha, received.layers, self.heads)
        changes = self._changes(received, top, places)
        measured = MeasuredRows(store, {"later": finite.rows})
        effects = change_effects(
            model, measured, {str(key): change for key, change in changes.items()}, label="hiding sinks"
        )
        mean, resampled = effects.effects(resamples=self.resamples, seed=self.seed)
        arrays = self._arrays(list(changes), mean[:, 0], resampled[:, :, 0], received.layers, alpha.shape[1])
        documents = len(np.unique(store.tokens["document"].to_numpy()[finite.rows]))
        arrays |= {"alpha": alpha, "at_first": at_first, "rows": len(finite.rows), "documents": documents}
        coords = {"kind": list(KINDS), "layer": received.layers, "head": np.arange(alpha.shape[1])}
        data = dataset(self.variables, arrays, coords)
        few = f"intervals over {counted(documents, 'document')}" if documents < 10 else ""
        return self.result(store, data, _table(data), finite, [few, self.note_layers(store)])

    def _changes(
        self,
        received: Received,
        top: Mapping[int, Bool[np.ndarray, "all_rows head"]],
        places: Sequence[tuple[int, int]],
    ) -> dict[tuple[Any, ...], Change]:
        """Every change, by (kind, scope ...)."""

        def hide(layer: int, heads: Sequence[int], keys: Bool[Tensor, "batch position"]) -> ScaleAttention:
            return ScaleAttention(layer, heads, keys, 0, queries=slice(self.later, None))

        random = [received.random_keys(top, 1, self.later, self.seed + draw) for draw in range(self.draws)]
        next_head = {layer: np.roll(keys, -1, axis=1) for layer, keys in top.items()}
        choices: dict[tuple[Any, ...], Any] = {("sink", "all"): top, ("other_head", "all"): next_head}
        choices |= {("random", "all", draw): keys for draw, keys in enumerate(random)}
        for kind, choice in (("sink", top), ("random", random[0])):
            for layer in received.layers if self.layers_too else ():
                choices[kind, "layer", layer] = {layer: choice[layer]}
            for layer, head in places:
                single = np.zeros_like(choice[layer])
                single[:, head] = choice[layer][:, head]
                choices[kind, "head", layer, head] = {layer: single}
        return {key: change_keys(choice, hide) for key, choice in choices.items()}

    def _arrays(
        self,
        keys: Sequence[tuple[Any, ...]],
        mean: np.ndarray,
        resampled: np.ndarray,
        layers: Sequence[int],
        heads: int,
    ) -> dict[str, Any]:
        """Variables from effects [change, measure] and their resamples."""
        arrays: dict[str, Any] = {}
        for name in _UNITS:
            column = list(MEASURES).index(name)
            by_kind = {kind: [i for i, key in enumerate(keys) if key[:2] == (kind, "all")] for kind in KINDS}
            values = np.array([mean[at, column].mean() for at in by_kind.values()])
            low, high = intervals(np.stack([resampled[:, at, column].mean(1) for at in by_kind.values()], 1))
            arrays |= {name: values, f"{name}_low": low, f"{name}_high": high}
            shape = (len(KINDS), len(layers))
            ends = [np.full(shape, np.nan) for _ in range(3)]
            single = np.full((*shape, heads), np.nan)
            all_low, all_high = intervals(resampled[:, :, column])
            for index, key in enumerate(keys):
                at = KINDS.index(key[0])
                if key[1] == "layer":
                    for array, value in zip(ends, (mean[index, column], all_low[index], all_high[index]), strict=True):
                        array[at, list(layers).index(key[2])] = value
                elif key[1] == "head":
                    single[at, list(layers).index(key[2]), key[3]] = mean[index, column]
            if self.layers_too:
                arrays |= dict(zip((f"{name}_layer", f"{name}_layer_low", f"{name}_layer_high"), ends, strict=True))
            if self.heads:
                arrays[f"{name}_head"] = single
        return arrays

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the loss without any sink beside a random key, and the layer and head that need theirs most."""
        data, later = result.data, result.provenance["settings"]["later"]
        loss = {kind: float(data["loss"].sel(kind=kind)) for kind in KINDS}
        low, high = (float(data[f"loss_{end}"].sel(kind="sink")) for end in ("low", "high"))
        interval = interval_text(low, high) if np.isnan(low) else f"95 % CI [{low:z.3f}, {high:z.3f}]"
        text = (
            f"Without any head's top key (position 0 in {100 * float(data['at_first'].mean()):z.0f} % of cases) for "
            f"queries from position {later} on, the loss changes by {loss['sink']:+z.3f} nats, {interval}; without "
            f"a random early key by {loss['random']:+z.3f}"
        )
        if "loss_layer" in data:
            layer = int(data["loss_layer"].sel(kind="sink").to_numpy().argmax())
            effect = data["loss_layer"].isel(layer=layer)
            text += f"; most in layer {int(data['layer'][layer])} alone, {float(effect.sel(kind='sink')):+z.3f} "
            text += f"(random {float(effect.sel(kind='random')):+z.3f})"
        if "loss_head" in data:
            at = np.unravel_index(np.nanargmax(data["loss_head"].sel(kind="sink").to_numpy()), data["alpha"].shape)
            effect = data["loss_head"].isel(layer=at[0], head=at[1])
            text += f"; most of single heads {head_name(int(data['layer'][at[0]]), int(at[1]))}, "
            text += f"{float(effect.sel(kind='sink')):+z.4f} (random {float(effect.sel(kind='random')):+z.4f})"
        return with_note(f"{text} ({counted(data['rows'], 'token')}).", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "layers", the loss by layer whose sinks are hidden, and "heads", attention to each head's top key."""
        figures = {"layers": _by_layer(result)} if "loss_layer" in result.data else {}
        return {**figures, "heads": _heads(result)}


def _summary(received: Received, top: Mapping[int, Bool[np.ndarray, "all_rows head"]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean alpha of the top keys, and how often they are position 0, axes (layer, head)."""
    heads = max(keys.shape[1] for keys in top.values())
    alpha, first = (np.full((len(top), heads), np.nan) for _ in range(2))
    for index, (layer, keys) in enumerate(top.items()):
        for head in range(keys.shape[1]):
            at: Int64[np.ndarray, " sequence"] = np.flatnonzero(keys[:, head])
            alpha[index, head] = received.alpha[layer][at, head].mean()
            first[index, head] = np.isin(at, received.starts).mean()
    return alpha, first


def _strongest(alpha: np.ndarray, layers: Sequence[int], number: int) -> list[tuple[int, int]]:
    order = np.argsort(-np.nan_to_num(alpha, nan=-1), axis=None, kind="stable")[:number]
    return [(layers[int(i)], int(h)) for i, h in (np.unravel_index(index, alpha.shape) for index in order)]


def _table(data: Any) -> pd.DataFrame:
    """A line for each change: kind, scope (all, layer, head), place and its effects."""
    lines = []
    layers, heads = (data[axis].to_numpy().tolist() for axis in ("layer", "head"))
    for kind in KINDS:
        at = data.sel(kind=kind)
        places = {("all", "all"): (at, "")}
        if "loss_layer" in data:
            places |= {("layer", f"layer {layer}"): (at.sel(layer=layer), "_layer") for layer in layers}
        if "loss_head" in data:
            pairs = ((layer, head) for layer in layers for head in heads)
            places |= {("head", head_name(*pair)): (at.sel(layer=pair[0], head=pair[1]), "_head") for pair in pairs}
        for (scope, place), (cell, end) in places.items():
            values = {name: float(cell[f"{name}{end}"]) for name in _UNITS}
            lines.append({"kind": kind, "scope": scope, "place": place} | values)
    return pd.DataFrame(lines).dropna(subset="loss", ignore_index=True)


# ---- figures --------------------------------------------------------------------------------------------


def _by_layer(result: Result) -> go.Figure:
    data, bands = result.data, []
    for kind, name, colour in (
        ("sink", "each head's top key hidden", CATEGORIES[0]),
        ("random", "random key", NEUTRAL),
    ):
        parts = [data[f"loss_layer{end}"].sel(kind=kind).to_numpy() for end in ("", "_low", "_high")]
        bands.append(Band(name, parts[0], (parts[1], parts[2]), colour, "dash" if kind == "random" else "solid"))
    later = result.provenance["settings"]["later"]
    return layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"Loss without the sinks of one layer, {label(str(result.provenance['model']), 50)}",
        subtitle=f"hidden from queries at position {later} and later; all layers at once: "
        f"{float(data['loss'].sel(kind='sink')):+z.3f} nats; 95 % intervals over "
        f"{counted(data['documents'], 'document')}",
        unit="increase of the loss, nats",
    )


def _heads(result: Result) -> go.Figure:
    data = result.data
    alpha, first = data["alpha"].to_numpy(), data["at_first"].to_numpy()
    sink, random = (float(data["loss"].sel(kind=kind)) for kind in ("sink", "random"))
    hover = [[f"position 0 in {100 * share:z.0f} % of sequences" for share in line] for line in first]
    return head_grid(
        alpha,
        hover=hover,
        layers=data["layer"].to_numpy().tolist(),
        title=f"Attention to each head's top key, {label(str(result.provenance['model']), 50)}",
        subtitle="mean over the queries that see it; hidden from later ones, the loss changes by "
        f"{sink:+z.3f} nats (random key {random:+z.3f})",
        unit="attention",
        limits=colour_limits(alpha),
    )
