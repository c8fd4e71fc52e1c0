"""The future lens: what the model will say several tokens further on, read from one hidden state (Pal et al. 2023).

    linear   W_U LN_f(g h_T)      g: h_T at this layer -> last block's h_(T+N), affine, in closed form
    direct   softmax(A h_T + b)   trained on what the model says at T+N

N = 0 is the ordinary next token, T+1; N = 1 the one after it, T+2. The target is what the model itself says at T+N, its
top token there; the text's own token is counted beside it. Fitted on some documents of the store, read on others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    MAX_TOKENS,
    NEUTRAL,
    NO_TARGET,
    TEMPLATE,
    ActivationArray,
    FutureRows,
    Model,
    RequestError,
    Result,
    Store,
    Unembed,
    axis_title,
    bigrams,
    blocks,
    clustered_means,
    count_shown,
    future_rows,
    integer_step,
    intervals,
    label,
    load_unembed,
    log_probabilities,
    next_tokens,
    note_few_rows,
    progress,
    provenance,
    recorded_layers,
    said_tokens,
    token_grid,
    usable_device,
)

Read = Callable[[Tensor], Tensor]
"""From states `[row, d_model]` to logits `[row, vocab]`."""

_FEW = 10  # documents, below which an interval over them is not to be trusted
_BINS = 10
_BATCH = 256
_GRID_TOKENS = 20

UNITS = {
    "precision": "share of tokens",
    "text_precision": "share of tokens",
    "surprisal": "nats",
    "shuffled_precision": "share of tokens",
    "gain": "share of tokens",
    "gain_low": "share of tokens",
    "gain_high": "share of tokens",
    "validation_precision": "share of tokens",
    "validation_cross_entropy": "nats",
    "bigram_precision": "share of tokens",
    "bigram_text_precision": "share of tokens",
    "bigram_surprisal": "nats",
    "unigram_precision": "share of tokens",
    "best_method": "index on the method axis",
    "best_layer": "layer",
    "ridge": "times the mean variance of a dimension",
    "epochs": "passes over the training rows",
    "calibration": "share of tokens",
    "calibration_rows": "tokens",
    "training_rows": "tokens",
    "validation_rows": "tokens",
    "rows": "tokens",
    "text_rows": "tokens",
    "left_out": "tokens",
    "documents": "documents",
    "top_id": "token id",
    "top_probability": "probability",
    "said_id": "token id",
    "text_id": "token id",
    "token_id": "token id",
    "sequence": "sequence",
    "position": "position",
}

_READ = ("method", "layer", "horizon")
_AXES = {
    **dict.fromkeys(("precision", "text_precision"), (*_READ, "k")),
    **dict.fromkeys(("calibration", "calibration_rows"), (*_READ, "bin")),
    **dict.fromkeys(("surprisal", "shuffled_precision", "gain", "gain_low", "gain_high"), _READ),
    **dict.fromkeys(("validation_precision", "validation_cross_entropy"), _READ),
    **dict.fromkeys(("ridge", "epochs"), ("layer", "horizon")),
    **dict.fromkeys(("top_id", "top_probability", "said_id", "text_id"), ("horizon", "row")),
    **dict.fromkeys(("token_id", "sequence", "position"), ("row",)),
    "documents": (),
}
"""Of the variables that are not over (horizon)."""


@dataclass(frozen=True)
class FutureLens:
    """How much of what the model will say one, two, three tokens past the next can be read from one hidden state."""

    name: ClassVar[str] = "future-lens"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Pal et al. 2023, Future Lens, arXiv 2311.04897",)
    controls: ClassVar[Mapping[str, str]] = {
        "bigram_precision": "what the token at T tells of T+N without any state",
        "unigram_precision": "the most frequent token, which needs nothing",
        "shuffled_precision": "the same maps given the states of other tokens",
    }

    site: str = "resid_post"
    """Kind of site to read at every layer: resid_post, resid_pre, resid_mid."""
    horizons: int = 4
    """N = 0 (the next token) to horizons - 1."""
    where: str | None = None
    """SQL over the token table: which tokens are read from; special ones and a sequence's first never. None: all."""
    held_out: float = 0.25
    """Share of the documents that are tested and not fitted on."""
    validation: float = 0.1
    """Share of the documents that choose the penalty, when training ends, and the best layer."""
    ridge: tuple[float, ...] = (1e-6, 1e-4, 1e-2, 1.0)
    """Penalties to choose from, times the mean variance of a dimension of the states."""
    direct_vocab: int = 5000
    """The direct method is left out for larger vocabularies, each map having d_model x vocab numbers."""
    epochs: int = 4
    """Most passes of the direct method over the training rows; the first that makes no horizon better is the last."""
    learning_rate: float = 2e-3
    """Of the direct method's AdamW, brought to 0 along a line."""
    top_k: int = 10
    """Precision is given at 1 to this many tokens."""
    detail: int = 400
    """Tested tokens, from the first on, of which each prediction is kept for the view."""
    seed: int = 0
    """Of the choice of documents, the order of rows, the shuffles and the resamples."""
    device: str = "cpu"
    """Where it is fitted and read: cpu, cuda."""

    def __post_init__(self) -> None:
        least = {"horizons": 1, "direct_vocab": 0, "epochs": 0, "top_k": 1, "detail": 0, "seed": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise RequestError(f"{name} must be at least {smallest}, not {getattr(self, name)}")
        for name in ("held_out", "validation"):
            if not 0 < getattr(self, name) < 1:
                raise RequestError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not self.held_out + self.validation < 1:
            raise RequestError(
                f"held_out {self.held_out} and validation {self.validation} leave no document to fit on; "
                "together they must be less than 1"
            )
        if not self.ridge or not all(0 < penalty < float("inf") for penalty in self.ridge):
            raise RequestError(f"ridge must be one or more numbers above 0, not {self.ridge}")
        if not 0 < self.learning_rate < float("inf"):
            raise RequestError(f"learning_rate must be above 0, not {self.learning_rate}")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Fits a map for every recorded layer of `site` and every horizon, then reads the tested documents with them.

        Over (method, layer, horizon): precision and text_precision, also over k, the share of tested tokens T whose
        target at T+N, the model's own top token or the text's, is among the first k read (0 to 1; bigram_precision and
        bigram_text_precision are what the token at T tells without a state, unigram_precision what needs nothing);
        surprisal, the mean -ln p_model(token read) at T+N, beside bigram_surprisal; shuffled_precision, with the states
        of other tokens; gain, precision at 1 above the bigram's, and its 95 % interval over documents, gain_low and
        gain_high; calibration over ten bins of the reading's own probability. Over (horizon): best_method and
        best_layer, chosen by validation_precision; rows, text_rows, training_rows, validation_rows, and left_out, the
        tested tokens whose T+N is beyond their document or sequence. Over (horizon, row), for the first `detail` tested
        tokens: top_id and top_probability of the best reading, said_id and text_id (-1: none).

        Costs for every layer and horizon 2 rows d_model^2 products in float64, an eigendecomposition, and as many
        products with W_U as there are penalties for each validation row; the direct method epochs x 3 products with its
        map for each training row. Memory: some blocks of logits, the maps of a layer, 4 bytes a tested row, method,
        layer and horizon. Raises RequestError as the logit lens does, for fewer than three documents, and where no
        document is long enough for the last horizon. Source: Pal et al., arXiv 2311.04897.
        """
        device = usable_device(self.device)
        layers, labels = recorded_layers(store, self.site)
        final = store[f"resid_post.{store.manifest.model.n_layers - 1}"]
        unembed = load_unembed(store.path, device)
        if self.top_k > unembed.vocab:
            raise RequestError(f"top_k is {self.top_k} and the vocabulary has {unembed.vocab}; give at most that")
        rows = future_rows(
            store, self.horizons, self.where, held_out=self.held_out, validation=self.validation, seed=self.seed
        )
        said = said_tokens(final, unembed, rows)
        direct = unembed.vocab <= self.direct_vocab
        methods = ["linear", "direct"] if direct else ["linear"]
        found = _Found(self, (len(methods), len(layers), self.horizons), rows, said, next_tokens(store))
        with progress("future lens", len(layers) * len(methods), "maps") as tick:
            for index, name in enumerate(labels):
                site = store[name]
                maps = [self._linear(site, final, unembed, rows, said)]
                tick(1)
                if direct:
                    maps.append(self._direct(site, unembed, rows, said))
                    tick(1)
                for method, by_horizon in enumerate(maps):
                    for horizon, fitted in enumerate(by_horizon):
                        found.add((method, index, horizon), fitted, site, unembed)
        arrays = found.finish(store, final, unembed)
        arrays["best_layer"] = np.array(layers)[arrays["best_layer"]]
        if not direct:
            del arrays["epochs"]
        coords = {
            "method": methods,
            "layer": layers,
            "horizon": np.arange(self.horizons),
            "k": np.arange(1, self.top_k + 1),
            "bin": (np.arange(_BINS) + 0.5) / _BINS,
            "row": found.kept,
        }
        variables = {
            name: (_AXES.get(name, ("horizon",)), array, {"units": UNITS[name]}) for name, array in arrays.items()
        }
        data = xr.Dataset(variables, coords=coords)
        shown = np.unique(
            np.concatenate([arrays[name].ravel() for name in ("top_id", "said_id", "text_id", "token_id")])
        )
        # JSON in ASCII: netCDF's own strings lose NUL and refuse half a surrogate pair, and a token can hold either
        data.attrs["tokens"] = json.dumps({int(token): unembed.token(int(token)) for token in shown if token >= 0})
        larger = f"left out: vocabulary of {unembed.vocab:,}, direct_vocab is {self.direct_vocab:,}"
        data.attrs["direct"] = "" if direct else larger
        data.attrs["note"] = _note(int(arrays["training_rows"].min()), final.shape[1], int(arrays["documents"]))
        return Result(self.name, data, _table(data), provenance(store, self))

    def _linear(
        self,
        site: ActivationArray,
        final: ActivationArray,
        unembed: Unembed,
        rows: FutureRows,
        said: Int[np.ndarray, " row"],
    ) -> list[_Fitted]:
        """For each horizon, of the ridge maps the one whose reading has the least cross-entropy on validation rows."""
        fitted = []
        for horizon, gram, cross in _moments(site, final, rows, self.horizons, unembed.weight.device):
            validation = rows.at("validation", horizon)
            tried = []
            for penalty, (weight, bias) in zip(self.ridge, ridge_maps(gram, cross, self.ridge), strict=True):
                read = _through(unembed, weight.float(), bias.float())
                tried.append(
                    _Fitted(read, *_score(read, site, validation, said[validation + horizon], unembed), penalty)
                )
            fitted.append(min(tried, key=lambda one: one.cross_entropy))
        return fitted[::-1]

    def _direct(
        self, site: ActivationArray, unembed: Unembed, rows: FutureRows, said: Int[np.ndarray, " row"]
    ) -> list[_Fitted]:
        """For each horizon, softmax regression on what the model says; all horizons take each batch together.

        They start at the unigram distribution, and each keeps its best pass on the validation rows.
        """
        device, horizons = unembed.weight.device, range(self.horizons)
        mean, scale = _standard(site, rows.training, device)
        weight = torch.zeros(len(mean), self.horizons, unembed.vocab, device=device, requires_grad=True)
        bias = torch.stack(
            [_log_unigrams(said[rows.at("training", horizon) + horizon], unembed.vocab) for horizon in horizons]
        ).to(device)
        bias.requires_grad_(True)

        def reader(horizon: int) -> Read:
            own, offset = weight[:, horizon].detach().clone(), bias[horizon].detach().clone()
            return lambda states: (states.float() - mean) * scale @ own + offset

        def validated(horizon: int, epoch: int) -> _Fitted:
            read, validation = reader(horizon), rows.at("validation", horizon)
            return _Fitted(read, *_score(read, site, validation, said[validation + horizon], unembed), epoch)

        best = [validated(horizon, 0) for horizon in horizons]
        optimizer = torch.optim.AdamW([weight, bias], lr=self.learning_rate, weight_decay=0.0)
        steps = max(1, self.epochs * -(-len(rows.training) // _BATCH))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        draw = np.random.default_rng(self.seed)
        for epoch in range(1, self.epochs + 1):
            order = draw.permutation(rows.training)
            for batch in np.split(order, range(_BATCH, len(order), _BATCH)):
                batch = np.sort(batch)
                targets = torch.from_numpy(rows.targets(batch, said, self.horizons)).to(device)
                states = (site[batch].to(device).float() - mean) * scale
                logits = torch.einsum("rd,dhv->rhv", states, weight) + bias
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
                )
                (loss / len(batch)).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            now = [validated(horizon, epoch) for horizon in horizons]
            better = [new.cross_entropy < old.cross_entropy for new, old in zip(now, best, strict=True)]
            best = [new if is_better else old for new, old, is_better in zip(now, best, better, strict=True)]
            if not any(better):
                break
        return best

    @staticmethod
    def headline(result: Result) -> str:
        """What the best layer reads of the token past the next, beside a bigram; of the next, where that was all."""
        data = result.data
        one = data.isel(horizon=min(1, data.sizes["horizon"] - 1))
        at = one.isel(method=int(one["best_method"])).sel(layer=int(one["best_layer"]))
        horizon = int(one["horizon"])
        told = "next" if horizon == 0 else f"{horizon + 1} tokens on"
        gain, low, high = (100 * float(at[name]) for name in ("gain", "gain_low", "gain_high"))
        interval = "no interval: one document" if np.isnan(low) else f"95 % {low:.0f} to {high:.0f}"
        note = data.attrs["note"]
        return (
            f"N = {horizon}: {100 * float(at['precision'][0]):.0f} % of what the model says {told}, "
            f"from layer {int(one['best_layer'])}, {at['method'].item()} "
            f"(bigram {100 * float(one['bigram_precision']):.0f} %, {gain:+.0f} points, {interval})"
            + (f"; {note}" if note else "")
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """ "precision": at 1 by layer and horizon; "view": a text and what is read ahead; "calibration"."""
        figures = {"precision": _precision(result), "calibration": _calibration(result)}
        return {**figures, "view": future_view(result)} if result.data.sizes["row"] else figures


def future_view(result: Result, sequence: int | None = None, first: int = 0, tokens: int = _GRID_TOKENS) -> go.Figure:
    """For each token of a tested sequence and each horizon, the token that is read there by the best layer.

    `sequence`: one of those in `data["sequence"]`, by default the first; `first`: position it begins at; `tokens`:
    1,024 at most. What is left out the subtitle says. Raises RequestError where none of it was kept.
    """
    data = result.data
    names = {int(token): text for token, text in json.loads(data.attrs["tokens"]).items()} | {-1: ""}
    sequence = int(data["sequence"][0]) if sequence is None else sequence
    known = np.flatnonzero((data["sequence"].to_numpy() == sequence) & (data["position"].to_numpy() >= first))
    if not len(known):
        raise RequestError(f"sequence {sequence} from position {first} was not kept; see result.data['sequence']")
    place = known[: min(tokens, MAX_TOKENS)]
    part = data.isel(row=place)
    horizons = part["horizon"].to_numpy().tolist()
    ids = {name: part[name].to_numpy().tolist() for name in ("top_id", "said_id", "text_id")}
    probability = np.where(part["top_id"] < 0, np.nan, part["top_probability"])
    best = [
        (str(data["method"].to_numpy()[int(m)]), int(layer))
        for m, layer in zip(part["best_method"], part["best_layer"], strict=True)
    ]

    def hover(horizon: int, column: int) -> str:
        if ids["top_id"][horizon][column] < 0:
            return "its target is beyond the document or sequence"
        read, says, text = (label(names[ids[name][horizon][column]]) for name in ("top_id", "said_id", "text_id"))
        told = [f"<b>N = {horizon}, {best[horizon][0]} from layer {best[horizon][1]}</b>"]
        told.append(f"read {read}, {probability[horizon, column]:.3f}")
        told.append(f"the model says {says}")
        return "<br>".join([*told, f"the text has {text}"] if ids["text_id"][horizon][column] >= 0 else told)

    figure = token_grid(
        probability,
        cells=[[names[token] for token in line] for line in ids["top_id"]],
        hover=[[hover(horizon, column) for column in range(len(place))] for horizon in horizons],
        tokens=[names[token] for token in part["token_id"].to_numpy().tolist()],
        positions=part["position"].to_numpy().tolist(),
        layers=horizons,
        title=f"Future lens of {_model(result)}, sequence {sequence}",
        subtitle="; ".join(filter(None, [_VIEW, count_shown(len(place), len(known))])),
        unit=axis_title(data["top_probability"].attrs),
    )
    return figure.update_yaxes(title="N")


# ---- fitting --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fitted:
    """A reading of one horizon at one layer, how it does on validation rows, and the penalty or pass chosen."""

    read: Read
    cross_entropy: float
    precision: float
    choice: float | int


def _moments(
    site: ActivationArray, final: ActivationArray, rows: FutureRows, horizons: int, device: torch.device
) -> Iterator[tuple[int, Float[Tensor, "x x"], Float[Tensor, "x y"]]]:
    """For each horizon, the last first, sums over its training rows of x x' and x y': x the state and a 1, y h_(T+N).

    Every row that reaches one horizon reaches the shorter ones, so the Gram matrix only grows and is summed once.
    """
    width = site.shape[1] + 1
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def extended(chosen: np.ndarray) -> Tensor:
        states = site[chosen].to(device).double()
        return torch.cat([states, states.new_ones(len(states), 1)], dim=1)

    for horizon in reversed(range(horizons)):
        chosen = rows.at("training", horizon)
        cross = torch.zeros(width, final.shape[1], dtype=torch.float64, device=device)
        for block in blocks(len(chosen), 4 * width):
            x, y = extended(chosen[block]), final[chosen[block] + horizon].to(device).double()
            cross += x.T @ y
            new = torch.from_numpy(rows.reach[chosen[block]] == horizon + 1).to(device)
            gram += x[new].T @ x[new]
        yield horizon, gram, cross


def ridge_maps(
    gram: Float[Tensor, "x x"], cross: Float[Tensor, "x y"], penalties: Sequence[float]
) -> Iterator[tuple[Float[Tensor, "d_model y"], Float[Tensor, " y"]]]:
    """Affine maps (weight, bias), one a penalty, from sums of x x' and x y' where x ends in a 1.

    Least is mean |y - x W - b|^2 + penalty v |W|^2, v the mean variance of a dimension of x; b is not penalised. One
    eigendecomposition and a product each.
    """
    rows = gram[-1, -1]
    mean, target = gram[-1, :-1] / rows, cross[-1] / rows
    values, vectors = torch.linalg.eigh(gram[:-1, :-1] / rows - torch.outer(mean, mean))
    turned = vectors.T @ (cross[:-1] / rows - torch.outer(mean, target))
    # states that never vary have a variance of rounding, or of 0
    spread = torch.maximum(values.mean(), 1e-10 * mean.square().mean()) + torch.finfo(torch.float64).tiny
    for penalty in penalties:
        weight = vectors @ (turned / (values.clamp(min=0) + penalty * spread)[:, None])
        yield weight, target - mean @ weight


def _through(unembed: Unembed, weight: Tensor, bias: Tensor) -> Read:
    return lambda states: unembed(states.float() @ weight + bias)


def _standard(
    site: ActivationArray, rows: np.ndarray, device: torch.device
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Mean, and 1 / standard deviation with a floor for dimensions that hardly vary."""
    total, squares = (torch.zeros(site.shape[1], dtype=torch.float64, device=device) for _ in range(2))
    for block in blocks(len(rows), 4 * site.shape[1]):
        states = site[rows[block]].to(device).double()
        total, squares = total + states.sum(0), squares + states.square().sum(0)
    mean = total / len(rows)
    variance = (squares / len(rows) - mean.square()).clamp(min=0)
    floor = torch.maximum(1e-4 * variance.mean(), 1e-10 * mean.square().mean())
    return mean.float(), (variance + floor + 1e-30).rsqrt().float()


def _log_unigrams(said: Int[np.ndarray, " row"], vocab: int) -> Float[Tensor, " vocab"]:
    """Log shares, every token counted half a time more than it was said."""
    counts = torch.from_numpy(np.bincount(said, minlength=vocab) + 0.5)
    return (counts / counts.sum()).log().float()


def _score(
    read: Read, site: ActivationArray, rows: np.ndarray, targets: np.ndarray, unembed: Unembed
) -> tuple[float, float]:
    """Mean -ln p(target) of a reading, and the share of rows on which its top token is the target."""
    loss = right = 0.0
    with torch.inference_mode():
        for block in blocks(len(rows), unembed.vocab):
            logits = read(site[rows[block]].to(unembed.weight.device))
            target = torch.from_numpy(targets[block]).to(logits.device)
            loss += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
            right += (logits.argmax(1) == target).sum().item()
    return loss / len(rows), right / len(rows)


# ---- testing --------------------------------------------------------------------------------------------


class _Found:
    """What every reading says of the tested rows."""

    def __init__(
        self,
        probe: FutureLens,
        shape: tuple[int, int, int],
        rows: FutureRows,
        said: Int[np.ndarray, " row"],
        text: Int[np.ndarray, " row"],
    ) -> None:
        self.probe, self.rows, self.said, self.text = probe, rows, said, text
        self.tested = [rows.at("tested", horizon) for horizon in range(probe.horizons)]
        self.kept = rows.tested[: probe.detail]
        self.arrays = {
            name: np.full(shape + {"k": (probe.top_k,), "bin": (_BINS,)}.get(axes[-1], ()), np.nan)
            for name, axes in _AXES.items()
            if axes[:3] == _READ
        }
        self.arrays |= {"ridge": np.zeros(shape[1:]), "epochs": np.zeros(shape[1:])}
        self.top = [np.zeros((*shape[:2], len(tested)), np.int32) for tested in self.tested]
        self.probability = np.zeros((*shape, len(self.kept)), np.float32)

    def add(self, at: tuple[int, int, int], fitted: _Fitted, site: ActivationArray, unembed: Unembed) -> None:
        """Read the tested rows of one horizon; `at` is (method, layer, horizon) as indices."""
        method, layer, horizon = at
        rows = self.tested[horizon]
        ids, probability = _read(fitted.read, site, rows, self.probe.top_k, unembed)
        targets, following = self.said[rows + horizon], self.text[rows + horizon]
        hits = ids == targets[:, None]
        bins = np.minimum((_BINS * probability).astype(int), _BINS - 1)
        counts = np.bincount(bins, minlength=_BINS)
        with np.errstate(invalid="ignore"):  # no row of that confidence, or with a token after it: NaN
            found = {
                "precision": hits.cumsum(1).mean(0),
                "text_precision": (ids == following[:, None])[following >= 0].cumsum(1).sum(0) / (following >= 0).sum(),
                "shuffled_precision": (ids[self._other(len(rows)), 0] == targets).mean(),
                "validation_precision": fitted.precision,
                "validation_cross_entropy": fitted.cross_entropy,
                "calibration": np.bincount(bins, hits[:, 0], minlength=_BINS) / counts,
                "calibration_rows": counts,
            }
        for name, value in found.items():
            self.arrays[name][at] = value
        self.arrays["epochs" if method else "ridge"][layer, horizon] = fitted.choice
        self.top[horizon][method, layer] = ids[:, 0]
        kept = self.rows.reach[self.kept] > horizon  # the first of `rows`, in order
        self.probability[at][kept] = probability[: kept.sum()]

    def _other(self, rows: int) -> Int[np.ndarray, " row"]:
        """Another row for every row."""
        order = np.random.default_rng(self.probe.seed).permutation(rows)
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        return other

    def finish(self, store: Store, final: ActivationArray, unembed: Unembed) -> dict[str, np.ndarray]:
        """All variables of the result by name; `best_layer` still an index."""
        horizons = range(self.probe.horizons)
        token = store.tokens["token_id"].to_numpy().astype(np.int64)
        by_horizon = [self._compare(horizon, token, final, unembed) for horizon in horizons]
        arrays = self.arrays | {
            name: np.stack([found[name] for found in by_horizon], axis=-1) for name in by_horizon[0]
        }
        precision = arrays["validation_precision"]
        flat = precision.reshape(-1, precision.shape[-1]).argmax(0)
        method, layer = np.unravel_index(flat, precision.shape[:2])
        counts = {
            f"{part}_rows".removeprefix("tested_"): np.array([len(self.rows.at(part, horizon)) for horizon in horizons])
            for part in ("training", "validation", "tested")
        }
        counts["text_rows"] = np.array([(self.text[rows + n] >= 0).sum() for n, rows in enumerate(self.tested)])
        counts["left_out"] = len(self.rows.tested) - counts["rows"]
        counts["documents"] = np.array(len(np.unique(self.rows.document[self.rows.tested])))
        view = {
            name: np.full((len(horizons), len(self.kept)), -1, np.int32) for name in ("top_id", "said_id", "text_id")
        }
        view["top_probability"] = np.stack([self.probability[method[n], layer[n], n] for n in horizons])
        for n in horizons:
            kept = self.rows.reach[self.kept] > n
            view["top_id"][n, kept] = self.top[n][method[n], layer[n], : kept.sum()]
            view["said_id"][n, kept] = self.said[self.kept[kept] + n]
            view["text_id"][n, kept] = self.text[self.kept[kept] + n]
        view["token_id"] = token[self.kept].astype(np.int32)
        for name in ("sequence", "position"):
            view[name] = store.tokens[name].to_numpy()[self.kept].astype(np.int32)
        return arrays | counts | view | {"best_method": method, "best_layer": layer}

    def _compare(
        self, horizon: int, token: Int[np.ndarray, " row"], final: ActivationArray, unembed: Unembed
    ) -> dict[str, np.ndarray]:
        """One horizon's surprisals and baselines, and what each reading has above the bigram."""
        rows, training = self.tested[horizon], self.rows.at("training", horizon)
        targets, following = self.said[rows + horizon], self.text[rows + horizon]
        bigram, mode = bigrams(token[training], self.said[training + horizon], token[rows])
        readings = self.top[horizon].reshape(-1, len(rows))
        surprisal = np.zeros(len(readings) + 1)
        read = np.concatenate([readings, bigram[None]])
        for block in blocks(len(rows), unembed.vocab):
            log = log_probabilities(unembed, final[rows[block] + horizon])
            asked = torch.from_numpy(read[:, block].T.astype(np.int64)).to(log.device)
            surprisal -= log.gather(1, asked).double().sum(0).cpu().numpy()
        surprisal /= len(rows)
        right = bigram == targets
        above = (readings == targets).T - right[:, None].astype(float)
        document = self.rows.document[rows]
        gain, drawn = clustered_means(above, document, seed=self.probe.seed)
        if len(np.unique(document)) < 2:
            drawn[:] = np.nan  # of one document every draw is the same: no interval
        low, high = intervals(drawn)
        with np.errstate(invalid="ignore"):  # no tested token has a text so long: NaN
            bigram_text = np.divide((bigram == following).sum(), (following >= 0).sum())
        shape = self.top[horizon].shape[:2]
        return {
            **{name: value.reshape(shape) for name, value in (("gain", gain), ("gain_low", low), ("gain_high", high))},
            "surprisal": surprisal[:-1].reshape(shape),
            "bigram_surprisal": surprisal[-1],
            "bigram_precision": right.mean(),
            "bigram_text_precision": bigram_text,
            "unigram_precision": (targets == mode).mean(),
        }


def _read(
    read: Read, site: ActivationArray, rows: np.ndarray, top_k: int, unembed: Unembed
) -> tuple[Int[np.ndarray, "row k"], Float[np.ndarray, " row"]]:
    """The first tokens of a reading and the probability of the first."""
    ids, probability = np.zeros((len(rows), top_k), np.int64), np.zeros(len(rows), np.float32)
    with torch.inference_mode():
        for block in blocks(len(rows), unembed.vocab):
            logits = read(site[rows[block]].to(unembed.weight.device))
            top = logits.topk(top_k, dim=1)
            ids[block] = top.indices.cpu().numpy()
            probability[block] = (top.values[:, 0] - logits.logsumexp(1)).exp().cpu().numpy()
    return ids, probability


# ---- the result -----------------------------------------------------------------------------------------


def _note(rows: int, d_model: int, documents: int) -> str:
    notes = list(filter(None, [note_few_rows(rows, d_model)]))
    if documents < _FEW:
        notes.append(f"intervals over {documents} tested documents, fewer than {_FEW}")
    return "; ".join(notes)


def _table(data: xr.Dataset) -> pd.DataFrame:
    """One line for each method, layer and horizon."""
    names = ("surprisal", "shuffled_precision", "gain", "gain_low", "gain_high", "validation_precision")
    wide = data[list(names)].assign(
        {f"precision_{k}": data["precision"].sel(k=k, drop=True) for k in sorted({1, data.sizes["k"]})}
        | {"text_precision_1": data["text_precision"].sel(k=1, drop=True)}
        | {name: data[name] for name in ("bigram_precision", "bigram_surprisal", "unigram_precision", "rows")}
    )
    return wide.to_dataframe(dim_order=list(_READ)).reset_index()


def _model(result: Result) -> str:
    return label(str(result.provenance["model"]), 60)


def _precision(result: Result) -> go.Figure:
    """Precision at 1 by layer: a panel for each method, a colour for each horizon, the bigram dashed."""
    data = result.data
    methods, layers = data["method"].to_numpy().tolist(), data["layer"].to_numpy().tolist()
    figure = make_subplots(1, len(methods), shared_yaxes=True, subplot_titles=methods, horizontal_spacing=0.04)
    for column, method in enumerate(methods, start=1):
        for horizon in data["horizon"].to_numpy().tolist():
            one = data.sel(horizon=horizon)
            shown = {"legendgroup": f"N = {horizon}", "showlegend": column == 1}
            line = {"color": CATEGORIES[horizon % len(CATEGORIES)]}
            values = one["precision"].sel({"method": method, "k": 1}).to_numpy()
            figure.add_scatter(
                x=layers, y=values, name=f"N = {horizon}", mode="lines+markers", line=line, row=1, col=column, **shown
            )
            figure.add_scatter(
                x=layers,
                y=np.full(len(layers), float(one["bigram_precision"])),
                name=f"bigram, N = {horizon}",
                mode="lines",
                line={**line, "dash": "dash"},
                row=1,
                col=column,
                **{**shown, "showlegend": False},
            )
    subtitle = f"{int(data['documents']):,} tested documents; dashed: what a bigram has, fitted on the others"
    figure.update_layout(
        template=TEMPLATE,
        title={"text": f"Future lens of {_model(result)}: precision at 1", "subtitle": {"text": subtitle}},
        margin={"t": 110},
        legend={"y": -0.18, "yanchor": "top"},
        height=460,
        width=180 + 420 * len(methods),
    )
    figure.update_xaxes(title="layer", dtick=integer_step(layers))
    figure.update_yaxes(rangemode="tozero")
    return figure.update_yaxes(title=axis_title(data["precision"].attrs), col=1)


def _calibration(result: Result) -> go.Figure:
    """How often the best reading of each horizon is right, by its own probability."""
    data = result.data
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="as sure as right", line=_DIAGONAL))
    for horizon, method, layer in zip(*(data[name].to_numpy() for name in _BEST), strict=True):
        one = data.isel(method=int(method)).sel(horizon=horizon, layer=layer)
        figure.add_scatter(
            x=one["bin"].to_numpy(),
            y=one["calibration"].to_numpy(),
            customdata=one["calibration_rows"].to_numpy(),
            name=f"N = {horizon}, layer {layer}",
            mode="lines+markers",
            line={"color": CATEGORIES[horizon % len(CATEGORIES)]},
            hovertemplate="%{y:.3f} of %{customdata:,} tokens",
        )
    title = f"Future lens of {_model(result)}: right, by how sure it is"
    figure.update_layout(template=TEMPLATE, title={"text": title}, height=480, width=640)
    figure.update_xaxes(title="probability of the token read", range=[0, 1])
    return figure.update_yaxes(title=axis_title(data["calibration"].attrs), range=[0, 1])


_VIEW = "in each cell the token read N tokens past the next, from this token's state at the best layer"
_BEST = ("horizon", "best_method", "best_layer")
_DIAGONAL: Mapping[str, Any] = {"color": NEUTRAL, "dash": "dot"}
