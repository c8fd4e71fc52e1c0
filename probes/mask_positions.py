"""Positions from the causal mask: how much of the scores depends on where query and key are, not on their distance.

With S_ij the mean score, before the softmax, of query i and key j over texts (Kim et al. 2025), and N_ij = S_ij less
the mean of its diagonal, which is all that depends on i - j,

    non-relative share = Cov(N, N') / Cov(S, S')        slope = that of N on j / i        over j < i

for the two halves S, S' of the documents, which have no noise of texts in common (share and slope are our choice; the
paper shows maps). A causal mask gives such a pattern without any weights: `simulated_share` is that of blocks without
parameters. Sinks are a column of high scores, so shares are given without them as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from plotly.subplots import make_subplots

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    SIGNED,
    Curve,
    LayerProbe,
    Model,
    Panel,
    Result,
    ScoreRule,
    Sequences,
    Store,
    ThemedFigure,
    Variable,
    attention_scores,
    check_fields,
    colour_bar,
    counted,
    dataset,
    label,
    layer_panels,
    non_relative,
    non_relative_share,
    plain_torch,
    recorded_rules,
    require_causal,
    select_sequences,
    simulated_scores,
    slope_of_keys,
    stack_heads,
    with_note,
    with_progress,
)

_LAYER, _HEAD = ("layer",), ("layer", "head")
_SHARE = "share of variance"
_SIMULATED = 4  # blocks
_LEAST = 16  # positions
_VARIABLES: tuple[Variable, ...] = (
    Variable("non_relative_share", _LAYER, _SHARE, "of the mean score of all heads, by halves of the documents", "0"),
    Variable("non_relative_share_no_sinks", _LAYER, _SHARE, "the same without key 0 and keys that are sinks", "0"),
    Variable("whole_share", _LAYER, _SHARE, "Var(N) / Var(S) of all documents together, noise of texts included"),
    Variable("slope", _LAYER, "score", "slope of N on j / i: how much higher late keys score", "0"),
    Variable("slope_no_sinks", _LAYER, "score", "the same without key 0 and keys that are sinks", "0"),
    Variable("head_share", _HEAD, _SHARE, "non_relative_share of each head", "0"),
    Variable("head_share_no_sinks", _HEAD, _SHARE, "the same without key 0 and the head's own sinks", "0"),
    Variable("head_slope_no_sinks", _HEAD, "score", "slope_no_sinks of each head", "0"),
    Variable("median_share_no_sinks", _LAYER, _SHARE, "median head: no head with large scores decides it", "0"),
    Variable("sinks", _HEAD, "keys", "keys after the first whose mean attention exceeds sink_threshold"),
    Variable("map", ("layer", "query", "key"), "score", "N of the mean score of all heads; NaN where there is none"),
    Variable("simulated_share", ("block",), _SHARE, "share of blocks without parameters under a causal mask"),
    Variable("simulated_correlation", _LAYER, "1", "Pearson, map without sinks and N of the second such block", "0"),
    Variable("sequences", (), "sequences", "sequences that scores are means over"),
    Variable("documents", (), "documents", "documents they are of"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class MaskPositions(LayerProbe):
    """Measures how much of the mean attention scores depends on positions beyond the distance of query and key."""

    name: ClassVar[str] = "mask-positions"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Kim et al. 2025, Behind RoPE: how does causal mask encode positional information?, arXiv 2509.21042",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "whole_share": "the same without halves: what noise of few texts adds",
        "simulated_share": "blocks without parameters: what the mask alone gives",
        "non_relative_share_no_sinks": "without sinks, whose column is non-relative by itself",
        "random weights": "the same architecture with random weights: what the mask gives at this depth",
    }

    length: int = 64
    """First tokens of each sequence that count; shorter sequences are left out. The paper has 1,024."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    sink_threshold: float = 0.3
    """Mean attention from which on a key is a sink, by head."""
    model: str | None = None
    """Folder or name of the recorded model, for a store that does not hold its attention's scales. None: its name."""
    seed: int = 0
    """Random seed of the halves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "length", at_least=_LEAST, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        check_fields(self, "sink_threshold", above=0, at_most=1)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads queries and keys, after rotation, once. Costs layers x sequences x heads x length^2 x d_head.

        Raises:
            RequestError: Queries and keys were not recorded, no sequence is long enough, values are NaN or infinite, or
                the model is not causal.
        """
        require_causal(store, self.name)
        rules = recorded_rules(store, model or self.model, self.layers)
        layers = list(rules)
        sequences = select_sequences(store, self.length, self.where)
        sites = [site for rule in rules.values() for site in (rule.queries, rule.keys)]
        rows = self.finite_rows(store, sites, sequences.rows)
        sequences = sequences.without(rows.left_out)
        half = self._halves(sequences)
        simulated = simulated_scores(self.length, _SIMULATED)
        below = np.tril(np.ones((self.length, self.length), bool), -1)
        heads, by_layer = {}, {}
        for layer, rule in with_progress(list(rules.items()), "mask positions", "layers"):
            place = np.arange(self.length)
            visible = below & rule.visible(place[:, None], place)
            scores, received = _mean_scores(store, rule, sequences, half)
            heads[layer], by_layer[layer] = _measures(
                scores, received, half, visible, simulated[1], self.sink_threshold
            )
        arrays: dict[str, Any] = stack_heads(
            layers, heads, [variable.name for variable in _VARIABLES if variable.dims == _HEAD]
        )
        arrays |= {name: np.stack([by_layer[layer][name] for layer in layers]) for name in by_layer[layers[0]]}
        known = arrays["head_share_no_sinks"]
        arrays["median_share_no_sinks"] = np.array([_median(row) for row in known])
        arrays["simulated_share"] = np.array([non_relative_share(block, block, below) for block in simulated])
        documents = len(np.unique(sequences.document))
        arrays |= {"sequences": len(sequences), "documents": documents}
        place = np.arange(self.length)
        coords = {"layer": layers, "head": np.arange(known.shape[1]), "query": place, "key": place}
        coords["block"] = np.arange(_SIMULATED)
        data = dataset(_VARIABLES, arrays, coords)
        names = [name for name in arrays if data[name].dims == _LAYER]
        few = "one document: shares include the noise of its text, as there are no halves" if documents < 2 else ""
        return self.result(store, data, data[names].to_dataframe().reset_index(), rows, [few])

    def _halves(self, sequences: Sequences) -> Bool[np.ndarray, " sequence"] | None:
        """Half of the documents; None for a single one."""
        known = np.random.default_rng(self.seed).permutation(np.unique(sequences.document))
        return np.isin(sequences.document, known[::2]) if len(known) > 1 else None

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the layer with the largest share without sinks beside the first layer's and the simulation's."""
        data = result.data
        clean = data["non_relative_share_no_sinks"].to_numpy()
        if np.isnan(clean).all():
            return with_note("Mean scores do not vary beyond the noise of texts.", result)
        most, layers = int(np.nanargmax(clean)), data["layer"].to_numpy()
        best = data.isel(layer=most)
        text = (
            f"Non-relative share of the mean scores, without sinks: {_text(clean[0])} at layer {layers[0]}, most "
            f"{_text(clean[most])} at layer {layers[most]} (with sinks {_text(best['non_relative_share'])}, median "
            f"head {_text(best['median_share_no_sinks'])}, slope on j / i {float(best['slope_no_sinks']):+z.2f}, "
            f"correlation with a mask without weights {float(best['simulated_correlation']):+z.2f}); blocks without "
            f"weights {_text(data['simulated_share'][1])} and {_text(data['simulated_share'][2])}. "
            f"{counted(data['sequences'], 'sequence')} of {result.provenance['settings']['length']} tokens"
        )
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "shares" by layer, and "maps", the non-relative part of the first, the most and the last layer."""
        return {"shares": _shares(result), "maps": _maps(result)}


def _text(value: Any) -> str:
    return "not defined" if np.isnan(float(value)) else f"{float(value):z.2f}"


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _mean_scores(
    store: Store, rule: ScoreRule, sequences: Sequences, half: Bool[np.ndarray, " sequence"] | None
) -> tuple[Float[np.ndarray, "part head query key"], Float[np.ndarray, "head key"]]:
    """Mean scores over each half of the sequences, and the mean attention that keys receive."""
    length = sequences.length
    place = torch.arange(length)
    visible = torch.as_tensor(rule.visible(place[:, None], place))
    groups = np.ones((1, len(sequences)), bool) if half is None else np.stack([half, ~half])
    total: Any = 0
    received: Any = 0
    first = 0
    for rows in sequences.blocks(store[rule.queries].shape[1] * length):
        scores = attention_scores(rule, store[rule.queries][rows], store[rule.keys][rows]).double()
        part = torch.from_numpy(groups[:, first : first + len(rows)]).double()
        total = total + torch.einsum("gs,shqk->ghqk", part, scores)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        received = received + weights.sum((0, 2))
        first += len(rows)
    counts = torch.from_numpy(groups.sum(1)).double()
    queries = visible.sum(0) * len(sequences)
    return (total / counts[:, None, None, None]).numpy(), (received / queries).numpy()


def _measures(
    scores: Float[np.ndarray, "part head query key"],
    received: Float[np.ndarray, "head key"],
    half: Bool[np.ndarray, " sequence"] | None,
    visible: Bool[np.ndarray, "query key"],
    simulated: Float[np.ndarray, "query key"],
    threshold: float,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Measures of each head, and of the mean of all heads."""
    weights = np.ones(1) if half is None else np.array([half.sum(), (~half).sum()]) / len(half)
    whole = np.einsum("g,ghqk->hqk", weights, scores)
    sink = received > threshold
    sink[:, 0] = True
    heads: dict[str, list[float]] = {"head_share": [], "head_share_no_sinks": [], "head_slope_no_sinks": []}
    for head in range(scores.shape[1]):
        clean = visible & ~sink[head]
        halves = scores[0, head], scores[-1, head]
        heads["head_share"].append(non_relative_share(*halves, visible))
        heads["head_share_no_sinks"].append(non_relative_share(*halves, clean))
        heads["head_slope_no_sinks"].append(slope_of_keys(whole[head], clean))
    mean, halves, clean = whole.mean(0), scores.mean(1), visible & ~sink.any(0)
    rest, simulated_rest = (non_relative(part, clean)[clean] for part in (mean, simulated))
    varies = len(rest) > 1 and rest.std() > 0 and simulated_rest.std() > 0
    layer = {
        "non_relative_share": non_relative_share(halves[0], halves[-1], visible),
        "non_relative_share_no_sinks": non_relative_share(halves[0], halves[-1], clean),
        "whole_share": non_relative_share(mean, mean, visible),
        "slope": slope_of_keys(mean, visible),
        "slope_no_sinks": slope_of_keys(mean, clean),
        "simulated_correlation": float(np.corrcoef(rest, simulated_rest)[0, 1]) if varies else float("nan"),
        "map": non_relative(mean, visible).astype(np.float32),
    }
    arrays = {name: np.array(values) for name, values in heads.items()}
    return arrays | {"sinks": sink[:, 1:].sum(1).astype(float)}, layer


def _shares(result: Result) -> go.Figure:
    data = result.data
    shares = [
        Curve("mean of heads", data["non_relative_share"].to_numpy(), CATEGORIES[1]),
        Curve("without sinks", data["non_relative_share_no_sinks"].to_numpy(), CATEGORIES[0]),
        Curve("median head, without sinks", data["median_share_no_sinks"].to_numpy(), CATEGORIES[2]),
        Curve("second block without weights", float(data["simulated_share"][1]), NEUTRAL, "dash"),
    ]
    return layer_panels(
        [[Panel("", shares)]],
        layers=data["layer"].to_numpy().tolist(),
        title=f"Scores that distance does not explain in {label(str(result.provenance['model']), 60)}",
        subtitle=f"{counted(data['sequences'], 'sequence')} of {counted(data['documents'], 'document')}, by "
        "halves of these",
        unit="non-relative share of variance",
    )


def _maps(result: Result) -> go.Figure:
    data, layers = result.data, result.data["layer"].to_numpy()
    clean = np.nan_to_num(data["non_relative_share_no_sinks"].to_numpy(), nan=-1)
    indices = sorted({0, int(clean.argmax()), len(layers) - 1})
    parts = [data["map"].isel(layer=index).to_numpy() for index in indices]
    values = np.concatenate([part[~np.isnan(part)] for part in parts])
    limit = float(np.abs(np.quantile(values, [0.01, 0.99])).max()) or 1.0
    figure = make_subplots(
        1,
        len(indices),
        subplot_titles=[f"layer {layers[index]}" for index in indices],
        shared_yaxes=True,
        figure=ThemedFigure(),
    )
    for column, part in enumerate(parts, start=1):
        figure.add_heatmap(
            z=part,
            colorscale=SIGNED,
            zmin=-limit,
            zmax=limit,
            showscale=column == len(parts),
            colorbar=colour_bar("score"),
            hovertemplate="query %{y}, key %{x}: %{z:.3f}<extra></extra>",
            hoverongaps=False,
            row=1,
            col=column,
        )
    figure.update_layout(
        title={
            "text": f"Mean scores less the mean of their diagonal in {label(str(result.provenance['model']), 60)}",
            "subtitle": {"text": "colours end at the 1 % and 99 % quantiles, because of sinks"},
        },
        height=420,
        width=max(480, 120 + 300 * len(indices)),
        margin={"t": 120},
    )
    figure.update_xaxes(title="key")
    figure.update_yaxes(autorange="reversed")
    return figure.update_yaxes(title="query", col=1)
