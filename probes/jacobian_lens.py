"""The Jacobian lens: the logit lens after the average first-order effect of a state on the last block's output.

    JacobianLens(h_l) = W_U LN_f(J_l h_l)

    J_l = mean over prompts of 1/|V| sum_{t in V} sum_{t' in V, t' >= t} d h_final,t' / d h_l,t

(Gurnee et al. 2026). V are the positions of a prompt after its first ones, without the last; effects on later positions
are summed. J = I is the logit lens. The maps are fitted once, by gradients of the model, and kept with the store; after
that the store is read as by any lens. Since J sums over later positions, a token that the lens reads may be predicted
later: `recall` asks for the tokens 1, 2, ... tokens on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int

from workbench.probing import (
    CATEGORIES,
    LENS_VARIABLES,
    LOST_VARIABLES,
    NEUTRAL,
    Curve,
    FiniteRows,
    LayerProbe,
    Model,
    Panel,
    RequestError,
    Result,
    Store,
    TrainedLens,
    Variable,
    affordable_prompts,
    axis_title,
    check,
    check_fields,
    clustered_ends,
    counted,
    dataset,
    kept_lens,
    label,
    layer_panels,
    lens_curves,
    lens_depth,
    lens_grid,
    mean_curves,
    mean_jacobians,
    plain_torch,
    provenance,
    read_lens,
    recorded_ends,
    recorded_model,
    require_causal,
    selected_rows,
    tokens_at,
    usable_device,
    with_interval,
    with_note,
)

_LOG = logging.getLogger(__name__)
_METHOD = "jacobian lens"
_LAYER, _AHEAD = ("layer",), ("layer", "horizon")
_SHARE = "share of tokens"
_VARIABLES: tuple[Variable, ...] = (
    *LENS_VARIABLES,
    *LOST_VARIABLES,
    *with_interval(
        Variable("recall", _AHEAD, _SHARE, "tokens whose token `horizon` on is in the lens's top k", "recall_shuffled")
    ),
    *with_interval(Variable("logit_recall", _AHEAD, _SHARE, "the same for the logit lens", "recall_shuffled")),
    *with_interval(
        Variable("recall_shuffled", _AHEAD, _SHARE, "recall of the later tokens of other rows: frequent tokens alone")
    ),
    *with_interval(Variable("logit_mean_kl", _LAYER, "nats", "KL(model || logit lens), without J, on the same tokens")),
    *with_interval(
        Variable(
            "logit_mean_cross_entropy", _LAYER, "nats", "cross-entropy of the text under the logit lens", "ln(vocab)"
        )
    ),
    Variable("identity", _LAYER, "1", "cosine of J and the identity: tr J / (|J| sqrt d_model), at most 1"),
    Variable("split_half", _LAYER, "1", "cosine of J - I of the even and of the odd prompts; NaN for one prompt", "0"),
    Variable("prompts", (), "prompts", "prompts that J is a mean over"),
)


@dataclass(frozen=True)
class JacobianLens(LayerProbe):
    """Reads every layer through the mean Jacobian to the last block: tokens that a state makes likely, now or later."""

    name: ClassVar[str] = "jacobian-lens"
    needs_model: ClassVar[bool] = True
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Gurnee et al. 2026, Verbalizable representations form a global workspace in language models, "
        "transformer-circuits.pub",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "logit_recall": "the logit lens, which is J = I, on the same tokens; logit_mean_kl likewise",
        "recall_shuffled": "recall of later tokens of other rows: what frequent tokens alone give",
        "split_half": "agreement of J of the even and of the odd prompts: near 0 for too few prompts",
    }

    site: str = "resid_post"
    """Kind of site: resid_post, the output of blocks."""
    lens: str | None = None
    """Folder of the fitted lens: read if it is there, fitted and saved there if not. None: the store's folder lenses,
    by these settings."""
    prompts: int | None = None
    """Sequences of the store whose Jacobians are averaged. None: 1 to 100, as many as take some minutes."""
    length: int = 128
    """First tokens of each of these sequences."""
    skip: int = 16
    """First positions of a sequence that are neither sources nor targets."""
    where: str | None = None
    """SQL over the token table: the tokens to read; sequences to fit are those with such a token. None: all."""
    row_limit: int = 4000
    """Maximum number of tokens that are read, in whole sequences drawn at random."""
    top_k: int = 10
    """Top tokens kept for each layer and token; recall asks if a later token is among them."""
    horizons: int = 10
    """Number of later tokens that recall asks for."""
    detail: int = 10_000
    """Maximum number of tokens with their own rows in the table; means are over all that are read."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    seed: int = 0
    """Random seed of the drawn sequences and of the shuffled rows."""
    device: str | None = None
    """Device of the gradients and of the products with W_U: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "site", one_of=("resid_post",))
        check_fields(self, "row_limit", "top_k", at_least=1, whole=True)
        check_fields(self, "horizons", at_least=1, at_most=1000, whole=True)
        check_fields(self, "prompts", at_least=1, whole=True, optional=True)
        check_fields(self, "detail", "seed", "skip", at_least=0, whole=True)
        check_fields(self, "length", at_least=self.skip + 2, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads the documents that the lens was not fitted on; fits it first where it is not kept already.

        A fit costs prompts x d_model backward passes over `length` tokens, on activations alone: on two cores some
        minutes for one prompt of a model of 100 million weights, so that a GPU pays. Reading costs twice a logit lens.

        Args:
            store: Has resid_post and the unembedding.
            model: The recorded model, for the fit. None: it is loaded from the setting `model` or the store's name.

        Raises:
            RequestError: A site or the unembedding was not recorded, no sequence is long enough, values are NaN or
                infinite, the model is not causal, cannot be loaded or is another one.
        """
        require_causal(store, self.name)
        check("top_k", self.top_k, at_most=store.manifest.model.vocab)  # before the fit
        _, labels = self.recorded(store, self.site)
        store.require(*labels, f"resid_post.{store.manifest.model.n_layers - 1}")  # before the fit
        folder = Path(self.lens) if self.lens is not None else kept_lens(store, "jacobian", self._fit_settings())
        if (folder / "lens.json").is_file():
            return self.read(_checked(folder), store, fitted=False)
        lens = self.fit(store, model=model)
        try:
            lens.save(folder)
        except OSError as error:
            if self.lens is not None:
                raise RequestError(f"lens={self.lens} cannot be written: {error.strerror}") from error
            _LOG.warning("the lens is not kept, since %s cannot be written; give lens= another folder", folder.parent)
        return self.read(lens, store, fitted=False)

    @plain_torch()
    def fit(self, store: Store, *, model: Model | None = None) -> TrainedLens:
        """Returns the fitted lens, to be saved and applied to other stores of the model; see `run`.

        Raises:
            RequestError: As `run`.
        """
        require_causal(store, self.name)
        loaded = recorded_model(store, model or self.model, usable_device(self.device))
        number = self.prompts or affordable_prompts(loaded, self.length)
        sequences, documents = self._sequences(store, number)
        ids = store.tokens["token_id"].to_numpy()
        chosen = [ids[rows].tolist() for rows in sequences]
        fitted = mean_jacobians(loaded, chosen, skip=self.skip)
        record, known = store.manifest.model, provenance(store, self)
        made_of = {key: known[key] for key in ("store_fingerprint", "settings", "workbench")}
        made_of |= {"method": _METHOD, "documents": documents, "prompts": len(chosen)}
        made_of |= {"tokens": sum(map(len, chosen)), "dtype": str(loaded.dtype).removeprefix("torch.")}
        made_of["split_half"] = [None if np.isnan(cosine) else float(cosine) for cosine in fitted.split_half]
        weight = fitted.jacobian - torch.eye(fitted.jacobian.shape[1], device="cpu")
        bias = torch.zeros(weight.shape[:2], device="cpu")
        shape = (record.name, record.fingerprint, record.n_layers)
        return TrainedLens(self.site, fitted.layers, weight, bias, *shape, made_of)

    @plain_torch()
    def read(self, lens: TrainedLens, store: Store, *, fitted: bool = True) -> Result:
        """Returns the readings of a store through a fitted lens.

        Args:
            lens: The lens.
            store: A store of its model.
            fitted: False leaves out documents that the lens was fitted on, if others are selected.

        Raises:
            RequestError: The store is of another model than the lens, or as `run`.
        """
        require_causal(store, self.name)
        lens.check_model(store)
        layers, labels = self.recorded(store, self.site)
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        rows, notes = self._rows(lens, store, fitted)
        checked = self.finite_rows(store, list(dict.fromkeys([*labels, last])), rows)
        known = zip(layers, labels, strict=True)
        layers = [layer for layer, name in known if name == last or layer in lens.layers or self.layers is not None]
        return self._result(lens, store, checked, layers, notes)

    def _fit_settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name in _FIT}

    def _sequences(self, store: Store, number: int) -> tuple[list[Int[np.ndarray, " position"]], list[int]]:
        """Rows of the sequences that are fitted on, and their documents; a fifth of the documents is left out."""
        store.require_whole_sequences("a Jacobian lens")
        sequence, document = (store.tokens[name].to_numpy() for name in ("sequence", "document"))
        starts = np.flatnonzero(np.diff(sequence, prepend=-1))
        lengths = np.minimum(np.diff(starts, append=store.rows), self.length)
        selected = np.isin(sequence[starts], sequence[selected_rows(store, self.where)])
        usable = np.flatnonzero(selected & (lengths >= self.skip + 2))
        if not len(usable):
            raise RequestError(
                f"no selected sequence has {self.skip + 2} tokens, of which the first {self.skip} are skipped; give a "
                "smaller skip"
            )
        draw = np.random.default_rng(self.seed)
        documents = draw.permutation(np.unique(document[starts[usable]]))
        allowed = documents[: max(1, int(0.8 * len(documents)))]
        usable = draw.permutation(usable[np.isin(document[starts[usable]], allowed)])[:number]
        rows = [starts[index] + np.arange(int(lengths[index])) for index in usable]
        return rows, np.unique(np.concatenate([document[part] for part in rows])).tolist()

    def _rows(self, lens: TrainedLens, store: Store, fitted: bool) -> tuple[Int[np.ndarray, " row"], list[str]]:
        """Rows that are read, and notes."""
        rows, notes = selected_rows(store, self.where), []
        document, sequence = (store.tokens[name].to_numpy() for name in ("document", "sequence"))
        if not fitted and lens.made_of.get("store_fingerprint") == store.manifest.fingerprint:
            new = rows[~np.isin(document[rows], lens.made_of.get("documents", []))]
            notes.append("" if len(new) else "read on the documents that the lens was fitted on: there are no others")
            rows = new if len(new) else rows
        total = len(rows)
        if total > self.row_limit:
            known, counts = np.unique(sequence[rows], return_counts=True)
            order = np.random.default_rng(self.seed).permutation(len(known))
            number = max(1, int((counts[order].cumsum() <= self.row_limit).sum()))
            rows = rows[np.isin(sequence[rows], known[order[:number]])][: self.row_limit]
            notes.append(f"{len(rows):,} of {counted(total, 'token')} read")
        halves = [cosine for cosine in lens.made_of.get("split_half", []) if cosine is not None]
        if not halves:
            notes.append(f"J is of {lens.made_of.get('prompts', 1)} prompt: how well it is determined is unknown")
        elif min(halves) < 0.8:
            notes.append(
                f"J of the even and the odd prompts differ (least cosine {min(halves):z.2f}): fit more prompts"
            )
        return rows, notes

    def _result(
        self, lens: TrainedLens, store: Store, checked: FiniteRows, layers: list[int], notes: list[str]
    ) -> Result:
        rows = checked.rows
        settings = {"site": self.site, "top_k": self.top_k, "detail": len(rows), "device": self.device}
        read = partial(read_lens, store, rows, layers=layers, **settings)
        (data, table), (plain, _) = read(translate=lens.translate), read()
        arrays = self._recalls(store, rows, data["top_id"].to_numpy(), plain["top_id"].to_numpy())
        ends = [f"{name}{end}" for name in ("mean_kl", "mean_cross_entropy") for end in ("", "_low", "_high")]
        arrays |= {f"logit_{name}": plain[name].to_numpy() for name in ends}
        arrays |= _fit_statistics(lens, layers) | {"prompts": lens.made_of.get("prompts", 0)}
        more = dataset(self.variables, arrays, {"layer": layers, "horizon": np.arange(1, self.horizons + 1)})
        data = data.assign(more.variables).isel(row=slice(0, self.detail))
        table = table.loc[table["row"].isin(rows[: self.detail].tolist())].reset_index(drop=True)
        return self.result(store, data, table, checked, notes)

    def _recalls(
        self, store: Store, rows: np.ndarray, top: Int[np.ndarray, "layer row k"], plain: Int[np.ndarray, "layer row k"]
    ) -> dict[str, Any]:
        order = np.random.default_rng(self.seed).permutation(len(rows))
        document, names = store.tokens["document"].to_numpy()[rows], ("recall", "logit_recall", "recall_shuffled")
        values: dict[str, list[np.ndarray]] = {f"{name}{end}": [] for name in names for end in ("", "_low", "_high")}
        for horizon in range(1, self.horizons + 1):
            target = tokens_at(store, horizon)[rows]
            known = target >= 0
            shuffled_target = target[order][known[order]]
            hits = [_hits(top[:, known], target[known]), _hits(plain[:, known], target[known])]
            hits = np.stack([*hits, _hits(top[:, known], shuffled_target)])  # variable, layer, row
            mean = hits.mean(2) if known.any() else np.full(hits.shape[:2], np.nan)
            ends = clustered_ends(np.moveaxis(hits, 2, 0), document[known], seed=self.seed)
            for end, part in zip(("", "_low", "_high"), (mean, *ends), strict=True):
                for name, by_layer in zip(names, part, strict=True):
                    values[f"{name}{end}"].append(by_layer)
        return {name: np.stack(parts, 1) for name, parts in values.items()}

    @staticmethod
    def headline(result: Result) -> str:
        """Returns recall of later tokens beside the logit lens and shuffled rows, and how well J is determined."""
        data = result.data
        layers, k = data["layer"].to_numpy(), result.provenance["settings"]["top_k"]
        if data.sizes["layer"] == 1 and data.attrs.get("own_output") == 0:
            return with_note("Only the model's own output was recorded, whose map is the identity.", result)
        ahead = min(4, int(data.sizes["horizon"]))
        read = [place for place in range(len(layers)) if place != data.attrs.get("own_output")]
        parts = []
        for horizon in dict.fromkeys((1, ahead)):
            at_horizon = data.sel(horizon=horizon).isel(layer=read)
            best = at_horizon.isel(
                layer=int(np.nan_to_num((at_horizon["recall"] - at_horizon["recall_shuffled"]).to_numpy()).argmax())
            )
            parts.append(
                f"token {horizon} on in the top {k}: {_percent(best['recall'])} at layer {int(best['layer'])}, logit "
                f"lens {_percent(best['logit_recall'])}, other rows' {_percent(best['recall_shuffled'])}"
            )
        first = data.isel(layer=read[0])
        text = (
            f"Jacobian lens: {'; '.join(parts)}. KL(model ‖ lens) at layer {int(first['layer'])}: "
            f"{float(first['mean_kl']):z.2f} nats, logit lens {float(first['logit_mean_kl']):z.2f}. J of "
            f"{counted(data['prompts'], 'prompt')}"
        )
        half = data["split_half"].to_numpy()
        if not np.isnan(half).all():
            text += f", halves agree by a cosine of {np.nanmin(half):z.2f} or more"
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "recall" of later tokens, "by_layer", KL beside the logit lens, "losses", and "grid" and "depth"."""
        figures = {"recall": _recall(result), "by_layer": _comparison(result), "losses": lens_curves(result)}
        if not len(result.table):
            return figures
        return {**figures, "grid": lens_grid(result), "depth": lens_depth(result)}


_FIT = ("site", "prompts", "length", "skip", "where", "seed")


def _checked(folder: Path) -> TrainedLens:
    from workbench import load_lens  # not in probing: a user's function

    lens = load_lens(folder)
    if not isinstance(lens, TrainedLens) or lens.made_of.get("method") != _METHOD:
        raise RequestError(f"{folder} is no Jacobian lens; load_lens({str(folder)!r}) reads it")
    return lens


def _hits(top: Int[np.ndarray, "layer row k"], target: Int[np.ndarray, " row"]) -> Bool[np.ndarray, "layer row"]:
    return (top == target[:, None]).any(-1)


def _fit_statistics(lens: TrainedLens, layers: list[int]) -> dict[str, np.ndarray]:
    """Cosine of J with the identity, and agreement of halves; 1 at the last block."""
    identity, half = np.ones(len(layers)), np.full(len(layers), np.nan)
    for row, layer in enumerate(layers):
        if layer in lens.layers:
            place = lens.layers.index(layer)
            jacobian = lens.weight[place].double() + torch.eye(lens.weight.shape[1], dtype=torch.float64)
            identity[row] = float(jacobian.trace() / (jacobian.norm() * len(jacobian) ** 0.5))
            value = lens.made_of.get("split_half", {})
            half[row] = np.nan if not value or value[place] is None else value[place]
    return {"identity": identity, "split_half": half}


def _percent(value: Any) -> str:
    return "not measured" if np.isnan(float(value)) else f"{100 * float(value):z.0f} %"


def _recall(result: Result) -> Any:
    data, k = result.data, result.provenance["settings"]["top_k"]
    layers = data["layer"].to_numpy().tolist()
    horizons = [horizon for horizon in (1, 2, 4, 8) if horizon <= data.sizes["horizon"]]
    panels = []
    for horizon in horizons:
        at_horizon = data.sel(horizon=horizon)
        named = (
            ("Jacobian lens", "recall", CATEGORIES[0], "solid"),
            ("logit lens", "logit_recall", CATEGORIES[1], "solid"),
            ("Jacobian lens, other rows' tokens", "recall_shuffled", NEUTRAL, "dash"),
        )
        curves = [
            Curve(name, at_horizon[variable].to_numpy(), colour, dash, ends=recorded_ends(at_horizon, variable))
            for name, variable, colour, dash in named
        ]
        panels.append(Panel(f"{counted(horizon, 'token')} on", curves))
    rows = [panels[:2], panels[2:]] if len(panels) == 4 else [panels]
    return layer_panels(
        rows,
        layers=layers,
        title=f"Later tokens in the top {k} of {label(str(result.provenance['model']), 60)}",
        subtitle=f"{counted(data['rows'], 'token')}; J is a mean over {counted(data['prompts'], 'prompt')}"
        + "; bands: 95 % intervals over documents" * (recorded_ends(data, "recall") is not None),
        unit=axis_title(data["recall"].attrs),
    )


def _comparison(result: Result) -> Any:
    names = {"mean_kl": "Jacobian lens", "logit_mean_kl": "logit lens"}
    return mean_curves(result, names, title=f"KL(model ‖ lens) of {label(str(result.provenance['model']), 60)}")
