"""What every layer predicts, read through a lens: the trajectory of each token's prediction over the layers.

The logit lens and the tuned lens differ in one map before the final norm; what is asked of their distributions is
the same and stands here: entropy, divergences from the model's own output, loss and rank of the token that follows,
the depth from which a prediction stays, and how well surprise at the model's own choice tells right from wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.figures.layer_curves import layer_curves
from workbench.figures.safe_text import axis_title, label
from workbench.figures.token_grid import MAX_TOKENS, count_shown, token_grid
from workbench.figures.token_strip import token_strip
from workbench.io.errors import RequestError
from workbench.model.load import usable_device
from workbench.model.unembed import Unembed, load_unembed
from workbench.results.result import Result
from workbench.store.reader import Store

Translate = Callable[[int, Tensor], Tensor]
"""From a layer and its states `[row, d_model]` to what the final norm is given."""

_BLOCK_BYTES = 4 << 20  # of one block of logits in float32: five such, which live at a time, stay in a CPU's cache
_BLOCK_ROWS = 128  # at least, or reading W_U for every block would be most of the work
_GRID_TOKENS = 20
_FULL_HOVER = 10_000  # cells whose hover tells all; of more it tells the top token, or the page would be too large

UNITS = {
    "entropy": "nats",
    "kl": "nats",
    "js": "nats",
    "tv": "probability",
    "cross_entropy": "nats",
    "surprise": "nats",
    "rank": "1 = top",
    "top_probability": "probability",
    "top_id": "token id",
    "agreement": "share of tokens",
    "accuracy": "share of tokens",
}

_MEANS = ("entropy", "kl", "js", "tv", "cross_entropy", "surprise", "agreement", "accuracy")


def read_lens(
    store: Store,
    rows: Int[np.ndarray, " row"],
    *,
    site: str,
    top_k: int,
    detail: int,
    device: str,
    translate: Translate = lambda layer, states: states,
) -> tuple[xr.Dataset, pd.DataFrame]:
    """What the lens `W_U LN_f(translate(layer, h))` says of `rows` at every recorded layer of `site`: arrays and table.

    Over (layer, row), the first `detail` rows: what `lens_statistics` gives, and over (row) `prediction_depth`. Over
    (layer), all rows: means; `mean_agreement` with the model's top token; `mean_accuracy` on the text; `depth_share`,
    the share of tokens whose prediction stays the model's own from this layer on (and not from the one before);
    `error_auc`, how well surprise at the model's top token tells tokens on which the model is wrong from those on
    which it is right: 0.5 is chance. The model's own output is never translated. Memory: a few blocks of logits, and
    4 bytes a layer and row. Raises RequestError where a site, the last block or the unembedding is missing.
    """
    last = f"resid_post.{store.manifest.model.n_layers - 1}"
    layers, labels = recorded_layers(store, site)
    final = store[last]
    unembed = load_unembed(store.path, usable_device(device))
    if top_k > unembed.vocab:
        raise RequestError(f"top_k is {top_k} and the vocabulary has {unembed.vocab}; give at most that")
    targets = next_tokens(store)[rows]
    kept = _Kept(len(layers), min(detail, len(rows)), top_k)
    totals = _Totals(len(layers), len(rows))
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
            found = lens_statistics(log, model_log, target, top_k)
            agrees.append(log.argmax(1) == model_top)
            totals.add(index, block, found, agrees[-1], log.argmax(1) == target, target)
            kept.add(index, block.start, found)
        totals.known[block] = (target >= 0).cpu().numpy()
        totals.right[block] = (model_top == target).cpu().numpy()
        depth = prediction_depth(torch.stack(agrees))
        totals.depth += torch.bincount(depth, minlength=len(layers) + 1).cpu().numpy()
        kept.add_depth(block.start, depth)
    data = _dataset(kept, totals, layers, rows)
    return data, _table(data, store, targets, unembed)


def selected_rows(store: Store, where: str | None) -> Int[np.ndarray, " row"]:
    """Ids of the rows for which the SQL condition holds, all without one. Raises RequestError where it selects none."""
    rows = np.arange(store.rows) if where is None else store.where(where).ids
    if not len(rows):
        raise RequestError(f"where {where!r} selects no token of {store.rows:,}")
    return rows


def prediction_depth(agrees: Bool[Tensor, "layer row"]) -> Int[Tensor, " row"]:
    """The first layer (counted in the order given) from which on every layer's top token is the model's own.

    The number of layers where even the last disagrees, which a last block that is the model's output never does.
    """
    stays = agrees.flip(0).cumprod(0).flip(0)
    return len(agrees) - stays.sum(0)


def auc(scores: Float[np.ndarray, " row"], positive: Bool[np.ndarray, " row"]) -> float:
    """Chance that a positive row's score is above a negative one's, ties counted half (Mann-Whitney); NaN where one
    kind is missing."""
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
    """Statistics of the lens's log-probabilities `log` against the model's and the next token (-1: none).

    entropy -sum p ln p; kl sum p_model (ln p_model - ln p), clipped at 0 where rounding made it negative; js the
    Jensen-Shannon divergence, half of each one's KL to their mean, 0 to ln 2; tv half the sum of |p_model - p|, 0 to 1;
    cross_entropy -ln p(target), NaN without one; rank 1 + how many tokens are more probable, 0 without one;
    surprise -ln p(the model's own top token), the residual cross-entropy of arXiv 2412.05768.
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


def next_tokens(store: Store) -> Int[np.ndarray, " row"]:
    """The id of the token that follows each row in its document and sequence; -1 where none does."""
    return tokens_at(store, 1)


def tokens_at(store: Store, offset: int) -> Int[np.ndarray, " row"]:
    """The id of the token `offset` tokens after each row (before, where negative), in its document and sequence; -1
    where there is none."""
    tokens = store.tokens
    ids, sequence, document = (tokens[name].to_numpy() for name in ("token_id", "sequence", "document"))
    source = np.arange(max(0, -offset), len(ids) - max(0, offset))
    same = (sequence[source] == sequence[source + offset]) & (document[source] == document[source + offset])
    found = np.full(len(ids), -1, dtype=np.int64)
    found[source] = np.where(same, ids[source + offset], -1)
    return found


def lens_grid(result: Result, sequence: int | None = None, first: int = 0, tokens: int = _GRID_TOKENS) -> Any:
    """The classic picture: for each layer and token, the lens's top token, coloured by its probability.

    `sequence`: one of those in the table, by default the first; `first`: position it begins at; `tokens`: 1,024 at
    most. What is left out the subtitle says. Raises RequestError for a sequence and position the table has not.
    """
    sequence, chosen = _of_sequence(result, sequence, first)
    known = chosen["row"].nunique()
    rows = np.sort(chosen["row"].unique())[: min(tokens, MAX_TOKENS)]
    chosen = chosen[chosen["row"].isin(rows)].sort_values(["layer", "row"])
    layers = chosen["layer"].unique()
    shape = (len(layers), -1)
    line = chosen.iloc[: len(chosen) // len(layers)]
    told = ["in each cell the token this layer would predict next, coloured by its probability"]
    told += [part for part in [count_shown(len(rows), known)] if part]
    hover = _hover
    if len(chosen) > _FULL_HOVER:
        hover = _brief
        told.append("hovering shows the top token alone")
    site = result.provenance["settings"]["site"]
    return token_grid(
        chosen["top_probability_1"].to_numpy().reshape(shape),
        cells=chosen["top_token_1"].to_numpy().reshape(shape).tolist(),
        hover=np.array([hover(row) for row in chosen.to_dict("records")], dtype=object).reshape(shape).tolist(),
        tokens=line["token"].tolist(),
        positions=line["position"].tolist(),
        layers=layers.tolist(),
        title=f"{_lens(result)} of {_model(result)}, {label(site)}, sequence {sequence}",
        subtitle="; ".join(told),
        unit=axis_title(result.data["top_probability"].attrs),
    )


def lens_depth(result: Result, sequence: int | None = None) -> Any:
    """A text, each token coloured by the layer from which on its prediction stays the model's own; white: never.

    `sequence`: one of those in the table, by default the first. Raises RequestError for one the table has not.
    """
    sequence, chosen = _of_sequence(result, sequence, 0)
    layers = result.data["layer"].to_numpy()
    line = chosen[chosen["layer"] == layers[0]].sort_values("row")
    depth = result.data["prediction_depth"].sel(row=line["row"].to_numpy()).to_numpy()
    return token_strip(
        np.append(layers, np.nan)[depth],
        tokens=line["token"].tolist(),
        positions=line["position"].tolist(),
        title=f"Where predictions are settled: {_lens(result)} of {_model(result)}, sequence {sequence}",
        subtitle="each token coloured by the layer from which on the lens's top token after it stays the model's own",
        unit="layer",
        limits=(float(layers[0]), float(layers[-1])),
    )


def _of_sequence(result: Result, sequence: int | None, first: int) -> tuple[int, pd.DataFrame]:
    """The table's lines of a sequence from a position on."""
    table = result.table
    sequence = table["sequence"].iloc[0] if sequence is None else sequence
    chosen = table[(table["sequence"] == sequence) & (table["position"] >= first)]
    if chosen.empty:
        raise RequestError(
            f"sequence {sequence} from position {first} is not in the table; see result.table['sequence']"
        )
    return int(sequence), chosen


def _model(result: Result) -> str:
    return label(str(result.provenance["model"]), 60)


def _lens(result: Result) -> str:
    """ "Logit lens" of the probe logit-lens."""
    return result.probe.replace("-", " ").capitalize()


def _hover(row: dict[str, Any]) -> str:
    """One cell's story, as markup: model text goes through `label`."""
    lines = [f"<b>layer {row['layer']}, position {row['position']}, token {label(row['token'])}</b>"]
    k = 1
    while f"top_token_{k}" in row:
        lines.append(f"{row[f'top_probability_{k}']:.3f}  {label(row[f'top_token_{k}'])}")
        k += 1
    lines.append(f"entropy {row['entropy']:.3f} nats, KL to output {row['kl']:.3f} nats")
    if row["rank"]:
        lines.append(f"next {label(row['next_token'])}: rank {row['rank']}, {row['cross_entropy']:.3f} nats")
    return "<br>".join(lines)


def _brief(row: dict[str, Any]) -> str:
    top = label(row["top_token_1"])
    return f"layer {row['layer']}, {row['position']} {label(row['token'])}: {top} {row['top_probability_1']:.3f}"


def lens_curves(result: Result) -> Any:
    """Mean entropy, KL to the output and loss on the text, by layer."""
    data = result.data
    names = {"entropy": "entropy of the lens", "kl": "KL(model ‖ lens)", "cross_entropy": "cross-entropy of the text"}
    counted = int(data["rows"])
    return layer_curves(
        {shown: data[f"mean_{name}"].to_numpy() for name, shown in names.items()},
        layers=data["layer"].to_numpy().tolist(),
        title=f"{_lens(result)} of {_model(result)}: mean over {counted:,} tokens",
        unit=axis_title(data["mean_entropy"].attrs),
    )


# ---- parts of read_lens ---------------------------------------------------------------------------------


def recorded_layers(store: Store, kind: str) -> tuple[list[int], list[str]]:
    """Layers of which sites of this kind were recorded, and the sites' labels."""
    if "." in kind:
        raise RequestError(f"site must be a kind without a layer, such as resid_post, not {kind!r}")
    found = {int(site.short.split(".")[1]): site for site in store.sites if (site.short or "").startswith(f"{kind}.")}
    if not found:
        store.require(f"{kind}.0")
    axes = next(iter(found.values())).axes
    if axes != ("row", "d_model"):
        raise RequestError(f"site {kind!r} has axes ({', '.join(axes)}); the lens reads (row, d_model)")
    layers = sorted(found)
    return layers, [f"{kind}.{layer}" for layer in layers]


def blocks(rows: int, vocab: int) -> Iterator[slice]:
    """Slices of `rows` whose logits take 4 MiB in float32, of 128 rows or more."""
    step = max(_BLOCK_ROWS, _BLOCK_BYTES // (4 * vocab))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def log_probabilities(unembed: Unembed, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """What the model would say of `resid` were it the last block's output, in nats."""
    with torch.inference_mode():
        return unembed(resid.to(unembed.weight.device)).log_softmax(-1)


class _Kept:
    """The first rows, one by one."""

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

    def add(self, layer: int, first: int, found: dict[str, Tensor]) -> None:
        room = max(0, self.rows - first)
        for name, array in self.arrays.items():
            values = found[name][:room].cpu().numpy()
            array[layer, first : first + len(values)] = values

    def add_depth(self, first: int, depth: Tensor) -> None:
        values = depth[: max(0, self.rows - first)].cpu().numpy()
        self.depth[first : first + len(values)] = values


class _Totals:
    """Running sums over all rows, in float64, and what a rank over all of them needs."""

    def __init__(self, layers: int, rows: int) -> None:
        self.sums = {name: np.zeros(layers) for name in _MEANS}
        self.rows, self.targets = np.zeros(layers), np.zeros(layers)
        self.depth = np.zeros(layers + 1, np.int64)
        self.surprise = np.zeros((layers, rows), np.float32)
        self.known, self.right = np.zeros(rows, bool), np.zeros(rows, bool)

    def add(
        self, layer: int, block: slice, found: dict[str, Tensor], agrees: Tensor, right: Tensor, target: Tensor
    ) -> None:
        known = target >= 0
        self.rows[layer] += len(target)
        self.targets[layer] += int(known.sum())
        values = {
            **{name: found[name] for name in ("entropy", "kl", "js", "tv", "surprise")},
            "cross_entropy": found["cross_entropy"][known],
            "agreement": agrees,
            "accuracy": right[known],
        }
        for name, value in values.items():
            self.sums[name][layer] += value.double().sum().item()
        self.surprise[layer, block] = found["surprise"].cpu().numpy()

    def means(self) -> dict[str, np.ndarray]:
        counts = {"cross_entropy": self.targets, "accuracy": self.targets}
        with np.errstate(invalid="ignore"):  # no token has a successor: the mean of nothing is NaN
            return {name: total / counts.get(name, self.rows) for name, total in self.sums.items()}

    def error_auc(self) -> np.ndarray:
        wrong = ~self.right[self.known]
        return np.array([auc(surprise[self.known], wrong) for surprise in self.surprise])


def _dataset(kept: _Kept, totals: _Totals, layers: list[int], rows: np.ndarray) -> xr.Dataset:
    axes = {2: ("layer", "row"), 3: ("layer", "row", "top")}
    arrays = {name: (axes[array.ndim], array, {"units": UNITS[name]}) for name, array in kept.arrays.items()}
    means = {f"mean_{name}": (("layer",), mean, {"units": UNITS[name]}) for name, mean in totals.means().items()}
    layered = {
        "depth_share": (("layer",), totals.depth[:-1] / len(rows), {"units": "share of tokens"}),
        "error_auc": (("layer",), totals.error_auc(), {"units": "area under the ROC curve"}),
        "prediction_depth": (("row",), kept.depth, {"units": "index on the layer axis"}),
    }
    counts = {
        "rows": ((), len(rows), {"units": "tokens", "long_name": "tokens the means are over"}),
        "rows_with_next": ((), int(totals.targets[0]), {"units": "tokens"}),
    }
    coords = {"layer": layers, "row": rows[: kept.rows], "top": np.arange(1, kept.arrays["top_id"].shape[2] + 1)}
    return xr.Dataset({**arrays, **means, **layered, **counts}, coords=coords)


def _table(data: xr.Dataset, store: Store, targets: np.ndarray, unembed: Unembed) -> pd.DataFrame:
    """One line for each layer and kept row."""
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
