"""Readings of a lens: distributions over the vocabulary at every layer, compared with the model's own output.

The logit lens and the tuned lens differ in one map before the final norm; the statistics of their distributions are the
same and stand here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.analysis.rows import blocks, next_tokens, recorded_layers
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch, usable_device
from workbench.model.unembed import Unembed, load_unembed
from workbench.results.variable import Variable, dataset
from workbench.store.reader import Store

Translate = Callable[[int, Tensor], Tensor]
"""From a layer and its states `[row, d_model]` to the input of the final norm."""

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
        Variable(f"mean_{one.name}", _MEAN, one.units, f"{one.meaning}; mean over all selected tokens", one.null)
        for one in (*_STATISTICS, *_SHARES)
        if one.name in _MEANS
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

    Raises:
        RequestError: The site, the last block or the unembedding was not recorded, or top_k exceeds the vocabulary.
    """
    last = f"resid_post.{store.manifest.model.n_layers - 1}"
    layers, labels = recorded_layers(store, site)
    final = store[last]
    unembed = load_unembed(store.path, usable_device(device))
    if top_k > unembed.vocab:
        raise RequestError(f"top_k is {top_k} and the vocabulary has {unembed.vocab}; give at most that")
    targets = next_tokens(store)[rows]
    details = _Details(len(layers), min(detail, len(rows)), top_k)
    totals = _Totals(len(layers), targets)
    for block in blocks(len(rows), unembed.vocab):
        model_log = log_probabilities(unembed, final[rows[block]])
        model_top = model_log.argmax(1)
        target = torch.from_numpy(targets[block]).to(model_log.device)
        agrees = []
        for index, (layer, name) in enumerate(zip(layers, labels, strict=True)):
            log = model_log
            if name != last:
                states = store[name][rows[block]].to(model_log.device)
                log = log_probabilities(unembed, translate(layer, states))
            predicted = log.argmax(1)
            agrees.append(predicted == model_top)
            statistics = lens_statistics(log, model_log, target, top_k)
            statistics = _on_host({**statistics, "agreement": agrees[-1], "accuracy": predicted == target})
            totals.add(index, block, statistics)
            details.add(index, block.start, statistics)
        totals.right[block] = (model_top == target).cpu().numpy()
        depth = prediction_depth(torch.stack(agrees))
        totals.depth += torch.bincount(depth, minlength=len(layers) + 1).cpu().numpy()
        details.add_depth(block.start, depth)
    data = _dataset(details, totals, layers, rows, unembed.vocab)
    data.attrs["own_output"] = labels.index(last) if last in labels else -1
    return data, _table(data, store, targets, unembed)


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
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return float("nan")
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def lens_statistics(
    log: Float[Tensor, "row vocab"],
    model_log: Float[Tensor, "row vocab"],
    target: Int[Tensor, " row"],
    top_k: int,
) -> dict[str, Tensor]:
    """Returns the statistics of the lens's log-probabilities against the model's and the next token.

    entropy -sum p ln p; kl sum p_model (ln p_model - ln p), clipped at 0 where rounding made it negative; js the
    Jensen-Shannon divergence, half of each one's KL to their mean, 0 to ln 2; tv half the sum of |p_model - p|, 0 to 1;
    cross_entropy -ln p(target), NaN without one; rank 1 + the number of more probable tokens, 0 without a target;
    surprise -ln p(the model's top-1 token), the residual cross-entropy of arXiv 2412.05768.

    Args:
        log: Log-probabilities of the lens.
        model_log: Log-probabilities of the model.
        target: Id of the next token, -1 for none.
        top_k: Number of top tokens to return.
    """
    p, p_model = log.exp(), model_log.exp()
    middle = torch.logaddexp(log, model_log) - math.log(2)
    js = (p * (log - middle) + p_model * (model_log - middle)).sum(1) / 2
    known = target >= 0
    at_target = log.gather(1, target.clamp(min=0)[:, None])
    top = log.topk(top_k, dim=1)
    return {
        "entropy": (p * -log).sum(1),
        "kl": (p_model * (model_log - log)).sum(1).clamp(min=0),
        "js": js.clamp(min=0),
        "tv": (p - p_model).abs().sum(1) / 2,
        "cross_entropy": torch.where(known, -at_target[:, 0], torch.nan),
        "rank": torch.where(known, 1 + (log > at_target).sum(1), 0),
        "surprise": -log.gather(1, model_log.argmax(1, keepdim=True))[:, 0],
        "top_id": top.indices,
        "top_probability": top.values.exp(),
    }


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
    """Running sums over all rows, in float64, and the values that are ranked over all of them."""

    def __init__(self, layers: int, targets: Int[np.ndarray, " row"]) -> None:
        rows = len(targets)
        self.sums = {name: np.zeros(layers) for name in _MEANS}
        self.rows, self.targets = np.zeros(layers), np.zeros(layers)
        self.depth = np.zeros(layers + 1, np.int64)
        self.surprise = np.zeros((layers, rows), np.float32)
        self.known, self.right = targets >= 0, np.zeros(rows, bool)

    def add(self, layer: int, block: slice, statistics: dict[str, Tensor]) -> None:
        known = torch.from_numpy(self.known[block])
        self.rows[layer] += len(known)
        self.targets[layer] += int(known.sum())
        for name, sums in self.sums.items():
            values = statistics[name]
            counted = values[known] if name in ("cross_entropy", "accuracy") else values
            sums[layer] += counted.double().sum().item()
        self.surprise[layer, block] = statistics["surprise"].numpy()

    def means(self) -> dict[str, np.ndarray]:
        counts = {"cross_entropy": self.targets, "accuracy": self.targets}
        with np.errstate(invalid="ignore"):  # no token has a successor: the mean of nothing is NaN
            return {name: total / counts.get(name, self.rows) for name, total in self.sums.items()}

    def error_auc(self) -> np.ndarray:
        wrong = ~self.right[self.known]
        return np.array([auc(surprise[self.known], wrong) for surprise in self.surprise])


def _dataset(
    details: _Details, totals: _Totals, layers: list[int], rows: Int[np.ndarray, " row"], vocab: int
) -> xr.Dataset:
    arrays = {
        **details.arrays,
        **{f"mean_{name}": mean for name, mean in totals.means().items()},
        "depth_share": totals.depth[:-1] / len(rows),
        "error_auc": totals.error_auc(),
        "prediction_depth": details.depth,
        "uniform_cross_entropy": math.log(vocab),
        "rows": len(rows),
        "rows_with_next": int(totals.targets[0]),
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
