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
    FiniteRows,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Store,
    TrainedLens,
    Unembed,
    Variable,
    check,
    check_fields,
    counted,
    dataset,
    kl_slope,
    lens_curves,
    lens_depth,
    lens_grid,
    load_unembed,
    mean_curves,
    model_label,
    note_few_rows,
    plain_torch,
    progress,
    provenance,
    read_lens,
    require_causal,
    selected_rows,
    split_by_document,
    usable_device,
    with_interval,
    with_note,
)

_BLOCK = 128  # rows whose logits are in memory
_PATIENCE = 2  # passes without a better layer
_EPOCHS = 20  # where they are not set and the work below allows them
_CPU_WORK, _GPU_WORK = 6e13, 1e16  # operations of a training whose epochs are not set: some minutes
_ROWS = "mean over the held-out tokens"
_VARIABLES: tuple[Variable, ...] = (
    *LENS_VARIABLES,
    *LOST_VARIABLES,
    *with_interval(
        Variable("logit_mean_kl", ("layer",), "nats", f"KL(model || logit lens), without a trained map; {_ROWS}")
    ),
    *with_interval(
        Variable(
            "logit_mean_cross_entropy",
            ("layer",),
            "nats",
            f"cross-entropy of the text under the logit lens; {_ROWS}",
            "ln(vocab) for a uniform guess",
        )
    ),
    Variable("weight", ("layer", "d_model", "d_model_in"), "1", "A; 0 at the last block", "0: the logit lens"),
    Variable("bias", ("layer", "d_model"), "activation", "b; 0 at the last block", "0: the logit lens"),
    Variable("epochs", ("layer",), "passes over the training rows", "epoch whose maps are kept"),
    Variable("training_rows", (), "tokens", "tokens that the maps are trained on"),
    Variable("validation_rows", (), "tokens", "tokens that choose the epoch"),
)


@dataclass(frozen=True)
class TunedLens(LayerProbe):
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
    epochs: int | None = None
    """Maximum epochs; training ends earlier when no layer improves on the validation documents for 2 epochs. None: 20,
    or as many as some minutes pay for; if that is less than one, it is one over fewer tokens, drawn at random."""
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
        super().__post_init__()
        check_fields(self, "top_k", "batch", at_least=1)
        check_fields(self, "detail", at_least=0)
        check_fields(self, "epochs", at_least=0, at_most=10_000, optional=True)
        check_fields(self, "learning_rate", "weight_decay", at_least=0, below=float("inf"))
        check("held_out", self.held_out, above=0, below=0.6)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Trains an affine map for every recorded layer of `site`, then reads the held-out documents through the maps.

        Costs epochs x layers x rows x 2 products with W_U; memory is some blocks of 128 rows of logits, the maps and
        Adam's moments.

        Raises:
            RequestError: A site or the unembedding was not recorded, values are NaN or infinite, the model is not
                causal, or there are fewer than three documents.
        """
        check("top_k", self.top_k, at_most=store.manifest.model.vocab)  # before the training
        lens, checked, tested = self._fit(store)
        return self._result(lens, store, checked, tested)

    @plain_torch()
    def fit(self, store: Store) -> TrainedLens:
        """Returns the trained maps, to be saved and applied to other stores; trains on the documents that `run` does.

        Raises:
            RequestError: As `run`.
        """
        return self._fit(store)[0]

    @plain_torch()
    def read(self, lens: TrainedLens, store: Store) -> Result:
        """Returns the readings of all selected tokens of a store through a lens that was trained before.

        Raises:
            RequestError: The store is of another model than the lens, or as `run`.
        """
        require_causal(store, self.name)
        lens.check_model(store)
        if self.site != lens.site:
            raise RequestError(f"site is {self.site!r}, and the lens reads {lens.site}")
        _, labels = self.recorded(store, self.site)
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        checked = self.finite_rows(store, list(dict.fromkeys([*labels, last])), selected_rows(store, self.where))
        return self._result(lens, store, checked, checked.rows)

    def _result(self, lens: TrainedLens, store: Store, checked: FiniteRows, rows: Int[np.ndarray, " row"]) -> Result:
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        known = zip(*self.recorded(store, self.site), strict=True)
        layers = [layer for layer, name in known if name == last or layer in lens.layers or self.layers is not None]
        read = partial(read_lens, store, rows, site=self.site, device=self.device, layers=layers)
        data, table = read(top_k=self.top_k, detail=self.detail, translate=lens.translate)
        plain, _ = read(top_k=1, detail=0)
        ends = [f"{name}{end}" for name in ("mean_kl", "mean_cross_entropy") for end in ("", "_low", "_high")]
        logit = {f"logit_{name}": plain[name].to_numpy() for name in ends}
        counts = {name: lens.made_of.get(name, 0) for name in ("training_rows", "validation_rows")}
        data = data.assign(dataset(self.variables, {**logit, **_maps(lens, layers), **counts}).variables)
        note = note_few_rows(counts["training_rows"], lens.bias.shape[1]) if counts["training_rows"] else ""
        return self.result(store, data, table, checked, [note, lens.made_of.get("note", "")])

    def _fit(self, store: Store) -> tuple[TrainedLens, FiniteRows, Int[np.ndarray, " test_row"]]:
        """The lens, the rows that are read, and those of them that are held out."""
        require_causal(store, self.name)
        device = usable_device(self.device)
        layers, labels = self.recorded(store, self.site)
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        store.require(last)  # before training
        translated = [(layer, name) for layer, name in zip(layers, labels, strict=True) if name != last]
        unembed = load_unembed(store.path, device)
        checked = self.finite_rows(store, [*labels, last], selected_rows(store, self.where))
        document = store.tokens["document"].to_numpy()[checked.rows]
        parts = split_by_document(document, self.held_out, purpose="a tuned lens", seed=self.seed)
        training, validation, tested = (checked.rows[part] for part in parts)
        maps = _Maps(len(translated), unembed.weight.shape[1], device)
        plan = self._plan(training, validation, len(translated), unembed)
        if plan.epochs and translated:
            self._train(store, [name for _, name in translated], last, unembed, maps, plan)
        model, made_of = store.manifest.model, provenance(store, self)
        made_of = {key: made_of[key] for key in ("store_fingerprint", "settings", "workbench")}
        made_of |= {"method": "tuned lens", "epochs": maps.epochs.tolist()}
        made_of |= {"training_rows": len(plan.training), "validation_rows": len(plan.validation), "note": plan.note}
        weight, bias = (part.detach().cpu() for part in maps.parameters())
        lens = TrainedLens(
            self.site,
            tuple(layer for layer, _ in translated),
            weight,
            bias,
            model.name,
            model.fingerprint,
            model.n_layers,
            made_of,
        )
        return lens, checked, tested

    def _plan(
        self,
        training: Int[np.ndarray, " training_row"],
        validation: Int[np.ndarray, " validation_row"],
        layers: int,
        unembed: Unembed,
    ) -> _Plan:
        """All tokens and the epochs that are set; None: what some minutes of the device pay for."""
        if self.epochs is not None:
            return _Plan(training, validation, self.epochs)
        work = _CPU_WORK if unembed.weight.device.type == "cpu" else _GPU_WORK
        visits = max(self.batch, int(work // max(1, 4 * layers * unembed.weight.numel())))  # two products each
        draw = np.random.default_rng(self.seed)
        rows, checked = (
            np.sort(draw.permutation(part)[:most])
            for part, most in ((training, visits), (validation, max(self.batch, visits // 10)))
        )
        epochs = min(_EPOCHS, visits // len(rows))
        if epochs == _EPOCHS:
            return _Plan(rows, checked, epochs)
        words = f"{counted(epochs, 'epoch')} of {len(rows):,} of {counted(len(training), 'token')}"
        note = f"trained for {words}, as long as some minutes allow; set epochs to train longer"
        return _Plan(rows, checked, epochs, note)

    def _train(self, store: Store, sites: list[str], last: str, unembed: Unembed, lens: _Maps, plan: _Plan) -> None:
        """Trains with AdamW on KL(model || lens), all layers on the same batches; each keeps its best epoch."""
        training, validation = plan.training, plan.validation
        optimizer = torch.optim.AdamW(lens.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = plan.epochs * -(-len(training) // self.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        draw = np.random.default_rng(self.seed)

        memory = [torch.empty(_BLOCK, unembed.vocab, device=unembed.weight.device) for _ in range(2)]

        def losses(rows: Int[np.ndarray, " row"]) -> Float[Tensor, " layer"]:
            """Mean KL of each layer; its slope goes through W_U by hand, since a graph would keep all logits."""
            values = torch.zeros(len(sites), device=unembed.weight.device)
            for part in np.split(rows, range(_BLOCK, len(rows), _BLOCK)):
                model, logits = (buffer[: len(part)] for buffer in memory)
                log = unembed.write(store[last][part].to(logits.device), model).log_softmax(1)
                entropy = -log.mul_(torch.exp(log, out=model)).sum(1)
                for index, name in enumerate(sites):
                    states = lens.translate(index, store[name][part].float().to(logits.device))
                    normed = unembed.normed(states)
                    unembed.write_normed(normed.detach(), logits)
                    bend = None if unembed.softcap is None else 1 - (logits / unembed.softcap).square()
                    values[index] += kl_slope(logits, model, entropy).sum() / len(rows)
                    if torch.is_grad_enabled():
                        slope = logits if bend is None else logits.mul_(bend)
                        normed.backward(slope @ unembed.weight * (unembed.scale / len(rows)))
            return values

        def validated() -> Float[Tensor, " layer"]:
            parts = np.split(validation, range(self.batch, len(validation), self.batch))
            with torch.no_grad():
                first, *rest = [losses(part) * len(part) for part in parts]
                return sum(rest, start=first) / len(validation)

        with progress("tuned lens", steps, "steps") as tick:
            lens.keep(0, validated())
            for epoch in range(1, plan.epochs + 1):
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
            f"KL(model ‖ lens) at layer {data['layer'].to_numpy()[0]}: {tuned[0]:z.2f} nats with the tuned lens, "
            f"{plain[0]:z.2f} nats with the logit lens (mean over {counted(data['rows'], 'held-out token')}).",
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


@dataclass(frozen=True)
class _Plan:
    """What maps are trained on, and how long."""

    training: Int[np.ndarray, " training_row"]
    validation: Int[np.ndarray, " validation_row"]
    epochs: int
    note: str = ""
    """What the work of the device allows, where that is less than `_EPOCHS` of all tokens."""


class _Maps:
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
        for best, part in zip(self.kept, self.parameters(), strict=True):
            best[better] = part.detach()[better]
        self.epochs[better.cpu()] = epoch
        self._best = torch.minimum(losses, self._best)

    def restore(self) -> None:
        with torch.no_grad():
            for best, part in zip(self.kept, self.parameters(), strict=True):
                part.copy_(best)
                part.requires_grad_(False)


def _maps(lens: TrainedLens, layers: list[int]) -> dict[str, np.ndarray]:
    d_model = lens.bias.shape[1]
    weight, bias = np.zeros((len(layers), d_model, d_model), np.float32), np.zeros((len(layers), d_model), np.float32)
    epochs, known = np.zeros(len(layers), np.int32), lens.made_of.get("epochs", [0] * len(lens.layers))
    for row, layer in enumerate(layers):
        if layer in lens.layers:
            place = lens.layers.index(layer)
            weight[row], bias[row], epochs[row] = lens.weight[place], lens.bias[place], known[place]
    return {"weight": weight, "bias": bias, "epochs": epochs}


def _comparison(result: Result) -> Any:
    names = {"mean_kl": "tuned lens", "logit_mean_kl": "logit lens"}
    return mean_curves(result, names, title=f"KL(model ‖ lens) of {model_label(result)}", tokens="held-out token")
