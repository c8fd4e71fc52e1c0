"""Semantic axes: directions between opposite words in a table of embeddings, and what moving along them does.

An axis is the mean difference of pairs of opposite words (good − bad, nice − awful, ...), of length 1; every word is
one token with a space before it. Frequency is regressed out of the rows first: the logarithm of the token id stands for
the rank. Measured are

    held_out     share of pairs that the axis of the other pairs puts in order; 0.5 without meaning
    alignment    cosine of two axes
    components   share of three principal components in the projections of words on the axes, beside random words' and
                 random axes of the same mutual cosines
    effect       change of the log-odds of an axis's poles as the next word when a noun is moved along another axis

That a shift along a moves the projection on b by their cosine is an identity; the effect is of the model's output, so
it is not. Ratings of words by people may be given; their correlation with the projections stands beside random axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.probing import (
    NEUTRAL,
    SIGNED,
    Model,
    RequestError,
    Result,
    Store,
    ThemedFigure,
    Variable,
    Vocabulary,
    WeightsProbe,
    axis_effects,
    category_points,
    central,
    check_fields,
    colour_bar,
    counted,
    dataset,
    interval_suffix,
    label,
    labelled_scatter,
    plain_torch,
    read_poles,
    read_vocabulary,
    resampled_means,
    wilson,
    with_interval,
    with_note,
)

_WORD = re.compile(r" [a-z]{3,}")
_LEAST = 3  # axes
_WORDS, _FREQUENT, _RANDOM, _RESAMPLES = 300, 5000, 20, 1000
_PAIR = ("axis", "other_axis")

VARIABLES = (
    Variable(
        "held_out",
        _PAIR,
        "share of pairs",
        "of the first axis's pairs that the second puts in order; on the diagonal, without the pair itself",
        "0.5",
    ),
    *with_interval(
        Variable("in_order", (), "share of pairs", "held-out pairs in order, of all axes; over axes", "0.5")
    ),
    Variable("alignment", _PAIR, "cosine", "cosine of two axes, frequency regressed out", "0"),
    Variable("alignment_raw", _PAIR, "cosine", "the same without regressing out frequency"),
    Variable(
        "frequency",
        ("axis",),
        "correlation",
        "of the words' projections with the logarithm of their token id, raw",
        "0",
    ),
    Variable("effect", _PAIR, "nats", "change of the second axis's log-odds by a shift along the first; NaN: not run"),
    Variable(
        "effect_alignment", (), "correlation", "of effect and alignment over pairs of different axes", "effect_null"
    ),
    Variable("effect_null", (), "correlation", "97.5 % quantile of its size with the axes of alignment permuted"),
    Variable("components", (), "share of variance", "of three components of words' projections on the axes"),
    Variable("components_axes", (), "share of variance", "the same for random axes of the same mutual cosines"),
    Variable("components_words", (), "share of variance", "the same for random tokens on the axes"),
    Variable("rating", ("axis",), "correlation", "of projections and ratings; NaN without ratings", "rating_null"),
    Variable("rating_low", ("axis",), "correlation", "lower end of its 95 % interval over words"),
    Variable("rating_high", ("axis",), "correlation", "upper end of its 95 % interval over words"),
    Variable("rating_null", ("axis",), "correlation", "95 % quantile of its size for axes between random words"),
    Variable("pairs", ("axis",), "pairs", "pairs of single tokens"),
)


@dataclass(frozen=True, eq=False)
class Axes:
    """Axes whose poles are single tokens with a space before them."""

    names: tuple[str, ...]
    pairs: tuple[Int[np.ndarray, "_ 2"], ...]
    """Token ids of each axis's pairs, the positive pole first."""
    left_out: int
    """Pairs of which a word is not one token."""

    @property
    def poles(self) -> set[int]:
        """Token ids of all poles."""
        return {int(id) for pairs in self.pairs for id in pairs.ravel()}


@dataclass(frozen=True)
class SemanticAxes(WeightsProbe):
    """Spans axes between opposite words in the embedding, and measures order, alignment and off-target effects."""

    name: ClassVar[str] = "semantic-axes"
    needs_model: ClassVar[bool] = True
    needs_store: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Kozlowski et al. 2025, arXiv 2508.10003",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "components_axes": "random axes of the same mutual cosines",
        "components_words": "random tokens on the same axes",
        "effect_null": "the axes of alignment permuted",
        "random weights": "a model of the same shape with random weights: pairs are put in order by chance",
    }

    table: str = "embedding"
    """Rows that the axes are made of: embedding, or unembedding."""
    poles: str | None = None
    """JSON file of axes, {"good-bad": [["good", "bad"], ...]}. None: our sixteen axes of four to six pairs."""
    ratings: str | None = None
    """CSV file with columns word, axis, rating. None: no ratings."""
    strength: float = 0.5
    """Shift of a noun along an axis, in norms of its embedding, for the effect on the output. 0: not measured."""
    seed: int = 0
    """Random seed of the random words and axes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "table", one_of=("embedding", "unembedding"))
        check_fields(self, "strength", at_least=0)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store | Model, *, model: Model | None = None) -> Result:
        """Measures the axes of a model, or of the model that a store was recorded from.

        Costs 2 passes over some 100 tokens an axis for the effects, and seconds for all else.

        Raises:
            RequestError: Fewer than three axes have two pairs of single tokens; a file of poles or ratings is wrong.
        """
        vocabulary = read_vocabulary(store, model)
        axes = token_axes(vocabulary, read_poles(self.poles))
        words = single_words(vocabulary)
        if len(axes.names) < _LEAST or len(words) < 30:
            raise RequestError(
                f"{len(axes.names)} axes have two pairs of single tokens in a vocabulary of {len(words):,} words; "
                f"semantic-axes needs {_LEAST}, and 30 words; give poles=, a JSON file of words that it has"
            )
        table = vocabulary.embedding if self.table == "embedding" else vocabulary.unembedding
        if table is None:
            raise RequestError("table='unembedding', and the model has no linear head; choose embedding")
        rows = table.double().numpy()
        arrays, directions = self._geometry(rows, axes, words)
        notes = [f"{counted(axes.left_out, 'pair')} left out, since a word is not one token"] if axes.left_out else []
        size = len(axes.names)
        arrays["effect"] = np.full((size, size), np.nan)
        mover, reason = self._mover(vocabulary, rows) if self.strength else (None, "")
        if mover is not None:
            arrays["effect"] = axis_effects(mover, vocabulary, axes.pairs, directions, self.strength)
        notes += [f"effect not measured: {reason}"] if reason else []
        arrays |= _effect_alignment(arrays["effect"], arrays["alignment"], self.seed)
        arrays |= self._ratings(rows, axes, words, directions)
        names = list(axes.names)
        data = dataset(self.variables, arrays, {"axis": names, "other_axis": names})
        frame = data[[name for name in arrays if data[name].dims == _PAIR]].to_dataframe().reset_index()
        return self.result(store, data, frame, notes)

    @staticmethod
    def _mover(vocabulary: Vocabulary, rows: np.ndarray) -> tuple[Model | None, str]:
        """The model, whose embedding is moved; or None, and why this has no effect on the next word to measure."""
        if vocabulary.unembedding is None:
            return None, "the model does not predict the next word"
        if rows.shape[1] != vocabulary.embedding.shape[1]:
            return None, "rows of the unembedding have another width than those of the embedding, which is moved"
        model, reason = vocabulary.loaded
        if model is not None and not model.site_map.causal:
            return None, "the model does not predict the next word"
        return model, reason

    def _geometry(self, rows: np.ndarray, axes: Axes, words: Mapping[str, int]) -> tuple[dict[str, Any], np.ndarray]:
        """Order, alignment, frequency and components; and the directions of the axes."""
        known = list(words.values())
        poles = np.array(sorted(axes.poles))
        clean, _ = without_frequency(rows, known, poles)
        vectors = dict(zip(poles.tolist(), clean, strict=True))
        raw = axis_directions({int(id): rows[id] for id in poles}, axes.pairs)
        directions = axis_directions(vectors, axes.pairs)
        non_poles = np.array([id for id in known if id not in axes.poles])
        draw = np.random.default_rng(self.seed)
        chosen = np.sort(draw.choice(non_poles[:_FREQUENT], min(_WORDS, len(non_poles[:_FREQUENT])), replace=False))
        plain, rank = without_frequency(rows, known, chosen)
        tokens = np.sort(draw.choice(len(rows), min(_WORDS, len(rows)), replace=False))
        random_tokens, _ = without_frequency(rows, known, tokens)
        seeds = draw.integers(1 << 31, size=_RANDOM)
        drawn = [component_share(plain @ random_axes(plain, directions, int(seed)).T) for seed in seeds]
        projections = (rows[chosen] - rows[chosen].mean(0)) @ raw.T
        return {
            "held_out": (order := held_out_order(vectors, axes.pairs)),
            **_in_order(np.diag(order), np.array([len(pairs) for pairs in axes.pairs]), self.seed),
            "alignment": directions @ directions.T,
            "alignment_raw": raw @ raw.T,
            "frequency": np.array([_correlation(column, rank) for column in projections.T]),
            "components": component_share(plain @ directions.T),
            "components_axes": float(np.mean(drawn)),
            "components_words": component_share(random_tokens @ directions.T),
            "pairs": np.array([len(pairs) for pairs in axes.pairs]),
        }, directions

    def _ratings(
        self, rows: np.ndarray, axes: Axes, words: Mapping[str, int], directions: np.ndarray
    ) -> dict[str, Any]:
        """Correlation of ratings and projections with its interval and null, of the axes that have ratings."""
        names = ("rating", "rating_low", "rating_high", "rating_null")
        values = {name: np.full(len(axes.names), np.nan) for name in names}
        if self.ratings is None:
            return values
        table, known = _read_ratings(self.ratings), list(words.values())
        draw = np.random.default_rng(self.seed)
        for place, name in enumerate(axes.names):
            poles = {int(id) for id in axes.pairs[place].ravel()}
            part = table.loc[(table["axis"] == name) & table["word"].isin(list(words))]
            part = part.loc[[words[word] not in poles for word in part["word"]]]  # a pole would be rated by itself
            if len(part) < 5:
                continue
            clean, _ = without_frequency(rows, known, np.array([words[word] for word in part["word"]]))
            rating = part["rating"].to_numpy(np.float64)
            values["rating"][place] = _correlation(clean @ directions[place], rating)
            resampled = []
            for _ in range(_RESAMPLES):
                rows_drawn = draw.integers(len(part), size=len(part))
                resampled.append(_correlation(clean[rows_drawn] @ directions[place], rating[rows_drawn]))
            values["rating_low"][place], values["rating_high"][place] = central(resampled, len(part))
            pool, _ = without_frequency(rows, known, np.array(known))
            pairs = draw.integers(len(pool), size=(_RESAMPLES, 2))
            null = [abs(_correlation(clean @ (pool[a] - pool[b]), rating)) for a, b in pairs if a != b]
            values["rating_null"][place] = np.nanquantile(null, 0.95)
        return values

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the share of held-out pairs in order beside other axes', the components, and the effect's law."""
        data = result.data
        order, pairs = data["held_out"].to_numpy(), data["pairs"].to_numpy()
        shares = [100 * float(data[name]) for name in ("components", "components_axes", "components_words")]
        right, number = float((np.diag(order) * pairs).sum() / pairs.sum()), int(pairs.sum())
        off_axis = float(order[~np.eye(len(order), dtype=bool)].mean())
        ends = ""
        if "in_order_low" in data:
            low, high = (100 * float(data[f"in_order_{end}"]) for end in ("low", "high"))
            ends = interval_suffix(low, high, ".0f")
        alike = np.abs(data["alignment"].to_numpy()[~np.eye(len(order), dtype=bool)]).mean()
        text = (
            f"{len(order)} axes put {100 * right:z.0f} % of {counted(number, 'held-out pair')} in order{ends} (axes "
            f"of other meanings {100 * off_axis:z.0f} %, chance 50 %); mean |cosine| of two axes {alike:z.2f}; three "
            f"components hold {shares[0]:z.0f} % of words' projections (random axes {shares[1]:z.0f} %, random tokens "
            f"{shares[2]:z.0f} %)"
        )
        effect = data["effect"].to_numpy()
        if np.isfinite(effect).all():
            on, off = np.diag(effect).mean(), np.abs(effect[~np.eye(len(effect), dtype=bool)]).mean()
            text += (
                f"; a shift changes the log-odds of its own poles by {on:+z.2f} nats, of others by {off:z.2f} in size; "
                f"off target it correlates with the cosine by {float(data['effect_alignment']):+z.2f} (null below "
                f"{float(data['effect_null']):z.2f})"
            )
        rated = data["rating"].to_numpy()
        if np.isfinite(rated).any():
            null = float(np.nanmean(data["rating_null"]))
            text += f"; ratings correlate by {np.nanmean(rated):+z.2f} on average (random axes below {null:z.2f})"
        return with_note(text + ".", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "alignment", "order", and, where they were measured, "effect" and "ratings"."""
        data = result.data
        names = data["axis"].to_numpy().tolist()
        shares, pairs = np.diag(data["held_out"].to_numpy()), data["pairs"].to_numpy()
        figures = {
            "alignment": _grid(
                data["alignment"].to_numpy(), names, title="Cosine of semantic axes", subtitle="frequency regressed out"
            ),
            "order": category_points(
                {
                    "own axis, pair left out": shares,
                    "mean of other axes": _off_diagonal(data["held_out"].to_numpy()).mean(1),
                },
                names,
                title="Opposite words in order along the axis",
                subtitle=f"{counted(int(pairs.sum()), 'pair')}; chance: 0.5; bars: Wilson's 95 % interval "
                "of the axis's pairs",
                unit="share of pairs",
                line=0.5,
                ends={"own axis, pair left out": wilson(shares, pairs)},
            ),
        }
        effect, cosine = data["effect"].to_numpy(), data["alignment"].to_numpy()
        if np.isfinite(effect).all():
            shifts = [f"{source} on {target}" for source in names for target in names if source != target]
            points = {"other poles": (_off_diagonal(cosine).ravel(), _off_diagonal(effect).ravel(), shifts)}
            points["its own poles"] = (np.diag(cosine), np.diag(effect), names)
            figures["effect"] = labelled_scatter(
                points,
                title="Effect of a shift along an axis on the output",
                subtitle=f"null of the correlation off target: below {float(data['effect_null']):z.2f}",
                names=("cosine of the axes", "change of log-odds (nats)"),
                line=0.0,
            )
        if data["rating"].notnull().any():
            figures["ratings"] = _rated(data.isel(axis=np.flatnonzero(data["rating"].notnull())))
        return figures


def _in_order(share: np.ndarray, pairs: np.ndarray, seed: int) -> dict[str, float]:
    """Share of all pairs that are in order, with its interval over axes."""
    mean, resampled = resampled_means((share * pairs)[:, None], pairs[:, None].astype(float), seed=seed)
    low, high = central(resampled[:, 0], len(pairs))
    return {"in_order": float(mean[0]), "in_order_low": low, "in_order_high": high}


def _rated(data: Any) -> Any:
    """Correlation with ratings by axis, with its interval, beside the largest that random axes reach in 95 %."""
    rating, low, high = (data[f"rating{end}"].to_numpy() for end in ("", "_low", "_high"))
    null = "95 % of axes between random words are below"
    figure = category_points(
        {"axis": rating, null: data["rating_null"].to_numpy()},
        data["axis"].to_numpy().tolist(),
        title="Ratings of words and their projections on the axis",
        subtitle="bars: 95 % interval over words",
        unit="correlation",
        line=0.0,
        ends={"axis": (low, high)},
    )
    return figure.update_traces(marker={"color": NEUTRAL}, selector={"name": null})


def _off_diagonal(values: np.ndarray) -> np.ndarray:
    size = len(values)
    return values[~np.eye(size, dtype=bool)].reshape(size, size - 1)


def _effect_alignment(effect: np.ndarray, alignment: np.ndarray, seed: int) -> dict[str, float]:
    """Correlation over pairs of different axes, and its null with the axes of `alignment` permuted."""
    if not np.isfinite(effect).all():
        return {"effect_alignment": float("nan"), "effect_null": float("nan")}
    flat, draw = _off_diagonal(effect).ravel(), np.random.default_rng(seed)
    orders = (draw.permutation(len(effect)) for _ in range(_RESAMPLES))
    null = [abs(_correlation(flat, _off_diagonal(alignment[np.ix_(order, order)]).ravel())) for order in orders]
    correlation = _correlation(flat, _off_diagonal(alignment).ravel())
    return {"effect_alignment": correlation, "effect_null": float(np.nanquantile(null, 0.975))}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


def _read_ratings(path: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(Path(path))
    except (OSError, ValueError) as error:
        raise RequestError(f"ratings {path!r} cannot be read as CSV: {error}") from error
    missing = [name for name in ("word", "axis", "rating") if name not in table]
    if missing or not pd.api.types.is_numeric_dtype(table["rating"]):
        reason = f"no column {missing[0]}" if missing else "ratings that are no numbers"
        raise RequestError(f"ratings {path!r} has {reason}; give columns word, axis, rating")
    return table.dropna(subset=["word", "axis", "rating"])


def single_words(vocabulary: Vocabulary) -> dict[str, int]:
    """Returns the tokens that are a space and a word of three lower-case letters or more: word to id, by id."""
    words: dict[str, int] = {}
    for id in np.flatnonzero(vocabulary.ordinary):
        if _WORD.fullmatch(vocabulary.texts[id]):
            words.setdefault(vocabulary.texts[id][1:], int(id))
    return words


def token_axes(vocabulary: Vocabulary, poles: Mapping[str, Sequence[tuple[str, str]]]) -> Axes:
    """Returns the axes that have two pairs or more of single tokens."""
    ids: dict[str, int] = {}
    for id in np.flatnonzero(vocabulary.ordinary):
        if vocabulary.texts[id].startswith(" "):
            ids.setdefault(vocabulary.texts[id][1:], int(id))
    names, pole_ids, left_out = [], [], 0
    for name, pairs in poles.items():
        present = [(ids[a], ids[b]) for a, b in pairs if a in ids and b in ids]
        left_out += len(pairs) - len(present)
        if len(present) >= 2:
            names.append(name)
            pole_ids.append(np.array(present))
    return Axes(tuple(names), tuple(pole_ids), left_out)


def without_frequency(
    rows: Float[np.ndarray, "token d"], words: Sequence[int], ids: Int[np.ndarray, " chosen"]
) -> tuple[Float[np.ndarray, "chosen d"], Float[np.ndarray, " chosen"]]:
    """Returns rows less what the logarithm of the token id explains of the words' rows, and that logarithm.

    Ids of a vocabulary made of merges follow frequency: the id stands for the rank.
    """
    known = np.asarray(words)[:_FREQUENT]
    rank = np.log(known + 1.0)
    x = rank - rank.mean()
    centre = rows[known].mean(0)
    slope = x @ (rows[known] - centre) / (x @ x)
    chosen = np.log(ids + 1.0)
    return rows[ids] - centre - np.outer(chosen - rank.mean(), slope), chosen


def axis_directions(
    vectors: Mapping[int, Float[np.ndarray, " d"]], pairs: Sequence[Int[np.ndarray, "_ 2"]]
) -> Float[np.ndarray, "axis d"]:
    """Returns the mean difference of each axis's pairs, of length 1."""
    rows = [np.mean([vectors[int(a)] - vectors[int(b)] for a, b in pole_ids], axis=0) for pole_ids in pairs]
    return np.stack([row / max(float(np.linalg.norm(row)), 1e-300) for row in rows])


def held_out_order(
    vectors: Mapping[int, Float[np.ndarray, " d"]], pairs: Sequence[Int[np.ndarray, "_ 2"]]
) -> Float[np.ndarray, "axis other_axis"]:
    """Returns the share of each axis's pairs (first index) that another axis (second) puts in order.

    On the diagonal the pair itself is left out of its axis. 0.5 on average without meaning.
    """
    directions = axis_directions(vectors, pairs)
    shares = np.empty((len(pairs), len(pairs)))
    for row, pole_ids in enumerate(pairs):
        gaps = np.stack([vectors[int(a)] - vectors[int(b)] for a, b in pole_ids])
        shares[row] = (gaps @ directions.T > 0).mean(0)
        rest = gaps.sum(0) - gaps
        shares[row, row] = ((gaps * rest).sum(1) > 0).mean()
    return shares


def component_share(projections: Float[np.ndarray, "word axis"], components: int = 3) -> float:
    """Returns the share of the variance of centred projections in their first principal components."""
    sizes = np.linalg.svd(projections - projections.mean(0), compute_uv=False) ** 2
    return float(sizes[:components].sum() / sizes.sum()) if sizes.sum() else float("nan")


def random_axes(
    rows: Float[np.ndarray, "word d"], like: Float[np.ndarray, "axis d"], seed: int
) -> Float[np.ndarray, "axis d"]:
    """Returns axes between random words, mixed so that their mutual cosines are those of `like`."""
    draw, number = np.random.default_rng(seed), len(like)
    drawn = np.stack([rows[a] - rows[b] for a, b in (draw.choice(len(rows), 2, replace=False) for _ in range(number))])
    values, vectors = np.linalg.eigh(like @ like.T)
    basis = np.linalg.svd(drawn, full_matrices=False)[2][:number]
    if len(basis) < number:
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T @ basis


def _grid(
    values: Float[np.ndarray, "name name"], names: Sequence[str], *, title: str, subtitle: str, unit: str = "cosine"
) -> Any:
    """A heat map of values from -1 to 1 between named things, blue below and orange above 0."""
    import plotly.graph_objects as go

    labels = [label(name) for name in names]
    figure = ThemedFigure(
        go.Heatmap(
            z=values,
            x=labels,
            y=labels,
            colorscale=SIGNED,
            zmid=0,
            zmin=-1,
            zmax=1,
            colorbar=colour_bar(unit),
            hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        height=300 + 22 * len(names),
        width=360 + 26 * len(names),
        margin={"t": 90},
    )
    figure.update_yaxes(autorange="reversed", type="category")
    return figure.update_xaxes(type="category", tickangle=-60)
