"""Induction heads: heads that attend to what followed the present token before (Olsson et al. 2022).

For a query i whose token x_i stands earlier in its sequence, at positions d with d + 1 < i,

    induction(h) = mean_i sum_d A_h[i, d + 1]        duplicate(h) = mean_i sum_d A_h[i, d]

over all earlier occurrences d, or the latest (`occurrences`). On the same queries: previous A[i, i - 1], current A[i,
i], first A[i, 0]. All five are also recorded as derived sites (`attn_induction`, ...), without patterns. Position
alone can fake induction: where tokens repeat at a fixed distance, a head that attends that far back reads no token
and scores 1. Therefore `induction_shuffled`, the attention at the targets of *other* sequences at the same query
positions, is subtracted; and `induction_reference` is the best that one fixed offset collects. Without patterns the
tokens alone bound what one offset could collect: `offset_bound`. Copying is read from the weights: the OV circuit W_U
W_O W_V norm(W_E) raises the attended token itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr

from workbench.probing import (
    ABLATION_VARIABLES,
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    TOKEN_MEASURES,
    Band,
    LayerProbe,
    MeasuredRows,
    Model,
    Occurrences,
    Queries,
    RaggedSequences,
    RequestError,
    Result,
    Store,
    ThemedFigure,
    TokenAttention,
    Variable,
    ablated_heads,
    ablation_text,
    axis_title,
    binned_ends,
    blocks,
    check,
    check_fields,
    choose_layers,
    colour_limits,
    copying_scores,
    counted,
    counted_queries,
    dataset,
    error_bars_of,
    group_intervals,
    head_grid,
    head_hover,
    head_name,
    interval_suffix,
    intervals,
    layer_bands,
    layers_of,
    layers_text,
    load_unembed,
    log_probabilities,
    model_label,
    next_tokens,
    plain_torch,
    recorded_ends,
    recorded_model,
    recorded_sums,
    require_any,
    require_causal,
    resampled_means,
    stack_heads,
    token_keys,
    usable_device,
    whole_sequences,
    with_interval,
    with_note,
)

_HEAD = ("layer", "head")
_UNIFORM = "`uniform`: a head that attends to all visible keys equally"
_VARIABLES: tuple[Variable, ...] = (
    *with_interval(Variable("induction", _HEAD, "attention", "to the tokens after earlier occurrences", _UNIFORM)),
    *with_interval(Variable("excess", _HEAD, "attention", "induction less induction_shuffled, -1 to 1", "0")),
    Variable("induction_shuffled", _HEAD, "attention", "at the targets of other sequences, same query positions"),
    Variable("induction_reference", _HEAD, "attention", "attention at the best fixed offset, 1 or more back"),
    Variable("reference_offset", _HEAD, "tokens", "that offset"),
    *with_interval(Variable("duplicate", _HEAD, "attention", "to the earlier occurrences themselves", _UNIFORM)),
    *with_interval(Variable("previous", _HEAD, "attention", "to the token before the query")),
    *with_interval(Variable("current", _HEAD, "attention", "to the query's own token")),
    *with_interval(Variable("first", _HEAD, "attention", "to the first token of the sequence")),
    Variable("copying", _HEAD, "share of tokens", "tokens whose own direct logit is the largest", "1 / copying_tokens"),
    Variable("copying_eigen", _HEAD, "1", "sum of the OV circuit's eigenvalues / sum of their sizes, -1 to 1", "0"),
    *ABLATION_VARIABLES,
    *with_interval(
        Variable("icl_loss", ("position",), "nats", "mean cross-entropy of the next token, by position of the query")
    ),
    Variable("icl_tokens", ("position",), "tokens", "tokens that icl_loss is the mean of"),
    Variable("icl_score", (), "nats", "icl_loss at `late` less that at `early`; negative: context helps", "0"),
    Variable("loss_repeated", (), "nats", "mean cross-entropy after tokens that stand earlier in their sequence"),
    Variable("loss_new", (), "nats", "mean cross-entropy after all other tokens"),
    Variable("offset_bound", (), "share of queries", "queries with a target at the most frequent offset"),
    Variable("uniform", (), "attention", "induction of a head that attends to all visible keys equally"),
    Variable("queries", (), "tokens", "queries that count"),
    Variable("sequences", (), "sequences", "sequences with such a query"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class InductionHeads(LayerProbe):
    """Measures which heads attend to what followed the present token before, beyond what position alone explains."""

    name: ClassVar[str] = "induction-heads"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Olsson et al. 2022, In-context learning and induction heads, transformer-circuits.pub",
        "Elhage et al. 2021, A mathematical framework for transformer circuits, transformer-circuits.pub",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "induction_shuffled": "attention at the targets of other sequences: what position alone gives",
        "induction_reference": "attention at the best fixed offset: near `induction` only if tokens are not read",
        "uniform": "a head that attends to all visible keys equally",
        "random weights": "the same architecture with random weights: no excess",
    }

    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    occurrences: str = "all"
    """Earlier occurrences of the query's token that count: all, or the last."""
    threshold: float = 0.3
    """Minimum excess of an induction head."""
    early: int = 50
    """Position of the query, from 0, whose loss the in-context-learning score subtracts."""
    late: int = 500
    """Position of the query whose loss it subtracts from."""
    window: int = 5
    """Positions on either side of both that are averaged over."""
    model: str | None = None
    """Folder or name of the recorded model, for copying. None: no copying, unless a loaded model is given."""
    copying_tokens: int = 500
    """Number of tokens, drawn at random from the vocabulary, that copying is measured on and among."""
    ablated: int = 3
    """Number of the strongest heads that are ablated, each alone and all together; needs the model. 0: none."""
    ablation_controls: int = 2
    """Draws of random heads of the same layers, which are ablated as a control."""
    ablation_tokens: int = 1000
    """Tokens, at least, of the whole sequences on which the loss with ablated heads is measured."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the bootstrap and of the draw of tokens."""
    device: str | None = None
    """Device of products with W_U: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("occurrences", self.occurrences, one_of=get_args(Occurrences))
        check("copying_tokens", self.copying_tokens, at_least=2, at_most=10_000)
        check_fields(self, "resamples", at_least=1)
        check_fields(self, "ablation_controls", "ablation_tokens", at_least=1)
        check_fields(self, "seed", "early", "window", "ablated", at_least=0)
        check("late", self.late, above=self.early)
        check("threshold", self.threshold, at_least=0, below=1)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `pattern`, or `attn_induction`, ...; for losses the last `resid_post`; for copying the model's weights.

        Costs one pass over these; memory is blocks of 64 MiB and, of patterns, heads x context^2 numbers of one layer.

        Raises:
            RequestError: Neither was recorded, no token repeats, values are NaN or infinite, the model is not causal
                or another one, or the device cannot be used.
        """
        require_causal(store, self.name)
        sources = _sites(self, store)
        layers = [*sources]
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        losses = last in [site.label for site in store.sites] and store.manifest.has_unembed
        sequences = whole_sequences(store, self.where)
        sites = [site for part in sources.values() for site in part] + [last] * losses
        rows = self.finite_rows(store, sites, sequences.rows)
        sequences = sequences.without(rows.left_out)
        queries = counted_queries(sequences, self.occurrences)  # pyright: ignore[reportArgumentType]  # checked
        if not len(queries.rows):
            raise RequestError(
                "no token of the selected sequences stands earlier in its sequence; record longer texts, or sequences "
                "of wb.random_repeats(model.tokenizer)"
            )
        arrays: dict[str, Any] = {"uniform": queries.uniform, "offset_bound": queries.offset_bound}
        arrays |= {"queries": len(queries.rows), "sequences": len(np.unique(queries.sequence))}
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        heads = {layer: _read(self, store, layer, sequences, queries) for layer in layers}
        arrays |= stack_heads(layers, heads, [variable.name for variable in _VARIABLES if variable.dims == _HEAD])
        coords: dict[str, Any] = {"layer": layers, "head": np.arange(arrays["induction"].shape[1])}
        notes = _notes(store, layers, len(sequences))
        if losses:
            lost, note = _losses(self, store, last, sequences)
            arrays, coords = arrays | lost, coords | {"position": np.arange(len(lost["icl_loss"]))}
            notes.append(note)
        else:
            notes.append(f"losses not computed: {last} or the unembedding was not recorded")
        if model is not None or self.model is not None:
            loaded = recorded_model(store, model or self.model, usable_device(self.device))
            arrays |= _copying(self, store, loaded, layers)
            try:
                ablation, axes = _ablation(self, store, loaded, layers, arrays["excess"], sequences, queries)
                arrays, coords = arrays | ablation, coords | axes
            except RequestError as error:
                notes.append(f"ablation not computed: {error}")
        data = dataset(_VARIABLES, arrays, coords)
        return self.result(store, data, _table(data), rows, notes)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the number of induction heads, the strongest beside its references, and the losses."""
        data, best, threshold = result.data, result.table.iloc[0], result.provenance["settings"]["threshold"]
        number, measured = int((data["excess"] > threshold).sum()), int(data["excess"].notnull().sum())
        heads = f"{number} of {measured} heads are induction heads (excess > {threshold:g})"
        heads = heads if measured else "Induction heads not counted: there is no other sequence to compare with"
        interval = interval_suffix(best["induction_low"], best["induction_high"])
        blind = f"one fixed offset collects at most {float(data['offset_bound']):z.2f}"
        if not np.isnan(best.get("induction_shuffled", np.nan)):
            blind = (
                f"targets of other sequences {best['induction_shuffled']:z.2f}, best fixed offset "
                f"{best['induction_reference']:z.2f}"
            )
        text = (
            f"{heads}; strongest {head_name(int(best['layer']), int(best['head']))}: induction "
            f"{best['induction']:z.2f}{interval}, {blind}"
        )
        if not np.isnan(best.get("duplicate", np.nan)):
            text += f", duplicate {best['duplicate']:z.2f}"
        if "copying" in data:
            text += f", copying {100 * best['copying']:z.0f} %, eigenvalues {best['copying_eigen']:z.2f}"
        if "ablation" in data and "after repeated tokens" in data["group"].to_numpy():
            several = str(data["ablated"][-1].item()).replace("all ", "the strongest ")
            effect = ablation_text({name: data[name].to_numpy() for name in map(str, data.data_vars)})
            text += f"; loss after repeated tokens with {several} ablated {effect}"
        if "loss_repeated" in data:
            text += (
                f"; loss after repeated tokens {float(data['loss_repeated']):z.2f} nats, after new ones "
                f"{float(data['loss_new']):z.2f}"
            )
        if "icl_score" in data:
            text += f"; in-context-learning score {float(data['icl_score']):z.2f} nats"
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "heads", excess by head; "kinds", what the strongest attend to; "ablation"; "loss" by position."""
        figures = {"heads": _heads(result), "kinds": _kinds(result)}
        figures |= {"ablation": _ablated(result)} if "ablation" in result.data else {}
        return {**figures, "loss": _loss(result)} if "icl_loss" in result.data else figures


# ---- readings -------------------------------------------------------------------------------------------


def _read(
    probe: InductionHeads, store: Store, layer: int, sequences: RaggedSequences, queries: Queries
) -> dict[str, np.ndarray]:
    """All measures of the heads of one layer, from its pattern or from what was derived of it while recording."""
    counts = np.bincount(queries.sequence, minlength=len(sequences)).astype(float)
    if layer in layers_of(store, "pattern"):
        array = store["pattern", layer]
        total = TokenAttention(array.shape[1], len(sequences), int(sequences.lengths.max()))
        for part in sequences.blocks(int(np.prod(array.shape[1:]))):
            keys = token_keys(sequences, part, probe.occurrences)  # pyright: ignore[reportArgumentType]  # checked
            total.add(part, keys, array[keys.rows])
        sums, offsets = total.by_sequence, total.by_offset()[1:]
        blind = total.shuffled()
        references = {"induction_shuffled": blind, "induction_reference": offsets.max(0)}
        references |= {"reference_offset": 1.0 + offsets.argmax(0)}
    else:
        sums, blind, references = recorded_sums(store, layer, queries, len(sequences)), queries.offset_bound, {}
    clusters, index = np.unique(sequences.document, return_inverse=True)
    measured = np.stack([*sums.values()], 1)  # sequence, measure, head
    totals, queries_of = (np.zeros((len(clusters), measured[0].size)) for _ in range(2))
    np.add.at(totals, index, measured.reshape(len(measured), -1))
    np.add.at(queries_of, index, counts[:, None])
    ends = intervals(resampled_means(totals, queries_of, resamples=probe.resamples, seed=probe.seed)[1])
    low, high = (dict(zip(sums, end.reshape(measured.shape[1:]), strict=True)) for end in ends)
    means = {name: values.sum(0) / counts.sum() for name, values in sums.items()} | references
    means |= {f"{name}_{side}": end[name] for name in sums for side, end in (("low", low), ("high", high))}
    means |= {"excess": means["induction"] - blind, "excess_low": low["induction"] - blind}
    return means | {"excess_high": high["induction"] - blind}


def _notes(store: Store, layers: list[int], sequences: int) -> list[str]:
    """Notes of references that patterns alone give."""
    derived = [layer for layer in layers if layer not in layers_of(store, "pattern")]
    notes = []
    if derived != layers and sequences < 2:
        notes.append("excess not computed: it needs two sequences or more")
    if derived:
        where = "" if derived == layers else f"at layers {layers_text(derived)} "
        notes.append(f"{where}excess is induction less offset_bound, because pattern was not recorded")
    return notes


def _sites(probe: InductionHeads, store: Store) -> dict[int, list[str]]:
    """Sites of each layer that attention is read from: its pattern, or what was derived of it."""
    patterns, derived = layers_of(store, "pattern"), layers_of(store, "attn_induction")
    require_any(store, "pattern", "attn_induction")
    if derived and probe.occurrences == "last":
        if not patterns:
            raise RequestError(
                "occurrences 'last' needs pattern: attn_induction is the attention after all earlier occurrences; "
                "leave occurrences out, or record pattern"
            )
        derived = []
    recorded = {site.label for site in store.sites}
    sites = {layer: [f"attn_{name}.{layer}" for name in TOKEN_MEASURES] for layer in derived}
    sites |= {layer: [f"pattern.{layer}"] for layer in patterns}
    chosen = choose_layers(sorted(sites), probe.layers, store.manifest.model.n_layers)
    return {layer: [site for site in sites[layer] if site in recorded] for layer in chosen}


def _losses(
    probe: InductionHeads, store: Store, last: str, sequences: RaggedSequences
) -> tuple[dict[str, np.ndarray], str]:
    """Cross-entropy of the next token by position, after repeated and after new tokens; and a note."""
    unembed = load_unembed(store.path, usable_device(probe.device))
    targets, position = next_tokens(store), store.tokens["position"].to_numpy()
    rows = sequences.rows[targets[sequences.rows] >= 0]
    loss = np.zeros(len(rows))
    for block in blocks(len(rows), unembed.vocab):
        log = log_probabilities(unembed, store[last][rows[block]])
        target = torch.from_numpy(targets[rows[block]]).to(log.device)
        loss[block] = -log.gather(1, target[:, None])[:, 0].double().cpu().numpy()
    repeated = np.zeros(store.rows, bool)
    for part in sequences.blocks(int(sequences.lengths.max())):
        keys = token_keys(sequences, part)
        repeated[keys.rows[keys.counts.numpy()]] = True
    at, is_repeat, tokens = position[rows], repeated[rows], np.bincount(position[rows])
    with np.errstate(invalid="ignore"):
        by_position = np.bincount(at, loss) / tokens
        parts = [np.divide(loss[mask].sum(), mask.sum()) for mask in (is_repeat, ~is_repeat)]
    arrays: dict[str, Any] = {"icl_loss": by_position, "icl_tokens": tokens}
    resampling: dict[str, Any] = {"resamples": probe.resamples, "seed": probe.seed}
    ends = binned_ends(loss, at, store.tokens["document"].to_numpy()[rows], **resampling)
    arrays |= dict(zip(("icl_loss_low", "icl_loss_high"), ends, strict=True))
    arrays |= {"loss_repeated": parts[0], "loss_new": parts[1]}
    near = [np.abs(at - place) <= probe.window for place in (probe.early, probe.late)]
    if not near[1].any():
        return arrays, f"in-context-learning score not computed: no sequence has a token at position {probe.late}"
    arrays["icl_score"] = np.asarray(loss[near[1]].mean() - loss[near[0]].mean())
    return arrays, ""


def _ablation(
    probe: InductionHeads,
    store: Store,
    model: Model,
    layers: list[int],
    excess: np.ndarray,
    sequences: RaggedSequences,
    queries: Queries,
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Effect of the strongest heads on the loss after repeated tokens and after others, beside random heads."""
    order = [np.unravel_index(i, excess.shape) for i in np.argsort(-np.nan_to_num(excess, nan=-2), axis=None)]
    heads = [(layers[layer], int(head)) for layer, head in order[: probe.ablated]]
    if not heads:
        return {}, {}
    chosen = np.random.default_rng(probe.seed).permutation(np.unique(queries.sequence))
    chosen = chosen[: 1 + int(np.searchsorted(np.cumsum(sequences.lengths[chosen]), probe.ablation_tokens))]
    rows = np.concatenate(
        [sequences.starts[sequence] + np.arange(int(sequences.lengths[sequence])) for sequence in np.sort(chosen)]
    )
    rows = rows[next_tokens(store)[rows] >= 0]
    repeated = np.isin(rows, queries.rows)
    groups = {"after repeated tokens": rows[repeated], "after new tokens": rows[~repeated]}
    measured = MeasuredRows(store, {name: part for name, part in groups.items() if len(part)})
    settings = {"controls": probe.ablation_controls, "resamples": probe.resamples, "seed": probe.seed}
    return ablated_heads(model, measured, heads, **settings)


def _copying(probe: InductionHeads, store: Store, loaded: Model, layers: list[int]) -> dict[str, np.ndarray]:
    """Copying of the heads at the recorded layers."""
    unembed = load_unembed(store.path, loaded.device)
    draw = np.random.default_rng(probe.seed)
    ids = np.sort(draw.permutation(unembed.vocab)[: probe.copying_tokens])
    scores = copying_scores(loaded, unembed, torch.from_numpy(ids), layers)
    return stack_heads(layers, scores, ("copying", "copying_eigen"))


def _table(data: xr.Dataset) -> pd.DataFrame:
    """A line for each layer and head, the largest excess first."""
    layer, head = (axis.ravel() for axis in np.meshgrid(data["layer"], data["head"], indexing="ij"))
    columns = {name: data[name].to_numpy().ravel() for name in data if data[name].dims == _HEAD}
    table = pd.DataFrame({"layer": layer, "head": head, **columns})
    table = table.loc[table["induction"].notna()]
    return table.sort_values(["excess", "induction"], ascending=False, kind="stable", ignore_index=True)


# ---- figures --------------------------------------------------------------------------------------------


def _heads(result: Result) -> go.Figure:
    data, layers = result.data, result.data["layer"].to_numpy().tolist()
    measures = ("excess", *TOKEN_MEASURES, "induction_shuffled", "copying", "copying_eigen")
    lines = {(line["layer"], line["head"]): head_hover(line, measures) for line in result.table.to_dict("records")}
    whole = data["induction_shuffled"].notnull().any("head").all() if "induction_shuffled" in data else False
    blind = "that at the targets of other sequences" if whole else "what one fixed offset collects at most"
    return head_grid(
        data["excess"].to_numpy().clip(0),
        hover=[[lines.get((layer, head), "") for head in data["head"].to_numpy().tolist()] for layer in layers],
        layers=layers,
        title=f"Induction heads of {model_label(result)}",
        subtitle=f"attention to the tokens after earlier occurrences, less {blind}; {_size(data)}",
        unit="excess",
        limits=colour_limits(data["excess"].to_numpy()),
    )


def _kinds(result: Result) -> go.Figure:
    best = result.table.head(12)
    names = [head_name(layer, head) for layer, head in zip(best["layer"], best["head"], strict=True)]
    figure = ThemedFigure(layout={"scattermode": "group", "scattergap": 0.25})
    for kind in TOKEN_MEASURES:
        if kind in best:
            figure.add_scatter(x=names, y=best[kind], name=kind, mode="markers", error_y=error_bars_of(best, kind))
    figure.update_traces(marker={"size": 7}, hovertemplate="%{x}: %{y:.3f}")
    whole = "induction_shuffled" in best
    figure.add_scatter(
        x=names,
        y=best["induction_shuffled"] if whole else [float(result.data["offset_bound"])] * len(names),
        name="induction, other sequences" if whole else "one fixed offset, at most",
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 9, "color": NEUTRAL},
        hovertemplate="%{x}: %{y:.3f}",
    )
    title = f"Attention of the strongest induction heads of {model_label(result)}"
    figure.update_layout(
        title={"text": title, "subtitle": {"text": f"{_size(result.data)}; bars: 95 % intervals over documents"}},
        height=480,
        width=960,
        margin={"t": 120},
    )
    figure.update_xaxes(title="head, largest excess first", type="category")
    figure.update_yaxes(title=axis_title(result.data["induction"].attrs), rangemode="tozero")
    return figure


def _size(data: xr.Dataset) -> str:
    return f"{counted(data['queries'], 'query')} in {counted(data['sequences'], 'sequence')}"


def _ablated(result: Result) -> go.Figure:
    data, ends = result.data, ("", "_low", "_high")
    groups = {
        str(group): np.stack([data[f"ablation{end}"].sel(group=group).to_numpy() for end in ends])
        for group in data["group"].to_numpy()
    }
    random = data.isel(group=0)
    low, high = recorded_ends(random, "ablation_random") or np.full((2, data.sizes["ablated"]), np.nan)
    control = f"random heads, {random['group'].item()}"
    groups[control] = np.stack([random["ablation_random"].to_numpy(), low, high])
    figure = group_intervals(
        groups,
        categories=[str(name) for name in data["ablated"].to_numpy()],
        hover="%{x}",
        title=f"Loss without the strongest induction heads of {model_label(result)}",
        subtitle="change of the loss with outputs at their mean; 95 % intervals over documents; random heads of the "
        "same layers",
    )
    figure.update_traces(marker={"color": NEUTRAL}, selector={"name": control})
    figure.update_xaxes(title="ablated heads")
    return figure.update_yaxes(title=axis_title(data["ablation"].attrs, "change of the loss"))


def _loss(result: Result) -> go.Figure:
    data, shown = result.data, result.data["icl_tokens"] > 0
    data = data.isel(position=shown.to_numpy())
    subtitle = f"mean over {counted(data['icl_tokens'].sum(), 'token')}"
    ends = recorded_ends(data, "icl_loss")
    figure = layer_bands(
        [Band("mean loss", data["icl_loss"].to_numpy(), ends, CATEGORIES[0])],
        layers=data["position"].to_numpy().tolist(),
        title=f"Loss by position in {model_label(result)}",
        subtitle=f"{subtitle}; band: 95 % interval over documents" if ends else subtitle,
        unit=axis_title(data["icl_loss"].attrs),
    )
    figure.update_traces(mode="lines", hovertemplate="position %{x}: %{y:.3f}")
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title="position of the query")
    return figure.update_yaxes(rangemode="tozero")
