"""Token erasure: the last token of a word forgets the tokens it is made of (Feucht et al., arXiv 2406.20086).

Linear probes read the token at t + i off the state at t. On last tokens of words of several tokens their accuracy
falls from early to late layers; on other tokens it does not. The fall, as a score of spans, segments a text into the
words the model itself uses:

    delta(t, i) = p_i^early(x_{t+i} | h_t) - p_i^late(x_{t+i} | h_t)
    psi(p, q)   = [ delta(q, 0) + sum_{t=p..q} sum_{i in -2, -1} s(t, i) delta(t, i) ] / (1 + m)

with s = -1 where t + i lies before p and m the number of terms in the sum; terms before the text's begin are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    ROWS_PER_DIMENSION,
    SIGNED,
    TEMPLATE,
    Model,
    RequestError,
    Result,
    SoftmaxFit,
    SoftmaxProbes,
    Store,
    axis_title,
    clustered_means,
    fit_softmax,
    integer_step,
    intervals,
    label,
    progress,
    provenance,
    recorded_layers,
    selected_rows,
    split_by_document,
    tokens_at,
    usable_device,
)

SCORED = (0, -1, -2)
"""Offsets that the erasure score is made of."""
_SHOWN = 40
_GROUPS = ("last", "control")


@dataclass(frozen=True)
class TokenErasure:
    """Whether last tokens of words forget the tokens before them, and which spans of the text behave like words."""

    name: ClassVar[str] = "token-erasure"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Feucht et al. 2024, Token erasure, arXiv 2406.20086",)
    controls: ClassVar[Mapping[str, str]] = {
        "the control group": "tokens that end no word of several tokens: `fall` is what last tokens lose beyond them",
        "fall_low": "lower end of the 95 % interval over documents of `fall`, which is to be above 0",
        "random weights": "the same architecture with random weights, whose `fall` is near 0",
    }

    site: str = "resid_post"
    """Kind of site to read at every layer."""
    where: str | None = None
    """SQL over the token table: states of which tokens are read. None: all but special tokens."""
    offsets: tuple[int, ...] = (-3, -2, -1, 0, 1)
    """Which tokens are read off a state, counted from its own; the score needs 0, -1 and -2."""
    spans: str = "word"
    """Label whose spans are the words; where it was not recorded, words begin at a token with a space."""
    early: int | None = None
    """Layer from which erasure counts. None: L // 32, the paper's 1 of 32."""
    late: int | None = None
    """Layer to which it counts. None: 9 L / 32, the paper's 9 of 32, and at least the one after `early`."""
    longest: int = 16
    """Tokens of the longest span that is scored; the paper's algorithm scores all."""
    held_out: float = 0.3
    """Share of the documents that are tested on; half as many decide when training ends."""
    epochs: int = 8
    """Most passes over the training rows."""
    batch: int = 1024
    """Rows a step."""
    learning_rate: float = 1e-2
    """Of AdamW, brought to 0 along a line."""
    weight_decay: float = 1e-3
    resamples: int = 1000
    """Draws of documents for the intervals."""
    seed: int = 0
    """Of the choice of documents, the order of rows and the draws."""
    device: str = "cpu"
    """Where probes are trained and read: cpu, cuda."""

    def __post_init__(self) -> None:
        for name, least in (("longest", 1), ("epochs", 1), ("batch", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RequestError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not self.offsets or len(set(self.offsets)) < len(self.offsets):
            raise RequestError(f"offsets must be different whole numbers, one or more, not {self.offsets}")
        if not 0 < self.held_out < 0.6:
            raise RequestError(f"held_out must lie between 0 and 0.6, not {self.held_out}")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Trains probes on some documents and asks the others.

        `data` has over (group, offset, layer): accuracy, 0 to 1, of the token at that offset, with its interval, and
        the tokens it is over; "last" are last tokens of spans of two or more tokens, with the offsets that stay inside
        the span, "control" all tokens outside of such spans. Over (offset): `fall`, how much more accuracy falls from
        `early` to `late` on last tokens than on control tokens, with its interval. Where 0, -1 and -2 are among the
        offsets, `table` has the segments of the tested documents: text, psi (-1 to 1; 0: nothing is erased), tokens,
        first row, and whether the segment is a word; `precision` and `recall` of segments of several tokens.

        Costs layers x offsets x epochs x rows x 3 products with a map from d_model to the tokens met; memory is a
        batch of logits and one layer's maps. Raises RequestError for a site or layer that was not recorded, and for
        fewer than three documents.
        """
        layers, labels = recorded_layers(store, self.site)
        early, late = self._layers(store)
        rows = selected_rows(store, self.where or "NOT is_special")
        parts = split_by_document(
            store.tokens["document"].to_numpy()[rows], self.held_out, purpose="token erasure", seed=self.seed
        )
        training, validation, tested = (rows[part] for part in parts)
        targets = np.stack([tokens_at(store, offset) for offset in self.offsets])
        right = np.zeros((len(layers), len(self.offsets), len(tested)), bool)
        kept: dict[int, Float[np.ndarray, "offset row"]] = {}
        device = usable_device(self.device)
        settings = SoftmaxFit(self.epochs, self.batch, self.learning_rate, self.weight_decay, self.seed)
        steps = len(layers) * self.epochs * -(-len(training) // self.batch)
        with progress("token erasure", steps, "steps") as tick:
            for index, (layer, site) in enumerate(zip(layers, labels, strict=True)):

                def states(ids: np.ndarray, site: str = site) -> Tensor:
                    return store[site][ids].float().to(device)

                split = (training, targets[:, training], validation, targets[:, validation])
                probes = fit_softmax(states, *split, settings, tick=tick)
                right[index], probability = _read(probes, states, tested, targets[:, tested], self.batch)
                if layer in (early, late):
                    kept[layer] = probability
        spans, source = _spans(store, self.spans)
        data = self._accuracy(store, layers, (early, late), right, tested, targets[:, tested], spans)
        data.attrs = {"spans": source, "note": _note(len(training), store[labels[0]].shape[1])}
        data["training_rows"] = ((), len(training), {"units": "tokens"})
        data["early"], data["late"] = ((), early, {"units": "layer"}), ((), late, {"units": "layer"})
        table = pd.DataFrame()
        if set(SCORED) <= set(self.offsets):
            delta = {offset: kept[early][at] - kept[late][at] for at, offset in enumerate(self.offsets)}
            table = _segments(store, tested, delta, spans, self.longest)
            data = data.assign(_agreement(table, spans, tested))
        return Result(self.name, data, table, provenance(store, self))

    def _layers(self, store: Store) -> tuple[int, int]:
        n_layers = store.manifest.model.n_layers
        early = n_layers // 32 if self.early is None else self.early
        late = max(early + 1, round(9 * n_layers / 32)) if self.late is None else self.late
        store.require(f"{self.site}.{early}", f"{self.site}.{late}")
        if early >= late:
            raise RequestError(f"early is layer {early} and late {late}; late must come after early")
        return early, late

    def _accuracy(
        self,
        store: Store,
        layers: list[int],
        scored: tuple[int, int],
        right: Bool[np.ndarray, "layer offset row"],
        tested: Int[np.ndarray, " row"],
        targets: Int[np.ndarray, "offset row"],
        spans: _Spans,
    ) -> xr.Dataset:
        """Means over tokens, resampled by document; groups share their draws, so that falls can be compared."""
        document = store.tokens["document"].to_numpy()[tested]
        groups = spans.groups(tested, self.offsets) & (targets >= 0)[None]
        values = np.where(groups[:, :, None], right.transpose(1, 0, 2)[None], np.nan)  # group offset layer row
        shape = values.shape[:3]
        mean, drawn = clustered_means(
            values.reshape(-1, len(tested)).T, document, resamples=self.resamples, seed=self.seed
        )
        mean, drawn = mean.reshape(shape), drawn.reshape(-1, *shape)
        bounds = intervals(drawn)
        early, late = (layers.index(layer) for layer in scored)
        fall = mean[..., early] - mean[..., late]
        fallen = drawn[..., early] - drawn[..., late]
        more = intervals(fallen[:, 0] - fallen[:, 1])
        share = {"units": "share of tokens"}
        axes = ("group", "offset", "layer")
        return xr.Dataset(
            {
                "accuracy": (axes, mean, share),
                "accuracy_low": (axes, bounds[0], share),
                "accuracy_high": (axes, bounds[1], share),
                "tokens": (("group", "offset"), groups.sum(2), {"units": "tokens"}),
                "fall": (("offset",), fall[0] - fall[1], share),
                "fall_low": (("offset",), more[0], share),
                "fall_high": (("offset",), more[1], share),
            },
            coords={"group": list(_GROUPS), "offset": list(self.offsets), "layer": layers},
        )

    @staticmethod
    def headline(result: Result) -> str:
        """How much more the previous token is forgotten at last tokens than elsewhere, and what was segmented."""
        data = result.data
        offset = -1 if -1 in data["offset"] else int(data["offset"][0])
        here = data.sel(offset=offset)
        early, late = int(data["early"]), int(data["late"])
        curves = ", ".join(
            f"{group} {float(here['accuracy'].sel(group=group, layer=early)):.2f} to "
            f"{float(here['accuracy'].sel(group=group, layer=late)):.2f}"
            for group in _GROUPS
        )
        told = [
            f"accuracy for the token at {offset:+d} from layer {early} to {late}: {curves}; falls "
            f"{float(here['fall']):.2f} more ({float(here['fall_low']):.2f} to {float(here['fall_high']):.2f})"
        ]
        if "precision" in data:
            told.append(
                f"{int(data['segments']):,} segments of several tokens, precision {float(data['precision']):.2f}, "
                f"recall {float(data['recall']):.2f} of {data.attrs['spans']}"
            )
        return "; ".join([*told, *filter(None, [data.attrs["note"]])])

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """ "accuracy": by layer, last tokens against control tokens, a line an offset; "vocabulary": the spans with
        the highest psi; "segments": one document, each segment coloured by its psi."""
        figures = {"accuracy": _curves(result)}
        if len(result.table):
            figures |= {"vocabulary": _vocabulary(result), "segments": _document(result)}
        return figures


# ---- what is read ---------------------------------------------------------------------------------------


@torch.no_grad()
def _read(
    probes: SoftmaxProbes, states: Any, rows: np.ndarray, targets: Int[np.ndarray, "offset row"], batch: int
) -> tuple[Bool[np.ndarray, "offset row"], Float[np.ndarray, "offset row"]]:
    """Whether each probe's top token is the target, and the target's probability; NaN where there is none."""
    right, probability = np.zeros(targets.shape, bool), np.full(targets.shape, np.nan)
    known = probes.class_of(targets)
    for first in range(0, len(rows), batch):
        part = slice(first, first + batch)
        x = states(rows[part])
        for index in range(len(targets)):
            log = probes.log_probabilities(index, x).cpu()
            wanted = torch.from_numpy(known[index, part])
            at = log.gather(1, wanted.clamp(min=0)[:, None])[:, 0].exp()
            right[index, part] = (log.argmax(1) == wanted).numpy()
            probability[index, part] = torch.where(wanted >= 0, at, 0.0).numpy()
    probability[targets < 0] = np.nan
    return right, probability


# ---- words ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spans:
    """Words of the store's texts: for each row the number of its word (-1: none), its first row and its length."""

    number: Int[np.ndarray, " row"]
    first: Int[np.ndarray, " row"]
    length: Int[np.ndarray, " row"]

    def is_one(self, first: int, length: int) -> bool:
        """Whether a word of so many tokens begins at this row."""
        return bool(self.number[first] >= 0 and self.first[first] == first and self.length[first] == length)

    def groups(
        self, rows: Int[np.ndarray, " selected"], offsets: tuple[int, ...]
    ) -> Bool[np.ndarray, "group offset selected"]:
        """Last tokens of words of several tokens, for offsets within the word or after it; tokens of no such word."""
        several = self.length[rows] > 1
        place = rows - self.first[rows]
        last = several & (place == self.length[rows] - 1)
        inside = np.stack([last & (place + offset >= 0) for offset in offsets])
        return np.stack([inside, np.repeat(~several[None], len(offsets), 0)])


def _spans(store: Store, name: str) -> tuple[_Spans, str]:
    """The spans of label `name`, or words found by their spaces, and what to call them."""
    tokens = store.tokens
    column = f"{name}_span"
    document = tokens["document"].to_numpy()
    sequence = tokens["sequence"].to_numpy()
    if column in tokens.column_names:
        number = tokens[column].to_pandas().to_numpy(dtype=float, na_value=-1).astype(np.int64)
        source = f"labelled spans of {name!r}"
    else:
        number = _by_spaces(tokens)
        source = "words by their spaces"
    same = (number[1:] == number[:-1]) & (document[1:] == document[:-1]) & (sequence[1:] == sequence[:-1])
    starts = np.flatnonzero(np.append(True, ~same | (number[1:] < 0)))
    lengths = np.diff(starts, append=len(number))
    return _Spans(
        number, np.repeat(starts, lengths), np.repeat(np.where(number[starts] < 0, 1, lengths), lengths)
    ), source


def _by_spaces(tokens: pa.Table) -> Int[np.ndarray, " row"]:
    """A token begins a word where its text begins with a space or it is not made of letters; -1: no word."""
    texts = tokens["token"].to_pandas().astype(str)
    letters = texts.str.strip().str.fullmatch(r"[^\W\d_]+").to_numpy(dtype=bool)
    begins = texts.str.startswith((" ", "\n", "\t")).to_numpy(dtype=bool) | ~np.append(False, letters[:-1])
    return np.where(letters, np.cumsum(begins & letters), -1)


# ---- the erasure score ----------------------------------------------------------------------------------


def erasure_scores(
    own: Float[np.ndarray, " token"],
    previous: Float[np.ndarray, " token"],
    second: Float[np.ndarray, " token"],
    longest: int,
) -> Float[np.ndarray, "length token"]:
    """psi of every span: line n - 1 has, at its last token q, the span of n tokens that ends there, else NaN.

    `own`, `previous`, `second`: delta(t, 0), delta(t, -1), delta(t, -2), NaN where there is no such token. Prefix sums
    make it one pass for each length: the terms with s = -1 are those of the span's first two tokens.
    """
    n = len(own)
    sums, counts = (np.zeros(n + 1) for _ in range(2))
    for part in (previous, second):
        sums[1:] += np.cumsum(np.nan_to_num(part))
        counts[1:] += np.cumsum(~np.isnan(part))
    before = np.nan_to_num(previous) + np.nan_to_num(second)  # at the first token both lie outside
    after = np.append(np.nan_to_num(second)[1:], 0.0)  # at the next one, two back lies outside
    found = np.full((longest, n), np.nan)
    for length in range(1, min(longest, n) + 1):
        last = np.arange(length - 1, n)
        first = last - length + 1
        total = sums[last + 1] - sums[first] - 2 * before[first]
        if length > 1:
            total -= 2 * after[first]
        terms = counts[last + 1] - counts[first]
        found[length - 1, last] = (np.nan_to_num(own)[last] + total) / (1 + terms)
    return found


def segmented(psi: Float[np.ndarray, "length token"]) -> list[tuple[int, int]]:
    """Spans (first, last) that cover the text: the highest psi first, shorter ones first among equals, no overlap."""
    length, last = np.nonzero(~np.isnan(psi))
    order = np.lexsort((last, length, -psi[length, last]))
    free, taken = np.ones(psi.shape[1], bool), []
    for index in order:
        first = last[index] - length[index]
        if free[first : last[index] + 1].all():
            free[first : last[index] + 1] = False
            taken.append((int(first), int(last[index])))
    return sorted(taken)


def _segments(
    store: Store,
    tested: Int[np.ndarray, " row"],
    delta: dict[int, Float[np.ndarray, " row"]],
    spans: _Spans,
    longest: int,
) -> pd.DataFrame:
    """One line for each segment of each tested sequence of a document, in order."""
    tokens = store.tokens.take(tested)
    texts = np.array(tokens["token"].to_pylist(), dtype=object)
    sequence, document = tokens["sequence"].to_numpy(), tokens["document"].to_numpy()
    cuts = np.diff(sequence, prepend=-1) != 0
    cuts |= np.diff(document, prepend=-1) != 0
    cuts |= np.diff(tested, prepend=-1) != 1
    starts = np.flatnonzero(cuts)
    lines = []
    for start, end in zip(starts, np.append(starts[1:], len(tested)), strict=True):
        parts = (delta[offset][start:end].copy() for offset in SCORED)
        psi = erasure_scores(*_inside(parts), longest)
        for first, last in segmented(psi):
            first_row = int(tested[start + first])
            length = last - first + 1
            lines.append(
                {
                    "sequence": int(sequence[start]),
                    "document": int(document[start]),
                    "first_row": first_row,
                    "text": "".join(texts[start + first : start + last + 1]),
                    "tokens": length,
                    "psi": psi[length - 1, last],
                    "is_span": spans.is_one(first_row, length),
                }
            )
    return pd.DataFrame(lines)


def _inside(parts: Any) -> list[np.ndarray]:
    """Terms that reach before the first token that is read are left out."""
    own, previous, second = parts
    previous[:1] = np.nan
    second[:2] = np.nan
    return [own, previous, second]


def _agreement(table: pd.DataFrame, spans: _Spans, tested: np.ndarray) -> dict[str, Any]:
    """How many segments of several tokens are words of several tokens, and how many of these are found."""
    several = table[table["tokens"] > 1]
    words = np.unique(spans.first[tested[spans.length[tested] > 1]])
    hits = int(several["is_span"].sum())
    share = {"units": "share of segments"}
    return {
        "segments": ((), len(several), {"units": "segments"}),
        "words": ((), len(words), {"units": "words of several tokens"}),
        "precision": ((), hits / len(several) if len(several) else np.nan, share),
        "recall": ((), hits / len(words) if len(words) else np.nan, {"units": "share of words"}),
    }


def _note(rows: int, d_model: int) -> str:
    wanted = ROWS_PER_DIMENSION * d_model
    return "" if rows >= wanted else f"{rows:,} training rows are few for {d_model} dimensions; {wanted:,} are wanted"


# ---- figures --------------------------------------------------------------------------------------------


def _curves(result: Result) -> go.Figure:
    data = result.data
    figure = go.Figure()
    layers = data["layer"].to_numpy().tolist()
    for index, offset in enumerate(data["offset"].to_numpy().tolist()):
        for group, dash in (("last", "solid"), ("control", "dot")):
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
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Token erasure in {label(str(result.provenance['model']), 60)}",
            "subtitle": {"text": "solid: last tokens of words of several tokens; dotted: tokens outside of these"},
        },
        width=760,
        height=460,
        margin={"t": 130},
    )
    figure.update_xaxes(title="layer", dtick=integer_step(layers))
    figure.update_yaxes(
        title=axis_title(data["accuracy"].attrs, "accuracy of the token at this offset"), rangemode="tozero"
    )
    return figure


def vocabulary(table: pd.DataFrame) -> pd.DataFrame:
    """Segments of several tokens by text, highest psi first: mean psi, how often found, whether ever a word."""
    several = table[table["tokens"] > 1]
    grouped = several.groupby("text").agg(psi=("psi", "mean"), times=("psi", "size"), is_span=("is_span", "any"))
    return grouped.sort_values(["psi", "times"], ascending=False).reset_index()


def _vocabulary(result: Result) -> go.Figure:
    spans = vocabulary(result.table)
    best = spans.head(_SHOWN)
    names = [f"{label(line.text, 30)} ({line.times})" for line in best.itertuples()]
    figure = go.Figure()
    for known, shown in ((True, "a word"), (False, "no word")):
        chosen = (best["is_span"] == known).to_numpy()
        figure.add_bar(
            x=best["psi"][chosen],
            y=[name for name, take in zip(names, chosen, strict=True) if take],
            name=shown,
            orientation="h",
        )
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "The implicit vocabulary: spans with the highest erasure score",
            "subtitle": {
                "text": f"{len(best)} of {len(spans):,} spans of several tokens (times found); "
                f"words: {label(result.data.attrs['spans'], 60)}"
            },
        },
        width=760,
        height=200 + 18 * len(best),
        margin={"t": 110},
    )
    figure.update_xaxes(title="psi, mean over the tested documents")
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)
    return figure


def _document(result: Result) -> go.Figure:
    """The first tested sequence, wrapped into lines; width is tokens, colour psi."""
    table = result.table
    shown = table[table["sequence"] == table["sequence"].iloc[0]]
    known, shown = len(shown), shown.head(_SHOWN)
    figure = go.Figure(
        go.Bar(
            x=shown["tokens"],
            y=[f"{place:>3} {label(text, 30)}" for place, text in enumerate(shown["text"])],
            orientation="h",
            marker={"color": shown["psi"], "cmin": -1, "cmid": 0, "cmax": 1, "colorscale": SIGNED}
            | {"showscale": True, "colorbar": {"title": {"text": "psi", "side": "right"}}},
            customdata=np.stack([shown["psi"], shown["is_span"]], 1),
            hovertemplate="psi %{customdata[0]:.3f}, a word: %{customdata[1]}<extra></extra>",
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Segments of sequence {int(shown['sequence'].iloc[0])}, in order",
            "subtitle": {"text": f"{len(shown)} of {known:,} segments"},
        },
        width=760,
        height=160 + 18 * len(shown),
    )
    figure.update_xaxes(title="tokens", dtick=1)
    figure.update_yaxes(autorange="reversed")
    return figure
