"""Vocabulary keys: do the tokens that rank high for a state come from few clusters of the unembedding?

The rows of the unembedding are keys, and the logits of a state are its products with them. K-means divides the keys
into clusters. For each token of the store the "main" clusters are those of the 10 tokens with the highest logits; then

    share_main(r) = P(the cluster of the token of rank r is a main one),  r = 11 ... 100

stands beside the same with the clusters permuted among tokens, sizes kept. `spearman` is the rank correlation of rank
and cosine to the first token's key. For the tokens of ranks 11 to 100: `next_main` and `next_other`, the share of
candidates that are the actual next token, and their ratio at equal rank (Mantel-Haenszel), since main clusters rank
higher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    Model,
    RequestError,
    Result,
    Store,
    StoreProbe,
    ThemedFigure,
    Unembed,
    Variable,
    band_traces,
    blocks,
    central,
    check_fields,
    clustered_ends,
    clustered_interval,
    counted,
    dataset,
    load_unembed,
    next_tokens,
    plain_torch,
    progress,
    recorded_ends,
    selected_rows,
    with_interval,
    with_note,
)

_MAIN, _RANKS = 10, 100
_RESAMPLES = 200
_ROUNDS = 15
_BLOCK = 1 << 24  # distances in memory at a time

VARIABLES = (
    *with_interval(
        Variable(
            "share_main",
            ("rank",),
            "share of tokens",
            "with the token of this rank in a main cluster",
            "share_permuted",
        )
    ),
    Variable("share_permuted", ("rank",), "share of tokens", "the same with clusters permuted, their sizes kept"),
    *with_interval(
        Variable("mean_share", (), "share", "mean of share_main over ranks 11 to 100", "mean of share_permuted")
    ),
    Variable("seed_spread", (), "share", "largest difference of that mean between seeds of k-means", "0"),
    *with_interval(
        Variable(
            "cosine", ("rank",), "cosine", "mean cosine of this rank's key to the key of the first", "cosine_random"
        )
    ),
    Variable("cosine_random", (), "cosine", "mean cosine of random keys to the key of the first"),
    *with_interval(Variable("spearman", (), "correlation", "of rank and that cosine, mean over tokens", "0")),
    Variable("next_main", (), "share of candidates", "candidates in main clusters that are the next token"),
    Variable("next_other", (), "share of candidates", "candidates in other clusters that are the next token"),
    *with_interval(
        Variable("next_ratio", (), "ratio", "next_main over next_other at equal rank (Mantel-Haenszel)", "1")
    ),
    Variable("next_ratio_permuted", (), "ratio", "the same with clusters permuted", "1"),
    Variable("clusters", (), "clusters", "clusters of keys"),
    Variable("rows", (), "tokens", "tokens of the store that were read"),
    *LOST_VARIABLES[1:],
)


@dataclass(frozen=True)
class VocabularyKeys(StoreProbe):
    """Measures if the tokens that rank high come from few clusters of the unembedding, beside permuted clusters."""

    name: ClassVar[str] = "vocabulary-keys"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("arXiv 2410.02284",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "share_permuted": "clusters permuted among tokens, their sizes kept",
        "next_ratio_permuted": "the ratio with permuted clusters",
        "random weights": "a model of the same shape with random weights: share_main equals share_permuted",
    }

    clusters: int | None = None
    """Clusters of k-means. None: 1,024, and fewer for a vocabulary under 32,768 tokens: a 32nd of it."""
    unit: bool = False
    """Divide keys by their length before clustering: norms follow frequency, and Euclidean clusters follow norms."""
    seeds: int = 2
    """Runs of k-means with different seeds; all shares are means over them."""
    where: str | None = "position > 0"
    """SQL over the token table. None: all."""
    row_limit: int = 1000
    """Maximum number of tokens, drawn at random among the selected ones."""
    seed: int = 0
    """Random seed of the drawn tokens, of k-means and of the permutations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None:
            check_fields(self, "clusters", at_least=2, whole=True)
        check_fields(self, "seeds", "row_limit", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Ranks the vocabulary for tokens of the store, from its last residual stream and its unembedding.

        Costs seeds x 15 x vocabulary x clusters x d_model multiplications for k-means.

        Raises:
            RequestError: The last layer's resid_post or the unembedding was not recorded, values are not finite, or the
                vocabulary has fewer than 200 tokens.
        """
        unembed = load_unembed(store.path)
        if unembed.vocab < 2 * _RANKS:
            raise RequestError(
                f"a vocabulary of {counted(unembed.vocab, 'token')} has too few ranks; vocabulary-keys needs 200"
            )
        number = self.clusters or min(1024, unembed.vocab // 32)
        if number > unembed.vocab:
            raise RequestError(f"clusters={number} of {counted(unembed.vocab, 'token')}; choose fewer")
        site = f"resid_post.{store.manifest.model.n_layers - 1}"
        store.require(site)
        chosen = selected_rows(store, self.where)
        draw = np.random.default_rng(self.seed)
        if len(chosen) > self.row_limit:
            chosen = np.sort(draw.choice(chosen, self.row_limit, replace=False))
        rows = self.finite_rows(store, [site], chosen)
        ranked = _ranked(store, site, rows.rows, unembed)
        targets = next_tokens(store)[rows.rows]
        documents = store.tokens["document"].to_numpy()[rows.rows]
        parts = []
        with progress("k-means", self.seeds * _ROUNDS, "rounds") as tick:
            for extra in range(self.seeds):
                labels = k_means(unembed.weight, number, seed=self.seed + extra, unit=self.unit, tick=tick)
                parts.append(self._clustered(ranked, labels, targets, documents, self.seed + extra))
        arrays = {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
        means = [part["mean_share"] for part in parts]
        arrays |= {"seed_spread": max(means) - min(means), "clusters": number, "rows": len(rows.rows)}
        arrays |= _cosines(unembed, ranked, documents, self.seed) | {"nonfinite_rows": len(rows.left_out)}
        names = ("share_main", "share_main_low", "share_main_high", "share_permuted")
        full = {name: np.full(_RANKS - 1, np.nan) for name in names}
        for name, values in full.items():
            values[_MAIN - 1 :] = arrays[name]
        data = dataset(self.variables, arrays | full, {"rank": np.arange(2, _RANKS + 1)})
        table = data[["share_main", "share_permuted", "cosine"]].to_dataframe().reset_index()
        return self.result(store, data, pd.DataFrame(table), rows)

    def _clustered(
        self, ranked: np.ndarray, labels: np.ndarray, targets: np.ndarray, documents: np.ndarray, seed: int
    ) -> dict[str, Any]:
        """Shares and ratios for one clustering, beside permuted clusters."""
        main = in_main(ranked, labels)
        permuted = in_main(ranked, np.random.default_rng(seed).permutation(labels))
        hits = ranked[:, _MAIN:] == targets[:, None]
        known = targets >= 0
        row_shares = main.mean(1)
        mean, low, high = _interval(row_shares, documents, self.seed)
        ratio = _ratio(main[known], hits[known], documents[known], self.seed)
        candidates = [main[known], ~main[known]]
        shares = [float(hits[known][part].mean()) if part.any() else np.nan for part in candidates]
        return {
            "share_main": main.mean(0),
            **_ends("share_main", main, documents, self.seed),
            "share_permuted": permuted.mean(0),
            "mean_share": mean,
            "mean_share_low": low,
            "mean_share_high": high,
            "next_main": shares[0],
            "next_other": shares[1],
            "next_ratio": ratio[0],
            "next_ratio_low": ratio[1],
            "next_ratio_high": ratio[2],
            "next_ratio_permuted": _ratio(permuted[known], hits[known], documents[known], self.seed)[0],
        }

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the share in main clusters beside permuted ones, the rank correlation, and the next-token ratio."""
        data = result.data
        value = {str(name): float(data[name]) for name in data.data_vars if not data[name].dims}
        permuted = float(data["share_permuted"].mean())
        ends = [100 * value[f"mean_share_{end}"] for end in ("low", "high")]
        interval = "" if np.isnan(ends[0]) else f"95 % CI [{ends[0]:z.0f}, {ends[1]:z.0f}]; "
        text = (
            f"{100 * value['mean_share']:z.0f} % of the tokens of ranks 11 to 100 are in the clusters of the first 10 "
            f"({interval}permuted clusters {100 * permuted:z.0f} %; seeds of k-means differ by "
            f"{100 * value['seed_spread']:z.0f} points), {counted(value['clusters'], 'cluster')}; rank and "
            "cosine to the "
            f"first key correlate by {value['spearman']:+z.2f}; {_ratio_text(value)}."
        )
        return with_note(text, result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "share", the share in main clusters by rank, and "cosine"."""
        data = result.data
        ranks = data["rank"].to_numpy()
        about = f"{counted(data['rows'], 'token')}, {counted(data['clusters'], 'cluster')}"
        later = ranks > _MAIN
        ends = {name: recorded_ends(data, name) for name in ("share_main", "cosine")}
        share, cosine = (about + "; band: 95 % CI over documents" * (ends[name] is not None) for name in ends)
        return {
            "share": _curves(
                {
                    "main clusters": data["share_main"].to_numpy()[later],
                    "clusters permuted": data["share_permuted"].to_numpy()[later],
                },
                ranks[later],
                title="Tokens from the clusters of the first ten, by rank",
                subtitle=f"{share}; mean of {result.provenance['settings']['seeds']} seeds of k-means",
                names=("rank", "share of tokens"),
                ends=ends["share_main"] and tuple(end[later] for end in ends["share_main"]),
            ),
            "cosine": _curves(
                {
                    "key of this rank": data["cosine"].to_numpy(),
                    "random key": np.full(len(ranks), float(data["cosine_random"])),
                },
                ranks,
                title="Cosine of a key to the key of the first token, by rank",
                subtitle=cosine,
                names=("rank", "cosine"),
                ends=ends["cosine"],
            ),
        }


def _ratio_text(value: Mapping[str, float]) -> str:
    if np.isnan(value["next_ratio"]):
        return "no candidate of ranks 11 to 100 is the next token, or all are in main clusters"
    low, high = value["next_ratio_low"], value["next_ratio_high"]
    interval = "" if np.isnan(low) else f"95 % CI [{low:z.2f}, {high:z.2f}], "
    return (
        f"at equal rank a candidate in a main cluster is the next token {value['next_ratio']:z.2f} times as often "
        f"({interval}permuted {value['next_ratio_permuted']:z.2f})"
    )


def _ranked(store: Store, site: str, rows: np.ndarray, unembed: Unembed) -> Int[np.ndarray, "row rank"]:
    """Ids of the 100 tokens with the highest logits of each row, the highest first."""
    parts = []
    for block in blocks(len(rows), unembed.vocab):
        logits = unembed(store[site][rows[block]])
        parts.append(logits.topk(_RANKS).indices)
    return torch.cat(parts).numpy()


def in_main(ranked: Int[np.ndarray, "row rank"], labels: Int[np.ndarray, " token"]) -> np.ndarray:
    """Returns which tokens of ranks 11 to 100 are in a cluster of the first 10, axes (row, rank)."""
    clusters = labels[ranked]
    return (clusters[:, _MAIN:, None] == clusters[:, None, :_MAIN]).any(2)


def _interval(values: Float[np.ndarray, " row"], documents: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Mean and its 95 % interval over documents."""
    interval = clustered_interval(values, documents, resamples=_RESAMPLES, seed=seed)
    return float(values.mean()), interval.low, interval.high


def _ends(name: str, values: np.ndarray, documents: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The ends of the 95 % intervals over documents of the means of columns, by their names in the result."""
    low, high = clustered_ends(values, documents, resamples=_RESAMPLES, seed=seed)
    return {f"{name}_low": low, f"{name}_high": high}


def _ratio(main: np.ndarray, hits: np.ndarray, documents: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Mantel-Haenszel ratio of hits in and out of main clusters over ranks, and its interval over documents."""
    unique, index = np.unique(documents, return_inverse=True)
    if not len(unique):  # no token has a next one, as in a store of last tokens
        return float("nan"), float("nan"), float("nan")
    counts = np.zeros((4, len(unique), hits.shape[1]))
    for place, values in enumerate((main & hits, ~main & hits, main, ~main)):
        np.add.at(counts[place], index, values)

    def ratio(weight: np.ndarray) -> float:
        hit_in, hit_out, in_, out = np.einsum("d,cdr->cr", weight, counts)
        total = np.maximum(in_ + out, 1)
        below = (hit_out * in_ / total).sum()
        return float((hit_in * out / total).sum() / below) if below else float("nan")

    draw = np.random.default_rng(seed)
    drawn = draw.multinomial(len(unique), np.full(len(unique), 1 / max(1, len(unique))), size=_RESAMPLES)
    low, high = central([ratio(weight) for weight in drawn]) if len(unique) > 1 else (float("nan"), float("nan"))
    return ratio(np.ones(len(unique))), low, high


def _cosines(unembed: Unembed, ranked: np.ndarray, documents: np.ndarray, seed: int) -> dict[str, Any]:
    """Cosine to the first key by rank, that of random keys, and the rank correlation with its interval."""
    units = torch.nn.functional.normalize(unembed.weight, dim=1)
    ids = torch.as_tensor(ranked)
    first = units[ids[:, 0]]
    cosine = torch.stack([(units[ids[:, rank]] * first).sum(1) for rank in range(1, _RANKS)], 1).double().numpy()
    random_keys = torch.as_tensor(np.random.default_rng(seed).integers(len(units), size=len(ranked)))
    ranks, order = np.arange(_RANKS - 1.0), rankdata(cosine, axis=1)
    x, y = ranks - ranks.mean(), order - order.mean(1, keepdims=True)
    size = np.sqrt((x @ x) * np.square(y).sum(1))
    correlations = np.where(size > 0, y @ x / np.maximum(size, 1e-300), 0.0)
    mean, low, high = _interval(correlations, documents, seed)
    return {
        "cosine": cosine.mean(0),
        **_ends("cosine", cosine, documents, seed),
        "cosine_random": float((units[random_keys] * first).sum(1).mean()),
        "spearman": mean,
        "spearman_low": low,
        "spearman_high": high,
    }


def k_means(
    rows: Float[Tensor, "row d"],
    clusters: int,
    *,
    seed: int,
    rounds: int = 15,
    unit: bool = False,
    tick: Callable[[int], None] = lambda _: None,
) -> Int[np.ndarray, " row"]:
    """Returns the cluster of each row, by Euclidean distance from centres that begin at random rows.

    An empty cluster takes the row that is farthest from its centre. Costs rounds x rows x clusters x d multiplications.

    Args:
        rows: The rows.
        clusters: Number of clusters, at most as many as rows.
        seed: Random seed of the first centres.
        rounds: Maximum number of rounds; it ends where no row changes its cluster.
        unit: Divide rows, and centres, by their length: spherical k-means.
        tick: Called with 1 after each round.
    """
    x = torch.nn.functional.normalize(rows.float(), dim=1) if unit else rows.float()
    first = np.random.default_rng(seed).choice(len(x), clusters, replace=False)
    centres = x[torch.as_tensor(first)].clone()
    labels = torch.full((len(x),), -1)
    for _ in range(rounds):
        new, gap = _assign(x, centres)
        tick(1)
        if torch.equal(new, labels):
            break
        labels = new
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        counts = labels.bincount(minlength=clusters)
        empty = (counts == 0).nonzero()[:, 0]
        centres = sums / counts.clamp_min(1)[:, None]
        centres[empty] = x[gap.argsort(descending=True)[: len(empty)]]
        centres = torch.nn.functional.normalize(centres, dim=1) if unit else centres
    return labels.numpy()


def _assign(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, and the squared distance to it less the row's own length."""
    sizes = centres.square().sum(1)
    parts = [(sizes - 2 * block @ centres.T).min(1) for block in x.split(max(1, _BLOCK // len(centres)))]
    nearest = torch.cat([part.indices for part in parts])
    return nearest, torch.cat([part.values for part in parts]) + x.square().sum(1)


def _curves(
    curves: Mapping[str, np.ndarray], x: np.ndarray, title: str, subtitle: str, names: tuple[str, str], ends: Any
) -> Any:
    """A line with the ends of its interval, and its control, over common horizontal values; `names` title the axes."""
    import plotly.graph_objects as go

    lines = [
        go.Scatter(x=x, y=y, mode="lines", name=name, line=line, hovertemplate="%{x}: %{y:.3f}")
        for (name, y), line in zip(
            curves.items(), ({"color": CATEGORIES[0]}, {"color": NEUTRAL, "dash": "dash"}), strict=True
        )
    ]
    figure = ThemedFigure([*band_traces(lines[0], ends), lines[1]])
    figure.update_layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        height=460,
        width=760,
        margin={"t": 130},
    )
    figure.update_xaxes(title=names[0])
    return figure.update_yaxes(title=names[1])
