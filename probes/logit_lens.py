"""The logit lens: what each layer would say if it were the last (nostalgebraist 2020).

    LogitLens(h_l) = W_U LN_f(h_l) + b_U

with the final norm's statistics taken from h_l itself, and the model's soft-cap, scale and bias applied. At the
last block it is the model's own output. Sub-layer sites (attn_out, mlp_out) can be read the same way, but those
are not distributions the model would ever emit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.figures.grid import layer_curves, token_grid
from workbench.figures.text import label
from workbench.lens import Unembed, load_unembed
from workbench.models import usable_device
from workbench.result import Result, provenance
from workbench.store.reader import Store

_BLOCK_BYTES = 64 << 20  # of one block of logits in float32; four such live at a time
_GRID_TOKENS = 20

UNITS = {
    "entropy": "nats",
    "kl": "nats",
    "cross_entropy": "nats",
    "rank": "1 = top",
    "top_probability": "probability",
    "top_id": "token id",
    "agreement": "share of tokens",
    "accuracy": "share of tokens",
}


@dataclass(frozen=True)
class LogitLens:
    """What each layer would predict, were the model to stop there: top tokens, entropy, KL to the output, loss."""

    name: ClassVar[str] = "logit-lens"

    site: str = "resid_post"
    """Kind of site to read at every layer: resid_post, resid_pre, resid_mid, attn_out, mlp_out."""
    where: str | None = None
    """SQL over the token table: which tokens count. None: all."""
    top_k: int = 5
    """Top tokens kept for each layer and token."""
    detail: int = 10_000
    """Tokens that get their own line in the table, from the first selected on; means are over all selected."""
    device: str = "cpu"
    """Where the unembedding is multiplied: cpu, cuda."""

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("detail", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def run(self, store: Store) -> Result:
        """Reads every layer of `site` that was recorded.

        `data` has, over (layer, row): entropy of the lens in nats (0 to ln vocab; ln vocab is uniform); kl in nats,
        KL(model || lens), 0 at the last block; cross_entropy in nats and rank (1 = top) of the token that follows in
        the text, NaN and 0 where none does; over (layer, row, top): top_id, top_probability. Over (layer), for all
        selected tokens: their means, agreement with the model's own top token, accuracy on the text, and the tokens
        counted. A stored fp16 value is off by up to 0.05 %, and what is computed from it accordingly.

        Costs layers x rows products with W_U; memory is bounded by a block of logits, not by rows. Raises
        RequestError where the site or the last block was not recorded, or the store holds no unembedding, or the device
        cannot be used.
        """
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        device = usable_device(self.device)
        layers, labels = _recorded_layers(store, self.site)
        final = store[last]
        unembed = load_unembed(store.path, device)
        if self.top_k > unembed.vocab:
            raise RequestError(f"top_k is {self.top_k} and the vocabulary has {unembed.vocab}; give at most that")
        rows = np.arange(store.rows) if self.where is None else store.where(self.where).ids
        if not len(rows):
            raise RequestError(f"where {self.where!r} selects no token of {store.rows:,}")
        targets = next_tokens(store)[rows]
        kept = _Kept(len(layers), min(self.detail, len(rows)), self.top_k)
        totals = _Totals(len(layers))
        for block in _blocks(len(rows), unembed.vocab):
            model_log = _log_probabilities(unembed, final[rows[block]])
            model_top = model_log.argmax(1)
            target = torch.from_numpy(targets[block]).to(device)
            for index, site in enumerate(labels):
                log = model_log if site == last else _log_probabilities(unembed, store[site][rows[block]])
                found = lens_statistics(log, model_log, target, self.top_k)
                totals.add(index, found, log.argmax(1), model_top, target)
                kept.add(index, block.start, found)
        data = _dataset(kept, totals, layers, rows)
        return Result(self.name, data, _table(data, store, targets, unembed), provenance(store, self))

    @staticmethod
    def headline(result: Result) -> str:
        """Where the loss falls, and from which layer on the lens mostly agrees with the model."""
        loss, agreement = result.data["mean_cross_entropy"].to_numpy(), result.data["mean_agreement"].to_numpy()
        layers = result.data["layer"].to_numpy()
        agrees = layers[np.argmax(agreement > 0.5)]
        return (
            f"cross-entropy {loss[0]:.2f} nats at layer {layers[0]}, {loss[-1]:.2f} at layer {layers[-1]}; "
            f"the model's own top token is the lens's on most tokens from layer {agrees}"
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """ "grid": layers by tokens of the first sequence; "by_layer": mean entropy, KL and loss over all tokens."""
        figures = {"by_layer": _curves(result)}
        return {"grid": lens_grid(result), **figures} if len(result.table) else figures


def lens_statistics(
    log: Float[Tensor, "row vocab"],
    model_log: Float[Tensor, "row vocab"],
    target: Int[Tensor, " row"],
    top_k: int,
) -> dict[str, Tensor]:
    """Statistics of the lens's log-probabilities `log` against the model's and the next token (-1: none).

    entropy -sum p ln p; kl sum p_model (ln p_model - ln p), clipped at 0 where rounding made it negative;
    cross_entropy -ln p(target), NaN without one; rank 1 + how many tokens are more probable, 0 without one.
    """
    p_model = model_log.exp()
    known = target >= 0
    at_target = log.gather(1, target.clamp(min=0)[:, None])
    top = log.topk(top_k, dim=1)
    return {
        "entropy": (log.exp() * -log).sum(1),
        "kl": (p_model * (model_log - log)).sum(1).clamp(min=0),
        "cross_entropy": torch.where(known, -at_target[:, 0], torch.nan),
        "rank": torch.where(known, 1 + (log > at_target).sum(1), 0),
        "top_id": top.indices,
        "top_probability": top.values.exp(),
    }


def next_tokens(store: Store) -> Int[np.ndarray, " row"]:
    """The id of the token that follows each row in its document and sequence; -1 where none does."""
    tokens = store.tokens
    ids, sequence, document = (tokens[name].to_numpy() for name in ("token_id", "sequence", "document"))
    following = np.full(len(ids), -1, dtype=np.int64)
    same = (sequence[1:] == sequence[:-1]) & (document[1:] == document[:-1])
    following[:-1] = np.where(same, ids[1:], -1)
    return following


def lens_grid(result: Result, sequence: int | None = None, first: int = 0, tokens: int = _GRID_TOKENS) -> Any:
    """The classic picture: for each layer and token, the lens's top token, coloured by its probability.

    `sequence`: one of those in the table, by default the first; `first`: position it begins at.
    """
    table = result.table
    sequence = table["sequence"].iloc[0] if sequence is None else sequence
    chosen = table[(table["sequence"] == sequence) & (table["position"] >= first)]
    if chosen.empty:
        raise RequestError(
            f"sequence {sequence} from position {first} is not in the table; see result.table['sequence']"
        )
    chosen = chosen[chosen["row"].isin(np.sort(chosen["row"].unique())[:tokens])].sort_values(["layer", "row"])
    layers = chosen["layer"].unique()
    shape = (len(layers), -1)
    line = chosen.iloc[: len(chosen) // len(layers)]
    site = result.provenance["settings"]["site"]
    return token_grid(
        chosen["top_probability_1"].to_numpy().reshape(shape),
        cells=chosen["top_token_1"].to_numpy().reshape(shape).tolist(),
        hover=np.array([_hover(row) for row in chosen.to_dict("records")], dtype=object).reshape(shape).tolist(),
        tokens=line["token"].tolist(),
        positions=line["position"].tolist(),
        layers=layers.tolist(),
        title=f"Logit lens of {label(str(result.provenance['model']), 60)}, {label(site)}, sequence {sequence}",
        subtitle="in each cell the token this layer would predict next, coloured by its probability",
        unit="probability",
    )


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


def _curves(result: Result) -> Any:
    data = result.data
    names = {"entropy": "entropy of the lens", "kl": "KL(model ‖ lens)", "cross_entropy": "cross-entropy of the text"}
    counted = int(data["rows"])
    return layer_curves(
        {shown: data[f"mean_{name}"].to_numpy() for name, shown in names.items()},
        layers=data["layer"].to_numpy().tolist(),
        title=f"Logit lens of {label(str(result.provenance['model']), 60)}: mean over {counted:,} tokens",
        unit="nats",
    )


# ---- parts of run ---------------------------------------------------------------------------------------


def _recorded_layers(store: Store, kind: str) -> tuple[list[int], list[str]]:
    """Layers of which sites of this kind were recorded, and the sites' labels."""
    if "." in kind:
        raise RequestError(f"site must be a kind without a layer, such as resid_post, not {kind!r}")
    found = {int(site.short.split(".")[1]): site for site in store.sites if (site.short or "").startswith(f"{kind}.")}
    if not found:
        store[kind, 0]  # refused by the store, with the record command that would provide it
    axes = next(iter(found.values())).axes
    if axes != ("row", "d_model"):
        raise RequestError(f"site {kind!r} has axes ({', '.join(axes)}); the lens reads (row, d_model)")
    layers = sorted(found)
    return layers, [f"{kind}.{layer}" for layer in layers]


def _blocks(rows: int, vocab: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (4 * vocab))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _log_probabilities(unembed: Unembed, resid: Tensor) -> Float[Tensor, "row vocab"]:
    with torch.inference_mode():
        return unembed(resid.to(unembed.weight.device)).log_softmax(-1)


class _Kept:
    """The first rows, one by one."""

    def __init__(self, layers: int, rows: int, top_k: int) -> None:
        self.rows = rows
        self.arrays = {
            "entropy": np.zeros((layers, rows), np.float32),
            "kl": np.zeros((layers, rows), np.float32),
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


class _Totals:
    """Running sums over all rows, in float64."""

    def __init__(self, layers: int) -> None:
        self.sums = {name: np.zeros(layers) for name in ("entropy", "kl", "cross_entropy", "agreement", "accuracy")}
        self.rows, self.targets = np.zeros(layers), np.zeros(layers)

    def add(self, layer: int, found: dict[str, Tensor], top: Tensor, model_top: Tensor, target: Tensor) -> None:
        known = target >= 0
        self.rows[layer] += len(target)
        self.targets[layer] += int(known.sum())
        values = {
            **{name: found[name] for name in ("entropy", "kl")},
            "cross_entropy": found["cross_entropy"][known],
            "agreement": top == model_top,
            "accuracy": (top == target)[known],
        }
        for name, value in values.items():
            self.sums[name][layer] += value.double().sum().item()

    def means(self) -> dict[str, np.ndarray]:
        counts = {"cross_entropy": self.targets, "accuracy": self.targets}
        with np.errstate(invalid="ignore"):  # no token has a successor: the mean of nothing is NaN
            return {name: total / counts.get(name, self.rows) for name, total in self.sums.items()}


def _dataset(kept: _Kept, totals: _Totals, layers: list[int], rows: np.ndarray) -> xr.Dataset:
    axes = {2: ("layer", "row"), 3: ("layer", "row", "top")}
    arrays = {name: (axes[array.ndim], array, {"units": UNITS[name]}) for name, array in kept.arrays.items()}
    means = {f"mean_{name}": (("layer",), mean, {"units": UNITS[name]}) for name, mean in totals.means().items()}
    counts = {
        "rows": ((), len(rows), {"units": "tokens", "long_name": "tokens the means are over"}),
        "rows_with_next": ((), int(totals.targets[0]), {"units": "tokens"}),
    }
    coords = {"layer": layers, "row": rows[: kept.rows], "top": np.arange(1, kept.arrays["top_id"].shape[2] + 1)}
    return xr.Dataset({**arrays, **means, **counts}, coords=coords)


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
    for name in ("entropy", "kl", "cross_entropy", "rank"):
        columns[name] = data[name].to_numpy().ravel()
    for k in range(data.sizes["top"]):
        ids = data["top_id"].to_numpy()[:, :, k].ravel()
        columns[f"top_token_{k + 1}"] = [unembed.token(token_id) for token_id in ids.tolist()]
        columns[f"top_probability_{k + 1}"] = data["top_probability"].to_numpy()[:, :, k].ravel()
    return pd.DataFrame(columns)
