"""Attention calibration (ACT): weight taken from hidden sinks and given to the other keys (Yu et al. 2024).

A hidden sink of a head is a key behind position 0 whose mean attention from the queries that see it is above 5 / N, N
tokens (the paper), or above a fixed threshold (its code: 0.1). In every row of that head such keys keep `keep` = 0.4 of
their weight; the rest goes to the other keys in proportion to their weights, so that rows still sum to 1 and position 0
gains too. Effects on the next token are measured for all layers but the first two and the last, and for the layers that
lower the loss on one half of the documents, measured on the other half. Controls: as many random keys in the same
heads, and as many random layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Int64
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    MEASURES,
    NEUTRAL,
    Change,
    MeasuredRows,
    Model,
    Received,
    RedistributeAttention,
    RequestError,
    Result,
    Store,
    StoreProbe,
    ThemedFigure,
    Variable,
    attention_source,
    change_effects,
    change_keys,
    check_fields,
    colour_limits,
    counted,
    dataset,
    document_halves,
    error_bars,
    head_grid,
    interval_suffix,
    intervals,
    model_label,
    plain_torch,
    predicting_rows,
    read_received,
    recorded_model,
    require_causal,
    with_interval,
    with_note,
)

KINDS = ("all", "random_keys", "chosen", "random_layers")
_CODE = 0.1  # threshold of the released code
_MEASURED = {"loss": "nats", "accuracy": "share of tokens", "kl": "nats", "entropy": "nats"}
_MEANING = {
    "loss": "change of the cross-entropy of the next token",
    "accuracy": "change of the share of next tokens that are predicted",
    "kl": "KL(model || calibrated) of the next token",
    "entropy": "change of the entropy of the prediction",
}
VARIABLES: tuple[Variable, ...] = (
    *(
        variable
        for name, units in _MEASURED.items()
        for variable in with_interval(Variable(name, ("kind",), units, _MEANING[name], "that of the controls"))
    ),
    Variable("loss_layer", ("layer",), "nats", "change of the loss with this layer calibrated alone, other half", "0"),
    Variable("hidden", ("layer", "head"), "keys", "hidden sinks of a sequence, mean"),
    Variable("hidden_paper", (), "keys", "hidden sinks of a head and sequence with the threshold 5 / N"),
    Variable("hidden_code", (), "keys", "hidden sinks of a head and sequence with the threshold 0.1"),
    Variable("heads_with", (), "share of heads", "heads and sequences with a hidden sink"),
    Variable("rows", (), "tokens", "tokens that the effects are measured at"),
)


@dataclass(frozen=True)
class AttentionCalibration(StoreProbe):
    """Takes attention from hidden sinks (ACT): effect on loss and accuracy, beside random keys and layers."""

    name: ClassVar[str] = "attention-calibration"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Yu et al. 2024, Unveiling hidden attention sinks, arXiv 2406.15765",)
    variables: ClassVar[tuple[Variable, ...]] = (*VARIABLES, *LOST_VARIABLES)
    controls: ClassVar[Mapping[str, str]] = {
        "random_keys": "as many random keys behind position 0, in the same heads",
        "random_layers": "as many random layers as were chosen",
    }

    threshold: float | None = None
    """Attention above which a key is a hidden sink. None: 5 / tokens of the sequence, as in the paper."""
    keep: float = 0.4
    """Share of its weight that a hidden sink keeps."""
    min_visible: int = 8
    """Queries that must see a key: the mean over fewer is noise."""
    first: int = 2
    """First layers that are left out."""
    last: int = 1
    """Last layers that are left out."""
    where: str | None = "NOT is_special"
    """SQL over the token table: tokens that are measured, as far as one stands before and one after them. None: all."""
    row_limit: int = 1000
    """Tokens that are measured, in whole sequences drawn at random."""
    model: str | None = None
    """Folder or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the drawn sequences, the halves, the random keys and layers, and the resamples."""
    device: str | None = None
    """Device of a model that the probe loads. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "threshold", above=0, at_most=1, optional=True)
        check_fields(self, "keep", at_least=0, at_most=1)
        check_fields(self, "min_visible", "row_limit", "resamples", at_least=1, whole=True)
        check_fields(self, "first", "last", "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Finds hidden sinks in the recorded attention, and runs the model with it calibrated.

        Costs one pass for each layer over half of about `row_limit` tokens, and six over the other half.

        Args:
            store: Its texts are measured; it names the model.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: No attention was recorded, no head has a hidden sink, no token is measured, or the model
                cannot be loaded, is another one, is not causal, or takes no change of its attention.
        """
        require_causal(store, self.name)
        rows = predicting_rows(store, self.where, self.row_limit, self.seed)
        received = read_received(store, rows)
        finite = self.finite_rows(store, [f"{_kind(store)}.{layer}" for layer in received.layers], rows)
        model = recorded_model(store, model or self.model, self.device)
        hidden = received.hidden_sinks(self.threshold, self.min_visible)
        arrays: dict[str, Any] = _sink_counts(received, hidden, self.min_visible)
        first_half, second_half, note = document_halves(store, finite.rows, self.seed)
        candidates = [layer for layer in received.layers if self.first <= layer < model.site_map.n_layers - self.last]
        used, notes = _in_both(store, hidden, candidates, (first_half, second_half))
        profile = self._effects(
            model, MeasuredRows(store, {"all": first_half}), {str(at): {at: hidden[at]} for at in used}
        )[0]
        loss = dict(zip(used, profile[:, 0], strict=True))
        arrays["loss_layer"] = np.array([loss.get(layer, np.nan) for layer in received.layers])
        chosen = [layer for layer in used if loss[layer] < 0]
        draw = np.random.default_rng(self.seed)
        random = sorted(int(at) for at in draw.choice(used, size=len(chosen), replace=False))
        keys = received.random_keys(hidden, 1, int(received.lengths.min()), self.seed)
        sets = {"all": {at: hidden[at] for at in used}, "random_keys": {at: keys[at] for at in used}}
        sets |= {"chosen": {at: hidden[at] for at in chosen}, "random_layers": {at: hidden[at] for at in random}}
        sets = {name: part for name, part in sets.items() if any(mask.any() for mask in part.values())}
        mean, low, high = self._effects(model, MeasuredRows(store, {"all": second_half}), sets)
        for column, name in enumerate(_MEASURED):
            for end, values in (("", mean), ("_low", low), ("_high", high)):
                by_kind = dict(zip(sets, values[:, column], strict=True))
                arrays[f"{name}{end}"] = np.array([by_kind.get(kind, np.nan) for kind in KINDS])
        arrays["rows"] = len(second_half)
        coords = {"kind": list(KINDS), "layer": received.layers, "head": np.arange(arrays["hidden"].shape[1])}
        data = dataset(self.variables, arrays, coords)
        data.attrs["chosen"] = ", ".join(map(str, chosen))
        names = [name for name in data if data[name].dims == ("kind",)]
        table = data[names].to_dataframe().reset_index()
        notes = [note, *notes, "" if chosen else "no layer lowers the loss of the first half, so that none was chosen"]
        return self.result(store, data, table, finite, notes)

    def _effects(
        self, model: Model, rows: MeasuredRows, sets: Mapping[str, Mapping[int, Bool[np.ndarray, "all_rows head"]]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, low and high ends of all measured effects, axes (set, measure)."""

        def calibrate(layer: int, heads: Sequence[int], keys: Bool[Tensor, "batch position"]) -> RedistributeAttention:
            return RedistributeAttention(layer, heads, keys, self.keep)

        changes: dict[str, Change] = {name: change_keys(keys, calibrate) for name, keys in sets.items()}
        effects = change_effects(model, rows, changes, label="calibrating attention")
        mean, resampled = effects.effects(resamples=self.resamples, seed=self.seed)
        columns = [list(MEASURES).index(name) for name in _MEASURED]
        low, high = intervals(resampled)
        return mean[:, 0, columns], low[:, 0, columns], high[:, 0, columns]

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the effect in the chosen layers, or in all, beside random keys and layers."""
        data = result.data
        loss = {kind: float(data["loss"].sel(kind=kind)) for kind in KINDS}
        kind = "all" if np.isnan(loss["chosen"]) else "chosen"
        low, high = (float(data[f"loss_{end}"].sel(kind=kind)) for end in ("low", "high"))
        interval = interval_suffix(low, high, ".3f")
        control = "random_keys" if kind == "all" else "random_layers"
        text = (
            f"{100 * float(data['heads_with']):z.0f} % of heads have a hidden sink; calibrated in {kind} layers the "
            f"loss changes by {loss[kind]:+z.3f} nats{interval} on other documents ({control.replace('_', ' ')} "
            f"{loss[control]:+z.3f})"
        )
        if kind != "all":
            text += f"; in all layers {loss['all']:+z.3f} (random keys {loss['random_keys']:+z.3f})"
        text += f"; {counted(data['rows'], 'token')}"
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "loss", the effect in all and in chosen layers beside controls, and "hidden", sinks of each head."""
        data = result.data
        model = model_label(result, 50)
        hidden = data["hidden"].to_numpy()
        grid = head_grid(
            hidden,
            hover=[[f"{number:z.2f} keys" for number in line] for line in hidden],
            layers=data["layer"].to_numpy().tolist(),
            title=f"Hidden attention sinks, {model}",
            subtitle=f"keys behind position 0 above the threshold, mean of sequences; threshold 5 / N: "
            f"{float(data['hidden_paper']):z.2f} a head, 0.1: {float(data['hidden_code']):z.2f}",
            unit="keys",
            limits=colour_limits(hidden),
        )
        return {"loss": _loss(result, model), "hidden": grid}


def _kind(store: Store) -> str:
    return "pattern" if attention_source(store)[0] == "pattern" else "attn_received"


def _in_both(
    store: Store,
    hidden: Mapping[int, Bool[np.ndarray, "all_rows head"]],
    layers: Sequence[int],
    halves: Sequence[Int64[np.ndarray, " _"]],
) -> tuple[list[int], list[str]]:
    """Layers with hidden sinks in the sequences of both halves, and a note on those with sinks in one half alone.

    RequestError if there is none: nothing could be calibrated in one of the halves.
    """
    sequence = store.tokens["sequence"].to_numpy()
    parts = [np.isin(sequence, sequence[rows]) for rows in halves]
    sinks = {layer: [hidden[layer][part].any() for part in parts] for layer in layers}
    used = [layer for layer, flags in sinks.items() if all(flags)]
    if not used:
        raise RequestError(
            "no head of these layers has a hidden sink in both halves of the documents; lower threshold, first or "
            "last, or record more texts"
        )
    single = [str(layer) for layer, flags in sinks.items() if any(flags) and not all(flags)]
    note = f"layers left out, with hidden sinks in one half of the documents alone: {', '.join(single)}"
    return used, [note] if single else []


def _sink_counts(
    received: Received, hidden: Mapping[int, Bool[np.ndarray, "all_rows head"]], min_visible: int
) -> dict[str, Any]:
    """Numbers of hidden sinks by head, and under both thresholds."""
    width = max(keys.shape[1] for keys in hidden.values())
    counts = np.full((len(hidden), width), np.nan)
    for at, keys in enumerate(hidden.values()):
        counts[at, : keys.shape[1]] = keys.sum(0) / len(received.starts)
    having = [
        keys[start : start + length].any(0).mean()
        for keys in hidden.values()
        for start, length in zip(received.starts, received.lengths, strict=True)
    ]
    shares = {}
    for name, threshold in (("hidden_paper", None), ("hidden_code", _CODE)):
        choice = received.hidden_sinks(threshold, min_visible)
        shares[name] = np.mean([keys.sum() / (keys.shape[1] * len(received.starts)) for keys in choice.values()])
    return {"hidden": counts, "heads_with": np.mean(having), **shares}


def _loss(result: Result, model: str) -> go.Figure:
    data, figure = result.data, ThemedFigure()
    names = {"all": "all layers", "random_keys": "random keys, all layers"}
    names |= {"chosen": "chosen layers", "random_layers": "random layers"}
    for kind, name in names.items():
        at = data.sel(kind=kind)
        mean, low, high = (np.atleast_1d(at[f"loss{end}"]) for end in ("", "_low", "_high"))
        if np.isnan(mean).all():  # layers were not chosen
            continue
        figure.add_scatter(
            x=[name],
            y=mean,
            error_y=error_bars(mean, low, high),
            mode="markers",
            marker={"size": 10, "color": NEUTRAL if kind.startswith("random") else CATEGORIES[0]},
            showlegend=False,
            hovertemplate="%{x}: %{y:.4f}",
        )
    figure.update_layout(
        title={
            "text": f"Loss with attention to hidden sinks reduced, {model}",
            "subtitle": {"text": f"{counted(data['rows'], 'token')} of other documents; 95 % intervals over documents"},
        },
        width=760,
        height=440,
        margin={"t": 110},
    )
    return figure.update_yaxes(title="change of the loss, nats", zeroline=True, rangemode="tozero")
