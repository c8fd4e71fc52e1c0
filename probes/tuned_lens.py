"""The tuned lens: the logit lens after an affine map trained for each layer (Belrose et al., arXiv 2303.08112).

    TunedLens_l(h) = W_U LN_f(h + A_l h + b_l)

A_l and b_l start at 0, which gives the logit lens, and are trained to minimise KL(model || lens). The last block has no
map: its row is the model's own output. The maps are trained on some documents of the store and read on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.probing import (
    LENS_VARIABLES,
    LOST_VARIABLES,
    Model,
    Result,
    Store,
    StoreProbe,
    Unembed,
    Variable,
    axis_title,
    check,
    check_fields,
    dataset,
    label,
    layer_curves,
    lens_curves,
    lens_depth,
    lens_grid,
    load_unembed,
    log_probabilities,
    note_few_rows,
    plain_torch,
    progress,
    read_lens,
    recorded_layers,
    require_causal,
    selected_rows,
    split_by_document,
    usable_device,
    with_note,
)

_PATIENCE = 2  # passes without a better layer
_ROWS = "mean over the held-out tokens"
_VARIABLES: tuple[Variable, ...] = (
    *LENS_VARIABLES,
    *LOST_VARIABLES,
    Variable("logit_mean_kl", ("layer",), "nats", f"KL(model || logit lens), without a trained map; {_ROWS}"),
    Variable(
        "logit_mean_cross_entropy",
        ("layer",),
        "nats",
        f"cross-entropy of the text under the logit lens; {_ROWS}",
        "ln(vocab) for a uniform guess",
    ),
    Variable("weight", ("layer", "d_model", "d_model_in"), "1", "A; 0 at the last block", "0: the logit lens"),
    Variable("bias", ("layer", "d_model"), "activation", "b; 0 at the last block", "0: the logit lens"),
    Variable("epochs", ("layer",), "passes over the training rows", "epoch whose maps are kept"),
    Variable("training_rows", (), "tokens", "tokens that the maps are trained on"),
    Variable("validation_rows", (), "tokens", "tokens that choose the epoch"),
)


@dataclass(frozen=True)
class TunedLens(StoreProbe):
    """Reads every layer through a trained affine map and the unembedding, on documents held out from training."""

    name: ClassVar[str] = "tuned-lens"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = ("Belrose et al. 2023, the tuned lens, arXiv 2303.08112",)
    controls: ClassVar[Mapping[str, str]] = {
        "logit_mean_kl": "KL of the logit lens on the same held-out tokens, without training",
        "logit_mean_cross_entropy": "cross-entropy of the text under the logit lens on the same tokens",
    }

    site: str = "resid_post"
    """Kind of site to read at every layer: resid_post, resid_pre, resid_mid."""
    where: str | None = None
    """SQL over the token table: the tokens to train on and to read. None: all."""
    held_out: float = 0.2
    """Share of the documents that are read and not trained on; half as many more are for validation."""
    epochs: int = 20
    """Maximum epochs; training ends earlier when no layer improves on the validation documents for 2 epochs."""
    batch: int = 1024
    """Batch size, in tokens."""
    learning_rate: float = 1e-3
    """AdamW learning rate, decayed linearly to 0."""
    weight_decay: float = 1e-3
    """AdamW weight decay, towards A = 0 and b = 0, which is the logit lens."""
    seed: int = 0
    """Random seed of the split of documents and of the order of rows."""
    top_k: int = 5
    """Top tokens kept for each layer and token."""
    detail: int = 10_000
    """Maximum number of held-out tokens with their own rows in the table; means are over all held-out tokens."""
    device: str | None = None
    """Device of training and reading: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        check_fields(self, "top_k", "batch", at_least=1)
        check_fields(self, "detail", "epochs", at_least=0)
        check_fields(self, "learning_rate", "weight_decay", at_least=0, below=float("inf"))
        check("held_out", self.held_out, above=0, below=0.6)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Trains an affine map for every recorded layer of `site`, then reads the held-out documents through the maps.

        Costs epochs x layers x rows x 3 products with W_U; memory is a batch of logits for one layer, the maps and
        Adam's moments.

        Raises:
            RequestError: A site or the unembedding was not recorded, values are NaN or infinite, the model is not
                causal, or there are fewer than three documents.
        """
        require_causal(store, self.name)
        device = usable_device(self.device)
        layers, labels = recorded_layers(store, self.site)
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        store.require(last)  # before training
        translated = [(layer, name) for layer, name in zip(layers, labels, strict=True) if name != last]
        unembed = load_unembed(store.path, device)
        checked = self.finite_rows(store, [*labels, last], selected_rows(store, self.where))
        rows = checked.rows
        document = store.tokens["document"].to_numpy()[rows]
        parts = split_by_document(document, self.held_out, purpose="a tuned lens", seed=self.seed)
        training, validation, tested = (rows[part] for part in parts)
        lens = _Trained(len(translated), unembed.weight.shape[1], device)
        if self.epochs:
            self._train(store, [name for _, name in translated], last, unembed, lens, training, validation)
        place = {layer: index for index, (layer, _) in enumerate(translated)}

        def translate(layer: int, states: Tensor) -> Tensor:
            return lens.translate(place[layer], states.float())

        read = partial(read_lens, store, tested, site=self.site, device=self.device)
        data, table = read(top_k=self.top_k, detail=self.detail, translate=translate)
        plain, _ = read(top_k=1, detail=0)
        logit = {f"logit_{name}": plain[name].to_numpy() for name in ("mean_kl", "mean_cross_entropy")}
        more = {
            **logit,
            **_maps(lens, layers, place),
            "training_rows": len(training),
            "validation_rows": len(validation),
        }
        data = data.assign(dataset(self.variables, more).variables)
        return self.result(store, data, table, checked, [note_few_rows(len(training), unembed.weight.shape[1])])

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
        """Trains with AdamW on KL(model || lens), all layers on the same batches; each keeps its best epoch."""
        optimizer = torch.optim.AdamW(lens.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.epochs * -(-len(training) // self.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        draw = np.random.default_rng(self.seed)

        def losses(rows: Int[np.ndarray, " row"]) -> Float[Tensor, " layer"]:
            with torch.no_grad():
                model_log = log_probabilities(unembed, store[last][rows])
            values = []
            for index, name in enumerate(sites):
                states = lens.translate(index, store[name][rows].float().to(model_log.device))
                loss = torch.nn.functional.kl_div(
                    unembed(states).log_softmax(-1), model_log, reduction="batchmean", log_target=True
                )
                if torch.is_grad_enabled():
                    loss.backward()  # one layer's logits at a time
                values.append(loss.detach())
            return torch.stack(values)

        def validated() -> Float[Tensor, " layer"]:
            parts = np.split(validation, range(self.batch, len(validation), self.batch))
            with torch.no_grad():
                first, *others = [losses(part) * len(part) for part in parts]
                return sum(others, start=first) / len(validation)

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
        """Returns the KL to the model's output of tuned and logit lens at the first layer."""
        data = result.data
        tuned, plain = data["mean_kl"].to_numpy(), data["logit_mean_kl"].to_numpy()
        if data.sizes["layer"] == 1 and data.attrs.get("own_output") == 0:
            return with_note("Only the model's own output was recorded, which has no map.", result)
        return with_note(
            f"KL(model ‖ lens) at layer {data['layer'].to_numpy()[0]}: {tuned[0]:.2f} nats with the tuned lens, "
            f"{plain[0]:.2f} nats with the logit lens (mean over {int(data['rows']):,} held-out tokens).",
            result,
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "by_layer", KL of tuned and logit lens; "losses", entropy, KL and loss; "grid", layers by tokens;
        "depth", the text coloured by prediction depth."""
        figures = {"by_layer": _comparison(result), "losses": lens_curves(result)}
        if not len(result.table):
            return figures
        return {**figures, "grid": lens_grid(result), "depth": lens_depth(result)}


class _Trained:
    """The maps: A `[layer, d_model, d_model]` and b `[layer, d_model]`, and the best of each layer so far."""

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
        """Keeps the layers that are better than in any epoch before."""
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


def _maps(lens: _Trained, layers: list[int], place: dict[int, int]) -> dict[str, np.ndarray]:
    d_model = lens.bias.shape[1]
    weight, bias = np.zeros((len(layers), d_model, d_model), np.float32), np.zeros((len(layers), d_model), np.float32)
    epochs = np.zeros(len(layers), np.int32)
    for row, layer in enumerate(layers):
        if layer in place:
            weight[row] = lens.weight[place[layer]].detach().cpu().numpy()
            bias[row] = lens.bias[place[layer]].detach().cpu().numpy()
            epochs[row] = lens.epochs[place[layer]]
    return {"weight": weight, "bias": bias, "epochs": epochs}


def _comparison(result: Result) -> Any:
    data, model = result.data, label(str(result.provenance["model"]), 60)
    return layer_curves(
        {"tuned lens": data["mean_kl"].to_numpy(), "logit lens": data["logit_mean_kl"].to_numpy()},
        layers=data["layer"].to_numpy().tolist(),
        title=f"KL(model ‖ lens) of {model}: {int(data['rows']):,} held-out tokens",
        unit=axis_title(data["mean_kl"].attrs),
    )
