"""Future lens: the model's output several tokens ahead, predicted from one hidden state (Pal et al. 2023).

    linear   W_U LN_f(g h_T)      g: affine map from h_T at this layer to the last block's h_(T+N), in closed form
    direct   softmax(A h_T + b)   trained on the model's output at T+N

At horizon N the target is the model's own top token at position T+N, its prediction of token t+N+1: N = 0 is ordinary
next-token prediction (t+1), N = 1 is t+2. The accuracy on the text's own token is measured as well. Maps are fitted on
some documents of the store and tested on others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float, Int

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    ActivationArray,
    Curve,
    FutureMap,
    FutureSplit,
    FutureTask,
    LayerProbe,
    Model,
    Panel,
    RequestError,
    Result,
    Store,
    TrainedFutureLens,
    Variable,
    axis_title,
    check,
    check_fields,
    choose_layer,
    clustered_ends,
    counted,
    dataset,
    fit_direct,
    fit_linear,
    future_calibration,
    future_title,
    future_view,
    layer_panels,
    load_future_task,
    load_unembed,
    note_few_documents,
    note_few_rows,
    note_own_output,
    own_output,
    pack_future_lens,
    plain_torch,
    points_text,
    precision_table,
    progress,
    provenance,
    recorded_ends,
    require_causal,
    tokens_ahead,
    usable_device,
    with_interval,
    with_note,
)

_BINS = 10
_CHOICES = {"linear": "ridge", "direct": "epochs"}  # the variable that validation chooses, by method
_READ = ("method", "layer", "horizon")
_K = (*_READ, "k")
_SHARE = "share of tokens"

VARIABLES = (
    *with_interval(
        Variable("precision", _K, _SHARE, "the model's top token at T+N is among the first k", "bigram_precision")
    ),
    Variable("text_precision", _K, _SHARE, "the same for the text's token as target", "bigram_text_precision"),
    Variable("surprisal", _READ, "nats", "mean -ln p of the prediction under the model at T+N", "bigram_surprisal"),
    Variable("shuffled_precision", _READ, _SHARE, "precision at 1 of the map on the states of other tokens", "chance"),
    Variable("seen_precision", _READ, _SHARE, "precision at 1 where the bigram has seen T", "bigram_seen_precision"),
    *with_interval(Variable("gain", _READ, _SHARE, "seen_precision minus bigram_seen_precision", "0")),
    Variable("validation_precision", _READ, _SHARE, "precision at 1 on the validation documents"),
    Variable("validation_cross_entropy", _READ, "nats", "mean -ln p of the target on the validation documents"),
    Variable("calibration", (*_READ, "bin"), _SHARE, "precision at 1 by probability of the prediction", "bin centre"),
    Variable("calibration_rows", (*_READ, "bin"), "tokens", "test tokens in each bin"),
    Variable("ridge", ("layer", "horizon"), "times the mean variance of a dimension", "chosen penalty, linear method"),
    Variable("epochs", ("layer", "horizon"), "epochs", "training epochs of the best direct map"),
    Variable("bigram_surprisal", ("horizon",), "nats", "surprisal of the bigram baseline"),
    *with_interval(Variable("bigram_precision", ("horizon",), _SHARE, "precision at 1 from the token at T alone")),
    Variable("bigram_seen", ("horizon",), _SHARE, "test tokens whose token at T some training row has"),
    Variable("bigram_seen_precision", ("horizon",), _SHARE, "bigram_precision on tokens that the bigram has seen"),
    Variable("bigram_text_precision", ("horizon",), _SHARE, "text_precision at 1 from the token at T alone"),
    Variable("unigram_precision", ("horizon",), _SHARE, "precision at 1 of the most frequent target"),
    Variable("best_method", ("horizon",), "index on the method axis", "method with the best validation_precision"),
    Variable("best_layer", ("horizon",), "layer", "layer with the best validation_precision; at N = 0 before the last"),
    Variable("training_rows", ("horizon",), "tokens", "tokens that maps are fitted on"),
    Variable("validation_rows", ("horizon",), "tokens", "tokens that choose penalty, epoch and layer"),
    Variable("rows", ("horizon",), "tokens", "test tokens"),
    Variable("text_rows", ("horizon",), "tokens", "test tokens whose document has a token at T+N+1"),
    Variable("left_out", ("horizon",), "tokens", "test tokens whose T+N is beyond their document or sequence"),
    Variable("documents", (), "documents", "test documents"),
    Variable("top_id", ("horizon", "row"), "token id", "prediction of the best map; -1: T+N is out of range"),
    Variable("top_probability", ("horizon", "row"), "probability", "probability of that prediction"),
    Variable("said_id", ("horizon", "row"), "token id", "the model's own top token at T+N"),
    Variable("text_id", ("horizon", "row"), "token id", "the text's token T+N+1"),
    Variable("token_id", ("row",), "token id", "token at T"),
    Variable("sequence", ("row",), "sequence", "sequence of the token"),
    Variable("position", ("row",), "position", "position of the token in its sequence"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class FutureLens(LayerProbe):
    """Predicts the model's output at t+2, t+3, ... from one hidden state."""

    name: ClassVar[str] = "future-lens"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Pal et al. 2023, Future Lens, arXiv 2311.04897",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "bigram_precision": "prediction from the token at T alone, without a hidden state",
        "unigram_precision": "the most frequent token, independent of the input",
        "shuffled_precision": "the same maps applied to the states of other tokens",
    }

    site: str = "resid_post"
    """Kind of site to read at every recorded layer: resid_post, resid_pre or resid_mid."""
    horizons: int = 4
    """Number of horizons: N = 0 (the next token) to horizons - 1."""
    where: str | None = None
    """SQL condition over the token table that selects the tokens T. None: all. Special tokens and the first token of a
    sequence are always excluded."""
    held_out: float = 0.25
    """Share of the documents used for testing."""
    validation: float = 0.1
    """Share of the documents used to choose the penalty, the epoch and the best layer."""
    ridge: tuple[float, ...] = (1e-6, 1e-4, 1e-2, 1.0)
    """Candidate penalties of the linear method, in units of the mean variance of a dimension of the states."""
    direct_vocab: int = 5000
    """Largest vocabulary for the direct method, whose maps have d_model x vocab parameters."""
    epochs: int = 4
    """Maximum epochs of the direct method; training stops when no horizon improves."""
    learning_rate: float = 2e-3
    """AdamW learning rate of the direct method, decayed linearly to 0."""
    top_k: int = 10
    """Largest k of precision at k."""
    detail: int = 400
    """Number of test tokens whose predictions are kept for the token view."""
    seed: int = 0
    """Random seed of the document split, the order of rows, the shuffles and the bootstrap."""
    device: str | None = None
    """Device for fitting and testing: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._split()  # checks the settings that it takes
        check_fields(self, "top_k", at_least=1)
        check_fields(self, "direct_vocab", "detail", at_least=0)
        check_fields(self, "epochs", at_least=0, at_most=10_000)
        check_fields(self, "learning_rate", above=0, below=float("inf"))
        if not self.ridge or not all(0 < penalty < float("inf") for penalty in self.ridge):
            raise RequestError(f"ridge must be one or more finite numbers above 0, not {self.ridge}")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Fits a map for every recorded layer and horizon, and tests it on held-out documents.

        Costs those of `fit_linear` and `fit_direct` for every layer, the latter epochs x 3 products with its maps per
        training row. Memory: blocks of logits, the maps of one layer, 4 bytes per test token, method, layer, horizon.

        Raises:
            RequestError: A site or the unembedding is missing, values are NaN or infinite, the model is not causal,
                `where` selects fewer than three documents, or no document is long enough for the last horizon.
        """
        require_causal(store, self.name)
        layers, labels = self.recorded(store, self.site)
        unembed = load_unembed(store.path, usable_device(self.device))
        task = load_future_task(store, self._split(), unembed, self.top_k, probe=self, sites=labels)
        methods = ["linear", "direct"] if unembed.vocab <= self.direct_vocab else ["linear"]
        readings: _Readings = {}
        with progress("future lens", len(layers) * len(methods), "maps") as tick:
            for (layer, label_), (index, method) in product(enumerate(labels), enumerate(methods)):
                site = store[label_]
                for horizon, fitted in enumerate(self._fit(method, site, task)):
                    readings[index, layer, horizon] = _test(self, fitted, site, task, method, horizon)
                tick(1)
        shape = len(methods), len(layers)
        by_horizon = [_against_bigram(readings, shape, n, task, self.seed) for n in range(self.horizons)]
        output = own_output(store, self.site, layers)
        arrays = _arrays(readings, methods, len(layers), self.horizons) | task.counts(self.horizons)
        arrays["best_method"], arrays["best_layer"] = choose_layer(arrays["validation_precision"], output)
        arrays |= {name: np.stack([part[name] for part in by_horizon], axis=-1) for name in by_horizon[0]}
        arrays |= _token_view(self, readings, arrays, task, store)
        arrays["best_layer"] = np.array(layers)[arrays["best_layer"]]
        coords = {"method": methods, "layer": layers, "horizon": np.arange(self.horizons)}
        coords |= {
            "k": np.arange(1, self.top_k + 1),
            "bin": (np.arange(_BINS) + 0.5) / _BINS,
            "row": _detail_rows(self, task),
        }
        data = dataset(VARIABLES, arrays, coords).assign_attrs(self._attributes(arrays, task))
        few_rows = note_few_rows(int(arrays["training_rows"].min()), task.final.shape[1])
        notes = [few_rows, note_few_documents(int(arrays["documents"])), note_own_output(output, layers)]
        return self.result(store, data, _table(data), task.checked, notes)

    @plain_torch()
    def fit(self, store: Store, method: str = "linear") -> TrainedFutureLens:
        """Returns the maps of one method, fitted as `run` fits them, to be saved and applied to other stores.

        Raises:
            RequestError: Another method than linear and direct, or as `run`.
        """
        check("method", method, one_of=("linear", "direct"))
        require_causal(store, self.name)
        layers, labels = self.recorded(store, self.site)
        unembed = load_unembed(store.path, usable_device(self.device))
        task = load_future_task(store, self._split(), unembed, self.top_k, probe=self, sites=labels)
        maps: dict[int, list[FutureMap]] = {}
        with progress("future lens", len(layers), "layers") as tick:
            for layer, label_ in zip(layers, labels, strict=True):
                maps[layer] = self._fit(method, store[label_], task)
                tick(1)
        known = provenance(store, self)
        made_of = {key: known[key] for key in ("store_fingerprint", "settings", "workbench")}
        made_of |= {"method": f"future lens, {method}", "training_rows": len(task.rows.training)}
        return pack_future_lens(store, self.site, method, maps, made_of)

    def _split(self) -> FutureSplit:
        return FutureSplit(self.horizons, self.where, self.held_out, self.validation, self.seed)

    def _fit(self, method: str, site: ActivationArray, task: FutureTask) -> list[FutureMap]:
        if method == "linear":
            return fit_linear(site, task, self.horizons, self.ridge)
        training = {"epochs": self.epochs, "learning_rate": self.learning_rate, "seed": self.seed}
        return fit_direct(site, task, self.horizons, **training)

    def _attributes(self, arrays: Mapping[str, np.ndarray], task: FutureTask) -> dict[str, str]:
        """Token texts, and the method that was left out."""
        ids = np.unique(np.concatenate([arrays[f"{name}_id"].ravel() for name in ("top", "said", "text", "token")]))
        vocab, limit = task.unembed.vocab, self.direct_vocab
        return {
            # JSON in ASCII: netCDF's strings lose NUL and refuse lone surrogates, and a token can hold either
            "tokens": json.dumps({int(token): task.unembed.token(int(token)) for token in ids if token >= 0}),
            "direct": "" if vocab <= limit else f"left out: vocabulary of {vocab:,}, direct_vocab is {limit:,}",
        }

    @staticmethod
    def headline(result: Result) -> str:
        """Top-1 accuracy at t+2 (t+1 where that is all) of the best layer, against the bigram baseline."""
        data = result.data
        at_horizon = data.isel(horizon=min(1, data.sizes["horizon"] - 1))
        at = at_horizon.isel(method=int(at_horizon["best_method"])).sel(layer=int(at_horizon["best_layer"]))
        against = f"gain {points_text(*(100 * float(at[name]) for name in ('gain', 'gain_low', 'gain_high')))}"
        if "bigram_seen" in data:  # results of earlier versions compare all tokens
            names = ("bigram_seen", "seen_precision", "bigram_seen_precision")
            share, accuracy, bigram = (100 * float(at[name]) for name in names)
            against = (
                f"on the {share:z.0f} % of tokens that the bigram has seen {accuracy:z.0f} to "
                f"{bigram:z.0f} %, {against}"
            )
            against = against if share else "the bigram has seen none of the tokens, so there is no gain to measure"
        return with_note(
            f"Top-1 accuracy at {tokens_ahead(int(at_horizon['horizon']))}: {100 * float(at['precision'][0]):z.0f} % "
            f"(layer {int(at_horizon['best_layer'])}, {at['method'].item()} probe); bigram baseline "
            f"{100 * float(at_horizon['bigram_precision']):z.0f} %; {against}.",
            result,
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "precision" and "gain" over the bigram by layer, "calibration", and "view", a text."""
        figures = {"precision": _precision(result), "gain": _gain(result), "calibration": future_calibration(result)}
        return {**figures, "view": future_view(result)} if result.data.sizes["row"] else figures


# ---- testing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """Results of one map on the test rows of its horizon."""

    numbers: Mapping[str, Any]
    """Values by variable name."""
    top: Int[np.ndarray, " row"]
    """Predicted token of each test row."""
    probability: Float[np.ndarray, " detail_row"]
    """Probability of the prediction for the kept rows; 0 where T+N is out of range."""


_Readings = dict[tuple[int, ...], _Reading]  # by indices of method, layer and horizon


def _test(
    probe: FutureLens, fitted: FutureMap, site: ActivationArray, task: FutureTask, method: str, horizon: int
) -> _Reading:
    rows = task.rows.at("test", horizon)
    ids, probabilities = fitted.top_tokens(site, rows, probe.top_k, task.unembed)
    probability = probabilities[:, 0]
    targets, text = task.model_top[rows + horizon], task.text_next[rows + horizon]
    hits = ids == targets[:, None]
    low, high = clustered_ends(hits.cumsum(1), task.rows.document[rows], seed=probe.seed)
    bins = np.minimum((_BINS * probability).astype(int), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    with np.errstate(invalid="ignore"):  # NaN for empty bins and where no token follows
        numbers = {
            "precision": hits.cumsum(1).mean(0),
            "precision_low": low,
            "precision_high": high,
            "text_precision": (ids == text[:, None])[text >= 0].cumsum(1).sum(0) / (text >= 0).sum(),
            "shuffled_precision": (ids[_other_rows(len(rows), probe.seed), 0] == targets).mean(),
            "validation_precision": fitted.precision,
            "validation_cross_entropy": fitted.cross_entropy,
            "calibration": np.bincount(bins, hits[:, 0], minlength=_BINS) / counts,
            "calibration_rows": counts.astype(float),
            _CHOICES[method]: float(fitted.choice),
        }
    detail_rows = _detail_rows(probe, task)
    kept_probability = np.zeros(len(detail_rows), np.float32)
    inside = task.rows.reach[detail_rows] > horizon
    kept_probability[inside] = probability[: inside.sum()]  # kept rows are the first test rows
    return _Reading(numbers, ids[:, 0].astype(np.int32), kept_probability)


def _other_rows(rows: int, seed: int) -> Int[np.ndarray, " row"]:
    """A different row for every row."""
    order = np.random.default_rng(seed).permutation(rows)
    partners = np.empty_like(order)
    partners[order] = np.roll(order, 1)
    return partners


def _arrays(readings: _Readings, methods: list[str], layers: int, horizons: int) -> dict[str, np.ndarray]:
    """Numbers of the readings over (method, layer, horizon), and the choices of each method."""
    shape = (len(methods), layers, horizons)
    arrays = {}
    for name, first in readings[0, 0, 0].numbers.items():
        if name not in _CHOICES.values():
            values = [readings[at].numbers[name] for at in np.ndindex(shape)]
            arrays[name] = np.array(values, dtype=float).reshape(*shape, *np.shape(first))
    for index, method in enumerate(methods):
        values = [readings[index, *at].numbers[_CHOICES[method]] for at in np.ndindex(shape[1:])]
        arrays[_CHOICES[method]] = np.array(values).reshape(shape[1:])
    return arrays


def _against_bigram(
    readings: _Readings, shape: tuple[int, int], horizon: int, task: FutureTask, seed: int
) -> dict[str, np.ndarray]:
    """Surprisal and gain of all maps of one horizon, and the baselines."""
    rows = task.rows.at("test", horizon)
    targets, text = task.model_top[rows + horizon], task.text_next[rows + horizon]
    tops = np.stack([readings[method, layer, horizon].top for method, layer in np.ndindex(shape)])
    baseline = task.bigram(rows, horizon)
    bigram, seen_rows = baseline.prediction, baseline.seen
    surprisal = task.surprisal(np.concatenate([tops, bigram[None]]), rows, horizon)
    by_map = {"surprisal": surprisal[:-1], **task.gain(tops == targets, bigram == targets, rows, seed, seen_rows)}
    with np.errstate(invalid="ignore"):  # NaN where no token follows, or the bigram has seen none
        bigram_text = np.divide((bigram == text).sum(), (text >= 0).sum())
        by_map["seen_precision"] = np.divide(((tops == targets) & seen_rows).sum(1), seen_rows.sum())
        bigram_seen = np.divide(((bigram == targets) & seen_rows).sum(), seen_rows.sum())
    low, high = clustered_ends(bigram == targets, task.rows.document[rows], seed=seed)
    return {
        **{name: values.reshape(shape) for name, values in by_map.items()},
        "bigram_precision_low": low,
        "bigram_precision_high": high,
        "bigram_surprisal": surprisal[-1],
        "bigram_precision": (bigram == targets).mean(),
        "bigram_seen": seen_rows.mean(),
        "bigram_seen_precision": bigram_seen,
        "bigram_text_precision": bigram_text,
        "unigram_precision": (targets == baseline.most_frequent).mean(),
    }


def _token_view(
    probe: FutureLens, readings: _Readings, arrays: Mapping[str, np.ndarray], task: FutureTask, store: Store
) -> dict[str, np.ndarray]:
    """Predictions of the best maps for the kept test tokens, with the model's and the text's tokens."""
    detail_rows, horizons = _detail_rows(probe, task), range(probe.horizons)
    best = [readings[int(arrays["best_method"][n]), int(arrays["best_layer"][n]), n] for n in horizons]
    view = {name: np.full((len(horizons), len(detail_rows)), -1, np.int32) for name in ("top_id", "said_id", "text_id")}
    for n in horizons:
        inside = task.rows.reach[detail_rows] > n
        view["top_id"][n, inside] = best[n].top[: inside.sum()]
        view["said_id"][n, inside] = task.model_top[detail_rows[inside] + n]
        view["text_id"][n, inside] = task.text_next[detail_rows[inside] + n]
    view["top_probability"] = np.stack([reading.probability for reading in best])
    view["token_id"] = task.token[detail_rows].astype(np.int32)
    for name in ("sequence", "position"):
        view[name] = store.tokens[name].to_numpy()[detail_rows].astype(np.int32)
    return view


def _detail_rows(probe: FutureLens, task: FutureTask) -> Int[np.ndarray, " detail_row"]:
    """Test tokens whose predictions are kept for the token view."""
    return task.rows.test[: probe.detail]


# ---- table and figures ----------------------------------------------------------------------------------


def _table(data: xr.Dataset) -> pd.DataFrame:
    """One line per method, layer and horizon."""
    gain = ("seen_precision", "gain", "gain_low", "gain_high")
    names = ("surprisal", "shuffled_precision", *gain, "validation_precision")
    bigram = ("bigram_precision", "bigram_seen", "bigram_seen_precision", "bigram_surprisal")
    baselines = {name: data[name] for name in (*bigram, "unigram_precision", "rows")}
    text = data["text_precision"].sel(k=1, drop=True)
    return precision_table(data, names, _READ, text_precision_1=text, **baselines)


def _precision(result: Result) -> go.Figure:
    """Top-1 accuracy by layer: a panel per method, a colour per horizon, the bigram baseline dashed."""
    data, panels = result.data, []
    for method in data["method"].to_numpy().tolist():
        curves = []
        for horizon in data["horizon"].to_numpy().tolist():
            at_horizon, name, colour = (
                data.sel(horizon=horizon),
                tokens_ahead(horizon),
                CATEGORIES[horizon % len(CATEGORIES)],
            )
            at = at_horizon.sel({"method": method, "k": 1})
            curves.append(Curve(name, at["precision"].to_numpy(), colour, ends=recorded_ends(at, "precision")))
            baseline = float(at["bigram_precision"])
            ends = recorded_ends(at, "bigram_precision")
            shown: dict[str, Any] = {"dash": "dash", "group": name, "legend": False}
            curves.append(Curve(f"bigram baseline, {name}", baseline, colour, ends=ends, **shown))
        panels.append(Panel(f"{method} probe", curves))
    documents, seen_note = int(data["documents"]), ""
    bands = "; bands: 95 % intervals over these" * (recorded_ends(data, "precision") is not None)
    if "bigram_seen" in data:
        seen_note = f", which have at least {100 * float(data['bigram_seen'].min()):z.0f} % of the test tokens"
    return layer_panels(
        [panels],
        layers=data["layer"].to_numpy().tolist(),
        title=f"{future_title(result)}: top-1 accuracy",
        subtitle=f"{counted(documents, 'test document')}{bands}; dashed: bigram baseline fitted on the training "
        f"documents{seen_note}",
        unit=axis_title(data["precision"].attrs, "top-1 accuracy"),
    )


def _gain(result: Result) -> go.Figure:
    """Gain over the bigram baseline by layer with its interval: a panel per method, a colour per horizon."""
    data, panels = result.data, []
    for method in data["method"].to_numpy().tolist():
        curves = []
        for horizon in data["horizon"].to_numpy().tolist():
            at_horizon = data.sel({"method": method, "horizon": horizon})
            gain, low, high = (at_horizon[f"gain{end}"].to_numpy() for end in ("", "_low", "_high"))
            ends = None if np.isnan(low).all() else (low, high)
            curves.append(Curve(tokens_ahead(horizon), gain, CATEGORIES[horizon % len(CATEGORIES)], ends=ends))
        panels.append(Panel(f"{method} probe", curves))
    seen_note = " that the bigram has seen" if "bigram_seen" in data else ""
    figure = layer_panels(
        [panels],
        layers=data["layer"].to_numpy().tolist(),
        title=f"{future_title(result)}: gain over the bigram baseline",
        subtitle=f"on the tokens{seen_note}; bands: 95 % interval over {counted(data['documents'], 'test document')}",
        unit=axis_title(data["gain"].attrs, "gain"),
    )
    return figure.update_yaxes(zeroline=True, zerolinecolor=NEUTRAL)
