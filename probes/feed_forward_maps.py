"""Feed-forward blocks as attention maps: how much they change which tokens contribute to a token (Kobayashi 2023).

With the scales of norms frozen, the state after attention is a sum over source tokens j, r_i = sum_j r_i<-j, and so
is the output of the feed-forward part, whose activation is divided by integrated gradients from zero: for s = sum_j u_j
they are u_j (phi(s) - phi(0)) / s. Biases are one more source. A map is C_ij, the L2 norm of j's contribution to i, and

    change_ff          = 1 - Spearman(C after attention, C of the feed-forward output)           over sources j <= i
    change_ff_residual = 1 - Spearman(C after attention, C after the feed-forward part and its residual)

as a mean over tokens. The paper (arXiv 2302.00456) finds that what surrounds the feed-forward part undoes its change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from scipy.stats import rankdata

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    PROBABILITY,
    Band,
    BlockParts,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Store,
    ThemedFigure,
    Variable,
    block_parts,
    check_fields,
    clustered_means,
    colour_bar,
    contributions,
    counted,
    dataset,
    interval_suffix,
    intervals,
    label,
    layer_bands,
    plain_torch,
    progress,
    recorded_model,
    require_causal,
    select_sequences,
    with_interval,
    with_note,
)

STAGES = ("attention", "feed-forward", "feed-forward and residual")
_LAYER, _MAP = ("layer",), ("layer", "stage", "query", "key")
_NULL = "1 for unrelated maps, 0 for equal ones"
_MEASURES = ("change_ff", "change_ff_residual", "cancellation")
_VARIABLES: tuple[Variable, ...] = (
    *with_interval(Variable("change_ff", _LAYER, "1 - Spearman", "of the map by the feed-forward part alone", _NULL)),
    *with_interval(
        Variable("change_ff_residual", _LAYER, "1 - Spearman", "of the map by the part and its residual", _NULL)
    ),
    *with_interval(
        Variable("cancellation", _LAYER, "cosine", "of the map's change by the part and by the residual after it")
    ),
    Variable("change_shuffled", _LAYER, "1 - Spearman", "of maps with sources in random order", "1"),
    Variable("completeness_error", _LAYER, "share of the norm", "largest miss of the sum over sources", "0"),
    Variable("map", _MAP, "share of the row", "contributions of sources in the first sequence"),
    Variable("token", ("key",), "text", "tokens of that sequence"),
    Variable("sequences", (), "sequences", "sequences that count"),
    *LOST_VARIABLES,
)
_QUANTILE = 0.99


@dataclass(frozen=True)
class FeedForwardMaps(LayerProbe):
    """Measures how much feed-forward parts change which tokens contribute, alone and with their residual."""

    name: ClassVar[str] = "feed-forward-maps"
    needs_model: ClassVar[bool] = True
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Kobayashi et al. 2023, Analyzing feed-forward blocks in transformers through the lens of attention maps, "
        "arXiv 2302.00456",
        "Sundararajan et al. 2017, Axiomatic attribution for deep networks, arXiv 1703.01365",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "change_shuffled": "sources in random order: what unrelated maps give",
        "completeness_error": "miss of the sum of all contributions: near 0, or the decomposition is wrong",
        "random weights": "the same architecture with random weights",
    }

    length: int = 48
    """First tokens of each sequence that count; shorter sequences are left out."""
    row_limit: int = 8
    """Maximum number of sequences, spread evenly over the store."""
    first: int = 8
    """First token whose map counts: earlier ones have few sources to rank."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    tolerance: float = 0.05
    """Largest completeness error; more is refused, since the block is then another function than its parts say."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the bootstrap and of shuffled sources."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "first", at_least=2, whole=True)
        check_fields(self, "length", above=self.first, whole=True)
        check_fields(self, "row_limit", "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        check_fields(self, "tolerance", above=0, below=float("inf"))

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Decomposes every block whose sites were recorded.

        Costs layers x sequences x length^2 x (d_model + 3 d_mlp) x d_model operations in float64.

        Args:
            store: Has pattern, v, resid_pre (resid_post of the layer before) and resid_post of the blocks.
            model: The recorded model, whose weights are read. None: loaded from the setting `model` or the store's
                name for it.

        Raises:
            RequestError: A site was not recorded, no sequence is long enough, the model has blocks of another form, is
                not causal or cannot be loaded, or contributions do not add up to what was recorded.
        """
        require_causal(store, self.name)
        parts = block_parts(recorded_model(store, model or self.model, "cpu"))
        places = self._places(store, list(parts))
        sequences = select_sequences(store, self.length, self.where)
        chosen = np.unique(np.linspace(0, len(sequences) - 1, min(self.row_limit, len(sequences))).round().astype(int))
        rows = sequences.rows[chosen]
        sites = list(dict.fromkeys(site for place in places.values() for site in place))
        checked = self.finite_rows(store, sites, rows)
        finite = ~np.isin(rows, checked.left_out).any(1)
        rows, documents = rows[finite], sequences.document[chosen][finite]
        measured = {}
        with progress("feed-forward maps", len(places) * len(rows), "maps") as tick:
            for layer, place in places.items():
                measured[layer] = _Layer.measure(self, store, parts[layer], place, rows, lambda: tick(1))
        return self._result(store, measured, rows, documents, checked)

    def _places(self, store: Store, known: list[int]) -> dict[int, tuple[str, str, str, str]]:
        """Sites of each layer that is read: pattern, values, input and output of the block."""
        recorded = {site.label for site in store.sites}
        places = {}
        for layer in known:
            before = f"resid_pre.{layer}"
            if before not in recorded and layer:
                before = f"resid_post.{layer - 1}"
            places[layer] = (f"pattern.{layer}", f"v.{layer}", before, f"resid_post.{layer}")
        chosen = [layer for layer, place in places.items() if set(place) <= recorded]
        if self.layers is not None:
            count = store.manifest.model.n_layers
            chosen = sorted({layer + count if layer < 0 else layer for layer in self.layers})
            if missing := [layer for layer in chosen if layer not in places]:
                raise RequestError(f"layers: layer {missing[0]} has no feed-forward part after attention")
        if not chosen:
            store.require(*places[known[-1]])
        for layer in chosen:
            store.require(*places[layer])
        return {layer: places[layer] for layer in chosen}

    def _result(
        self, store: Store, measured: Mapping[int, _Layer], rows: np.ndarray, documents: np.ndarray, checked: Any
    ) -> Result:
        layers = list(measured)
        arrays: dict[str, Any] = {}
        for name in _MEASURES:
            values = np.stack([getattr(measured[layer], name) for layer in layers], 1)
            mean, resampled = clustered_means(values, documents, resamples=self.resamples, seed=self.seed)
            low, high = intervals(resampled)
            arrays |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        arrays["change_shuffled"] = np.array([np.nanmean(layer.change_shuffled) for layer in measured.values()])
        arrays["completeness_error"] = np.array([layer.error for layer in measured.values()])
        arrays["map"] = np.stack([layer.map for layer in measured.values()])
        arrays["token"] = store.tokens["token"].take(rows[0]).to_pylist()
        arrays["sequences"] = len(rows)
        place = np.arange(self.length)
        coords = {"layer": layers, "stage": list(STAGES), "query": place, "key": place}
        data = dataset(_VARIABLES, arrays, coords)
        names = [name for name in arrays if data[name].dims == _LAYER]
        number = len(np.unique(documents))
        few = f"intervals over {counted(number, 'document')}, fewer than 10" * (number < 10)
        return self.result(store, data, data[names].to_dataframe().reset_index(), checked, [few])

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the changes, the layer with the largest, and the completeness error."""
        data = result.data
        by_ff, whole, undone = (float(data[name].mean()) for name in _MEASURES)
        most = data.isel(layer=int(np.nan_to_num(data["change_ff"].to_numpy(), nan=-1).argmax()))
        ends = [float(most[f"change_ff{end}"]) for end in ("", "_low", "_high")]
        interval = interval_suffix(ends[1], ends[2])
        return with_note(
            f"Feed-forward parts change the map of contributing tokens by 1 - Spearman {by_ff:z.2f}, with the residual "
            f"{whole:z.2f} (mean of layers; unrelated maps {float(data['change_shuffled'].mean()):z.2f}); "
            "most at layer "
            f"{int(most['layer'])}: {ends[0]:z.2f}{interval}, with residual {float(most['change_ff_residual']):z.2f}; "
            f"cosine of the part's change and the residual's {undone:+z.2f}. Contributions miss the block's output by "
            f"at most {float(data['completeness_error'].max()):.1g}.",
            result,
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "changes" by layer, and "maps" of one sequence at the layer with the largest change."""
        return {"changes": _changes(result), "maps": _maps(result)}


@dataclass(frozen=True)
class _Layer:
    """Measures of each sequence at one layer, and the map of the first."""

    change_ff: Float[np.ndarray, " sequence"]
    change_ff_residual: Float[np.ndarray, " sequence"]
    cancellation: Float[np.ndarray, " sequence"]
    change_shuffled: Float[np.ndarray, " sequence"]
    error: float
    map: Float[np.ndarray, "stage query key"]

    @classmethod
    def measure(
        cls,
        probe: FeedForwardMaps,
        store: Store,
        parts: BlockParts,
        place: tuple[str, ...],
        rows: np.ndarray,
        tick: Any,
    ) -> _Layer:
        values: dict[str, list[float]] = {name: [] for name in (*_MEASURES, "change_shuffled")}
        draw, worst, first = np.random.default_rng(probe.seed), 0.0, None
        for sequence in rows:
            pattern, value, before, after = (store[site][sequence].double() for site in place)
            terms = contributions(parts, before, pattern[..., : len(sequence)], value)
            miss = (terms.total - after).norm(dim=1) / after.norm(dim=1).clamp(min=1e-30)
            worst = max(worst, float(miss.max()))
            if worst > probe.tolerance:
                raise RequestError(
                    f"the contributions at {place[3]} miss what was recorded by {worst:.2g} of its norm: the block is "
                    "not the attention, norms and feed-forward part that its sites say"
                )
            maps = [part[:, :-1] for part in (terms.attention, terms.feed_forward, terms.block)]
            for name, number in zip(_MEASURES, _compare(maps, probe.first), strict=True):
                values[name].append(number)
            values["change_shuffled"].append(_shuffled(maps[0], maps[1], probe.first, draw))
            first = np.stack([_shares(part) for part in maps]) if first is None else first
            tick()
        assert first is not None
        return cls(**{name: np.array(part) for name, part in values.items()}, error=worst, map=first.astype(np.float32))


def _shares(contribution: Float[np.ndarray, "query key"]) -> Float[np.ndarray, "query key"]:
    """Rows that sum to 1; NaN after the query, and for a row without any contribution."""
    n = len(contribution)
    visible = np.where(np.tril(np.ones((n, n), bool)), contribution, np.nan)
    total = np.nansum(visible, 1, keepdims=True)
    return np.divide(visible, total, out=np.full(visible.shape, np.nan), where=total > 0)


def _compare(maps: list[Float[np.ndarray, "query key"]], first: int) -> tuple[float, float, float]:
    """Both changes and their cancellation, as means over rows."""
    rows = range(first, len(maps[0]))
    changes = [[1 - spearman(maps[0][i, : i + 1], part[i, : i + 1]) for i in rows] for part in maps[1:]]
    shares = [_shares(part) for part in maps]
    steps = [shares[1] - shares[0], shares[2] - shares[1]]
    cosines = []
    for i in rows:
        a, b = (step[i, : i + 1] for step in steps)
        size = np.linalg.norm(a) * np.linalg.norm(b)
        cosines.append(a @ b / size if size > 1e-12 else np.nan)
    without, with_residual, cosine = (
        float(np.nanmean(part)) if not np.isnan(part).all() else np.nan for part in (*changes, cosines)
    )
    return without, with_residual, cosine


def _shuffled(attention: np.ndarray, feed_forward: np.ndarray, first: int, draw: np.random.Generator) -> float:
    parts = [
        1 - spearman(attention[i, : i + 1], draw.permutation(feed_forward[i, : i + 1]))
        for i in range(first, len(attention))
    ]
    return float(np.nanmean(parts)) if not np.isnan(parts).all() else float("nan")


def spearman(first: Float[np.ndarray, " source"], second: Float[np.ndarray, " source"]) -> float:
    """Returns the rank correlation, ties averaged; NaN where one side is constant."""
    a, b = (rankdata(part) - (len(part) + 1) / 2 for part in (first, second))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


def _changes(result: Result) -> go.Figure:
    data = result.data
    words = {"change_ff": "feed-forward part", "change_ff_residual": "with its residual"}
    bands = [
        Band(
            words[name],
            data[name].to_numpy(),
            (data[f"{name}_low"].to_numpy(), data[f"{name}_high"].to_numpy()),
            colour,
        )
        for name, colour in zip(words, CATEGORIES, strict=False)
    ]
    return layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"Change of the map of contributing tokens in {label(str(result.provenance['model']), 60)}",
        subtitle=f"{counted(data['sequences'], 'sequence')}; bands: 95 % intervals over documents; unrelated maps: "
        f"{float(data['change_shuffled'].mean()):z.2f}",
        unit="1 - Spearman",
    )


def _maps(result: Result) -> go.Figure:
    data = result.data
    most = data.isel(layer=int(np.nan_to_num(data["change_ff"].to_numpy(), nan=-1).argmax()))
    figure = make_subplots(
        1, 3, subplot_titles=[f"after {stage}" for stage in STAGES], shared_yaxes=True, figure=ThemedFigure()
    )
    tokens = [label(str(token), 12) for token in data["token"].to_numpy()]
    limit = float(np.nanquantile(most["map"].to_numpy(), _QUANTILE)) or 1.0
    for column, stage in enumerate(STAGES, start=1):
        figure.add_heatmap(
            z=most["map"].sel(stage=stage).to_numpy(),
            customdata=np.broadcast_to(np.array(tokens, dtype=object), (len(tokens), len(tokens))),
            colorscale=PROBABILITY,
            zmin=0,
            zmax=limit,  # the same in all panels
            showscale=column == 3,
            colorbar=colour_bar("share of the row"),
            hovertemplate="query %{y}, key %{x} %{customdata}: %{z:.3f}<extra></extra>",
            hoverongaps=False,
            row=1,
            col=column,
        )
    title = f"Contributing tokens at layer {int(most['layer'])} of {label(str(result.provenance['model']), 60)}"
    subtitle = (
        f"share of each source token in the output at a token; {counted(len(tokens), 'token')} of the first sequence"
    )
    ends = f"colours end at the {100 * _QUANTILE:g} % quantile, since the first tokens have few sources"
    heading = {"text": title, "subtitle": {"text": f"{subtitle}; {ends}"}}
    figure.update_layout(title=heading, height=440, width=1020, margin={"t": 130})
    figure.update_xaxes(title="source")
    figure.update_yaxes(autorange="reversed")
    return figure.update_yaxes(title="token", col=1)
