"""Token erasure: last tokens of multi-token words lose the information about their tokens (Feucht et al. 2024).

Linear probes read the token at t + i from the hidden state at t. At the last tokens of words of several tokens their
accuracy drops from early to late layers; at other tokens it does not. The drop, as a score of spans, segments a text
into the model's implicit vocabulary:

    delta(t, i) = p_i^early(x_{t+i} | h_t) - p_i^late(x_{t+i} | h_t)
    psi(p, q)   = [ delta(q, 0) + sum_{t=p..q} sum_{i in -2, -1} s(t, i) delta(t, i) ] / (1 + m)

with s = -1 where t + i lies before p, else 1, and m the number of terms in the sum; terms before the start of the text
are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    SCORED,
    SIGNED,
    TEMPLATE,
    LayerProbe,
    Model,
    RequestError,
    Result,
    SoftmaxFit,
    SoftmaxProbes,
    Store,
    Variable,
    Words,
    axis_title,
    check_fields,
    clustered_means,
    dataset,
    erasure_scores,
    find_words,
    fit_softmax,
    integer_step,
    intervals,
    label,
    model_label,
    note_few_rows,
    plain_torch,
    points_text,
    progress,
    segment,
    selected_rows,
    split_by_document,
    tokens_at,
    usable_device,
    with_interval,
    with_note,
)

_SHOWN = 40
_GROUPS = ("last", "control")
_GROUP, _OFFSET = ("group", "offset"), ("offset",)
_ACCURACY = (*_GROUP, "layer")
_SHARE = "share of tokens"

VARIABLES = (
    *with_interval(
        Variable(
            "accuracy", _ACCURACY, _SHARE, "covered test tokens whose token at this offset is the probe's top token"
        )
    ),
    Variable("tokens", _GROUP, "tokens", "covered test tokens: the training rows have their token at this offset"),
    Variable("coverage", _GROUP, _SHARE, "test tokens that are covered, of those with a token at this offset"),
    *with_interval(
        Variable(
            "fall", _OFFSET, _SHARE, "drop of accuracy from layer `early` to `late` at last tokens minus control", "0"
        )
    ),
    *with_interval(
        Variable("fall_from_best", _OFFSET, _SHARE, "the same drop from layer `best` instead of `early`", "0")
    ),
    Variable(
        "best", _OFFSET, "layer", "layer before `late` with the best accuracy at last tokens of validation documents"
    ),
    Variable("training_rows", (), "tokens", "tokens that the probes are trained on"),
    Variable("early", (), "layer", "layer from which erasure is measured"),
    Variable("late", (), "layer", "layer to which erasure is measured"),
    Variable("segments", (), "segments", "segments of several tokens"),
    Variable("words", (), "words of several tokens", "words of several tokens in the test documents"),
    Variable("precision", (), "share of segments", "segments of several tokens that are words"),
    Variable("recall", (), "share of words", "words of several tokens that are segments"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class TokenErasure(LayerProbe):
    """Do last tokens of words erase the tokens before them, and which spans of the text behave like words?"""

    name: ClassVar[str] = "token-erasure"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Feucht et al. 2024, Token erasure, arXiv 2406.20086",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "control group": "tokens outside of words of several tokens: `fall` is the drop at last tokens beyond theirs",
        "fall_low": "lower end of the 95 % interval of `fall` over documents, above 0 if there is erasure",
        "random weights": "the same architecture with random weights, where `fall` is near 0",
    }

    site: str = "resid_post"
    """Kind of site to read at every recorded layer."""
    where: str | None = None
    """SQL condition over the token table that selects the tokens to read. None: all except special tokens."""
    offsets: tuple[int, ...] = (-3, -2, -1, 0, 1)
    """Offsets of the tokens that are read from a state; the erasure score needs 0, -1 and -2."""
    spans: str = "word"
    """Label whose spans are the words; if it was not recorded, words begin at a token with a leading space."""
    early: int | None = None
    """Layer from which erasure is measured. None: L / 32 rounded, layer 1 of 32 in the paper."""
    late: int | None = None
    """Layer to which erasure is measured. None: 9 L / 32 rounded, layer 9 of 32 in the paper, at least `early` + 1."""
    longest: int = 16
    """Maximum tokens of a span that is scored; the paper scores all lengths."""
    held_out: float = 0.3
    """Share of the documents used for testing; half as many are used for early stopping."""
    epochs: int = 8
    """Maximum training epochs."""
    batch: int = 1024
    """Batch size in rows."""
    learning_rate: float = 1e-2
    """AdamW learning rate, decayed linearly to 0."""
    weight_decay: float = 1e-3
    """AdamW weight decay."""
    resamples: int = 1000
    """Bootstrap resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the document split, the order of rows and the bootstrap."""
    device: str | None = None
    """Device for training and testing: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "longest", "epochs", "batch", "resamples", at_least=1)
        check_fields(self, "learning_rate", "weight_decay", at_least=0, below=float("inf"))
        check_fields(self, "held_out", above=0, below=0.6)
        if not self.offsets or len(set(self.offsets)) < len(self.offsets):
            raise RequestError(f"offsets must be one or more different whole numbers, not {self.offsets}")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Trains probes on some documents, tests them on others, and segments the test documents.

        Group "last" holds last tokens of words of two or more tokens, at the offsets that stay inside the word or lie
        after it; "control" holds all tokens outside of such words. Words that a sequence border cuts are in neither.
        Only covered tokens count, whose target some training row has: no probe can predict another. With 0, -1 and -2
        among the offsets, `table` has one line per segment: text, psi (-1 to 1; 0: no erasure, as where a target is not
        covered), tokens, first row, whether it is a word, and whether it touches a word that is cut.

        Costs layers x offsets x epochs x rows x 3 products with a map from d_model to the distinct tokens; memory is
        one batch of logits, one layer's maps, and 5 bytes per layer, offset and held-out token.

        Raises:
            RequestError: A site or layer was not recorded, values are NaN or infinite, the model is not causal, or
                fewer than three documents are selected.
        """
        layers, labels = self.recorded(store, self.site)
        early, late = self._layers(store, layers)
        checked = self.finite_rows(store, labels, selected_rows(store, self.where or "NOT is_special"))
        rows = checked.rows
        documents = store.tokens["document"].to_numpy()[rows]
        parts = split_by_document(documents, self.held_out, purpose="token erasure", seed=self.seed)
        training, validation, tested = (rows[part] for part in parts)
        targets = np.stack([tokens_at(store, offset) for offset in self.offsets])
        hits, likelihoods = self._read_layers(store, labels, training, validation, tested, targets)
        tested_hits, validation_hits = np.split(hits, [len(tested)], axis=2)
        words, source = find_words(store, self.spans)
        groups, covered = _covered(words, tested, targets, training, self.offsets)
        at_early, at_late = layers.index(early), layers.index(late)
        last_tokens = _covered(words, validation, targets, training, self.offsets)[1][0]
        best = (validation_hits[:at_late] & last_tokens).sum(2).argmax(0)
        arrays = self._accuracy(tested_hits, covered, documents[parts[2]], (at_early, at_late), best)
        with np.errstate(invalid="ignore"):  # a group without tokens
            arrays["coverage"] = np.divide(covered.sum(2), groups.sum(2))
        arrays |= {"training_rows": len(training), "early": early, "late": late, "best": np.array(layers)[best]}
        table = pd.DataFrame()
        if set(SCORED) <= set(self.offsets):
            deltas = likelihoods[at_early] - likelihoods[at_late]
            delta = {offset: deltas[at, : len(tested)] for at, offset in enumerate(self.offsets)}
            table = _segments(store, tested, delta, words, self.longest)
            arrays |= _agreement(table, words, tested)
        coords = {"group": list(_GROUPS), "offset": list(self.offsets), "layer": layers}
        data = dataset(VARIABLES, arrays, coords)
        data.attrs = {"spans": source}
        return self.result(store, data, table, checked, [note_few_rows(len(training), store[labels[0]].shape[1])])

    def _read_layers(
        self,
        store: Store,
        labels: list[str],
        training: Int[np.ndarray, " training_row"],
        validation: Int[np.ndarray, " validation_row"],
        tested: Int[np.ndarray, " test_row"],
        targets: Int[np.ndarray, "offset store_row"],
    ) -> tuple[Bool[np.ndarray, "layer offset row"], Float[np.ndarray, "layer offset row"]]:
        """Fits the probes of each layer; hits and likelihoods of the targets on the test rows, then validation rows."""
        rows = np.concatenate([tested, validation])
        hits, likelihoods = [], []
        device = usable_device(self.device)
        settings = SoftmaxFit(self.epochs, self.batch, self.learning_rate, self.weight_decay, self.seed)
        steps = len(labels) * self.epochs * -(-len(training) // self.batch)
        with progress("token erasure", steps, "steps") as tick:
            for site in labels:

                def states(ids: np.ndarray, site: str = site) -> Tensor:
                    return store[site][ids].float().to(device)

                split = (training, targets[:, training], validation, targets[:, validation])
                probes = fit_softmax(states, *split, settings, tick=tick)
                right, likelihood = _read(probes, states, rows, targets[:, rows], self.batch)
                hits.append(right)
                likelihoods.append(likelihood.astype(np.float32))
        return np.stack(hits), np.stack(likelihoods)

    def _layers(self, store: Store, layers: list[int]) -> tuple[int, int]:
        n_layers = store.manifest.model.n_layers
        early = round(n_layers / 32) if self.early is None else self.early
        late = max(early + 1, round(9 * n_layers / 32)) if self.late is None else self.late
        for layer in (early, late):
            if layer not in layers:
                store.require(f"{self.site}.{layer}")
        if early >= late:
            raise RequestError(f"late must come after early, layer {early}, not at layer {late}")
        return early, late

    def _accuracy(
        self,
        hits: Bool[np.ndarray, "layer offset row"],
        groups: Bool[np.ndarray, "group offset row"],
        document: Int[np.ndarray, " row"],
        scored: tuple[int, int],
        best: Int[np.ndarray, " offset"],
    ) -> dict[str, np.ndarray]:
        """Means over tokens with intervals over documents; groups share resamples, so that their drops compare."""
        values = np.where(groups[:, :, None], hits.transpose(1, 0, 2)[None], np.nan)  # group offset layer row
        shape, rows = values.shape[:3], values.shape[3]
        flat = values.reshape(-1, rows).T
        mean, resampled = clustered_means(flat, document, resamples=self.resamples, seed=self.seed)
        mean, resampled = mean.reshape(shape), resampled.reshape(-1, *shape)
        early, late = scored
        arrays = {"accuracy": mean, "tokens": groups.sum(2)}
        arrays["accuracy_low"], arrays["accuracy_high"] = intervals(resampled)
        for name, start in {"fall": np.full_like(best, early), "fall_from_best": best}.items():
            at = (..., np.arange(len(best)), start)
            drop, resampled_drop = mean[at] - mean[..., late], resampled[at] - resampled[..., late]
            arrays[name] = drop[0] - drop[1]
            low_high = intervals(resampled_drop[:, 0] - resampled_drop[:, 1])
            arrays[f"{name}_low"], arrays[f"{name}_high"] = low_high
        return arrays

    @staticmethod
    def headline(result: Result) -> str:
        """Returns whether last tokens erase the token before, the drops against the control, and the segmentation."""
        data = result.data
        offset = -1 if -1 in data["offset"] else int(data["offset"][0])
        here = data.sel(offset=offset)
        late = int(data["late"])
        starts = {"fall": int(data["early"])} | ({"fall_from_best": int(here["best"])} if "best" in data else {})
        parts, erased = [], False
        for name, start in starts.items():
            last, control = (
                [100 * float(here["accuracy"].sel(group=group, layer=layer)) for layer in (start, late)]
                for group in _GROUPS
            )
            fall = [100 * float(here[f"{name}{end}"]) for end in ("", "_low", "_high")]
            erased |= last[0] > last[1] and fall[1] > 0
            parts.append(
                f"layers {start} to {late}: last tokens of words {last[0]:.0f} to {last[1]:.0f} %, control "
                f"{control[0]:.0f} to {control[1]:.0f} %, drop beyond the control's {points_text(*fall)}"
            )
        parts = list(dict.fromkeys(parts))  # the early layer may be the best
        finding = "Token erasure" if erased else "No token erasure"
        if np.isnan(float(here["fall_low"])):
            finding = "Token erasure not decided"
        if not int(here["tokens"].min()):
            finding, parts = "Token erasure not measured", ["where a group has no token to compare"]
        texts = [f"{finding} at offset {offset:+d}, {'; '.join(parts)}."]
        if "coverage" in data:
            share = [f"{100 * float(here['coverage'].sel(group=group)):.0f} % of {group}" for group in _GROUPS]
            texts.append(f"Targets in the training documents: {share[0]} tokens, {share[1]} tokens.")
        if "precision" in data:
            texts.append(
                f"{int(data['segments']):,} segments of several tokens: precision {float(data['precision']):.2f}, "
                f"recall {float(data['recall']):.2f} against {data.attrs['spans']}."
            )
        return with_note(" ".join(texts), result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "accuracy" (by layer), "vocabulary" (spans with the highest psi) and "segments" (of one text)."""
        figures = {"accuracy": _curves(result)}
        if len(result.table):
            figures |= {"vocabulary": _vocabulary(result), "segments": _document(result)}
        return figures


def _covered(
    words: Words,
    rows: Int[np.ndarray, " row"],
    targets: Int[np.ndarray, "offset store_row"],
    training: Int[np.ndarray, " training_row"],
    offsets: tuple[int, ...],
) -> tuple[Bool[np.ndarray, "group offset row"], Bool[np.ndarray, "group offset row"]]:
    """Tokens of each group with a target, and those of them whose target some training row has at some offset."""
    groups = words.groups(rows, offsets) & (targets[:, rows] >= 0)[None]
    return groups, groups & np.isin(targets[:, rows], targets[:, training])[None]


@torch.no_grad()
def _read(
    probes: SoftmaxProbes,
    states: Callable[[np.ndarray], Tensor],
    rows: Int[np.ndarray, " row"],
    targets: Int[np.ndarray, "offset row"],
    batch: int,
) -> tuple[Bool[np.ndarray, "offset row"], Float[np.ndarray, "offset row"]]:
    """Hits of each probe's top token and the target's probability; NaN where there is no target."""
    hits, probability = np.zeros(targets.shape, bool), np.full(targets.shape, np.nan)
    classes = probes.class_of(targets)
    for first in range(0, len(rows), batch):
        part = slice(first, first + batch)
        x = states(rows[part])
        for index in range(len(targets)):
            log = probes.log_probabilities(index, x)
            target = torch.from_numpy(classes[index, part]).to(log.device)
            at = log.gather(1, target.clamp(min=0)[:, None])[:, 0].exp()
            hits[index, part] = (log.argmax(1) == target).cpu().numpy()
            probability[index, part] = torch.where(target >= 0, at, 0.0).cpu().numpy()
    probability[targets < 0] = np.nan
    return hits, probability


# ---- the erasure score ----------------------------------------------------------------------------------


def _segments(
    store: Store,
    tested: Int[np.ndarray, " row"],
    delta: dict[int, Float[np.ndarray, " row"]],
    words: Words,
    longest: int,
) -> pd.DataFrame:
    """One line per segment of each test sequence of a document, in order."""
    tokens = store.tokens.take(tested)
    texts = np.array(tokens["token"].to_pylist(), dtype=object)
    sequence, document = tokens["sequence"].to_numpy(), tokens["document"].to_numpy()
    cuts = np.diff(sequence, prepend=-1) != 0
    cuts |= np.diff(document, prepend=-1) != 0
    cuts |= np.diff(tested, prepend=-1) != 1
    starts = np.flatnonzero(cuts)
    lines = []
    for start, end in zip(starts, np.append(starts[1:], len(tested)), strict=True):
        current, previous, second = (delta[offset][start:end].copy() for offset in SCORED)
        previous[:1] = second[:2] = np.nan  # these terms reach before the first token
        psi = erasure_scores(current, previous, second, longest)
        for first, last in segment(psi):
            first_row, length = int(tested[start + first]), last - first + 1
            lines.append(
                {
                    "sequence": int(sequence[start]),
                    "document": int(document[start]),
                    "first_row": first_row,
                    "text": "".join(texts[start + first : start + last + 1]),
                    "tokens": length,
                    "psi": psi[length - 1, last],
                    "is_span": words.is_word(first_row, length),
                    "cut": bool(words.cut[first_row : first_row + length].any()),
                }
            )
    return pd.DataFrame(lines)


def _agreement(table: pd.DataFrame, words: Words, tested: Int[np.ndarray, " row"]) -> dict[str, int | float]:
    """Precision and recall of the segments of several tokens against words of several tokens, all of them whole."""
    several = table.loc[(table["tokens"] > 1) & ~table["cut"]]
    number = len(np.unique(words.first[tested[(words.length[tested] > 1) & ~words.cut[tested]]]))
    hits = int(several["is_span"].sum())
    return {
        "segments": len(several),
        "words": number,
        "precision": hits / len(several) if len(several) else np.nan,
        "recall": hits / number if number else np.nan,
    }


# ---- figures --------------------------------------------------------------------------------------------


def _curves(result: Result) -> go.Figure:
    """Accuracy by layer, a colour per offset: last tokens solid, control tokens dotted."""
    data = result.data
    figure = go.Figure()
    layers = data["layer"].to_numpy().tolist()
    for index, offset in enumerate(data["offset"].to_numpy().tolist()):
        for group, dash in zip(_GROUPS, ("solid", "dot"), strict=True):
            here = data.sel(offset=offset, group=group)
            mean, low, high = (here[name].to_numpy() for name in ("accuracy", "accuracy_low", "accuracy_high"))
            figure.add_scatter(
                x=layers,
                y=mean,
                name=f"{offset:+d} {group}",
                mode="lines+markers",
                line={"dash": dash, "color": CATEGORIES[index % len(CATEGORIES)]},
                error_y={"array": high - mean, "arrayminus": mean - low, "thickness": 1, "width": 3},
                hovertemplate="layer %{x}: %{y:.3f}",
            )
    groups = (
        "solid: last tokens of words of several tokens; dotted: tokens outside of such words; 95 % CI over documents; "
        "targets that the training documents have"
    )
    figure.update_layout(
        template=TEMPLATE,
        title={"text": f"Token erasure in {model_label(result)}", "subtitle": {"text": groups}},
        width=800,
        height=500,
        margin={"t": 140},
    )
    figure.update_xaxes(title="layer", dtick=integer_step(layers))
    title = axis_title(data["accuracy"].attrs, "accuracy for the token at this offset")
    return figure.update_yaxes(title=title, rangemode="tozero")


def vocabulary(table: pd.DataFrame) -> pd.DataFrame:
    """Returns segments of several tokens by text, highest mean psi first, with counts and whether any is a word."""
    several = table.loc[table["tokens"] > 1]
    grouped = several.groupby("text").agg(psi=("psi", "mean"), times=("psi", "size"), is_span=("is_span", "any"))
    return grouped.sort_values(["psi", "times"], ascending=False).reset_index()


def _vocabulary(result: Result) -> go.Figure:
    spans = vocabulary(result.table)
    best = spans.head(_SHOWN)
    names = [f"{label(text, 30)} ({times})" for text, times in zip(best["text"], best["times"], strict=True)]
    figure = go.Figure()
    for is_word, name in ((True, "word"), (False, "not a word")):
        chosen = (best["is_span"] == is_word).to_numpy()
        labels = [name for name, keep in zip(names, chosen, strict=True) if keep]
        figure.add_bar(x=best["psi"][chosen], y=labels, name=name, orientation="h")
    subtitle = (
        f"{len(best)} of {len(spans):,} spans of several tokens (occurrences); {label(result.data.attrs['spans'], 60)}"
    )
    figure.update_layout(
        template=TEMPLATE,
        title={"text": f"Implicit vocabulary of {model_label(result)}", "subtitle": {"text": subtitle}},
        width=760,
        height=200 + 18 * len(best),
        margin={"t": 110},
    )
    figure.update_xaxes(title="erasure score psi, mean over the test documents")
    return figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)


def _document(result: Result) -> go.Figure:
    """Segments of the first test sequence, one bar each: length in tokens, colour psi."""
    table = result.table
    segments = table.loc[table["sequence"] == table["sequence"].iloc[0]]
    total, segments = len(segments), segments.head(_SHOWN)
    colour = {"color": segments["psi"], "cmin": -1, "cmid": 0, "cmax": 1, "colorscale": SIGNED, "showscale": True}
    figure = go.Figure(
        go.Bar(
            x=segments["tokens"],
            y=[f"{place:>3} {label(text, 30)}" for place, text in enumerate(segments["text"])],
            orientation="h",
            marker={**colour, "colorbar": {"title": {"text": "erasure score psi", "side": "right"}}},
            customdata=np.stack([segments["psi"], segments["is_span"]], 1),
            hovertemplate="psi %{customdata[0]:.3f}, word: %{customdata[1]}<extra></extra>",
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Segmentation of sequence {int(segments['sequence'].iloc[0])} by {model_label(result)}",
            "subtitle": {"text": f"the first {len(segments)} of {total:,} segments"},
        },
        width=760,
        height=160 + 18 * len(segments),
        margin={"t": 110},
    )
    figure.update_xaxes(title="length (tokens)", dtick=1)
    return figure.update_yaxes(autorange="reversed")
