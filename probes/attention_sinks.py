"""Attention sinks: heads that put most of their attention on one token whatever the text (Gu et al. 2024).

    alpha_k = 1/(T - k) sum_{q >= k} A[q, k]            mean over the queries that can see key k, itself included
    Sink_k  = share of (sequence, layer, head) with alpha_k > epsilon

with positions k from 0 (the papers count from 1: their Sink_1 is position 0). The threshold comes before the mean. With
it: how the sink token differs in value and residual norm (Guo et al. 2024), massive activations (Sun et al. 2024), an
entropy detector of sink heads, and by how much the attention a head pays to the sink depends on the domain of the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from einops import rearrange

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
    attention_sites,
    attention_source,
    axis_title,
    check,
    check_fields,
    clustered_ends,
    colour_limits,
    compare_domains,
    counted,
    dataset,
    group_intervals,
    head_attention,
    head_grid,
    head_hover,
    head_name,
    interval_suffix,
    label,
    layer_bands,
    log_axis,
    massive_text,
    model_label,
    note_missing,
    plain_torch,
    position_bars,
    read_attention,
    received_sequences,
    recorded_ends,
    require_causal,
    residual_norms,
    residual_site,
    stack_heads,
    stack_layers,
    stack_value_norms,
    strongest_patterns,
    value_norms,
    value_site,
    with_interval,
    with_side_panel,
)

_FEW = 10
_HEADS_SHOWN = 12
_EXAMPLE = 128  # tokens
_OF_HEADS = ("alpha", "sink_share", "row_entropy", "column_entropy", "detected")

_HEAD = ("layer", "head")
_LAYER = ("layer",)
_DOMAIN = ("domain", "layer", "head")
_EXAMPLES = ("example", "query", "key")
_UNIFORM = "0.074 for T = 64: H_T / T of a head that attends uniformly"
_VARIABLES: tuple[Variable, ...] = (
    Variable("alpha", (*_HEAD, "position"), "attention", "mean over sequences of the attention received", _UNIFORM),
    Variable("sink_share", _HEAD, "share of sequences", "sequences in which the position `sink` is a sink", "0"),
    Variable("row_entropy", _HEAD, "share of the largest entropy", "entropy of what a query attends to", "1"),
    Variable("column_entropy", _HEAD, "share of the largest entropy", "largest entropy of a column", "1"),
    Variable("detected", _HEAD, "share of sequences", "sequences in which the entropy detector takes the head", "0"),
    Variable("value_norm_sink", _HEAD, "L2 norm", "mean norm of the value vector of the sink"),
    Variable("value_norm_others", _HEAD, "L2 norm", "mean norm of the value vectors of the other tokens"),
    Variable("value_norm_ratio", _HEAD, "times the others' mean", "value_norm_sink / value_norm_others", "1"),
    *with_interval(Variable("residual_norm_sink", _LAYER, "L2 norm", "mean norm of the residual stream at the sink")),
    *with_interval(Variable("residual_norm_others", _LAYER, "L2 norm", "mean norm of the stream at the other tokens")),
    Variable("residual_norm_ratio", _LAYER, "times the others' mean", "residual_norm_sink / residual_norm_others", "1"),
    Variable("massive_top", _LAYER, "|h|", "largest activation of a sequence, mean over sequences"),
    Variable("massive_median", _LAYER, "|h|", "median activation of a sequence, mean over sequences"),
    Variable("massive_position", _LAYER, "position", "most frequent position of the largest |h|"),
    Variable("massive_dimension", _LAYER, "dimension", "most frequent dimension of the largest |h|"),
    Variable("massive_above_absolute", _LAYER, "share of sequences", "largest |h| above massive_absolute", "0"),
    Variable("massive_above_ratio", _LAYER, "share of sequences", "largest |h| above massive_ratio x the median", "0"),
    Variable("massive", _LAYER, "share of sequences", "largest activation above both thresholds", "0"),
    *with_interval(Variable("sink_k", ("position",), "% of heads", "heads with alpha above epsilon, 0 to 100", "0")),
    *with_interval(Variable("sink", (), "% of heads", "sink_k at the position `sink`", "0")),
    Variable("reliable", ("position",), "1 = reliable", "min_visible queries or more see the position"),
    *with_interval(Variable("attention", _DOMAIN, "attention", "mean attention of later tokens to the sink")),
    *with_interval(Variable("gap", _HEAD, "attention", "attention in the most less the least attending domain")),
    Variable("gap_most", _HEAD, "index of a domain", "domain that attends most to the sink"),
    Variable("gap_least", _HEAD, "index of a domain", "domain that attends least to the sink"),
    Variable("documents", ("domain",), "documents", "documents of the domain; one alone takes no part in the gap"),
    Variable("sequences", (), "sequences", "sequences that count"),
    Variable("short_sequences", (), "sequences", "sequences left out because they are shorter than `length`"),
    Variable("example_pattern", _EXAMPLES, "attention", "attention of single heads over the first sequence"),
    Variable("example_layer", ("example",), "layer", "layer of each example"),
    Variable("example_head", ("example",), "head", "head of each example"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class AttentionSinks(LayerProbe):
    """Measures which heads attend to one token whatever the text, how that token differs, and in which domains."""

    name: ClassVar[str] = "attention-sinks"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Gu et al. 2024, When attention sink emerges in language models, arXiv 2410.10781",
        "Guo et al. 2024, Active-dormant attention heads, arXiv 2410.13835",
        "Sun et al. 2024, Massive activations in large language models, arXiv 2402.17762",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "a uniform head": "has alpha of H_T / T at position 0: 0.074 for T = 64, far below epsilon",
        "random weights": "the same architecture with random weights has no sink: Sink_1 is 0",
        "value_norm_others": "value norm of the other tokens; that of a sink is smaller",
        "residual_norm_others": "residual norm of the other tokens; that of a sink is larger",
    }

    epsilon: float = 0.3
    """Minimum alpha of a sink, in one head and sequence."""
    length: int = 64
    """Tokens of each sequence that count, from its first on; shorter sequences are left out."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    domain: str | None = None
    """Metadata column by whose values the attention to the sink is compared. None: no comparison."""
    sink: int = 0
    """Position of the token whose norms and attention received are compared with those of the other tokens."""
    row_entropy: float = 0.5
    """Maximum entropy of the rows of a detected head, as a share of the largest possible."""
    column_entropy: float = 0.9
    """Minimum entropy of one of its columns, as a share of the largest possible."""
    min_visible: int = 8
    """Minimum number of queries that see a key; other keys are left out of the detector, and unreliable in Sink_k."""
    massive_absolute: float = 100.0
    """Minimum size of a massive activation."""
    massive_ratio: float = 1000.0
    """Minimum ratio of a massive activation to the median of its layer and sequence."""
    examples: int = 8
    """Number of heads, those with the largest alpha, whose attention over the first sequence is kept."""
    resamples: int = 1000
    """Resamples of documents for the intervals of the metric and of the comparison of domains."""
    seed: int = 0
    """Random seed of the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("length", 3), ("min_visible", 2), ("resamples", 1), ("seed", 0), ("examples", 0)):
            check(name, getattr(self, name), at_least=least)
        check_fields(self, "epsilon", "row_entropy", "column_entropy", at_least=0, at_most=1)
        check_fields(self, "massive_absolute", "massive_ratio", at_least=0)
        if not 0 <= self.sink <= self.length - 2:
            raise RequestError(
                f"sink must be from 0 to {self.length - 2}, before the last of {counted(self.length, 'token')}"
            )
        if self.min_visible > self.length:
            raise RequestError(
                f"min_visible is {self.min_visible} and no key is seen by more than {counted(self.length, 'token')}"
            )

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `pattern`, `v` and `resid_post`, or what was derived from them while recording.

        Of attention recorded both ways the one with more layers is read, `pattern` if equal. Costs one pass over the
        sites; memory is blocks of 64 MiB and a few numbers per sequence and head of a layer, with `domain` of all.

        Raises:
            RequestError: No attention was recorded, no sequence is long enough, derived attention was summed over
                longer sequences than `length`, values are NaN or infinite, or the model is not causal.
        """
        require_causal(store, self.name)
        source, layers = attention_source(store, self.layers)
        if self.domain is not None and source == "derived":
            if self.sink != 0:
                raise RequestError(
                    f"sink {self.sink}: attn_first has the attention to position 0 only; for domains record pattern"
                )
            store.require(*(f"attn_first.{layer}" for layer in layers))
        sequences = received_sequences(store, source, self.length, self.where, self.domain)
        values, streams = (self.layers_with(store, *kinds) for kinds in (("v", "v_norm"), ("resid_post", "resid_norm")))
        norm_sites = [value_site(store, layer) for layer in values] + [residual_site(store, layer) for layer in streams]
        rows = self.finite_rows(store, [*attention_sites(store, source, layers), *norm_sites], sequences.rows)
        sequences = sequences.without(rows.left_out)
        received = {layer: _attention(self, store, source, layer, sequences) for layer in layers}
        norms = {layer: value_norms(store, layer, sequences, self.sink) for layer in values}
        massive: dict[str, Any] = {"absolute": self.massive_absolute, "relative": self.massive_ratio}
        massive |= {"resamples": self.resamples, "seed": self.seed}
        residual = {layer: residual_norms(store, layer, sequences, self.sink, **massive) for layer in streams}
        blocks = sorted({*layers, *residual})
        arrays = stack_heads(blocks, received, _OF_HEADS) | stack_layers(blocks, residual)
        arrays |= stack_value_norms(blocks, {layer: len(part["sink_share"]) for layer, part in received.items()}, norms)
        arrays |= _sink_shares(self, received, sequences)
        arrays["reliable"] = (self.length - np.arange(self.length) >= self.min_visible).astype(np.int8)
        if self.domain is not None:
            paid = {layer: part["paid"] for layer, part in received.items()}
            settings = {"layers": blocks, "heads": arrays["sink_share"].shape[1], "resamples": self.resamples}
            arrays |= compare_domains(paid, sequences, seed=self.seed, **settings)
        arrays |= {"sequences": np.asarray(len(sequences)), "short_sequences": np.asarray(sequences.short)}
        coords = {"layer": blocks, "head": np.arange(arrays["sink_share"].shape[1]), "position": np.arange(self.length)}
        if sequences.domains:
            coords["domain"] = list(sequences.domains)
        data = dataset(_VARIABLES, arrays, coords)
        data = data.assign(_examples(self, store, data["alpha"], sequences).variables)
        few = [*_few(self, data, sequences), *filter(None, [self.note_layers(store)])]
        data.attrs = {"source": source, "few": "; ".join([*rows.notes, *few])}
        notes = [*_notes(self, store, data, sequences), *few]
        return self.result(store, data, _table(data, self.sink), rows, notes)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the metric, the head with the largest alpha, the norms of the sink, and massive activations."""
        settings, data, best = result.provenance["settings"], result.data, result.table.nlargest(1, "alpha").iloc[0]
        sink = settings["sink"]
        strongest = head_name(int(best["layer"]), int(best["head"]))
        low, high = recorded_ends(data, "sink") or (np.nan, np.nan)
        interval = interval_suffix(low, high, ".1f")
        parts = [
            f"Sink_{sink + 1} = {float(data['sink_k'][sink]):z.1f} % of heads{interval} (epsilon "
            f"{settings['epsilon']:g}, T {settings['length']}, {counted(data['sequences'], 'sequence')})",
            f"strongest head {strongest}, alpha {best['alpha']:z.2f}",
        ]
        if not np.isnan(best.get("value_norm_ratio", np.nan)):
            parts.append(f"the sink's value norm in {strongest} is {best['value_norm_ratio']:z.2f} times the others'")
        if "residual_norm_ratio" in data and data["residual_norm_ratio"].notnull().any():
            most = data["residual_norm_ratio"][int(np.nanargmax(data["residual_norm_ratio"].to_numpy()))]
            parts.append(f"its residual norm is {float(most):z.1f} times the others' at layer {int(most['layer'])}")
        massive = massive_text(data) if "massive_top" in data else ""
        return "; ".join([*parts, *filter(None, [massive, data.attrs["few"]])]) + "."

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "sinks", alpha by layer and head with residual norms at the side, and "positions", Sink_k.

        If they were recorded, also "norms" by layer, "domains" for the heads with the largest gaps, and "attention".
        """
        figures = {"sinks": _sinks(result), "positions": _positions(result)}
        if "residual_norm_ratio" in result.data:
            figures["norms"] = _norms(result)
        if "gap" in result.data and result.data["gap"].notnull().any():
            figures["domains"] = _by_domain(result)
        if "example_pattern" in result.data:
            figures["attention"] = _over_text(result)
        return figures


# ---- readings of a layer --------------------------------------------------------------------------------


def _attention(
    probe: AttentionSinks, store: Store, source: str, layer: int, sequences: Sequences
) -> dict[str, np.ndarray]:
    """Reads one layer: means over sequences for each head; "above", the number of heads with a sink at a position
    [sequence, position]; for domains "paid", the attention to `sink` [sequence, head]."""
    length, parts = probe.length, []
    kind = "pattern" if source == "pattern" else "attn_received"
    for rows in sequences.blocks(int(np.prod(store[kind, layer].shape[1:]))):
        values = read_attention(store, source, layer, rows, probe.sink)  # [sequence, position, head]
        alpha = values["alpha"]
        part = {
            "alpha": rearrange(alpha, "sequence position head -> sequence head position").sum(0),
            "above": (alpha > probe.epsilon).sum(2),
            "sink_share": (alpha[:, probe.sink] > probe.epsilon).sum(0),
        }
        if "row" in values:  # the first query sees one key: no entropy
            part["row"] = (values["row"][:, 1:] / np.log(np.arange(2, length + 1))[:, None]).sum(1) / length
        if "column" in values:
            queries = length - np.arange(length - probe.min_visible + 1)
            part["column"] = (values["column"][:, : len(queries)] / np.log(queries)[:, None]).max(1)
        if "paid" in values and probe.domain is not None:
            part["paid"] = values["paid"][:, probe.sink + 1 :].mean(1)
        parts.append(part)
    total = {name: np.sum([part[name] for part in parts], axis=0) for name in ("alpha", "sink_share")}
    stats = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name not in total}
    means = {name: total[name] / len(sequences) for name in ("alpha", "sink_share")}
    means |= {f"{name}_entropy": stats[name].mean(0) for name in ("row", "column") if name in stats}
    if {"row", "column"} <= stats.keys():
        means["detected"] = ((stats["row"] < probe.row_entropy) & (stats["column"] > probe.column_entropy)).mean(0)
    paid = {"paid": stats["paid"]} if "paid" in stats else {}
    return means | {"above": stats["above"]} | paid


def _sink_shares(
    probe: AttentionSinks, received: Mapping[int, Mapping[str, np.ndarray]], sequences: Sequences
) -> dict[str, np.ndarray]:
    """Sink_k of all positions and of the position `sink`, with intervals over documents."""
    heads = sum(len(part["sink_share"]) for part in received.values())
    shares = 100 * np.sum([part["above"] for part in received.values()], axis=0) / heads
    ends = clustered_ends(shares, sequences.document, resamples=probe.resamples, seed=probe.seed)
    parts = {f"sink_k{end}": part for end, part in zip(("", "_low", "_high"), (shares.mean(0), *ends), strict=True)}
    return parts | {name.replace("_k", ""): part[probe.sink] for name, part in parts.items()}


def _examples(probe: AttentionSinks, store: Store, alpha: xr.DataArray, sequences: Sequences) -> xr.Dataset:
    """Attention over the first sequence that counts, of the heads with the largest alpha among those recorded whole."""
    rows = sequences.starts[0] + np.arange(min(sequences.length, _EXAMPLE))
    at_sink, layers = alpha.isel(position=probe.sink).to_numpy(), alpha["layer"].to_numpy().tolist()
    layer, head, patterns, known = strongest_patterns(store, at_sink, layers, rows, probe.examples)
    if not len(patterns):
        return xr.Dataset()
    tokens = store.tokens["token"].take(rows).to_pylist()
    arrays = {"example_pattern": patterns, "example_layer": layer, "example_head": head}
    examples = dataset(_VARIABLES, arrays)
    # as JSON: a token may hold characters that netCDF does not
    examples["example_pattern"].attrs |= {"tokens": json.dumps(tokens), "heads": known}
    return examples


def _notes(probe: AttentionSinks, store: Store, data: xr.Dataset, sequences: Sequences) -> list[str]:
    """Notes of missing variables and sequences, with the reason."""
    derived = data.attrs["source"] == "derived"
    needs = {
        "row_entropy": ("attn_entropy",) if derived else ("pattern",),
        "column_entropy": ("attn_received_entropy",) if derived else ("pattern",),
        "value_norm_ratio": ("v", "v_norm"),
        "residual_norm_ratio": ("resid_post", "resid_norm"),
        "massive": ("resid_post",),
    }
    notes = note_missing(store, data, needs, {"massive": "massive activations"})
    if sequences.short:
        notes.append(f"{counted(sequences.short, 'sequence')} of fewer than {probe.length} tokens left out")
    if probe.domain is not None:
        if mixed := int((sequences.domain < 0).sum()):
            notes.append(f"{counted(mixed, 'sequence')} without a single {probe.domain} left out of the comparison")
        if len(sequences.domains) < 2:
            notes.append(f"gap not computed: all sequences have the same {probe.domain}")
    return notes


def _few(probe: AttentionSinks, data: xr.Dataset, sequences: Sequences) -> list[str]:
    """Notes of numbers that rest on little data."""
    few = [f"only {counted(len(sequences), 'sequence')}"] if len(sequences) < _FEW else []
    if probe.domain is not None:
        if short := int((data["documents"] < _FEW).sum()):
            few.append(f"fewer than {_FEW} documents in {short} of {counted(len(sequences.domains), 'domain')}")
        if (single := int((data["documents"] < 2).sum())) and len(sequences.domains) > 1:
            few.append(f"{single} of fewer than 2 documents {'takes' if single == 1 else 'take'} no part in the gap")
    return few


def _table(data: xr.Dataset, sink: int) -> pd.DataFrame:
    """A line for each layer and head, those that are sinks in most sequences first."""
    names = ["sink_share", "row_entropy", "column_entropy", "detected", "value_norm_sink", "value_norm_others"]
    names += ["value_norm_ratio", "gap", "gap_low", "gap_high"]
    by_layer = [name for name in data if str(name).startswith("massive") and data[name].dims == _LAYER]
    alpha = data["alpha"].to_numpy()
    layer, head = (axis.ravel() for axis in np.meshgrid(data["layer"], data["head"], indexing="ij"))
    columns = {"layer": layer, "head": head, "alpha": alpha[..., sink].ravel()}
    reliable = np.where(data["reliable"].to_numpy() == 1, np.nan_to_num(alpha, nan=-1.0), -1.0)
    columns |= {"peak_position": reliable.argmax(-1).ravel(), "peak_alpha": reliable.max(-1).ravel()}
    columns |= {name: data[name].to_numpy().ravel() for name in names if name in data}
    columns |= {name: np.repeat(data[name].to_numpy(), data.sizes["head"]) for name in by_layer}
    if "domain" in data.sizes:
        domains = data["domain"].to_numpy().astype(object)
        columns |= {f"attention_{name}": data["attention"].to_numpy()[i].ravel() for i, name in enumerate(domains)}
        for name in ("gap_most", "gap_least"):
            index = np.nan_to_num(data[name].to_numpy().ravel(), nan=-1).astype(int)
            columns[name] = np.where(index < 0, "", domains[index])
    table = pd.DataFrame(columns)
    return table.loc[table["alpha"].notna()].sort_values(
        ["sink_share", "alpha"], ascending=False, kind="stable", ignore_index=True
    )


# ---- figures --------------------------------------------------------------------------------------------


def _sinks(result: Result) -> go.Figure:
    settings, data = result.provenance["settings"], result.data
    sink = settings["sink"]
    alpha = data["alpha"].isel(position=sink)
    alpha = alpha.sel(layer=alpha["layer"][alpha.notnull().any("head").to_numpy()])
    measures = ("alpha", "sink_share", "row_entropy", "column_entropy", "detected", "value_norm_ratio", "gap")
    lines = {(row["layer"], row["head"]): head_hover(row, measures) for row in result.table.to_dict("records")}
    layers = alpha["layer"].to_numpy().tolist()
    figure = head_grid(
        alpha.to_numpy(),
        hover=[[lines.get((layer, head), "") for head in range(alpha.sizes["head"])] for layer in layers],
        layers=layers,
        title=f"Attention sinks of {model_label(result)}: Sink_{sink + 1} = {float(data['sink_k'][sink]):z.1f} %",
        subtitle=f"mean attention that position {sink} receives from itself and later tokens; "
        f"epsilon {settings['epsilon']:g}, T {settings['length']}, {counted(data['sequences'], 'sequence')}",
        unit=axis_title(data["alpha"].attrs, "alpha"),
        limits=colour_limits(alpha.to_numpy()),
    )
    if "residual_norm_ratio" not in data:
        return figure
    curves = {name: curve.sel(layer=layers).to_numpy() for name, curve in _norm_curves(result).items()}
    return with_side_panel(figure, curves, unit=f"residual {axis_title(data['residual_norm_sink'].attrs)}")


def _norm_curves(result: Result) -> dict[str, xr.DataArray]:
    data, sink = result.data, result.provenance["settings"]["sink"]
    return {f"position {sink}": data["residual_norm_sink"], "the others, mean": data["residual_norm_others"]}


def _over_text(result: Result) -> go.Figure:
    data = result.data
    patterns = data["example_pattern"]
    heads = zip(data["example_layer"].to_numpy().tolist(), data["example_head"].to_numpy().tolist(), strict=True)
    length, known = result.provenance["settings"]["length"], patterns.attrs.get("heads")
    among = (
        f" of {counted(known, 'head')} whose patterns were recorded" if known else " heads"
    )  # earlier results have none
    return head_attention(
        patterns.to_numpy(),
        heads=[head_name(layer, head) for layer, head in heads],
        tokens=json.loads(patterns.attrs["tokens"]),
        title=f"Attention in {model_label(result)}",
        subtitle=f"{patterns.sizes['query']} of {counted(length, 'token')} of the first sequence; the menu has "
        f"{patterns.sizes['example']}{among}, those with the largest alpha",
    )


def _positions(result: Result) -> go.Figure:
    data, settings = result.data, result.provenance["settings"]
    ends, where = recorded_ends(data, "sink_k"), "bars"
    known = {} if ends is None else dict(enumerate(zip(*(end.tolist() for end in ends), strict=True)))
    if ends is None and "sink_low" in data:  # results of earlier versions
        known, where = {settings["sink"]: (float(data["sink_low"]), float(data["sink_high"]))}, "at the sink"
    return position_bars(
        data["sink_k"].to_numpy(),
        reliable=data["reliable"].to_numpy() == 1,
        names=("sink", f"seen by fewer than {settings['min_visible']} queries: unreliable"),
        title=f"Share of sinks by position in {model_label(result)}",
        subtitle=f"share of (sequence, layer, head) with alpha above {settings['epsilon']:g}; "
        f"{counted(data['sequences'], 'sequence')}" + f"; {where}: 95 % interval over documents" * bool(known),
        unit=axis_title(data["sink_k"].attrs),
        ends=known or None,
    )


def _norms(result: Result) -> go.Figure:
    data = result.data
    known = data.sel(layer=data["residual_norm_ratio"].dropna("layer")["layer"])
    bands = [
        Band(name, known[curve.name].to_numpy(), recorded_ends(known, str(curve.name)), colour)
        for (name, curve), colour in zip(_norm_curves(result).items(), CATEGORIES, strict=False)
    ]
    figure = layer_bands(
        bands,
        layers=known["layer"].to_numpy().tolist(),
        title=f"Residual norm of the sink in {model_label(result)}",
        subtitle=counted(data["sequences"], "sequence") + "; bands: 95 % CI over documents" * bool(bands[0].ends),
        unit=axis_title(data["residual_norm_sink"].attrs),
    )
    return figure.update_yaxes(**log_axis(*(np.asarray(band.values) for band in bands)))


def _by_domain(result: Result) -> go.Figure:
    data, sink = result.data, result.provenance["settings"]["sink"]
    heads = result.table.nlargest(_HEADS_SHOWN, "gap")
    # one point for each head, not their product
    at = {axis: xr.DataArray(heads[axis].to_numpy(), dims="shown") for axis in ("layer", "head")}
    parts = [data[name].sel(at).to_numpy() for name in ("attention", "attention_low", "attention_high")]
    numbers = zip(data["domain"].to_numpy().tolist(), data["documents"].to_numpy().tolist(), strict=True)
    names = [f"{label(name)} ({counted(number, 'document')})" for name, number in numbers]
    epsilon = result.provenance["settings"]["epsilon"]
    low, high = data["attention_low"] > epsilon, data["attention_high"] < epsilon
    switching, compared = int((low.any("domain") & high.any("domain")).sum()), int(data["gap"].notnull().sum())
    counts = f"{switching:,} of {counted(compared, 'head')}"
    title = f"Active in one domain, dormant in another: {counts}" if switching else "Attention by domain"
    figure = group_intervals(
        dict(zip(names, np.stack(parts, 1), strict=True)),
        categories=[head_name(layer, head) for layer, head in zip(heads["layer"], heads["head"], strict=True)],
        hover="%{x}",
        title=f"{title}, {model_label(result)}",
        subtitle=f"attention of later tokens to position {sink}; 95 % intervals over documents; "
        f"dormant: above {epsilon:g}, active: below",
    )
    figure.update_xaxes(title=f"{counted(len(heads), 'head')} with the largest gaps")
    return figure.update_yaxes(title=axis_title(data["attention"].attrs) + " to the sink")
