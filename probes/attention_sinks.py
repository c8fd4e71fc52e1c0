"""Attention sinks: heads that put most of their attention on one token whatever the text (Gu et al. 2024).

    alpha_k = 1/(T - k) sum_{q >= k} A[q, k]            mean over the queries that can see key k, itself included
    Sink_k  = share of (sequence, layer, head) with alpha_k > epsilon

with positions k from 0 (the papers count from 1: their Sink_1 is position 0). The threshold comes before the mean. With
it: how the sink token differs in value and residual norm (Guo et al. 2024), massive activations (Sun et al. 2024), an
entropy detector of sink heads, and by how much the attention a head pays to the sink depends on the domain of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Float, Int

from workbench.probing import (
    CATEGORIES,
    NEUTRAL,
    TEMPLATE,
    Columns,
    Model,
    RequestError,
    Result,
    Store,
    Variable,
    axis_title,
    clustered_means,
    dataset,
    head_attention,
    head_grid,
    head_name,
    intervals,
    label,
    layer_curves,
    nearest,
    provenance,
    row_entropy,
    with_interval,
    with_side_panel,
)

_BLOCK_BYTES = 64 << 20  # of one block of patterns in float64; a few such live at a time
_FEW = 10
_HEADS_SHOWN = 12
_EXAMPLE = 128  # tokens

_HEAD = ("layer", "head")
_LAYER = ("layer",)
_DOMAIN = ("domain", "layer", "head")
_EXAMPLE_AXES = ("example", "query", "key")
_UNIFORM = "0.074 for T = 64: H_T / T of a head that attends uniformly"
_VARIABLES: tuple[Variable, ...] = (
    Variable("alpha", (*_HEAD, "position"), "attention", "mean over sequences of the attention received", _UNIFORM),
    Variable("sink_share", _HEAD, "share of sequences", "sequences in which the position `sink` is a sink", "0"),
    Variable("row_entropy", _HEAD, "share of the largest entropy", "entropy of what a query attends to", "1"),
    Variable(
        "column_entropy", _HEAD, "share of the largest entropy", "largest entropy of the attention to one key", "1"
    ),
    Variable("detected", _HEAD, "share of sequences", "sequences in which the entropy detector takes the head", "0"),
    Variable("value_norm_sink", _HEAD, "L2 norm", "mean norm of the value vector of the sink"),
    Variable("value_norm_others", _HEAD, "L2 norm", "mean norm of the value vectors of the other tokens"),
    Variable("value_norm_ratio", _HEAD, "times the others' mean", "value_norm_sink / value_norm_others", "1"),
    Variable("residual_norm_sink", _LAYER, "L2 norm", "mean norm of the residual stream at the sink"),
    Variable("residual_norm_others", _LAYER, "L2 norm", "mean norm of the residual stream at the other tokens"),
    Variable("residual_norm_ratio", _LAYER, "times the others' mean", "residual_norm_sink / residual_norm_others", "1"),
    Variable("massive_top", _LAYER, "|h|", "largest activation of a sequence, mean over sequences"),
    Variable("massive_median", _LAYER, "|h|", "median activation of a sequence, mean over sequences"),
    Variable("massive_position", _LAYER, "position", "most frequent position of the largest activation"),
    Variable(
        "massive_dimension",
        _LAYER,
        "dimension of the residual stream",
        "most frequent dimension of the largest activation",
    ),
    Variable("massive_above_absolute", _LAYER, "share of sequences", "largest activation above massive_absolute", "0"),
    Variable(
        "massive_above_ratio", _LAYER, "share of sequences", "largest activation above massive_ratio x the median", "0"
    ),
    Variable("massive", _LAYER, "share of sequences", "largest activation above both thresholds", "0"),
    Variable(
        "sink_k",
        ("position",),
        "% of heads",
        "share of (sequence, layer, head) with alpha above epsilon, 0 to 100",
        "0",
    ),
    *with_interval(Variable("sink", (), "% of heads", "sink_k at the position `sink`", "0")),
    Variable(
        "reliable", ("position",), "1 = min_visible queries or more see it", "whether enough queries see the position"
    ),
    *with_interval(
        Variable("attention", _DOMAIN, "attention", "mean attention of later tokens to the sink, in the domain")
    ),
    *with_interval(
        Variable("gap", _HEAD, "attention", "attention in the most attending domain less that in the least attending")
    ),
    Variable("gap_most", _HEAD, "index of a domain", "domain that attends most to the sink"),
    Variable("gap_least", _HEAD, "index of a domain", "domain that attends least to the sink"),
    Variable("documents", ("domain",), "documents", "documents of the domain"),
    Variable("sequences", (), "sequences", "sequences that count"),
    Variable("short_sequences", (), "sequences", "sequences left out because they are shorter than `length`"),
    Variable("example_pattern", _EXAMPLE_AXES, "attention", "attention of single heads over the first sequence"),
    Variable("example_layer", ("example",), "layer", "layer of each example"),
    Variable("example_head", ("example",), "head", "head of each example"),
)

_OF_HEADS = ("alpha", "sink_share", "row_entropy", "column_entropy", "detected")
_DERIVED = {"alpha": "attn_received", "column": "attn_received_entropy", "row": "attn_entropy", "paid": "attn_first"}


@dataclass(frozen=True)
class AttentionSinks:
    """Which heads attend to one token whatever the text, how that token differs, and in which domains they do."""

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
        "value_norm_others": "value norm of the other tokens, beside which the sink's is small",
        "residual_norm_others": "residual norm of the other tokens, beside which the sink's is large",
    }

    epsilon: float = 0.3
    """A key is a sink of a head in a sequence if its alpha is more than this."""
    length: int = 64
    """Tokens of each sequence that count, from its first on; shorter sequences are left out."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    domain: str | None = None
    """Metadata column by whose values the attention to the sink is compared. None: it is not."""
    sink: int = 0
    """Position of the token whose norms, and attention received, are compared with the others'."""
    row_entropy: float = 0.5
    """The detector takes a head whose rows' entropy, as a share of the largest possible, is below this."""
    column_entropy: float = 0.9
    """And one of whose columns' entropy, as a share of the largest possible, is above this."""
    min_visible: int = 8
    """Keys that fewer queries see are not for the detector, and marked as unreliable in Sink_k."""
    massive_absolute: float = 100.0
    """A massive activation is larger than this."""
    massive_ratio: float = 1000.0
    """And larger than this many times the median of its layer and sequence."""
    examples: int = 8
    """Heads, those with the largest alpha, whose attention over the first sequence is kept; 0: none."""
    resamples: int = 1000
    """Draws of documents for the intervals of the metric and of the comparison of domains."""
    seed: int = 0
    """Of these draws."""

    def __post_init__(self) -> None:
        for name, least in (("length", 3), ("min_visible", 2), ("resamples", 1), ("seed", 0), ("examples", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("epsilon", "row_entropy", "column_entropy"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        for name in ("massive_absolute", "massive_ratio"):
            if not getattr(self, name) >= 0:
                raise RequestError(f"{name} must not be negative, but is {getattr(self, name)}")
        if not 0 <= self.sink <= self.length - 2:
            raise RequestError(f"sink must be from 0 to {self.length - 2}, before the last of {self.length} tokens")
        if self.min_visible > self.length:
            raise RequestError(
                f"min_visible is {self.min_visible} and no key is seen by more than {self.length} tokens"
            )

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `pattern` (and `v`, `resid_post`), or what was derived from them while recording.

        Where attention is recorded both ways, the one with more layers is read, `pattern` if equal. What was not
        recorded is left out and named in `data.attrs["note"]`. Costs one pass over the sites; memory is some blocks of
        64 MiB and a few numbers for each sequence and head of a layer, with `domain` of all layers. Raises RequestError
        where no attention was recorded, no sequence is long enough, or derived attention was summed over longer
        sequences than `length`.
        """
        source, layers = _source(store)
        if self.domain is not None and source == "derived":
            if self.sink != 0:
                raise RequestError(
                    f"sink {self.sink}: attn_first knows what is paid to position 0 only; for domains record pattern"
                )
            store.require(*(f"attn_first.{layer}" for layer in layers))
        sequences = _sequences(self, store, source)
        found = {layer: _attention(self, store, source, layer, sequences) for layer in layers}
        norms = {layer: _value_norms(self, store, layer, sequences) for layer in _layers(store, "v", "v_norm")}
        residual = {
            layer: _residual(self, store, layer, sequences) for layer in _layers(store, "resid_post", "resid_norm")
        }
        every = sorted({*layers, *residual})
        arrays = _over_heads(every, found)
        arrays |= _value_ratio(every, found, norms)
        arrays |= _over_layers(every, residual)
        heads_seen = len(sequences) * sum(len(part["sink_share"]) for part in found.values())
        arrays["sink_k"] = 100 * sum(part["above"] for part in found.values()) / heads_seen
        arrays |= _sink_interval(self, found, sequences)
        arrays["reliable"] = (self.length - np.arange(self.length) >= self.min_visible).astype(np.int8)
        if self.domain is not None:
            paid = {layer: part["paid"] for layer, part in found.items()}
            arrays |= _domains(self, every, arrays["sink_share"].shape[1], paid, sequences)
        data = _dataset(arrays, every, self, sequences)
        data = data.assign(_examples(self, store, data["alpha"], sequences).variables)
        data.attrs = {"source": source, **_remarks(self, data, sequences)}
        return Result(self.name, data, _table(data, self.sink), provenance(store, self))

    @staticmethod
    def headline(result: Result) -> str:
        """The metric, the head that attends most to the sink, and how the sink's norms differ there."""
        settings, data, best = result.provenance["settings"], result.data, result.table.nlargest(1, "alpha").iloc[0]
        sink = settings["sink"]
        told = [
            f"Sink_{sink + 1} = {float(data['sink_k'][sink]):.1f} % of heads (epsilon {settings['epsilon']:g}, "
            f"T {settings['length']}, {_counted(int(data['sequences']))})",
            f"strongest {int(best['layer'])}.{int(best['head'])} ({best['alpha']:.2f})",
        ]
        norms = []
        if not np.isnan(best.get("value_norm_ratio", np.nan)):
            norms.append(f"value norm there {best['value_norm_ratio']:.2f}")
        if "residual_norm_ratio" in data:
            ratio = data["residual_norm_ratio"].dropna("layer")
            most = ratio[int(np.argmax(ratio.to_numpy()))]
            norms.append(f"residual norm {float(most):.1f} times the others' at layer {int(most['layer'])}")
        return "; ".join([*told, *([", ".join(norms)] if norms else []), *filter(None, [data.attrs["few"]])])

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """ "sinks": layers by heads, coloured by alpha of the sink, with residual norms beside; "positions": Sink_k;
        where they were recorded, "norms": residual norms by layer, "domains": attention to the sink in each domain, for
        the heads with the largest gaps, and "attention": of single heads, over a text."""
        figures = {"sinks": _sinks(result), "positions": _positions(result)}
        if "residual_norm_ratio" in result.data:
            figures["norms"] = _norms(result)
        if result.data.sizes.get("domain", 0) > 1:
            figures["domains"] = _by_domain(result)
        if "example_pattern" in result.data:
            figures["attention"] = _over_text(result)
        return figures


# ---- which sites, which tokens --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequences:
    """The first rows of the sequences that count, and what is known about each."""

    starts: Int[np.ndarray, " sequence"]
    document: Int[np.ndarray, " sequence"]
    domain: Int[np.ndarray, " sequence"]
    """Index into `domains`; -1 for none, or several."""
    domains: tuple[str, ...]
    length: int
    short: int
    """How many were left out because they are shorter."""

    def __len__(self) -> int:
        return len(self.starts)

    def blocks(self, row_values: int) -> Iterator[tuple[slice, Int[np.ndarray, "sequence position"]]]:
        """Row ids, some sequences at a time, where a row has so many values."""
        step = max(1, _BLOCK_BYTES // (8 * row_values * self.length))
        for first in range(0, len(self), step):
            part = slice(first, min(first + step, len(self)))
            yield part, self.starts[part, None] + np.arange(self.length)


def _layers(store: Store, *kinds: str) -> list[int]:
    """Layers in which a site of any of these kinds was recorded."""
    labels = [(site.short or "").split(".") for site in store.sites]
    return sorted({int(parts[1]) for parts in labels if parts[0] in kinds})


def _source(store: Store) -> tuple[str, list[int]]:
    """Where attention is read from, and its layers."""
    found = {"pattern": _layers(store, "pattern"), "derived": _layers(store, "attn_received")}
    source = max(found, key=lambda name: len(found[name]))
    if not found[source]:
        store.require("attn_received.0")
    return source, found[source]


def _sequences(probe: AttentionSinks, store: Store, source: str) -> _Sequences:
    tokens = store.tokens
    starts = np.flatnonzero(np.diff(tokens["sequence"].to_numpy(), prepend=-1))
    lengths = np.diff(starts, append=store.rows)
    if probe.where is not None:
        chosen = np.isin(starts, store.where(probe.where).ids)
        if not chosen.any():
            raise RequestError(
                f"where {probe.where!r} holds for the first token of none of {len(starts):,} sequences, "
                "and the first token is what selects a sequence"
            )
        starts, lengths = starts[chosen], lengths[chosen]
    longest = lengths.max(initial=0)
    if longest < probe.length:
        raise RequestError(
            f"length {probe.length}: no sequence has as many tokens, the longest of {len(starts):,} has {longest}; "
            "give a smaller length, or record longer texts"
        )
    if source == "derived" and longest > probe.length:
        raise RequestError(
            f"length {probe.length}: attn_received was summed over whole sequences, of up to {longest} tokens; "
            f"record with --context {probe.length}, or record pattern, or give length {longest}"
        )
    long = lengths >= probe.length
    domain, domains = np.full(int(long.sum()), -1), ()
    if probe.domain is not None:
        domain, domains = _domain_of(probe, tokens, starts[long])
    document = tokens["document"].to_numpy()[starts[long]]
    return _Sequences(starts[long], document, domain, domains, probe.length, int((~long).sum()))


def _domain_of(probe: AttentionSinks, tokens: Any, starts: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Of each sequence the domain that all its tokens have, else -1; and the domains' names."""
    if probe.domain not in tokens.column_names:
        raise RequestError(
            f"domain {probe.domain!r} is no column of the token table{nearest(probe.domain, tokens.column_names)}; "
            f"columns: {', '.join(tokens.column_names)}"
        )
    values = pd.Series(tokens[probe.domain].to_pylist(), dtype=object)
    codes, names = pd.factorize(values.map(str, na_action="ignore"), sort=True)
    inside = codes[starts[:, None] + np.arange(probe.length)]
    domain = np.where((inside == inside[:, :1]).all(1), inside[:, 0], -1)
    present = np.unique(domain[domain >= 0])
    if not len(present):
        raise RequestError(f"domain {probe.domain!r} has no value that all tokens of a sequence share")
    renumbered = np.full(len(names) + 1, -1)  # the last one is for -1
    renumbered[present] = np.arange(len(present))
    return renumbered[domain], tuple(names[present])


# ---- what is read of a layer ----------------------------------------------------------------------------


def _attention(
    probe: AttentionSinks, store: Store, source: str, layer: int, sequences: _Sequences
) -> dict[str, np.ndarray]:
    """Of one layer: means over sequences for each head; "above", how often each position is a sink; "sinks", how many
    heads have `sink` as one [sequence]; and for domains "paid", the attention to it [sequence, head]. What was not
    recorded is missing."""
    length, parts = probe.length, []
    kind = "pattern" if source == "pattern" else "attn_received"
    for _, rows in sequences.blocks(int(np.prod(store[kind, layer].shape[1:]))):
        read = _read_pattern if source == "pattern" else _read_derived
        seen = read(store, layer, rows, probe.sink)
        alpha = seen["alpha"]  # [sequence, position, head], as everything in `seen`
        part = {
            "alpha": rearrange(alpha, "sequence position head -> sequence head position").sum(0),
            "above": (alpha > probe.epsilon).sum((0, 2)),
            "sink_share": (alpha[:, probe.sink] > probe.epsilon).sum(0),
            "sinks": (alpha[:, probe.sink] > probe.epsilon).sum(1),
        }
        if "row" in seen:  # the first query sees one key: no entropy
            part["row"] = (seen["row"][:, 1:] / np.log(np.arange(2, length + 1))[:, None]).sum(1) / length
        if "column" in seen:
            queries = length - np.arange(length - probe.min_visible + 1)
            part["column"] = (seen["column"][:, : len(queries)] / np.log(queries)[:, None]).max(1)
        if "paid" in seen and probe.domain is not None:
            part["paid"] = seen["paid"][:, probe.sink + 1 :].mean(1)
        parts.append(part)
    total = {name: sum(part[name] for part in parts) for name in ("alpha", "above", "sink_share")}
    each = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name not in total}
    found = {name: total[name] / len(sequences) for name in ("alpha", "sink_share")}
    found |= {f"{name}_entropy": each[name].mean(0) for name in ("row", "column") if name in each}
    if {"row", "column"} <= each.keys():
        taken = (each["row"] < probe.row_entropy) & (each["column"] > probe.column_entropy)
        found["detected"] = taken.mean(0)
    return (
        found | {"above": total["above"], "sinks": each["sinks"]} | ({"paid": each["paid"]} if "paid" in each else {})
    )


def _sink_interval(
    probe: AttentionSinks, found: Mapping[int, Mapping[str, np.ndarray]], sequences: _Sequences
) -> dict[str, np.ndarray]:
    """Sink_k of the position `sink`, and its interval: a bootstrap over documents, NaN where there is one alone."""
    heads = sum(len(part["sink_share"]) for part in found.values())
    share = 100 * sum(part["sinks"] for part in found.values())[:, None] / heads
    mean, drawn = clustered_means(share, sequences.document, resamples=probe.resamples, seed=probe.seed)
    alone = len(np.unique(sequences.document)) < 2
    low, high = np.full(2, np.nan) if alone else intervals(drawn)[:, 0]
    return {"sink": np.asarray(mean[0]), "sink_low": np.asarray(low), "sink_high": np.asarray(high)}


def _read_pattern(store: Store, layer: int, rows: np.ndarray, sink: int) -> dict[str, np.ndarray]:
    """[sequence, position, head] in float64: of keys alpha and column entropy, of queries row entropy and payment."""
    pattern = store["pattern", layer][rows][..., : rows.shape[1]].double()
    block = rearrange(pattern, "sequence query head key -> sequence head query key")
    columns = Columns(torch.ones(rows.shape))
    columns.add(0, block)
    seen = {"alpha": columns.received(), "column": columns.entropy(), "row": row_entropy(block)}
    return {name: part.numpy() for name, part in {**seen, "paid": pattern[..., sink]}.items()}


def _read_derived(store: Store, layer: int, rows: np.ndarray, sink: int) -> dict[str, np.ndarray]:
    """The same from what the recording derived; "paid" is known of position 0 only."""
    kinds = {part: kind for part, kind in _DERIVED.items() if layer in _layers(store, kind)}
    if sink:
        kinds.pop("paid", None)
    return {part: store[kind, layer][rows].double().numpy() for part, kind in kinds.items()}


def _value_norms(probe: AttentionSinks, store: Store, layer: int, sequences: _Sequences) -> np.ndarray:
    """[sink or others, head]: mean L2 norm of value vectors; heads are those of the values where `v` is read."""
    kind = "v_norm" if layer in _layers(store, "v_norm") else "v"
    array = store[kind, layer]
    sums = [
        _sink_and_others(_norm(array[rows].double().numpy(), kind == "v"), probe.sink)
        for _, rows in sequences.blocks(int(np.prod(array.shape[1:])))
    ]
    return sum(sums) / len(sequences)


def _residual(probe: AttentionSinks, store: Store, layer: int, sequences: _Sequences) -> dict[str, float]:
    """Mean norms of the sink and of the others and, from resid_post itself, massive activations."""
    kind = "resid_post" if layer in _layers(store, "resid_post") else "resid_norm"
    array, sums, tops = store[kind, layer], [], []
    for _, rows in sequences.blocks(int(np.prod(array.shape[1:]))):
        hidden = array[rows].double().numpy()
        sums.append(_sink_and_others(_norm(hidden, kind == "resid_post"), probe.sink))
        if kind == "resid_post":
            tops += [massive_activation(matrix.reshape(len(matrix), -1)) for matrix in hidden]
    sink, others = (float(norm) for norm in (sum(sums) / len(sequences)).reshape(2, -1).mean(1))
    found = {"residual_norm_sink": sink, "residual_norm_others": others, "residual_norm_ratio": _ratio(sink, others)}
    if not tops:
        return found
    top, median, position, dimension = (np.array(part) for part in zip(*tops, strict=True))
    large, rare = top > probe.massive_absolute, top > probe.massive_ratio * median
    return found | {
        "massive_top": top.mean(),
        "massive_median": median.mean(),
        "massive_position": float(np.bincount(position).argmax()),
        "massive_dimension": float(np.bincount(dimension).argmax()),
        "massive_above_absolute": large.mean(),
        "massive_above_ratio": rare.mean(),
        "massive": (large & rare).mean(),
    }


def massive_activation(hidden: Float[np.ndarray, "position d_model"]) -> tuple[float, float, int, int]:
    """Of one sequence's residual stream: the largest |h|, the median |h|, and position and dimension of the largest."""
    size = np.abs(hidden)
    position, dimension = np.unravel_index(int(size.argmax()), size.shape)
    return float(size.max()), float(np.median(size)), int(position), int(dimension)


def _norm(x: np.ndarray, vectors: bool) -> np.ndarray:
    return np.linalg.norm(x, axis=-1) if vectors else x


def _sink_and_others(norms: Float[np.ndarray, "sequence position *head"], sink: int) -> np.ndarray:
    """[sink or others, *head]: summed over sequences, the others their mean in each."""
    return np.stack([norms[:, sink].sum(0), np.delete(norms, sink, axis=1).mean(1).sum(0)])


def _ratio(sink: Any, others: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):  # all of them 0: no ratio
        return np.divide(sink, others)


# ---- domains --------------------------------------------------------------------------------------------


def _domains(
    probe: AttentionSinks, layers: Sequence[int], n_heads: int, paid: Mapping[int, np.ndarray], sequences: _Sequences
) -> dict[str, np.ndarray]:
    """Attention to the sink in each domain, and the gap between the most and the least attending one."""
    n = len(sequences.domains)
    documents = np.array([len(np.unique(sequences.document[sequences.domain == d])) for d in range(n)])
    shape = (n, len(layers), n_heads)
    arrays = {name: np.full(shape, np.nan) for name in ("attention", "attention_low", "attention_high")}
    arrays |= {name: np.full(shape[1:], np.nan) for name in ("gap", "gap_low", "gap_high", "gap_most", "gap_least")}
    for layer, values in paid.items():
        heads = values.shape[1]
        at = (layers.index(layer), slice(heads))
        split = np.where(sequences.domain[:, None, None] == np.arange(n)[:, None], values[:, None], np.nan)
        mean, drawn = clustered_means(
            split.reshape(len(values), -1), sequences.document, resamples=probe.resamples, seed=probe.seed
        )
        mean, drawn = mean.reshape(n, heads), drawn.reshape(-1, n, heads)
        drawn[:, documents < 2] = np.nan  # of one document every draw is the same: no interval
        arrays["attention"][:, *at] = mean
        arrays["attention_low"][:, *at], arrays["attention_high"][:, *at] = intervals(drawn)
        if n < 2:
            continue
        most, least, head = mean.argmax(0), mean.argmin(0), np.arange(heads)
        arrays["gap"][at] = mean[most, head] - mean[least, head]
        gaps = drawn[:, most, head] - drawn[:, least, head]
        arrays["gap_low"][at], arrays["gap_high"][at] = intervals(gaps)
        arrays["gap_most"][at], arrays["gap_least"][at] = most, least
    return arrays | {"documents": documents}


# ---- the result -----------------------------------------------------------------------------------------


def _examples(probe: AttentionSinks, store: Store, alpha: xr.DataArray, sequences: _Sequences) -> xr.Dataset:
    """Attention over the first sequence that counts, of the heads with the largest alpha among those recorded whole."""
    at_sink = alpha.isel(position=probe.sink).to_numpy()
    recorded = set(_layers(store, "pattern"))
    ranked = [np.unravel_index(i, at_sink.shape) for i in np.argsort(-at_sink, axis=None, kind="stable")]  # NaN last
    layers = alpha["layer"].to_numpy()
    chosen = [(int(layers[i]), int(head)) for i, head in ranked if not np.isnan(at_sink[i, head])]
    chosen = [place for place in chosen if place[0] in recorded][: probe.examples]
    if not chosen:
        return xr.Dataset()
    rows = sequences.starts[0] + np.arange(min(sequences.length, _EXAMPLE))
    patterns = [store["pattern", layer][rows][:, head, : len(rows)].float().numpy() for layer, head in chosen]
    tokens = store.tokens["token"].take(rows).to_pylist()
    layer, head = np.array(chosen).T
    arrays = {"example_pattern": np.stack(patterns), "example_layer": layer, "example_head": head}
    examples = dataset(_VARIABLES, arrays)
    # as JSON: a token may hold characters that netCDF does not
    examples["example_pattern"].attrs["tokens"] = json.dumps(tokens)
    return examples


def _over_heads(layers: Sequence[int], found: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """[layer, head, ...], NaN where a layer was not recorded or has fewer heads."""
    names = [name for name in _OF_HEADS if any(name in part for part in found.values())]
    n_heads = max(len(part["sink_share"]) for part in found.values())
    arrays = {}
    for name in names:
        rest = next(part[name].shape[1:] for part in found.values() if name in part)
        arrays[name] = np.full((len(layers), n_heads, *rest), np.nan)
        for layer, part in found.items():
            if name in part:
                arrays[name][layers.index(layer), : len(part[name])] = part[name]
    return arrays


def _value_ratio(
    layers: Sequence[int], found: Mapping[int, Mapping[str, np.ndarray]], norms: Mapping[int, np.ndarray]
) -> dict[str, np.ndarray]:
    """Value norms for each query head, of which several read one value where keys are shared."""
    heads = {layer: len(part["sink_share"]) for layer, part in found.items()}
    sink, others = np.full((2, len(layers), max(heads.values())), np.nan)
    for layer in norms.keys() & heads:
        spread = np.repeat(norms[layer], heads[layer] // norms[layer].shape[1], axis=1)
        at = (layers.index(layer), slice(heads[layer]))
        sink[at], others[at] = spread
    if np.isnan(sink).all():
        return {}
    return {"value_norm_sink": sink, "value_norm_others": others, "value_norm_ratio": _ratio(sink, others)}


def _over_layers(layers: Sequence[int], found: Mapping[int, Mapping[str, float]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for part in found.values() for name in part)
    return {name: np.array([found.get(layer, {}).get(name, np.nan) for layer in layers]) for name in names}


def _dataset(
    arrays: Mapping[str, np.ndarray], layers: Sequence[int], probe: AttentionSinks, sequences: _Sequences
) -> xr.Dataset:
    counts = {"sequences": len(sequences), "short_sequences": sequences.short}
    coords = {"layer": list(layers), "head": np.arange(arrays["sink_share"].shape[1])}
    coords["position"] = np.arange(probe.length)
    if sequences.domains:
        coords["domain"] = list(sequences.domains)
    return dataset(_VARIABLES, {**arrays, **counts}, coords)


def _remarks(probe: AttentionSinks, data: xr.Dataset, sequences: _Sequences) -> dict[str, str]:
    """ "note": what is not there, and why; "few": what rests on little."""
    needs = {
        "row_entropy": "attn_entropy",
        "column_entropy": "attn_received_entropy",
        "value_norm_ratio": "v or v_norm",
        "residual_norm_ratio": "resid_post or resid_norm",
        "massive": "resid_post",
    }
    notes = [f"no {name}: {kind} is not recorded" for name, kind in needs.items() if name not in data]
    notes += [
        f"{name} is NaN at layers {', '.join(map(str, missing))}: {kind} is not recorded there"
        for name, kind in needs.items()
        if name in data and len(missing := _missing_layers(data[name]))
    ]
    if sequences.short:
        notes.append(f"{_counted(sequences.short)} of fewer than {probe.length} tokens left out")
    few = [f"only {_counted(len(sequences))}"] if len(sequences) < _FEW else []
    if probe.domain is not None:
        if mixed := int((sequences.domain < 0).sum()):
            notes.append(f"{_counted(mixed)} of no one {probe.domain} left out of that comparison")
        if len(sequences.domains) < 2:
            notes.append(f"no gap: all sequences are of one {probe.domain}")
        if short := int((data["documents"] < _FEW).sum()):
            few.append(f"fewer than {_FEW} documents in {short} of {len(sequences.domains)} domains")
    return {"note": "; ".join([*notes, *few]), "few": "; ".join(few)}


def _counted(sequences: int) -> str:
    return f"{sequences:,} sequence{'s' * (sequences != 1)}"


def _missing_layers(array: xr.DataArray) -> list[int]:
    known = array.notnull()
    return array["layer"].to_numpy()[~(known.any("head") if "head" in array.dims else known).to_numpy()].tolist()


def _table(data: xr.Dataset, sink: int) -> pd.DataFrame:
    """One line for each layer and head, those that are sinks in most sequences first."""
    names = ["sink_share", "row_entropy", "column_entropy", "detected", "value_norm_sink", "value_norm_others"]
    names += ["value_norm_ratio", "gap", "gap_low", "gap_high"]
    alpha = data["alpha"].to_numpy()
    layer, head = (axis.ravel() for axis in np.meshgrid(data["layer"], data["head"], indexing="ij"))
    columns = {"layer": layer, "head": head, "alpha": alpha[..., sink].ravel()}
    reliable = np.where(data["reliable"].to_numpy() == 1, np.nan_to_num(alpha, nan=-1.0), -1.0)
    columns |= {"peak_position": reliable.argmax(-1).ravel(), "peak_alpha": reliable.max(-1).ravel()}
    columns |= {name: data[name].to_numpy().ravel() for name in names if name in data}
    if "domain" in data.sizes:
        domains = data["domain"].to_numpy().astype(object)
        columns |= {f"attention_{name}": data["attention"].to_numpy()[i].ravel() for i, name in enumerate(domains)}
        for name in ("gap_most", "gap_least"):
            index = data[name].to_numpy().ravel()
            columns[name] = np.where(np.isnan(index), "", domains[np.nan_to_num(index).astype(int)])
    table = pd.DataFrame(columns)
    return table[table["alpha"].notna()].sort_values(
        ["sink_share", "alpha"], ascending=False, kind="stable", ignore_index=True
    )


# ---- figures --------------------------------------------------------------------------------------------


def _sinks(result: Result) -> go.Figure:
    settings, data = result.provenance["settings"], result.data
    sink = settings["sink"]
    alpha = data["alpha"].isel(position=sink)
    alpha = alpha.sel(layer=alpha["layer"][alpha.notnull().any("head").to_numpy()])
    lines = {(row["layer"], row["head"]): _hover(row) for row in result.table.to_dict("records")}
    layers = alpha["layer"].to_numpy().tolist()
    figure = head_grid(
        alpha.to_numpy(),
        hover=[[lines.get((layer, head), "") for head in range(alpha.sizes["head"])] for layer in layers],
        layers=layers,
        title=f"Attention sinks of {_model(result)}: Sink_{sink + 1} = {float(data['sink_k'][sink]):.1f} %",
        subtitle=f"mean attention that position {sink} receives from itself and later tokens; "
        f"epsilon {settings['epsilon']:g}, T {settings['length']}, {int(data['sequences']):,} sequences",
        unit=axis_title(data["alpha"].attrs, "alpha"),
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
    length, known = result.provenance["settings"]["length"], int(data["alpha"].isel(position=0).notnull().sum())
    return head_attention(
        patterns.to_numpy(),
        heads=[head_name(layer, head) for layer, head in heads],
        tokens=json.loads(patterns.attrs["tokens"]),
        title=f"Attention in {_model(result)}",
        subtitle=f"{patterns.sizes['query']} of {length:,} tokens of the first sequence; the menu has "
        f"{patterns.sizes['example']} of {known:,} heads, those with the largest alpha",
    )


def _hover(row: Mapping[str, Any]) -> str:
    told = {
        "alpha": "alpha",
        "sink_share": "share of sequences in which it is a sink",
        "row_entropy": "row entropy",
        "column_entropy": "column entropy",
        "detected": "share of sequences in which it is detected",
        "value_norm_ratio": "value norm, times the others'",
        "gap": "gap between domains",
    }
    lines = [f"{shown}: {row[name]:.3g}" for name, shown in told.items() if not np.isnan(row.get(name, np.nan))]
    return "<br>".join([f"<b>{head_name(row['layer'], row['head'])}</b>", *lines])


def _positions(result: Result) -> go.Figure:
    data, settings = result.data, result.provenance["settings"]
    sink_k, reliable = data["sink_k"].to_numpy(), data["reliable"].to_numpy() == 1
    figure = go.Figure(
        [
            go.Bar(
                x=data["position"].to_numpy()[chosen].tolist(),
                y=sink_k[chosen],
                name=name,
                marker={"color": color},
                hovertemplate="position %{x}: %{y:.2f} %",
            )
            for chosen, name, color in (
                (reliable, "sink", CATEGORIES[0]),
                (~reliable, f"seen by fewer than {settings['min_visible']} tokens: unreliable", NEUTRAL),
            )
        ]
    )
    title = f"Which positions are sinks in {_model(result)}"
    subtitle = f"share of (sequence, layer, head) with alpha over {settings['epsilon']:g}"
    figure.update_layout(
        template=TEMPLATE, title={"text": title, "subtitle": {"text": subtitle}}, height=420, width=760, showlegend=True
    )
    figure.update_xaxes(title="position, from 0")
    figure.update_yaxes(title=axis_title(data["sink_k"].attrs), rangemode="tozero")
    return figure


def _norms(result: Result) -> go.Figure:
    data = result.data
    known = data["residual_norm_ratio"].dropna("layer")["layer"]
    figure = layer_curves(
        {name: curve.sel(layer=known).to_numpy() for name, curve in _norm_curves(result).items()},
        layers=known.to_numpy().tolist(),
        title=f"Residual norm of the sink in {_model(result)}",
        unit=axis_title(data["residual_norm_sink"].attrs),
    )
    figure.update_yaxes(type="log", rangemode="normal", dtick="D2", tickformat="~r")
    return figure


def _by_domain(result: Result) -> go.Figure:
    data = result.data
    chosen = result.table.nlargest(_HEADS_SHOWN, "gap")
    names = [head_name(layer, head) for layer, head in zip(chosen["layer"], chosen["head"], strict=True)]
    at = {
        axis: xr.DataArray(chosen[axis].to_numpy(), dims="shown") for axis in ("layer", "head")
    }  # one point for each line, not their product
    figure = go.Figure()
    for index, name in enumerate(data["domain"].to_numpy().tolist()):
        mean, low, high = (
            data[part].isel(domain=index).sel(at).to_numpy()
            for part in ("attention", "attention_low", "attention_high")
        )
        figure.add_scatter(
            x=names,
            y=mean,
            error_y={"type": "data", "array": high - mean, "arrayminus": mean - low, "thickness": 1},
            name=f"{label(name)} ({int(data['documents'][index]):,} documents)",
            mode="markers",
            marker={"size": 8},
            hovertemplate="%{x}: %{y:.3f}",
        )
    sink = result.provenance["settings"]["sink"]
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Active in one domain, dormant in another: heads of {_model(result)}",
            "subtitle": {"text": f"attention of later tokens to position {sink}; 95 % intervals over documents"},
        },
        scattermode="group",
        height=460,
        width=960,
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
    )
    figure.update_xaxes(title="head, largest gaps first", type="category")
    figure.update_yaxes(title=axis_title(data["attention"].attrs) + " to the sink", rangemode="tozero")
    return figure


def _model(result: Result) -> str:
    return label(str(result.provenance["model"]), 60)
