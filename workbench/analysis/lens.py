"""Readings of a lens: distributions over the vocabulary at every layer, compared with the model's own output.

The logit lens and the tuned lens differ in one map before the final norm; the statistics of their distributions are the
same and stand here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.analysis.rows import blocks, next_tokens, recorded_layers
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.torch_state import plain_torch, usable_device
from workbench.model.unembed import Unembed, load_unembed
from workbench.results.bootstrap import intervals, resampled_means
from workbench.results.variable import Variable, dataset, with_interval
from workbench.store.reader import Store

Translate = Callable[[int, Tensor], Tensor]
"""From a layer and its states `[row, d_model]` to the input of the final norm."""

_CACHED = 1 << 17  # values of a part of the rows: four such arrays in float32 fit a CPU's second cache
_TINY = torch.finfo(torch.float32).tiny
_GROUP = 64  # columns whose maximum is searched first

_READ, _MEAN = ("layer", "row"), ("layer",)
_UNIFORM = "ln(vocab) for a uniform guess"
_MEANS = ("entropy", "kl", "js", "tv", "cross_entropy", "surprise", "agreement", "accuracy")
_STATISTICS = (
    Variable("entropy", _READ, "nats", "entropy of the lens's distribution, 0 to ln(vocab)", _UNIFORM),
    Variable("kl", _READ, "nats", "KL(model || lens), 0 and up; 0 at the last block"),
    Variable("js", _READ, "nats", "Jensen-Shannon divergence of lens and model, 0 to ln 2"),
    Variable("tv", _READ, "probability", "total variation distance of lens and model, 0 to 1"),
    Variable("surprise", _READ, "nats", "cross-entropy of the lens at the model's top-1 token", _UNIFORM),
    Variable("cross_entropy", _READ, "nats", "cross-entropy of the token that follows; NaN where none does", _UNIFORM),
    Variable("rank", _READ, "1 = top", "rank of the token that follows in the text; 0 where none does"),
    Variable("top_id", (*_READ, "top"), "token id", "tokens with the highest probability"),
    Variable("top_probability", (*_READ, "top"), "probability", "their probabilities, 0 to 1", "1 / vocab"),
)
_SHARES = (
    Variable("agreement", _READ, "share of tokens", "lens and model have the same top-1 token"),
    Variable("accuracy", _READ, "share of tokens", "the lens's top-1 token is the one that follows in the text"),
)
LENS_VARIABLES: tuple[Variable, ...] = (
    *_STATISTICS,
    *(
        variable
        for statistic in (*_STATISTICS, *_SHARES)
        if statistic.name in _MEANS
        for variable in with_interval(
            Variable(
                f"mean_{statistic.name}",
                _MEAN,
                statistic.units,
                f"{statistic.meaning}; mean over all selected tokens",
                statistic.null,
            )
        )
    ),
    Variable(
        "depth_share",
        _MEAN,
        "share of tokens",
        "tokens whose top-1 prediction equals the model's from this layer on, and not from the one before",
    ),
    Variable(
        "error_auc",
        _MEAN,
        "area under the ROC curve",
        "how well `surprise` separates tokens that the model predicts wrongly from those it predicts right, 0 to 1",
        "0.5",
    ),
    Variable(
        "prediction_depth",
        ("row",),
        "index on the layer axis",
        "first layer from which lens and model agree on top-1",
    ),
    Variable("uniform_cross_entropy", (), "nats", "cross-entropy of a uniform guess, ln(vocab)"),
    Variable("rows", (), "tokens", "tokens the means are over"),
    Variable("rows_with_next", (), "tokens", "those of them that a token follows in their document and sequence"),
)
"""Variables of every lens, with their axes."""


@plain_torch()
def log_probabilities(unembed: Unembed, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Returns the model's log-probabilities, in nats, with `resid` as the output of its last block."""
    with torch.inference_mode():
        return unembed(resid.to(unembed.weight.device)).log_softmax(-1)


@plain_torch()
def read_lens(
    store: Store,
    rows: Int[np.ndarray, " row"],
    *,
    site: str,
    top_k: int,
    detail: int,
    device: str | None,
    translate: Translate = lambda layer, states: states,
    layers: Sequence[int] | None = None,
) -> tuple[xr.Dataset, pd.DataFrame]:
    """Returns the readings of the lens `W_U LN_f(translate(layer, h))` as arrays (`LENS_VARIABLES`) and as a table.

    Costs layers x rows products with W_U; memory is a few blocks of logits and 4 bytes a layer and row.

    Args:
        store: The recorded activations.
        rows: Ids of the rows to read; means are over all of them.
        site: Kind of site to read at every recorded layer.
        top_k: Top tokens kept for each layer and row.
        detail: Rows, from the first on, whose own readings are kept.
        device: Device of the products with W_U. None: the GPU if there is one.
        translate: Map from a layer and its states to the input of the final norm; the model's own output is never
            translated.
        layers: Layers to read; None: all that were recorded.

    Raises:
        RequestError: The site, the last block or the unembedding was not recorded, or top_k exceeds the vocabulary.
    """
    last = f"resid_post.{store.manifest.model.n_layers - 1}"
    layers, labels = recorded_layers(store, site, layers)
    final = store[last]
    unembed = load_unembed(store.path, usable_device(device))
    if top_k > unembed.vocab:
        raise RequestError(f"top_k is {top_k} and the vocabulary has {unembed.vocab}; give at most that")
    targets = next_tokens(store)[rows]
    details = _Details(len(layers), min(detail, len(rows)), top_k)
    totals = _Totals(len(layers), targets, store.tokens["document"].to_numpy()[rows])
    read = _Reader(store, unembed, top_k, translate)
    with progress("reading the lens", len(layers) * len(rows), "rows") as tick:
        for block in blocks(len(rows), unembed.vocab):
            model = read.model(final[rows[block]])
            target = torch.from_numpy(targets[block]).to(model.top.device)
            agrees = []
            for index, (layer, name) in enumerate(zip(layers, labels, strict=True)):
                statistics = read.lens(layer, None if name == last else name, rows[block], model, target)
                agrees.append(statistics["agreement"])
                statistics = _on_host(statistics)
                totals.add(index, block, statistics)
                details.add(index, block.start, statistics)
                tick(len(target))
            totals.right[block] = (model.top == target).cpu().numpy()
            depth = prediction_depth(torch.stack(agrees))
            totals.depth += torch.bincount(depth, minlength=len(layers) + 1).cpu().numpy()
            details.add_depth(block.start, depth)
    data = _dataset(details, totals, layers, rows, unembed.vocab)
    data.attrs["own_output"] = labels.index(last) if last in labels else -1
    return data, _table(data, store, targets, unembed)


class _Reader:
    """Statistics of blocks of rows, whose logits lie in the same memory one after another."""

    def __init__(self, store: Store, unembed: Unembed, top_k: int, translate: Translate) -> None:
        self._store, self._unembed, self._top_k, self._translate = store, unembed, top_k, translate
        self._memory: dict[str, Tensor] = {}

    def model(self, resid: Float[Tensor, "row d_model"]) -> ModelOutput:
        """Returns the model's distributions."""
        return ModelOutput.of(self._logits("model", resid))

    def lens(
        self, layer: int, site: str | None, rows: Int[np.ndarray, " row"], model: ModelOutput, target: Tensor
    ) -> dict[str, Tensor]:
        """Returns the statistics of one layer; site None: the model's own output, which has no distance to itself."""
        logits = model.logits
        if site is not None:
            states = self._store[site][rows].to(logits.device)
            with torch.inference_mode():
                logits = self._logits("lens", self._translate(layer, states))
        statistics = lens_statistics(logits, model, target, self._top_k)
        if site is None:
            statistics |= {name: torch.zeros_like(statistics[name]) for name in ("kl", "js", "tv")}
        top = statistics.pop("top")
        return {**statistics, "agreement": top == model.top, "accuracy": top == target}

    def _logits(self, name: str, resid: Tensor) -> Tensor:
        device, shape = self._unembed.weight.device, (len(resid), self._unembed.vocab)
        if name not in self._memory or len(self._memory[name]) < len(resid):
            self._memory[name] = torch.empty(shape, device=device)
        return self._unembed.write(resid.to(device), self._memory[name][: len(resid)])


def prediction_depth(agrees: Bool[Tensor, "layer row"]) -> Int[Tensor, " row"]:
    """Returns the index of the first layer from which on every layer's top-1 token equals the model's.

    The number of layers stands for a row on which even the last layer differs from the model.
    """
    stays = agrees.flip(0).cumprod(0).flip(0)
    return len(agrees) - stays.sum(0)


def auc(scores: Float[np.ndarray, " row"], positive: Bool[np.ndarray, " row"]) -> float:
    """Returns the area under the ROC curve, 0 to 1; 0.5 for scores that do not separate; NaN where one kind is missing.

    It is the probability that a positive row's score is above a negative one's, ties counted half (Mann-Whitney).
    """
    ranks = pd.Series(scores).rank().to_numpy()
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


@dataclass(frozen=True)
class ModelOutput:
    """Distributions of the model itself on rows, with which lenses are compared."""

    logits: Float[Tensor, "row vocab"]
    probability: Float[Tensor, "row vocab"]
    entropy: Float[Tensor, " row"]
    top: Int[Tensor, " row"]
    """Token with the highest probability."""

    @classmethod
    def of(cls, logits: Float[Tensor, "row vocab"]) -> ModelOutput:
        """Returns the distributions of logits, or of log-probabilities."""
        log = logits.log_softmax(1)
        probability = log.exp()
        entropy = -log.mul_(probability).sum(1)
        return cls(logits, probability, entropy, largest_values(logits, 1)[2])

    def __getitem__(self, part: slice) -> ModelOutput:
        """Returns the distributions of some rows."""
        return ModelOutput(self.logits[part], self.probability[part], self.entropy[part], self.top[part])


def lens_statistics(
    logits: Float[Tensor, "row vocab"], model: ModelOutput, target: Int[Tensor, " row"], top_k: int
) -> dict[str, Tensor]:
    """Returns the statistics of a lens's distributions against the model's and the next token.

    entropy -sum p ln p; kl sum p_model (ln p_model - ln p), clipped at 0 where rounding made it negative; js the
    Jensen-Shannon divergence, the entropy of the mean minus the mean of the entropies, 0 to ln 2; tv half the sum of
    |p_model - p|, 0 to 1; cross_entropy -ln p(target), NaN without one; rank 1 + the number of more probable tokens, 0
    without a target; surprise -ln p(the model's top-1 token), the residual cross-entropy of arXiv 2412.05768. Rounding
    in float32 changes them by up to some 1e-5 nats.

    Cost: about a third of the product with W_U on a CPU, since a few rows at a time stay in its cache.

    Args:
        logits: Logits of the lens, or its log-probabilities.
        model: The model's distributions on the same rows.
        target: Id of the next token, -1 for none.
        top_k: Number of top tokens to return.
    """
    rows, vocab = logits.shape
    step = max(1, _CACHED // vocab) if logits.device.type == "cpu" else max(1, rows)
    scratch = [logits.new_empty(min(step, rows), vocab) for _ in range(3)]
    parts = []
    for first in range(0, max(1, rows), step):
        part = slice(first, first + step)
        parts.append(_statistics(logits[part], model[part], target[part], top_k, scratch))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _statistics(
    logits: Tensor, model: ModelOutput, target: Tensor, top_k: int, scratch: list[Tensor]
) -> dict[str, Tensor]:
    shifted, p, product = (memory[: len(logits)] for memory in scratch)
    q = model.probability
    values, ids, top = largest_values(logits, top_k)
    peak = values[:, :1]
    torch.sub(logits, peak, out=shifted)
    torch.exp(shifted, out=p)
    total = p.sum(1)
    normaliser = total.log()
    p.mul_(total.reciprocal()[:, None])
    entropy = normaliser - torch.mul(p, shifted, out=product).sum(1)
    kl = normaliser - model.entropy - torch.mul(q, shifted, out=product).sum(1)
    tv = torch.sub(p, q, out=product).abs_().sum(1) / 2
    has_target = target >= 0
    at_target = logits.gather(1, target.clamp(min=0)[:, None])
    above = torch.gt(logits, at_target, out=product).sum(1).long()
    mixture = p.add_(q).clamp_(min=_TINY)  # 0 ln 0 is 0; torch's xlogy takes five times as long
    js = math.log(2) - torch.log(mixture, out=product).mul_(mixture).sum(1) / 2 - (entropy + model.entropy) / 2
    surprise = normaliser - (logits.gather(1, model.top[:, None]) - peak)[:, 0]
    return {
        "entropy": entropy.clamp(min=0),
        "kl": kl.clamp(min=0),
        "js": js.clamp(min=0),
        "tv": tv,
        "cross_entropy": torch.where(has_target, normaliser - (at_target - peak)[:, 0], torch.nan),
        "rank": torch.where(has_target, 1 + above, 0),
        "surprise": surprise,
        "top": top,
        "top_id": ids,
        "top_probability": (values - peak).exp() / total[:, None],
    }


def kl_slope(
    logits: Float[Tensor, "row vocab"], model: Float[Tensor, "row vocab"], entropy: Float[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Returns KL(model || lens) of each row, and puts its slope, p - p_model, in the place of the lens's logits.

    Args:
        logits: Logits of the lens, which are overwritten.
        model: Probabilities of the model.
        entropy: Entropy of the model.
    """
    step = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    parts, scratch = [], logits.new_empty(min(step, len(logits)), logits.shape[1])
    for first in range(0, len(logits), step):
        x, q = logits[first : first + step], model[first : first + step]
        product = scratch[: len(x)]
        x -= x.amax(1, keepdim=True)
        cross = torch.mul(q, x, out=product).sum(1)
        total = x.exp_().sum(1)
        parts.append(total.log() - cross - entropy[first : first + step])
        x.mul_(total.reciprocal()[:, None]).sub_(q)
    return torch.cat(parts)


def log_normaliser(logits: Float[Tensor, "row vocab"], peak: Float[Tensor, "row 1"]) -> Float[Tensor, " row"]:
    """Returns ln sum exp of each row, whose largest value is known: half the time of `logsumexp` on a CPU."""
    step = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    parts = zip(logits.split(step), peak.split(step), strict=True)
    return torch.cat([torch.sub(part, high).exp_().sum(1).log() + high[:, 0] for part, high in parts])


def largest_values(
    x: Float[Tensor, "row column"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"], Int[Tensor, " row"]]:
    """Returns the k largest values of each row, their columns, and the first column with the largest, whatever k is.

    In a tenth of the time of `topk` on a CPU: the largest are in the k groups of columns with the largest maxima.
    """
    rows, columns = x.shape
    groups = columns // _GROUP
    if groups < 4 * k:
        values, places = x.topk(k, 1)
        return values, places, x.argmax(1)
    whole, rest = x[:, : groups * _GROUP].view(rows, groups, _GROUP), x[:, groups * _GROUP :]
    maxima = whole.amax(2)
    chosen_groups = torch.cat([maxima.argmax(1, keepdim=True), maxima.topk(k, 1).indices], 1)  # one of them twice
    candidates = (chosen_groups[:, :, None] * _GROUP + torch.arange(_GROUP, device=x.device)).flatten(1)
    end = torch.arange(groups * _GROUP, columns, device=x.device).expand(rows, -1)
    values = torch.cat([whole.gather(1, chosen_groups[:, :, None].expand(-1, -1, _GROUP)).flatten(1), rest], 1)
    candidates = torch.cat([candidates, end], 1)
    first = candidates.gather(1, values.argmax(1, keepdim=True))[:, 0]
    values = values.masked_fill(_repeated(chosen_groups, values.shape[1]), -torch.inf)
    largest, place = values.topk(k, 1)
    return largest, candidates.gather(1, place), first


def _repeated(chosen_groups: Int[Tensor, "row group"], columns: int) -> Bool[Tensor, "row candidate"]:
    """True for candidates of a group that is the first one again."""
    duplicate = chosen_groups == chosen_groups[:, :1]
    duplicate[:, 0] = False
    duplicate = duplicate.repeat_interleave(_GROUP, 1)
    return torch.nn.functional.pad(duplicate, (0, columns - duplicate.shape[1]))


def _on_host(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The statistics on the CPU, by one copy from another device: float32 holds ids, ranks and booleans exactly."""
    flat = {name: values[:, None] if values.ndim == 1 else values for name, values in statistics.items()}
    packed = torch.cat([values.float() for values in flat.values()], 1).cpu()
    parts = packed.split([values.shape[1] for values in flat.values()], 1)
    return {
        name: part.to(values.dtype).view(values.shape)
        for part, (name, values) in zip(parts, statistics.items(), strict=True)
    }


class _Details:
    """Readings of the first rows."""

    def __init__(self, layers: int, rows: int, top_k: int) -> None:
        self.rows = rows
        self.depth = np.zeros(rows, np.int32)
        self.arrays = {
            "entropy": np.zeros((layers, rows), np.float32),
            "kl": np.zeros((layers, rows), np.float32),
            "js": np.zeros((layers, rows), np.float32),
            "tv": np.zeros((layers, rows), np.float32),
            "surprise": np.zeros((layers, rows), np.float32),
            "cross_entropy": np.zeros((layers, rows), np.float32),
            "rank": np.zeros((layers, rows), np.int32),
            "top_id": np.zeros((layers, rows, top_k), np.int32),
            "top_probability": np.zeros((layers, rows, top_k), np.float32),
        }

    def add(self, layer: int, first: int, statistics: dict[str, Tensor]) -> None:
        room = max(0, self.rows - first)
        for name, array in self.arrays.items():
            values = statistics[name][:room].numpy()
            array[layer, first : first + len(values)] = values

    def add_depth(self, first: int, depth: Tensor) -> None:
        values = depth[: max(0, self.rows - first)].cpu().numpy()
        self.depth[first : first + len(values)] = values


class _Totals:
    """Running sums over the rows of each document, in float64, and the values that are ranked over all rows."""

    def __init__(self, layers: int, targets: Int[np.ndarray, " row"], document: Int[np.ndarray, " row"]) -> None:
        rows = len(targets)
        self.documents, self.document = np.unique(document, return_inverse=True)
        shape = (len(self.documents), layers)
        self.sums = {name: np.zeros(shape) for name in _MEANS}
        self.rows, self.targets = np.zeros(shape), np.zeros(shape)
        self.depth = np.zeros(layers + 1, np.int64)
        self.surprise = np.zeros((layers, rows), np.float32)
        self.known, self.right = targets >= 0, np.zeros(rows, bool)

    def add(self, layer: int, block: slice, statistics: dict[str, Tensor]) -> None:
        document, has_target = self.document[block], self.known[block]

        def by_document(values: np.ndarray | None, mask: np.ndarray | slice) -> np.ndarray:
            weights = None if values is None else values[mask]
            return np.bincount(document[mask], weights, len(self.documents))

        self.rows[:, layer] += by_document(None, slice(None))
        self.targets[:, layer] += by_document(None, has_target)
        for name, sums in self.sums.items():
            mask = has_target if name in ("cross_entropy", "accuracy") else slice(None)
            sums[:, layer] += by_document(statistics[name].double().numpy(), mask)
        self.surprise[layer, block] = statistics["surprise"].numpy()

    def means(self) -> dict[str, np.ndarray]:
        """Means by layer, NaN where no token has a successor, and their intervals."""
        counts, means = {"cross_entropy": self.targets, "accuracy": self.targets}, {}
        for name, total in self.sums.items():
            number = counts.get(name, self.rows)
            mean, resampled = resampled_means(total, number)
            low, high = intervals(resampled, (number > 0).sum(0))
            means |= {f"mean_{name}": mean, f"mean_{name}_low": low, f"mean_{name}_high": high}
        return means

    def error_auc(self) -> np.ndarray:
        wrong = ~self.right[self.known]
        return np.array([auc(surprise[self.known], wrong) for surprise in self.surprise])


def _dataset(
    details: _Details, totals: _Totals, layers: list[int], rows: Int[np.ndarray, " row"], vocab: int
) -> xr.Dataset:
    arrays = {
        **details.arrays,
        **totals.means(),
        "depth_share": totals.depth[:-1] / len(rows),
        "error_auc": totals.error_auc(),
        "prediction_depth": details.depth,
        "uniform_cross_entropy": math.log(vocab),
        "rows": len(rows),
        "rows_with_next": int(totals.targets[:, 0].sum()),
    }
    coords = {"layer": layers, "row": rows[: details.rows], "top": np.arange(1, details.arrays["top_id"].shape[2] + 1)}
    return dataset(LENS_VARIABLES, arrays, coords)


def _table(data: xr.Dataset, store: Store, targets: np.ndarray, unembed: Unembed) -> pd.DataFrame:
    """A line for each layer and kept row."""
    rows = data["row"].to_numpy()
    tokens = store.tokens.take(rows)
    n_layers = data.sizes["layer"]
    tiled = {name: np.tile(tokens[name].to_numpy(), n_layers) for name in ("row", "sequence", "position", "document")}
    columns: dict[str, Any] = {"layer": np.repeat(data["layer"].to_numpy(), len(rows)), **tiled}
    columns["token"] = np.tile(np.array(tokens["token"].to_pylist(), dtype=object), n_layers)
    following = [unembed.token(target) if target >= 0 else "" for target in targets[: len(rows)].tolist()]
    columns["next_token"] = np.tile(np.array(following, dtype=object), n_layers)
    for name in ("entropy", "kl", "js", "tv", "cross_entropy", "surprise", "rank"):
        columns[name] = data[name].to_numpy().ravel()
    for k in range(data.sizes["top"]):
        ids = data["top_id"].to_numpy()[:, :, k].ravel()
        columns[f"top_token_{k + 1}"] = [unembed.token(token_id) for token_id in ids.tolist()]
        columns[f"top_probability_{k + 1}"] = data["top_probability"].to_numpy()[:, :, k].ravel()
    return pd.DataFrame(columns)
