"""The tuned lens: the logit lens with each layer's own change of basis (Belrose et al., arXiv 2303.08112).

    TunedLens_l(h) = W_U LN_f(h + A_l h + b_l)

A_l and b_l start at 0, where it is the logit lens, and are trained so that KL(model || lens) is small. The last block
has none: its row is the model's own output. Trained on some documents of the store, read on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.bootstrap import divided, few_rows
from workbench.analysis.lens import (
    lens_curves,
    lens_depth,
    lens_grid,
    log_probabilities,
    read_lens,
    recorded_layers,
    selected_rows,
)
from workbench.figures.layer_curves import layer_curves
from workbench.figures.safe_text import axis_title, label
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.model.load import Model, usable_device
from workbench.model.unembed import Unembed, load_unembed
from workbench.results.result import Result, provenance
from workbench.store.reader import Store

_PATIENCE = 2  # passes without a better layer


@dataclass(frozen=True)
class TunedLens:
    """What each layer would predict after a trained change of basis, on documents the training did not see."""

    name: ClassVar[str] = "tuned-lens"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Belrose et al. 2023, the tuned lens, arXiv 2303.08112",)
    controls: ClassVar[Mapping[str, str]] = {
        "logit_mean_kl": "the logit lens on the same held-out tokens, with nothing trained",
        "logit_mean_cross_entropy": "the same, of the token that follows",
    }

    site: str = "resid_post"
    """Kind of site to read at every layer: resid_post, resid_pre, resid_mid."""
    where: str | None = None
    """SQL over the token table: which tokens count. None: all."""
    held_out: float = 0.2
    """Share of the documents that are read and not trained on; half as many more decide when training ends."""
    epochs: int = 20
    """Most passes over the training rows; a layer ends earlier once it gets no better on the validation documents."""
    batch: int = 1024
    """Rows a step."""
    learning_rate: float = 1e-3
    """Of Adam, brought to 0 along a line."""
    weight_decay: float = 1e-3
    """Towards A = 0 and b = 0, the logit lens."""
    seed: int = 0
    """Of the choice of documents and the order of rows."""
    top_k: int = 5
    """Top tokens kept for each layer and token."""
    detail: int = 10_000
    """Tokens that get their own line in the table, from the first held out on; means are over all held out."""
    device: str = "cpu"
    """Where it is trained and read: cpu, cuda."""

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("detail", 0), ("epochs", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RequestError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 < self.held_out < 0.6:
            raise RequestError(f"held_out must lie between 0 and 0.6, not {self.held_out}")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Trains a translator for every recorded layer of `site`, then reads the held-out documents through them.

        `data` has what the logit lens has, of the held-out rows: mean_kl and mean_cross_entropy stand beside
        logit_mean_kl and logit_mean_cross_entropy, the same rows without translators. `weight` (layer, d_model,
        d_model_in) and `bias` (layer, d_model) are A and b, 0 at the last block; `epochs` (layer) the passes kept.
        `training_rows`, `validation_rows` and `rows` say what each number rests on, and a `note` what is too little.

        Costs epochs x layers x rows x 3 products with W_U; memory is bounded by a batch of logits a layer, the
        translators and Adam's moments. Raises RequestError as the logit lens does, and for fewer than three documents.
        """
        device = usable_device(self.device)
        layers, labels = recorded_layers(store, self.site)
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        store.require(last)  # before training
        translated = [(layer, name) for layer, name in zip(layers, labels, strict=True) if name != last]
        rows = selected_rows(store, self.where)
        document = store.tokens["document"].to_numpy()[rows]
        parts = divided(document, self.held_out, purpose="a tuned lens", seed=self.seed)
        training, validation, tested = (rows[part] for part in parts)
        unembed = load_unembed(store.path, device)
        lens = _Trained(len(translated), unembed.weight.shape[1], device)
        if self.epochs:
            self._train(store, [name for _, name in translated], last, unembed, lens, training, validation)
        place = {layer: index for index, (layer, _) in enumerate(translated)}

        def translate(layer: int, states: Tensor) -> Tensor:
            return lens.translate(place[layer], states.float())

        read = {"site": self.site, "device": self.device}
        data, table = read_lens(store, tested, **read, top_k=self.top_k, detail=self.detail, translate=translate)
        plain, _ = read_lens(store, tested, **read, top_k=1, detail=0)
        for name in ("mean_kl", "mean_cross_entropy"):
            data[f"logit_{name}"] = plain[name]
        data = data.assign(_translators(lens, layers, place))
        data["training_rows"] = ((), len(training), {"units": "tokens"})
        data["validation_rows"] = ((), len(validation), {"units": "tokens"})
        data.attrs["note"] = few_rows(len(training), unembed.weight.shape[1])
        return Result(self.name, data, table, provenance(store, self))

    def _train(
        self,
        store: Store,
        sites: list[str],
        last: str,
        unembed: Unembed,
        lens: _Trained,
        training: Int[np.ndarray, " training_row"],
        validation: Int[np.ndarray, " validation_row"],
    ) -> None:
        """Adam on KL(model || lens), every layer on the same batches; each keeps the best pass on `validation`."""
        optimizer = torch.optim.AdamW(lens.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.epochs * -(-len(training) // self.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        draw = np.random.default_rng(self.seed)

        def losses(rows: Int[np.ndarray, " row"]) -> Float[Tensor, " layer"]:
            with torch.no_grad():
                model_log = log_probabilities(unembed, store[last][rows])
            found = []
            for index, name in enumerate(sites):
                states = lens.translate(index, store[name][rows].float().to(model_log.device))
                loss = torch.nn.functional.kl_div(
                    unembed(states).log_softmax(-1), model_log, reduction="batchmean", log_target=True
                )
                if torch.is_grad_enabled():
                    loss.backward()  # one layer's logits at a time
                found.append(loss.detach())
            return torch.stack(found)

        def validated() -> Float[Tensor, " layer"]:
            parts = np.split(validation, range(self.batch, len(validation), self.batch))
            with torch.no_grad():
                return sum(losses(part) * len(part) for part in parts) / len(validation)

        with progress("tuned lens", steps, "steps") as tick:
            lens.keep(0, validated())
            for epoch in range(1, self.epochs + 1):
                order = draw.permutation(training)
                for rows in np.split(order, range(self.batch, len(order), self.batch)):
                    losses(np.sort(rows))
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    schedule.step()
                    tick(1)
                lens.keep(epoch, validated())
                if epoch - lens.epochs.max() >= _PATIENCE:
                    break
        lens.restore()

    @staticmethod
    def headline(result: Result) -> str:
        """How far from the model's output the lenses are at the first layer, and from where the prediction stays."""
        data = result.data
        tuned, plain = data["mean_kl"].to_numpy(), data["logit_mean_kl"].to_numpy()
        layers = data["layer"].to_numpy()
        note = data.attrs.get("note", "")
        return (
            f"KL to the output {tuned[0]:.2f} nats at layer {layers[0]}, logit lens {plain[0]:.2f}; "
            f"on {int(data['rows']):,} held-out tokens" + (f"; {note}" if note else "")
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """ "by_layer": KL of tuned and logit lens; "grid": layers by tokens; "losses": entropy, KL and loss;
        "depth": the text, each token coloured by where its prediction is settled."""
        figures = {"by_layer": _comparison(result), "losses": lens_curves(result)}
        if not len(result.table):
            return figures
        return {**figures, "grid": lens_grid(result), "depth": lens_depth(result)}


class _Trained:
    """The translators: A `[layer, d_model, d_model]` and b `[layer, d_model]`, and the best of each layer so far."""

    def __init__(self, layers: int, d_model: int, device: torch.device) -> None:
        self.weight = torch.zeros(layers, d_model, d_model, device=device, requires_grad=True)
        self.bias = torch.zeros(layers, d_model, device=device, requires_grad=True)
        self.kept = [part.detach().clone() for part in self.parameters()]
        self.epochs = torch.zeros(layers, dtype=torch.long)
        self._best = torch.full((layers,), torch.inf, device=device)

    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def translate(self, layer: int, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        return states + states @ self.weight[layer].T + self.bias[layer]

    def keep(self, epoch: int, losses: Float[Tensor, " layer"]) -> None:
        """Keep the layers that are better than they ever were."""
        better = losses < self._best
        for kept, part in zip(self.kept, self.parameters(), strict=True):
            kept[better] = part.detach()[better]
        self.epochs[better.cpu()] = epoch
        self._best = torch.minimum(losses, self._best)

    def restore(self) -> None:
        with torch.no_grad():
            for kept, part in zip(self.kept, self.parameters(), strict=True):
                part.copy_(kept)
                part.requires_grad_(False)


def _translators(lens: _Trained, layers: list[int], place: dict[int, int]) -> dict[str, Any]:
    d_model = lens.bias.shape[1]
    weight, bias = np.zeros((len(layers), d_model, d_model), np.float32), np.zeros((len(layers), d_model), np.float32)
    epochs = np.zeros(len(layers), np.int32)
    for row, layer in enumerate(layers):
        if layer in place:
            weight[row] = lens.weight[place[layer]].detach().cpu().numpy()
            bias[row] = lens.bias[place[layer]].detach().cpu().numpy()
            epochs[row] = lens.epochs[place[layer]]
    return {
        "weight": xr.Variable(("layer", "d_model", "d_model_in"), weight, {"units": "1"}),
        "bias": xr.Variable(("layer", "d_model"), bias, {"units": "activation"}),
        "epochs": xr.Variable(("layer",), epochs, {"units": "passes over the training rows"}),
    }


def _comparison(result: Result) -> Any:
    data, model = result.data, label(str(result.provenance["model"]), 60)
    return layer_curves(
        {"tuned lens": data["mean_kl"].to_numpy(), "logit lens": data["logit_mean_kl"].to_numpy()},
        layers=data["layer"].to_numpy().tolist(),
        title=f"KL(model ‖ lens) of {model}: {int(data['rows']):,} held-out tokens",
        unit=axis_title(data["mean_kl"].attrs),
    )
