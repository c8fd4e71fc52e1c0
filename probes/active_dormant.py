"""Active-dormant heads: sink, value drain and residual peak of one token, and heads that rest on it in some domains.

For the sink token s, by default the position that receives most attention (Guo et al. 2024):

    sink(l, h)  = alpha_s, the mean attention that s receives from the queries that see it
    drain(l, h) = ||v_s W_O|| / median_j ||v_j W_O||          over the other tokens j of the sequence
    peak(l)     = ||resid_s|| / median_j ||resid_j||

each a mean over sequences. A head is dormant on a sequence with alpha_s > epsilon, and active otherwise; `active` is
the share of sequences on which it is active, and `gap` the difference between the domains in which it differs most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    Band,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Sequences,
    Store,
    Variable,
    attention_source,
    axis_title,
    check,
    check_fields,
    clustered_means,
    colour_limits,
    compare_domains,
    counted,
    dataset,
    group_intervals,
    head_grid,
    head_hover,
    head_name,
    head_outputs,
    intervals,
    label,
    layer_bands,
    layers_of,
    layers_text,
    log_axis,
    model_label,
    output_maps,
    permuted_gap,
    plain_torch,
    ratio,
    read_alpha,
    received_sequences,
    recorded_model,
    require_causal,
    residual_site,
    stack_heads,
    usable_device,
    value_site,
    value_text,
    with_interval,
    with_note,
    with_progress,
    written_norms,
)

_HEAD = ("layer", "head")
_LAYER = ("layer",)
_DOMAIN = ("domain", "layer", "head")
_SHOWN = 12
_OVER_HEADS = {"mean_sink": ("sink_attention", xr.DataArray.mean), "median_drain": ("drain", xr.DataArray.median)}
_UNIFORM = "0.074 for T = 64 and position 0: H_T / T of a head that attends uniformly"
_VARIABLES: tuple[Variable, ...] = (
    *with_interval(Variable("sink_attention", _HEAD, "attention", "mean attention that the sink receives", _UNIFORM)),
    *with_interval(Variable("active", _HEAD, "share of sequences", "the sink receives epsilon or less", "1")),
    *with_interval(Variable("drain", _HEAD, "times the median", "norm of v W_O of the sink, others' median", "1")),
    Variable("drain_value", _HEAD, "times the median", "the same of v, before W_O: another quantity", "1"),
    *with_interval(Variable("mean_sink", _LAYER, "attention", "sink_attention, mean over heads", _UNIFORM)),
    *with_interval(Variable("median_drain", _LAYER, "times the median", "drain, median over heads", "1")),
    *with_interval(Variable("peak", _LAYER, "times the median", "residual norm of the sink, others' median", "1")),
    Variable("position_attention", ("position",), "attention", "attention received, mean over heads and sequences"),
    Variable("sink_position", (), "position", "position of the sink, from 0"),
    *with_interval(Variable("domain_active", _DOMAIN, "share of sequences", "`active` in each domain", "1")),
    *with_interval(Variable("gap", _HEAD, "share of sequences", "`active` in the most less the least active domain")),
    Variable("gap_most", _HEAD, "index of a domain", "domain in which the head is most active"),
    Variable("gap_least", _HEAD, "index of a domain", "domain in which it is least active"),
    Variable("gap_permuted", (), "share of sequences", "largest gap of any head in 5 % of permutations of domains"),
    Variable("documents", ("domain",), "documents", "documents of the domain; one alone takes no part in the gap"),
    Variable("sequences", (), "sequences", "sequences that count"),
    Variable("short_sequences", (), "sequences", "sequences left out because they are shorter than `length`"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class ActiveDormant(LayerProbe):
    """Measures sink, value drain and residual peak, and on which domains a head rests on the sink."""

    name: ClassVar[str] = "active-dormant"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = ("Guo et al. 2024, Active-dormant attention heads, arXiv 2410.13835",)
    controls: ClassVar[Mapping[str, str]] = {
        "gap_permuted": "largest gap of any head when domains are permuted over documents; exceeded by chance in 5 %",
        "drain_value": "the norm before W_O: a small value can be written large",
        "random weights": "the same architecture with random weights: no dormant head, drain and peak near 1",
    }

    epsilon: float = 0.3
    """Maximum alpha of the sink on a sequence on which the head counts as active."""
    length: int = 64
    """Tokens of each sequence that count, from its first on; shorter sequences are left out."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    domain: str | None = None
    """Metadata column by whose values heads are compared. None: no comparison."""
    sink: int | None = None
    """Position of the sink. None: the one that receives most attention, mean over heads and sequences."""
    min_visible: int = 8
    """Minimum number of queries that see a position which is chosen as the sink."""
    model: str | None = None
    """Folder or name of the recorded model, for the drain. None: no drain, unless a loaded model is given."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    permutations: int = 200
    """Permutations of domains over documents."""
    seed: int = 0
    """Random seed of resamples and permutations."""
    device: str | None = None
    """Device of products with W_O: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("length", self.length, at_least=3)
        check("min_visible", self.min_visible, at_least=2, at_most=self.length)
        check("epsilon", self.epsilon, at_least=0, at_most=1)
        check_fields(self, "resamples", "permutations", at_least=1)
        check_fields(self, "seed", at_least=0)
        if self.sink is not None and not 0 <= self.sink <= self.length - 2:
            raise RequestError(
                f"sink must be from 0 to {self.length - 2}, before the last of {counted(self.length, 'token')}"
            )

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `attn_received` or `pattern`; `v` and the model for the drain; `resid_post` or `resid_norm`.

        Costs two passes over the attention and one over the others; memory is blocks of 64 MiB and a few numbers for
        each sequence and head.

        Raises:
            RequestError: No attention was recorded, no sequence is long enough, derived attention was summed over
                longer sequences than `length`, values are NaN or infinite, or the model is not causal or another one.
        """
        require_causal(store, self.name)
        source, layers = attention_source(store, self.layers)
        kind = "pattern" if source == "pattern" else "attn_received"
        sequences = received_sequences(store, source, self.length, self.where, self.domain)
        values, streams = (self.layers_with(store, *kinds) for kinds in (("v", "v_norm"), ("resid_post", "resid_norm")))
        sites = [f"{kind}.{layer}" for layer in layers] + [residual_site(store, layer) for layer in streams]
        rows = self.finite_rows(store, sites + [_value_site(store, layer) for layer in values], sequences.rows)
        sequences = sequences.without(rows.left_out)
        arrays = _choose_sink(self, store, source, layers, sequences)
        sink = int(arrays["sink_position"])
        blocks = sorted({*layers, *streams})
        received = {
            layer: _sink_attention(store, source, layer, sequences, sink)
            for layer in with_progress(layers, "attention to the sink", "layers")
        }
        heads: dict[int, dict[str, np.ndarray]] = {
            layer: {"sink_attention": attention} for layer, attention in received.items()
        }
        for part in heads.values():
            part["active"] = (part["sink_attention"] <= self.epsilon).astype(float)
        notes = _drains(self, store, model, sequences, sink, heads)
        if self.sink is None and sink == self.length - self.min_visible:
            notes.append(f"position {sink} is the last that counts as a sink: no position receives most as a sink does")
        means = {
            layer: {
                name: mean for key, array in part.items() for name, mean in _mean(self, key, array, sequences).items()
            }
            for layer, part in heads.items()
        }
        arrays |= stack_heads(blocks, means, [variable.name for variable in _VARIABLES if variable.dims == _HEAD])
        arrays |= _over_heads(self, heads, blocks, sequences) | _peaks(self, store, blocks, streams, sequences, sink)
        number = arrays["active"].shape[1]
        if self.domain is not None:
            arrays |= _by_domain(
                self, {layer: part["active"] for layer, part in heads.items()}, sequences, blocks, number
            )
            notes += _domain_notes(self, arrays["documents"], sequences)
        arrays |= {"sequences": np.asarray(len(sequences)), "short_sequences": np.asarray(sequences.short)}
        coords: dict[str, Any] = {"layer": blocks, "head": np.arange(number), "position": np.arange(self.length)}
        if sequences.domains:
            coords["domain"] = list(sequences.domains)
        data = dataset(_VARIABLES, arrays, coords)
        return self.result(store, data, _table(data), rows, [*notes, self.note_layers(store)])

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the number of dormant heads, the strongest with its drain, the peak, and the largest gap."""
        data, settings, table = result.data, result.provenance["settings"], result.table
        best, sink = table.nlargest(1, "sink_attention").iloc[0], int(data["sink_position"])
        strongest = head_name(int(best["layer"]), int(best["head"]))
        dormant = int((table["active"].to_numpy() < 0.5).sum())
        parts = [
            f"{dormant} of {counted(len(table), 'head')} {'is' if dormant == 1 else 'are'} dormant on most sequences "
            f"(attention to position {sink} above "
            f"{settings['epsilon']:g}, T {settings['length']}, {counted(data['sequences'], 'sequence')})",
            f"strongest {strongest}: {value_text(best, 'sink_attention')}",
        ]
        if not np.isnan(best.get("drain", np.nan)):
            parts.append(f"its value through W_O is {value_text(best, 'drain')} times the other tokens' median")
        if "peak" in data and data["peak"].notnull().any():
            most = data.isel(layer=int(np.nanargmax(data["peak"].to_numpy())))
            at = {name: float(most[name]) for name in ("peak", "peak_low", "peak_high")}
            parts.append(f"residual peak {value_text(at, 'peak', 1)} times the median at layer {int(most['layer'])}")
        if "gap" in table and table["gap"].notna().to_numpy().any():
            widest, permuted = table.nlargest(1, "gap").iloc[0], float(data["gap_permuted"])
            number = int((table["gap"].to_numpy() > permuted).sum())
            text = (
                f"{counted(number, 'head')} {'differs' if number == 1 else 'differ'} between domains by more than "
                f"permuted domains do ({permuted:z.2f})"
            )
            if number:
                text += (
                    f", most {head_name(int(widest['layer']), int(widest['head']))} by {value_text(widest, 'gap')}, "
                    f"{widest['gap_most']} over {widest['gap_least']}"
                )
            parts.append(text)
        return with_note("; ".join(parts) + ".", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "heads", the active share by layer and head; "phenomena" by layer; "domains" for the largest gaps."""
        figures = {"heads": _heads(result), "phenomena": _phenomena(result)}
        return {**figures, "domains": _domains(result)} if _gaps(result) else figures


def _value_site(store: Store, layer: int) -> str:
    """`v` where it was recorded, which the drain needs; else `v_norm`."""
    return f"v.{layer}" if layer in layers_of(store, "v") else value_site(store, layer)


# ---- readings -------------------------------------------------------------------------------------------


def _choose_sink(
    probe: ActiveDormant, store: Store, source: str, layers: list[int], sequences: Sequences
) -> dict[str, np.ndarray]:
    """Mean attention by position, and the position of the sink."""
    total, heads = np.zeros(sequences.length), 0
    for layer in layers:
        shape = store["pattern" if source == "pattern" else "attn_received", layer].shape[1:]
        for rows in sequences.blocks(int(np.prod(shape))):
            total += read_alpha(store, source, layer, rows).sum((0, 2))
        heads += shape[0]
    mean = total / (heads * len(sequences))
    chosen = int(mean[: probe.length - probe.min_visible + 1].argmax()) if probe.sink is None else probe.sink
    return {"position_attention": mean, "sink_position": np.asarray(chosen)}


def _sink_attention(store: Store, source: str, layer: int, sequences: Sequences, sink: int) -> np.ndarray:
    """Attention that the sink receives, [sequence, head]."""
    values = int(np.prod(store["pattern" if source == "pattern" else "attn_received", layer].shape[1:]))
    return np.concatenate([read_alpha(store, source, layer, rows)[:, sink] for rows in sequences.blocks(values)])


def _drains(
    probe: ActiveDormant,
    store: Store,
    model: Model | None,
    sequences: Sequences,
    sink: int,
    heads: dict[int, dict[str, np.ndarray]],
) -> list[str]:
    """Adds the drain of each sequence to `heads`, before and after W_O; returns notes of what could not be computed."""
    whole, outputs, notes = layers_of(store, "v"), {}, []
    if model is not None or probe.model is not None:
        loaded = recorded_model(store, model or probe.model, usable_device(probe.device))
        outputs = head_outputs(loaded)
        if any(outputs[layer].norm is not None for layer in heads.keys() & outputs.keys()):
            notes.append("drain is that of the output before the norm after W_O, which the model takes of all heads")
    for layer in sorted(heads.keys() & {*layers_of(store, "v", "v_norm")}):
        site, number = _value_site(store, layer), heads[layer]["active"].shape[1]
        vectors = layer in whole
        maps = output_maps(outputs[layer].weights()) if vectors and layer in outputs else None
        plain, written = [], []
        for rows in sequences.blocks(int(np.prod(store[site].shape[1:]))):
            values = store[site][rows].double()
            norms = (values.norm(dim=-1) if vectors else values).numpy()
            plain.append(_to_median(norms, sink))
            if maps is not None:
                written.append(_to_median(written_norms(values, maps).numpy(), sink))
        heads[layer]["drain_value"] = np.repeat(np.concatenate(plain), number // plain[0].shape[1], 1)
        if written:
            heads[layer]["drain"] = np.concatenate(written)
    if not any("drain_value" in part for part in heads.values()):
        return ["drain not computed: neither v nor v_norm was recorded"]
    if not outputs:
        return [*notes, "drain not computed: it needs the model (model=, --model), for W_O"]
    if missing := [layer for layer, part in heads.items() if "drain" not in part]:
        notes.append(f"drain is NaN at layers {layers_text(missing)}: v was not recorded there")
    return notes


def _to_median(norms: np.ndarray, sink: int) -> np.ndarray:
    """Norm at the sink by the median of the others, [sequence, ...]; NaN where that is 0."""
    median = np.median(np.delete(norms, sink, axis=1), axis=1)
    return np.where(median > 0, ratio(norms[:, sink], median), np.nan)


def _mean(probe: ActiveDormant, name: str, values: np.ndarray, sequences: Sequences) -> dict[str, np.ndarray]:
    """Mean over sequences, with its interval where one is declared."""
    mean, resampled = clustered_means(values, sequences.document, resamples=probe.resamples, seed=probe.seed)
    return {name: mean} if name == "drain_value" else _with_ends(name, mean, resampled, sequences)


def _with_ends(name: str, value: Any, resampled: np.ndarray, sequences: Sequences) -> dict[str, np.ndarray]:
    low, high = intervals(resampled, len(np.unique(sequences.document)))
    return {name: np.asarray(value), f"{name}_low": low, f"{name}_high": high}


def _over_heads(
    probe: ActiveDormant, heads: Mapping[int, Mapping[str, np.ndarray]], layers: list[int], sequences: Sequences
) -> dict[str, np.ndarray]:
    """Sink attention and drain by layer, mean and median over heads, with their intervals."""
    arrays: dict[str, np.ndarray] = {}
    settings = {"resamples": probe.resamples, "seed": probe.seed}
    for layer, part in heads.items():
        for name, (source, over) in _OVER_HEADS.items():
            if source not in part:
                continue
            mean, resampled = clustered_means(part[source], sequences.document, **settings)
            value = over(xr.DataArray(mean, dims="head"), "head")
            drawn = over(xr.DataArray(resampled, dims=("resample", "head")), "head").to_numpy()
            for key, number in _with_ends(name, value, drawn, sequences).items():
                arrays.setdefault(key, np.full(len(layers), np.nan))[layers.index(layer)] = number
    return arrays


def _peaks(
    probe: ActiveDormant, store: Store, layers: list[int], streams: list[int], sequences: Sequences, sink: int
) -> dict[str, np.ndarray]:
    """Residual peak by layer, with its interval."""
    arrays = {f"peak{end}": np.full(len(layers), np.nan) for end in ("", "_low", "_high")} if streams else {}
    for layer in streams:
        site, parts = residual_site(store, layer), []
        for rows in sequences.blocks(int(np.prod(store[site].shape[1:]))):
            values = store[site][rows].double().reshape(*rows.shape, -1)  # several streams count as one vector
            parts.append(_to_median(values.norm(dim=-1).numpy(), sink))
        for name, value in _mean(probe, "peak", np.concatenate(parts)[:, None], sequences).items():
            arrays[name][layers.index(layer)] = value[0]
    return arrays


def _by_domain(
    probe: ActiveDormant, active: dict[int, np.ndarray], sequences: Sequences, layers: list[int], heads: int
) -> dict[str, np.ndarray]:
    """Active share in each domain, the gap, and the gap of permuted domains."""
    settings = {"layers": layers, "heads": heads, "resamples": probe.resamples, "seed": probe.seed}
    arrays = compare_domains(active, sequences, **settings)
    arrays = {name.replace("attention", "domain_active"): part for name, part in arrays.items()}
    all_heads = np.concatenate(list(active.values()), axis=1)
    gap = permuted_gap(all_heads, sequences, permutations=probe.permutations, seed=probe.seed)
    return {**arrays, "gap_permuted": np.asarray(gap)}


def _domain_notes(probe: ActiveDormant, documents: np.ndarray, sequences: Sequences) -> list[str]:
    notes = []
    if mixed := int((sequences.domain < 0).sum()):
        notes.append(f"{counted(mixed, 'sequence')} without a single {probe.domain} left out of the comparison")
    if (documents > 1).sum() < 2:
        notes.append(f"gap not computed: it needs two values of {probe.domain} with two documents each")
    return notes


def _table(data: xr.Dataset) -> pd.DataFrame:
    """A line for each layer and head, the largest gap first, or the strongest sink without domains."""
    layer, head = (axis.ravel() for axis in np.meshgrid(data["layer"], data["head"], indexing="ij"))
    columns: dict[str, Any] = {"layer": layer, "head": head}
    columns |= {str(name): part.to_numpy().ravel() for name, part in data.items() if part.dims == _HEAD}
    if "domain" in data.sizes:
        names = data["domain"].to_numpy().astype(object)
        columns |= {f"active_{name}": data["domain_active"].to_numpy()[i].ravel() for i, name in enumerate(names)}
        for name in ("gap_most", "gap_least"):
            index = columns[name]
            columns[name] = np.where(np.isnan(index), "", names[np.nan_to_num(index).astype(int)])
    table = pd.DataFrame(columns)
    order = ["gap", "sink_attention"] if "gap" in table else ["sink_attention"]
    return table.loc[table["active"].notna()].sort_values(order, ascending=False, kind="stable", ignore_index=True)


# ---- figures --------------------------------------------------------------------------------------------


def _heads(result: Result) -> go.Figure:
    data, settings = result.data, result.provenance["settings"]
    known = data.sel(layer=data["layer"][data["active"].notnull().any("head").to_numpy()])
    layers = known["layer"].to_numpy().tolist()
    lines = {(line["layer"], line["head"]): _hover(line) for line in result.table.to_dict("records")}
    return head_grid(
        known["active"].to_numpy(),
        hover=[[lines.get((layer, head), "") for head in range(known.sizes["head"])] for layer in layers],
        layers=layers,
        title=f"Active share of the heads of {model_label(result)}",
        subtitle=f"share of {counted(data['sequences'], 'sequence')} on which position {int(data['sink_position'])} "
        f"receives {settings['epsilon']:g} or less of the attention",
        unit=axis_title(data["active"].attrs, "active"),
        limits=colour_limits(known["active"].to_numpy()),
    )


def _hover(line: Mapping[str, Any]) -> str:
    return head_hover(line, ("active", "sink_attention", "drain", "drain_value", "gap"))


def _phenomena(result: Result) -> go.Figure:
    data = result.data
    curves = {"mean_sink": ("sink: attention, mean over heads", data["sink_attention"].mean("head"))}
    if "drain" in data:
        curves["median_drain"] = ("drain: value through W_O, median over heads", data["drain"].median("head"))
    if "peak" in data:
        curves["peak"] = ("peak: residual norm", data["peak"])
    bands = []
    for (name, (text, values)), colour in zip(curves.items(), CATEGORIES, strict=False):
        ends = None
        if f"{name}_low" in data:
            low, high = (data[f"{name}_{end}"].to_numpy() for end in ("low", "high"))
            ends = (np.where(low > 0, low, np.nan), high)  # the axis is logarithmic
        bands.append(Band(text, values.to_numpy(), ends, colour))
    figure = layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"Sink, drain and peak of position {int(data['sink_position'])} in {model_label(result)}",
        subtitle=f"{counted(data['sequences'], 'sequence')}; bands: 95 % intervals over documents",
        unit="attention; times the other tokens' median",
    )
    figure.update_yaxes(rangemode="normal", **log_axis(*(band.values for band in bands)))
    return figure.update_layout(margin={"t": 110})


def _gaps(result: Result) -> bool:
    return "gap" in result.data and bool(result.data["gap"].notnull().any())


def _domains(result: Result) -> go.Figure:
    data, heads = result.data, result.table.head(_SHOWN)
    at = {axis: xr.DataArray(heads[axis].to_numpy(), dims="shown") for axis in ("layer", "head")}
    parts = [data[name].sel(at).to_numpy() for name in ("domain_active", "domain_active_low", "domain_active_high")]
    documents = data["documents"].to_numpy().tolist()
    domains = zip(data["domain"].values, documents, strict=True)
    names = [f"{label(str(name))} ({counted(number, 'document')})" for name, number in domains]
    figure = group_intervals(
        dict(zip(names, np.stack(parts, 1), strict=True)),
        categories=[head_name(layer, head) for layer, head in zip(heads["layer"], heads["head"], strict=True)],
        hover="%{x}",
        title=f"Active in one domain, dormant in another, {model_label(result)}",
        subtitle=f"share of active sequences; 95 % intervals over documents; the largest gap of permuted domains is "
        f"below {float(data['gap_permuted']):z.2f} in 95 %",
    )
    figure.update_xaxes(title="head, largest gaps first")
    return figure.update_yaxes(title=axis_title(data["domain_active"].attrs), range=[-0.03, 1.03])
