"""ZeroTuning: attention to the initial token scaled by a factor gamma in chosen heads (Han et al. 2025).

For one head and query with weights a_0 (initial token) and a_i,

    a'_0 = gamma a_0 / D,   a'_i = a_i / D,   D = (gamma - 1) a_0 + 1

which is ln gamma added to the score of key 0; the ratios of other keys stay. Layers (or heads) are profiled with gamma
0.5 and 2 on one half of the documents: those whose loss falls more with 2 are up-effective, the others down-effective.
The more common kind is tuned in the `share` of units with the largest gain, and swept over gamma on the other half,
beside all heads. A head with a_0 near 0 or near 1 cannot respond, since da'_0 / d ln gamma = a_0 (1 - a_0) at gamma 1:
both stand beside the effects. Controls: a random key of positions 1 to 15 in place of the initial one, and a softmax
temperature that gives the same mean entropy of the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    MEASURES,
    NEUTRAL,
    Change,
    LayerProbe,
    MeasuredRows,
    Model,
    RequestError,
    Result,
    ScaleAttention,
    Store,
    ThemedFigure,
    Variable,
    change_effects,
    check_fields,
    choose_layers,
    colour_limits,
    counted,
    dataset,
    document_halves,
    error_bars,
    first_key_rows,
    head_grid,
    interval_suffix,
    intervals,
    model_label,
    plain_torch,
    predicting_rows,
    recorded_model,
    require_causal,
    scaled_entropy,
    temperature_curve,
    with_interval,
    with_note,
)

SETS = ("all", "tuned")
KINDS = ("initial", "random")
_PROFILED = (0.5, 2.0)
_EARLY = 16
_TEMPERATURES = tuple(float(factor) for factor in np.geomspace(0.25, 4, 49))
_CELL = ("heads", "key", "gamma")
_HEAD = ("layer", "head")

VARIABLES = (
    *with_interval(Variable("loss", _CELL, "nats", "change of the next token's cross-entropy", "loss_temperature")),
    Variable("entropy", _CELL, "nats", "change of the entropy of the prediction", "0"),
    Variable("kl", _CELL, "nats", "KL(model || changed) of the next token", "0"),
    Variable("agreement", _CELL, "share of tokens", "change of the top-1 predictions that stay, at most 0", "0"),
    Variable("loss_temperature", _CELL, "nats", "change of the loss by a softmax temperature of the same entropy"),
    Variable("attention_entropy", ("gamma",), "nats", "entropy of queries' attention after the scaling, closed form"),
    Variable("a0", _HEAD, "attention", "mean attention to the initial token"),
    Variable("sensitivity", _HEAD, "attention", "mean of a0 (1 - a0), the slope of a0 over ln gamma, at most 0.25"),
    Variable("loss_up", _HEAD, "nats", "change of the loss with gamma 2 in this unit alone; NaN: not profiled", "0"),
    Variable("loss_down", _HEAD, "nats", "change of the loss with gamma 0.5 in this unit alone", "0"),
    Variable("tuned", _HEAD, "1", "1 for heads of the tuned set"),
    Variable("rows", (), "tokens", "tokens of the sweep"),
)


@dataclass(frozen=True)
class ZeroTuning(LayerProbe):
    """Scales attention to the initial token in chosen heads: loss and entropy over gamma, beside a random key."""

    name: ClassVar[str] = "zero-tuning"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Han et al. 2025, ZeroTuning, arXiv 2505.11739",)
    variables: ClassVar[tuple[Variable, ...]] = (*VARIABLES, *LOST_VARIABLES)
    controls: ClassVar[Mapping[str, str]] = {
        "random": "the same factors on a random key of positions 1 to 15",
        "loss_temperature": "a softmax temperature with the same mean entropy of the prediction",
    }

    gammas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)
    """Factors of the sweep."""
    profile: str = "layers"
    """Units that are profiled: layers, all heads of one at a time; heads, each alone; none: all heads are tuned."""
    share: float = 0.4
    """Share of the units of the more common kind that are tuned."""
    where: str | None = "NOT is_special"
    """SQL over the token table: tokens that are measured, as far as one stands before and one after them. None: all."""
    row_limit: int = 1000
    """Tokens that are measured, in whole sequences drawn at random."""
    model: str | None = None
    """Folder or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the drawn sequences, the halves, the random keys and the resamples."""
    device: str | None = None
    """Device of a model that the probe loads. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "profile", one_of=("layers", "heads", "none"))
        check_fields(self, "share", above=0, at_most=1)
        check_fields(self, "row_limit", "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        if not self.gammas or len(set(self.gammas)) < len(self.gammas) or min(self.gammas) < 0:
            raise RequestError(f"gammas must be one or more factors from 0 that differ, not {self.gammas}")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Profiles units on half of the documents and sweeps gamma on the others.

        Costs 2 passes for each unit over half of about `row_limit` tokens, and 4 for each factor but 1 over the rest.

        Args:
            store: Its texts are measured; it names the model.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: No attention was recorded, no token is measured, or the model cannot be loaded, is another
                one, is not causal, or takes no change of its attention scores.
        """
        require_causal(store, self.name)
        rows = predicting_rows(store, self.where, self.row_limit, self.seed)
        known = first_key_rows(store, rows)
        attention = {
            layer: known[layer] for layer in choose_layers([*known], self.layers, store.manifest.model.n_layers)
        }
        finite = self.finite_rows(store, _sites(store, list(attention)), rows)
        model = recorded_model(store, model or self.model, self.device)
        first, second, note = document_halves(store, finite.rows, self.seed)
        heads = {layer: weight.shape[1] for layer, (weight, _) in attention.items()}
        layers, width = list(heads), max(heads.values())
        arrays: dict[str, Any] = _recorded(attention, layers, width, self.gammas)
        up, down, tuned = self._profiled(model, MeasuredRows(store, {"all": first}), heads, width)
        arrays |= {"loss_up": up, "loss_down": down, "tuned": tuned}
        sets = {"all": {layer: list(range(count)) for layer, count in heads.items()}}
        sets["tuned"] = {layer: np.flatnonzero(tuned[at] == 1).tolist() for at, layer in enumerate(layers)}
        arrays |= self._swept(model, MeasuredRows(store, {"all": second}), sets)
        arrays["rows"] = len(second)
        coords = {"heads": list(SETS), "key": list(KINDS), "gamma": list(self.gammas), "layer": layers}
        data = dataset(self.variables, arrays, coords | {"head": np.arange(width)})
        names = [name for name in data if data[name].dims == _CELL]
        return self.result(
            store, data, data[names].to_dataframe().reset_index(), finite, [note, self.note_layers(store)]
        )

    def _profiled(
        self, model: Model, rows: MeasuredRows, heads: Mapping[int, int], width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Change of the loss with gamma 2 and 0.5 in each unit alone, and 1 for the heads that are tuned."""
        layers = list(heads)
        up, down = (np.full((len(layers), width), np.nan) for _ in range(2))
        exists = np.array([[head < heads[layer] for head in range(width)] for layer in layers])
        if self.profile == "none":
            return up, down, exists.astype(float)
        units = [(layer, None) for layer in layers]
        if self.profile == "heads":
            units = [(layer, head) for layer in layers for head in range(heads[layer])]
        records = [ScaleAttention(layer, head, 0, gamma) for layer, head in units for gamma in _PROFILED]
        changes: dict[str, Change] = {
            str(n): lambda _batch, record=record: [record] for n, record in enumerate(records)
        }
        effects = change_effects(model, rows, changes, label="profiling").effects(resamples=1)[0]
        loss = effects[:, 0, list(MEASURES).index("loss")].reshape(len(units), 2)
        for (layer, head), (lower, raised) in zip(units, loss, strict=True):
            at = (layers.index(layer), slice(heads[layer]) if head is None else head)
            up[at], down[at] = raised, lower
        ups = loss[:, 1] < loss[:, 0]
        common = ups if ups.mean() >= 0.5 else ~ups
        gain = np.where(common, -loss.min(1), -np.inf)
        number = max(1, round(self.share * int(common.sum())))
        tuned = np.zeros((len(layers), width))
        for unit in np.argsort(-gain, kind="stable")[:number]:
            layer, head = units[int(unit)]
            tuned[layers.index(layer), slice(heads[layer]) if head is None else head] = 1
        return up, down, tuned

    def _swept(
        self, model: Model, rows: MeasuredRows, sets: Mapping[str, Mapping[int, Sequence[int]]]
    ) -> dict[str, np.ndarray]:
        """Effects of every factor on the initial and on a random key, in all heads and in the tuned ones."""
        draws = np.random.default_rng(self.seed).integers(1, _EARLY, size=rows.store.rows)

        def change(name: str, kind: str, gamma: float) -> Change:
            def records(batch: Any) -> list[ScaleAttention]:
                key: Any = 0
                if kind == "random":
                    lengths = batch.mask.sum(1)
                    at = 1 + (torch.from_numpy(draws[batch.row[:, 0].numpy()]) - 1) % (lengths - 1).clamp(min=1)
                    key = (at[:, None] == torch.from_numpy(np.arange(batch.ids.shape[1]))) & (batch.row >= 0)
                return [ScaleAttention(layer, heads, key, gamma) for layer, heads in sets[name].items() if len(heads)]

            return records

        cells = [(s, k, g) for s in SETS for k in KINDS for g in self.gammas if g != 1]
        effects = change_effects(model, rows, {str(cell): change(*cell) for cell in cells}, label="sweeping gamma")
        mean, resampled = effects.effects(resamples=self.resamples, seed=self.seed)
        low, high = intervals(resampled)
        shape = (len(SETS), len(KINDS), len(self.gammas))
        names = ("loss", "entropy", "kl", "agreement")
        arrays = {name: np.zeros(shape) for name in (*names, "loss_low", "loss_high")}
        for index, (name, kind, gamma) in enumerate(cells):
            at = (SETS.index(name), KINDS.index(kind), self.gammas.index(gamma))
            for measure in names:
                arrays[measure][at] = mean[index, 0, list(MEASURES).index(measure)]
            arrays["loss_low"][at], arrays["loss_high"][at] = low[index, 0, 0], high[index, 0, 0]
        curve = temperature_curve(model, rows, _TEMPERATURES)
        plain = effects.means(resamples=1)[0][0, 0]
        entropy = plain[list(MEASURES).index("entropy")] + arrays["entropy"]
        by_entropy = np.interp(entropy, curve[:, list(MEASURES).index("entropy")], curve[:, 0], np.nan, np.nan)
        arrays["loss_temperature"] = np.where(arrays["entropy"] == 0, 0, by_entropy - plain[0])
        return arrays

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the best factor of the tuned heads with its loss beside both controls."""
        data = result.data
        loss = data["loss"].sel(heads="tuned", key="initial")
        best = int(loss.to_numpy().argmin())
        at = data.isel(gamma=best).sel(heads="tuned", key="initial")
        low, high = float(at["loss_low"]), float(at["loss_high"])
        interval = interval_suffix(low, high, ".3f")
        random = float(data["loss"].isel(gamma=best).sel(heads="tuned", key="random"))
        text = (
            f"Best factor {float(loss['gamma'][best]):g} in {int(np.nansum(data['tuned']))} tuned heads: loss "
            f"{float(at['loss']):+z.3f} nats{interval} on other documents (random key {random:+z.3f}, "
            "temperature of the "
            f"same entropy {float(at['loss_temperature']):+z.3f}); mean a0 {float(data['a0'].mean()):z.2f}, "
            "a0 (1 - a0) "
            f"{float(data['sensitivity'].mean()):z.3f} ({counted(data['rows'], 'token')})"
        )
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "loss" over gamma beside both controls, and "sensitivity", a0 (1 - a0) of every head."""
        data = result.data
        model = model_label(result, 50)
        sensitivity, weight = data["sensitivity"].to_numpy(), data["a0"].to_numpy()
        grid = head_grid(
            sensitivity,
            hover=[[f"a0 {share:z.3f}" for share in line] for line in weight],
            layers=data["layer"].to_numpy().tolist(),
            title=f"Which heads can respond to gamma, {model}",
            subtitle="a0 (1 - a0): a head whose a0 is near 0 or near 1 cannot",
            unit="a0 (1 - a0)",
            limits=colour_limits(sensitivity),
        )
        return {"loss": _sweep(result, model), "sensitivity": grid}


def _sites(store: Store, layers: Sequence[int]) -> list[str]:
    labels = {site.short or "" for site in store.sites}
    return [f"{kind}.{layer}" for layer in layers for kind in ("pattern", "attn_first") if f"{kind}.{layer}" in labels]


def _recorded(
    attention: Mapping[int, tuple[np.ndarray, np.ndarray | None]],
    layers: Sequence[int],
    width: int,
    gammas: Sequence[float],
) -> dict[str, Float[np.ndarray, ...]]:
    """Attention to the initial token, its slope, and the entropy of attention by factor."""
    a0, slope = (np.full((len(layers), width), np.nan) for _ in range(2))
    entropies = []
    for at, layer in enumerate(layers):
        weight, entropy = attention[layer]
        weight = weight.clip(0, 1)
        a0[at, : weight.shape[1]] = weight.mean(0)
        slope[at, : weight.shape[1]] = (weight * (1 - weight)).mean(0)
        if entropy is not None:
            entropies.append([scaled_entropy(weight, entropy, gamma).mean() for gamma in gammas])
    arrays = {"a0": a0, "sensitivity": slope}
    return arrays | ({"attention_entropy": np.mean(entropies, 0)} if entropies else {})


def _sweep(result: Result, model: str) -> go.Figure:
    data, figure = result.data, ThemedFigure()
    lines = {
        "tuned heads": ("loss", "tuned", "initial", CATEGORIES[0], "solid"),
        "all heads": ("loss", "all", "initial", CATEGORIES[1], "solid"),
        "tuned heads, random key": ("loss", "tuned", "random", NEUTRAL, "dash"),
        "tuned heads, temperature of the same entropy": ("loss_temperature", "tuned", "initial", CATEGORIES[0], "dot"),
    }
    x = [f"{gamma:g}" for gamma in data["gamma"].to_numpy()]
    for name, (variable, heads, key, colour, dash) in lines.items():
        at = data.sel(heads=heads, key=key)
        errors = {}
        if variable == "loss":
            low, mean, high = (at[f"loss{end}"].to_numpy() for end in ("_low", "", "_high"))
            errors = {"error_y": error_bars(mean, low, high)}
        line = {"color": colour, "dash": dash}
        figure.add_scatter(x=x, y=at[variable].to_numpy(), name=name, mode="lines+markers", line=line, **errors)
    figure.update_layout(
        title={
            "text": f"Loss with attention to the initial token scaled, {model}",
            "subtitle": {"text": f"{counted(data['rows'], 'token')}; 95 % intervals over documents"},
        },
        width=860,
        height=460,
        margin={"t": 110},
    )
    figure.update_xaxes(title="gamma", type="category")
    return figure.update_yaxes(title="change of the loss, nats")
