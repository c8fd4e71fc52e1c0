"""Hidden sinks: positions other than the first that receive much attention, and which tokens stand there.

With alpha_k the mean attention that key k receives from the queries that see it, in one head and sequence of N tokens
(Yu et al. 2024): a position k > 0 is a hidden sink if alpha_k exceeds a threshold, 5 / N in the paper and 0.1 in its
code. Keys that few queries see are left out: a last key that only its own query attends to has alpha 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.probing import (
    LOST_VARIABLES,
    MONOSPACE,
    NEUTRAL,
    TOKEN_CLASSES,
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
    head_grid,
    head_name,
    interval_suffix,
    intervals,
    label,
    model_label,
    plain_torch,
    position_bars,
    read_alpha,
    received_sequences,
    require_causal,
    resampled_means,
    stack_heads,
    token_classes,
    with_interval,
    with_note,
)

RELATIVE, FIXED = 5.0, 0.1
"""Thresholds of the paper, times 1 / N, and of its code."""

_HEAD = ("layer", "head")
_SHOWN = 25
_VARIABLES: tuple[Variable, ...] = (
    *with_interval(Variable("heads_share", (), "share of heads", "heads with a hidden sink, mean over sequences", "0")),
    Variable("share", _HEAD, "share of sequences", "with a hidden sink of the head, by `threshold`", "0"),
    Variable("share_relative", _HEAD, "share of sequences", "the same with 5 / N, the paper's threshold", "0"),
    Variable("share_fixed", _HEAD, "share of sequences", "the same with 0.1, the threshold of the paper's code", "0"),
    Variable("share_late", _HEAD, "share of sequences", "with a detection that few queries see; these do not count"),
    Variable("mass", _HEAD, "attention", "mean attention received by a hidden sink, where there is one"),
    *with_interval(
        Variable("position_share", ("position",), "share", "(sequence, head) with a hidden sink there", "0")
    ),
    Variable("reliable", ("position",), "1 = reliable", "min_visible queries or more see the position"),
    Variable("class_share", ("class",), "share of detections", "hidden sinks on tokens of the class", "class_tokens"),
    Variable("class_tokens", ("class",), "share of tokens", "tokens of the class among positions that can be detected"),
    Variable("class_rate", ("class",), "share", "(token, head) of the class that are hidden sinks"),
    *with_interval(
        Variable("token_rate", ("token",), "share", "(occurrence, head) of the token that are hidden sinks")
    ),
    Variable("token_detections", ("token",), "detections", "(occurrence, head) of the token that are hidden sinks"),
    Variable("uniform_positions", (), "positions", "positions at which a uniform head exceeds `threshold`", "0"),
    Variable("cutoff", (), "attention", "alpha above which a position counts", ""),
    Variable("sequences", (), "sequences", "sequences that count"),
    Variable("short_sequences", (), "sequences", "sequences left out because they are shorter than `length`"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class HiddenSinks(LayerProbe):
    """Measures which heads attend much to a position other than the first, and which tokens stand there."""

    name: ClassVar[str] = "hidden-sinks"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Yu et al. 2024, Unveiling and harnessing hidden attention sinks, arXiv 2406.15765",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "uniform_positions": "positions at which a uniform head exceeds the threshold, which is too low then",
        "class_tokens": "share of tokens of each class: the share of detections if tokens did not matter",
        "share_late": "detections that few queries see, which are left out",
        "random weights": "the same architecture with random weights: no hidden sink",
    }

    threshold: str = "5/N"
    """Minimum alpha of a hidden sink, as text: "0.1", or "5/N", that times 1 / length."""
    length: int = 64
    """Tokens of each sequence that count, from its first on; shorter sequences are left out."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    min_visible: int = 8
    """Minimum number of queries that see a position; later ones do not count."""
    resamples: int = 1000
    """Resamples of documents for the interval."""
    seed: int = 0
    """Random seed of the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("length", self.length, at_least=3)
        check("min_visible", self.min_visible, at_least=1, at_most=self.length - 1)
        check_fields(self, "resamples", at_least=1)
        check_fields(self, "seed", at_least=0)
        _cutoff(self.threshold, self.length)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `attn_received`, or `pattern`. Costs one pass over it, in blocks of 64 MiB.

        Raises:
            RequestError: No attention was recorded, no sequence is long enough, derived attention was summed over
                longer sequences than `length`, values are NaN or infinite, or the model is not causal.
        """
        require_causal(store, self.name)
        source, layers = attention_source(store, self.layers)
        sequences = received_sequences(store, source, self.length, self.where)
        kind = "pattern" if source == "pattern" else "attn_received"
        rows = self.finite_rows(store, [f"{kind}.{layer}" for layer in layers], sequences.rows)
        sequences = sequences.without(rows.left_out)
        cutoff = _cutoff(self.threshold, self.length)
        counts = np.zeros((len(sequences), self.length), np.int64)
        with_sink, heads, number = np.zeros(len(sequences)), {}, 0
        for layer in layers:
            heads[layer], detections, having = _detect(self, store, source, layer, sequences, cutoff)
            counts, with_sink, number = counts + detections, with_sink + having, number + len(heads[layer]["share"])
        arrays: dict[str, Any] = stack_heads(
            layers, heads, [variable.name for variable in _VARIABLES if variable.dims == _HEAD]
        )
        interval = clustered_interval(with_sink / number, sequences.document, resamples=self.resamples, seed=self.seed)
        arrays |= dict(zip(("heads_share", "heads_share_low", "heads_share_high"), interval, strict=True))
        queries = self.length - np.arange(self.length)
        eligible = (np.arange(self.length) > 0) & (queries >= self.min_visible)
        arrays |= _by_position(self, counts / number, sequences) | {"reliable": eligible.astype(np.int8)}
        uniform = np.cumsum(1 / np.arange(self.length, 0, -1.0))[::-1] / queries
        arrays |= {"uniform_positions": int((uniform > cutoff)[eligible].sum()), "cutoff": cutoff}
        arrays |= {"sequences": len(sequences), "short_sequences": sequences.short}
        tokens, table = _tokens(self, store, sequences, counts, eligible, number)
        arrays = {name: np.asarray(value) for name, value in (arrays | tokens).items()}
        coords = {"layer": layers, "head": np.arange(arrays["share"].shape[1]), "position": np.arange(self.length)}
        coords |= {"class": list(TOKEN_CLASSES), "token": table["token_id"].to_numpy()[:_SHOWN]}
        data = dataset(_VARIABLES, arrays, coords)
        data["token_rate"].attrs["tokens"] = json.dumps(
            table["token"].tolist()[:_SHOWN]
        )  # JSON: a token holds anything
        return self.result(store, data, table, rows, [*_notes(self, data), self.note_layers(store)])

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the share of heads with a hidden sink, both thresholds' counts, and the most frequent tokens."""
        data, settings = result.data, result.provenance["settings"]
        share, low, high = (100 * float(data[f"heads_share{end}"]) for end in ("", "_low", "_high"))
        interval = interval_suffix(low, high, ".1f")
        known = data["share"].notnull()
        frequent = [int((data[name] >= 0.5).where(known, False).sum()) for name in ("share_relative", "share_fixed")]
        text = (
            f"{share:z.1f} % of heads have a hidden sink{interval} (alpha above {settings['threshold']} = "
            f"{float(data['cutoff']):.3g} at a position after the first, T {settings['length']}, "
            f"{counted(data['sequences'], 'sequence')}); in half of the sequences or more: {frequent[0]} of "
            f"{counted(int(known.sum()), 'head')} with 5/N, {frequent[1]} with 0.1"
        )
        table = result.table.loc[result.table["detections"] > 0]
        if len(table):
            lift = data["class_share"] / data["class_tokens"]
            name = str(data["class"][int(np.nanargmax(lift.where(data["class_tokens"] > 0.005).to_numpy()))].item())
            part, base = (100 * float(data[of].sel({"class": name})) for of in ("class_share", "class_tokens"))
            tokens = ", ".join(json.dumps(token, ensure_ascii=True)[:24] for token in table["token"].tolist()[:3])
            text += f"; {part:z.0f} % of detections are on {name} tokens, {base:z.0f} % of tokens; most on {tokens}"
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "heads", the share by layer and head; "tokens", the rate of the most detected; "positions"."""
        return {"heads": _heads(result), "tokens": _rates(result), "positions": _positions(result)}


def _cutoff(threshold: str, length: int) -> float:
    """Alpha above which a position counts. RequestError for a threshold that is neither a number nor number/N."""
    match = re.fullmatch(r"(\d*\.?\d+)(/N)?", str(threshold).replace(" ", ""))
    value = float(match[1]) / (length if match[2] else 1) if match else -1.0
    if not 0 < value < 1:
        raise RequestError(f"threshold must be a number between 0 and 1, or one such as 5/N, not {threshold!r}")
    return value


# ---- readings -------------------------------------------------------------------------------------------


def _detect(
    probe: HiddenSinks, store: Store, source: str, layer: int, sequences: Sequences, cutoff: float
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Shares of one layer's heads; heads that detect each position [sequence, position]; heads that detect any."""
    shape = store["pattern" if source == "pattern" else "attn_received", layer].shape[1:]
    last = probe.length - probe.min_visible + 1
    sums = {name: np.zeros(shape[0]) for name in ("share", "share_relative", "share_fixed", "share_late", "mass")}
    number, counts, having = np.zeros(shape[0]), [], []
    for rows in sequences.blocks(int(np.prod(shape))):
        alpha = read_alpha(store, source, layer, rows)  # [sequence, position, head]
        early, late = alpha[:, 1:last], alpha[:, max(last, 1) :]
        for name, level in (("share", cutoff), ("share_relative", RELATIVE / probe.length), ("share_fixed", FIXED)):
            sums[name] += (early > level).any(1).sum(0)
        sums["share_late"] += (late > cutoff).any(1).sum(0)
        sinks = early > cutoff
        sums["mass"] += np.where(sinks, early, 0).sum((0, 1))
        number += sinks.sum((0, 1))
        counts.append(np.pad(sinks.sum(2), ((0, 0), (1, probe.length - last))))
        having.append(sinks.any(1).sum(1))
    shares = {name: total / len(sequences) for name, total in sums.items()}
    shares["mass"] = np.divide(sums["mass"], number, out=np.full(shape[0], np.nan), where=number > 0)
    return shares, np.concatenate(counts), np.concatenate(having)


def _by_position(probe: HiddenSinks, share: np.ndarray, sequences: Sequences) -> dict[str, np.ndarray]:
    """Share of heads by position, mean over sequences [sequence, position], with its interval."""
    mean, resampled = clustered_means(share, sequences.document, resamples=probe.resamples, seed=probe.seed)
    low, high = intervals(resampled, len(np.unique(sequences.document)))
    return {"position_share": mean, "position_share_low": low, "position_share_high": high}


def _tokens(
    probe: HiddenSinks, store: Store, sequences: Sequences, counts: np.ndarray, eligible: np.ndarray, heads: int
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Rates by class and by token, and a line for each token, the most detected first."""
    rows = sequences.rows[:, eligible].ravel()
    sinks = counts[:, eligible].ravel()
    _, classes = token_classes(store, rows)
    size = np.bincount(classes, minlength=len(TOKEN_CLASSES))
    detected = np.bincount(classes, sinks, minlength=len(TOKEN_CLASSES))
    with np.errstate(invalid="ignore"):
        arrays = {
            "class_share": detected / detected.sum(),
            "class_tokens": size / size.sum(),
            "class_rate": detected / (size * heads),
        }
    ids, index = np.unique(store.tokens["token_id"].to_numpy()[rows], return_inverse=True)
    first = np.full(len(ids), len(rows))
    np.minimum.at(first, index, np.arange(len(rows)))
    occurrences, detections = np.bincount(index), np.bincount(index, sinks)
    table = pd.DataFrame(
        {
            "token_id": ids,
            "token": store.tokens["token"].take(rows[first]).to_pylist(),
            "class": [TOKEN_CLASSES[kind] for kind in classes[first]],
            "occurrences": occurrences,
            "detections": detections.astype(np.int64),
            "rate": detections / (occurrences * heads),
            "lift": np.divide(detections / occurrences, sinks.mean(), out=np.full(len(ids), np.nan), where=sinks.any()),
        }
    ).sort_values(["detections", "rate"], ascending=False, kind="stable", ignore_index=True)
    top = table.head(_SHOWN)
    arrays |= {"token_rate": top["rate"].to_numpy(), "token_detections": top["detections"].to_numpy()}
    document = np.repeat(sequences.document, eligible.sum())
    ends = _rate_ends(probe, top["token_id"].to_numpy(), ids[index], document, sinks / heads)
    return arrays | ends, table


def _rate_ends(
    probe: HiddenSinks, token_ids: np.ndarray, token: np.ndarray, document: np.ndarray, share: np.ndarray
) -> dict[str, np.ndarray]:
    """Ends of the interval of each shown token's rate over documents, from the share of heads at each occurrence."""
    row, at = np.nonzero(token[:, None] == token_ids)
    documents, cluster = np.unique(document[row], return_inverse=True)
    totals, counts = (np.zeros((len(documents), len(token_ids))) for _ in range(2))
    np.add.at(totals, (cluster, at), share[row])
    np.add.at(counts, (cluster, at), 1)
    _, resampled = resampled_means(totals, counts, resamples=probe.resamples, seed=probe.seed)
    low, high = intervals(resampled, (counts > 0).sum(0))
    return {"token_rate_low": low, "token_rate_high": high}


def _notes(probe: HiddenSinks, data: Any) -> list[str]:
    notes = []
    if number := int(data["uniform_positions"]):
        notes.append(
            f"the threshold is low: a head that attends uniformly has {number} hidden sinks of "
            f"{counted(int(data['reliable'].sum()), 'position')}; give a larger threshold, or a smaller length"
        )
    if short := int(data["short_sequences"]):
        notes.append(f"{counted(short, 'sequence')} of fewer than {probe.length} tokens left out")
    return notes


# ---- figures --------------------------------------------------------------------------------------------


def _heads(result: Result) -> go.Figure:
    data, settings = result.data, result.provenance["settings"]
    share, low, high = (100 * float(data[f"heads_share{end}"]) for end in ("", "_low", "_high"))
    names = ("share", "share_relative", "share_fixed", "share_late", "mass")
    layers, heads = data["layer"].to_numpy().tolist(), data["head"].to_numpy().tolist()

    values = {name: data[name].to_numpy() for name in names}

    def hover(row: int, head: int) -> str:
        lines = [f"{name}: {grid[row, head]:z.3f}" for name, grid in values.items()]
        return "<br>".join([f"<b>{head_name(layers[row], heads[head])}</b>", *lines])

    return head_grid(
        data["share"].to_numpy(),
        hover=[[hover(row, head) for head in range(len(heads))] for row in range(len(layers))],
        layers=layers,
        title=f"Hidden sinks in {model_label(result)}: {share:z.1f} % of heads{interval_suffix(low, high, '.1f')}",
        subtitle=f"share of {counted(data['sequences'], 'sequence')} in which a position after the first receives more "
        f"than {settings['threshold']} = {float(data['cutoff']):.3g} of the attention",
        unit=axis_title(data["share"].attrs),
        limits=colour_limits(data["share"].to_numpy()),
    )


def _rates(result: Result) -> go.Figure:
    data = result.data
    tokens = json.loads(data["token_rate"].attrs["tokens"])
    number, table = int(data["share"].notnull().sum()), result.table
    overall = table["detections"].sum() / (number * table["occurrences"].sum())
    nonzero = data["token_detections"].to_numpy() > 0
    detected = tokens[: int(nonzero.sum())]
    figure = ThemedFigure(
        go.Bar(
            x=100 * data["token_rate"].to_numpy()[nonzero],
            y=[f"{label(token)} ({number})" for number, token in enumerate(detected)],
            error_x=_bars(data, "token_rate", nonzero),
            customdata=data["token_detections"].to_numpy()[nonzero],
            orientation="h",
            hovertemplate="%{y}: %{x:.2f} % of occurrences and heads, %{customdata} detections<extra></extra>",
        )
    )
    figure.add_vline(x=100 * overall, line={"color": NEUTRAL, "dash": "dash"})
    title: dict[str, Any] = {"text": f"Tokens of hidden sinks in {model_label(result)}"}
    interval_note = "bars: 95 % interval over documents; " * ("token_rate_low" in data)
    title["subtitle"] = {"text": f"the most detected first, in brackets their rank; {interval_note}dashed: all tokens"}
    figure.update_layout(title=title, height=160 + 20 * int(nonzero.sum()), width=760)
    figure.update_xaxes(title="% of (occurrence, head) that are hidden sinks", rangemode="tozero")
    return figure.update_yaxes(type="category", autorange="reversed", tickfont={"family": MONOSPACE, "size": 11})


def _bars(data: Any, name: str, mask: np.ndarray) -> dict[str, Any] | None:
    """Error bars in percent; None for a result saved before there were intervals."""
    if f"{name}_low" not in data:
        return None
    return error_bars(*(100 * data[f"{name}{end}"].to_numpy()[mask] for end in ("", "_low", "_high")))


def _positions(result: Result) -> go.Figure:
    data, settings = result.data, result.provenance["settings"]
    reliable, ends = data["reliable"].to_numpy() == 1, {}
    if "position_share_low" in data:
        low, high = (100 * data[f"position_share_{end}"].to_numpy() for end in ("low", "high"))
        ends = {int(at): (low[at], high[at]) for at in np.flatnonzero(reliable)}
    figure = position_bars(
        100 * data["position_share"].to_numpy(),
        reliable=reliable,
        ends=ends,
        names=("hidden sink", f"first position, or seen by fewer than {settings['min_visible']} queries"),
        title=f"Hidden sinks by position in {model_label(result)}",
        subtitle=f"share of (sequence, head) with alpha above {float(data['cutoff']):.3g}"
        + "; bars: 95 % interval over documents" * bool(ends),
        unit="% of (sequence, head)",
    )
    bars: Any
    for bars in figure.data:  # no key for bars that are not drawn
        bars.update(showlegend=bool(np.nan_to_num(np.asarray(bars.y, float)).any()))
    return figure
