"""Linear probes: how well a label of each token can be read from every layer by multinomial logistic regression.

    P(label = c | h) = softmax_c(W (h - mean) / spread + b)

W and b minimise the mean log-loss plus penalty / 2 ‖W‖² on some documents; other documents of the training part choose
the penalty, and a third set tests. Two controls are fitted with the same penalty. *Shuffled labels*: the labels change
places among the tokens of each part (among its documents, where each document has a single value), so that nothing can
be learned; accuracy above the majority would be a leak. *Control task* (Hewitt & Liang 2019): each token id gets one
random label, drawn from the label's frequencies, the same in every context; a probe learns it as far as it memorises
tokens. Selectivity is the accuracy minus that of the control task. Two baselines see no activation: the most frequent
value, and the most frequent value of the token id in the training part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    Band,
    Direction,
    LabelledRows,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Scored,
    Standardised,
    Store,
    Variable,
    check,
    check_fields,
    control_task,
    counted,
    dataset,
    fit_classes,
    fit_probe,
    interval_text,
    intervals_of,
    label,
    labelled_rows,
    layer_bands,
    majority,
    model_label,
    most_informative,
    points_text,
    recalls,
    second_moments,
    selected_rows,
    shuffle_labels,
    token_identity,
    with_interval,
    with_note,
    with_progress,
)

_LAYER, _SHARE = ("layer",), "share of tokens"
_MEASURES = (
    Variable("accuracy", _LAYER, _SHARE, "test tokens whose label the probe predicts, 0 to 1", "majority_accuracy"),
    Variable("balanced_accuracy", _LAYER, _SHARE, "mean over values of the share predicted", "1 / values"),
    Variable("cross_entropy", _LAYER, "nats", "mean log-loss of the test tokens", "majority_cross_entropy"),
    Variable("shuffled_accuracy", _LAYER, _SHARE, "accuracy on shuffled labels of a probe fitted on shuffled labels"),
    Variable("control_accuracy", _LAYER, _SHARE, "accuracy on the control task: a random label for each token id"),
    Variable("selectivity", _LAYER, _SHARE, "accuracy - control_accuracy", "0: the probe could memorise as much"),
    Variable("gain", _LAYER, _SHARE, "accuracy - token_accuracy", "0: no more than the token itself tells"),
)
_BASELINES = (
    Variable("majority_accuracy", (), _SHARE, "accuracy of the value most frequent in the training part"),
    Variable("token_accuracy", (), _SHARE, "accuracy of the value most frequent for the token id in the training part"),
)
_SPARSE = Variable("sparse_accuracy", ("layer", "dimensions"), _SHARE, "accuracy of a probe on so many dimensions")
_VARIABLES = (
    *(end for variable in (*_MEASURES, *_BASELINES, _SPARSE) for end in with_interval(variable)),
    Variable("majority_cross_entropy", (), "nats", "log-loss of the frequencies of the training part"),
    Variable("token_cross_entropy", (), "nats", "log-loss of the frequencies for the token id"),
    Variable("recall", ("layer", "value"), _SHARE, "test tokens with this value that the probe predicts"),
    Variable("weight", ("layer", "value", "d_model"), "logit per activation", "W / spread: for states as recorded"),
    Variable("bias", ("layer", "value"), "logit", "b - W mean / spread"),
    Variable("penalty", _LAYER, "1", "chosen penalty; scikit-learn's C is 1 / (training rows x penalty)"),
    Variable("validation_loss", _LAYER, "nats", "log-loss on the documents that choose the penalty"),
    Variable("unconverged", _LAYER, "fits", "fits that stopped before their minimum", "0"),
    Variable("sparse_order", ("layer", "order"), "dimension", "dimensions by variance between values, largest first"),
    Variable("training_rows", ("value",), "tokens", "tokens of the training part, which chooses the penalty, too"),
    Variable("test_rows", ("value",), "tokens", "test tokens"),
    Variable("test_documents", (), "documents", "documents that the intervals are over"),
)
_COUNTED = ("accuracy", "cross_entropy", "shuffled_accuracy", "control_accuracy", "selectivity", "gain")


@dataclass(frozen=True)
class LinearProbes(LayerProbe):
    """Reads a label of the tokens from every layer by logistic regression, beside controls and baselines."""

    name: ClassVar[str] = "linear-probes"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = (*_VARIABLES, *LOST_VARIABLES)
    sources: ClassVar[tuple[str, ...]] = (
        "Alain & Bengio 2016, linear classifier probes, arXiv 1610.01644",
        "Hewitt & Liang 2019, control tasks and selectivity, arXiv 1909.03368",
        "Gurnee et al. 2023, k-sparse probing, arXiv 2305.01610",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "shuffled_accuracy": "labels shuffled among the tokens, or documents, of each part: nothing to learn",
        "control_accuracy": "a random label for each token id, the same in every context: what can be memorised",
        "majority_accuracy": "the most frequent value",
        "token_accuracy": "the most frequent value of the token id",
    }

    label: str | None = None
    """Column of the token table: texts, integers or booleans. None: the first column of the texts with two values."""
    site: str = "resid_post"
    """Kind of site to read, of axes (row, d_model)."""
    where: str | None = None
    """SQL over the token table: the tokens to train and test on. None: all. Special tokens are left out."""
    held_out: float = 0.3
    """Share of the documents that are tested on; half as many choose the penalty."""
    penalties: tuple[float, ...] = (1.0, 0.1, 0.01, 1e-3, 1e-4)
    """Penalties to choose among: the strength of the L2 penalty beside the mean log-loss, for standardised states."""
    dimensions: tuple[int, ...] = (1, 4, 16)
    """Numbers of dimensions of sparse probes; empty: none."""
    least: int = 20
    """Minimum number of tokens of a value."""
    most: int = 20
    """Maximum number of values: the most frequent."""
    row_limit: int = 20_000
    """Maximum number of tokens, drawn at random."""
    resamples: int = 1000
    """Resamples of the test documents, for the intervals."""
    seed: int = 0
    """Random seed of split, draw, controls and resamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "least", "resamples", at_least=1, whole=True)
        check("most", self.most, at_least=2, whole=True)
        check("row_limit", self.row_limit, at_least=3, whole=True)
        check("held_out", self.held_out, above=0, below=0.6)
        for penalty in self.penalties:
            check("penalties", penalty, above=0, below=float("inf"))
        for number in self.dimensions:
            check("dimensions", number, at_least=1, whole=True)
        if not self.penalties:
            raise RequestError("penalties is empty; name one or more")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Fits and tests a probe at every recorded layer of `site`.

        Costs, for each layer, rows x d_model² for the curvature, a Cholesky factor of d_model x d_model and 10 to 50
        passes over the rows for each of the penalties, the probe and two controls. Memory: the states of one layer in
        float32, three times.

        Raises:
            RequestError: The site or the label was not recorded, values are NaN or infinite, or too few values or
                documents.
        """
        layers, sites = self.recorded(store, self.site)
        finite = self.finite_rows(store, sites, selected_rows(store, self.where))
        known = labelled_rows(
            store,
            self.label,
            finite.rows,
            least=self.least,
            most=self.most,
            row_limit=self.row_limit,
            held_out=self.held_out,
            seed=self.seed,
        )
        draw = np.random.default_rng(self.seed)
        _, document = np.unique(known.document, return_inverse=True)
        test = np.arange(len(known.rows)) >= known.fitted
        shuffled, permuted = shuffle_labels(known.codes, document, (~test, test), draw)
        tasks = {"shuffled": permuted, "control": control_task(known.token_id, known.codes[: known.fitted], draw)}
        baselines, token_right = self._baselines(known)
        parts = []
        order = np.argsort(known.rows)  # the disk is read in order
        for site in with_progress(sites, "linear probes", "layers"):
            states = np.empty((len(known.rows), store[site].shape[1]), np.float32)
            states[order] = store[site][known.rows[order]].float().numpy()
            parts.append(self._layer(states, known, tasks, token_right))
        arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]} | baselines
        data = dataset(self.variables, arrays, self._coords(layers, known, arrays))
        data.attrs |= {"label": known.label, "shuffled": shuffled}
        return self.result(store, data, _table(data), finite, [*known.notes, *self._notes(data)])

    def _layer(
        self, states: np.ndarray, known: LabelledRows, tasks: Mapping[str, np.ndarray], token_right: np.ndarray
    ) -> dict[str, Any]:
        """Arrays of one layer, without the axis `layer`."""
        codes, classes, fitted = known.codes, len(known.values), known.fitted
        standard = Standardised.of(states, fitted)
        x, truth, document = standard.x, codes[fitted:], known.test_document
        moments = second_moments(x[:fitted])
        sizes = (known.training, known.validation)
        probe = fit_probe(x, codes, classes, *sizes, self.penalties, moments)
        scored = Scored.of(probe.fit.log_probabilities(x[fitted:]), truth)
        columns, unconverged = [scored.right, scored.loss], probe.unconverged
        for task in (tasks["shuffled"], tasks["control"]):
            fit = fit_classes(x[:fitted], task[:fitted], classes, probe.penalty, moments=moments)
            columns.append(Scored.of(fit.log_probabilities(x[fitted:]), task[fitted:]).right)
            unconverged += not fit.converged
        right, control = (columns[place].astype(float) for place in (0, 3))
        columns += [right - control, right - token_right]
        order = most_informative(x[:fitted], codes[:fitted], classes, max(self.dimensions, default=1))
        for number in self._sparse(x.shape[1]):
            sparse = fit_probe(x[:, order[:number]], codes, classes, *sizes, self.penalties)
            columns.append(Scored.of(sparse.fit.log_probabilities(x[fitted:, order[:number]]), truth).right)
            unconverged += sparse.unconverged
        ends = intervals_of(columns, document, self.resamples, self.seed)
        recall, balanced = recalls(scored.right, truth, classes, document, self.resamples, self.seed)
        arrays = _with_ends(dict(zip(_COUNTED, ends, strict=False)) | {"balanced_accuracy": np.array(balanced)})
        arrays |= _with_ends({"sparse_accuracy": ends[len(_COUNTED) :].T})
        weight, bias = standard.raw(probe.fit)
        return {
            **arrays,
            "recall": recall,
            "weight": weight.astype(np.float32),
            "bias": bias,
            "penalty": probe.penalty,
            "validation_loss": probe.validation_loss,
            "unconverged": unconverged,
            "sparse_order": order,
        }

    def _sparse(self, d_model: int) -> list[int]:
        return sorted({number for number in self.dimensions if number < d_model})

    def _baselines(self, known: LabelledRows) -> tuple[dict[str, Any], np.ndarray]:
        """Arrays without the axis `layer`, and where the baseline of the token id is right."""
        classes, codes = len(known.values), known.codes
        truth, log = codes[known.fitted :], majority(codes[: known.fitted], len(known.values))
        most = Scored.of(np.broadcast_to(log, (len(truth), classes)), truth)
        token = Scored.of(token_identity(known.token_id, codes, classes, known.fitted), truth)
        ends = intervals_of([most.right, token.right], known.test_document, self.resamples, self.seed)
        arrays = _with_ends({"majority_accuracy": ends[0], "token_accuracy": ends[1]})
        return {
            **arrays,
            "majority_cross_entropy": most.loss.mean(),
            "token_cross_entropy": token.loss.mean(),
            "training_rows": np.bincount(codes[: known.fitted], minlength=classes),
            "test_rows": np.bincount(truth, minlength=classes),
            "test_documents": len(np.unique(known.test_document)),
        }, token.right.astype(float)

    def _coords(self, layers: list[int], known: LabelledRows, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "layer": layers,
            "value": list(known.values),
            "dimensions": self._sparse(arrays["weight"].shape[2]),
            "order": np.arange(1, arrays["sparse_order"].shape[1] + 1),
        }

    def _notes(self, data: Any) -> list[str]:
        notes, layers = [], data["layer"].to_numpy()
        if stopped := int(data["unconverged"].sum()):
            notes.append(f"{stopped} fits did not converge: their numbers are not those of the minimum")
        edge = data["penalty"].to_numpy() == min(self.penalties)
        if len(self.penalties) > 1 and edge.any():
            place = "every layer" if edge.all() else f"layers {', '.join(map(str, layers[edge]))}"
            notes.append(f"the smallest of `penalties` was chosen at {place}: smaller ones may do better")
        return notes

    @staticmethod
    def directions(result: Result, layer: int) -> dict[str, Direction]:
        """Returns, for each value of the label, the direction along which its logit rises against the others'.

        The vector is the value's row of `weight` minus the mean of the other rows, for states as recorded.

        Raises:
            RequestError: The result has no such layer.
        """
        data, known = result.data, result.provenance
        layers = data["layer"].to_numpy().tolist()
        check("layer", layer, one_of=layers)
        weight = data["weight"].to_numpy()[layers.index(layer)].astype(np.float64)
        values = data["value"].to_numpy().tolist()
        made_of = {"method": "linear probe", "label": data.attrs["label"], "layer": layer}
        made_of |= {key: known[key] for key in ("model", "model_fingerprint", "store_fingerprint")}
        made_of |= {"accuracy": float(data["accuracy"].sel(layer=layer)), "test_rows": int(data["test_rows"].sum())}
        site = f"{known['settings']['site']}.{layer}"
        other_mean = (weight.sum(0) - weight) / (len(values) - 1)
        return {
            value: Direction(site, vector, f"{made_of['label']} = {value}", made_of)
            for value, vector in zip(values, weight - other_mean, strict=True)
        }

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the accuracy at the layer of the least validation loss, with controls and baselines."""
        data = result.data
        best = data.isel(layer=int(np.nanargmin(data["validation_loss"].to_numpy())))

        def percent(name: str) -> str:
            return f"{100 * float(best[name]):z.0f} %"

        def points(name: str) -> str:
            return points_text(*(100 * float(best[name + end]) for end in ("", "_low", "_high")))

        ends = interval_text(100 * best["accuracy_low"], 100 * best["accuracy_high"])
        return with_note(
            f"Accuracy for {data.attrs['label']} ({data.sizes['value']} values): {percent('accuracy')} at layer "
            f"{int(best['layer'])}, {ends}; majority {percent('majority_accuracy')}, token identity "
            f"{percent('token_accuracy')} (gain {points('gain')}), control task {percent('control_accuracy')} "
            f"(selectivity {points('selectivity')}), shuffled labels {percent('shuffled_accuracy')}.",
            result,
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "by_layer", accuracy beside controls and baselines; "gains", selectivity and gain over the token;
        "sparse", accuracy on few dimensions."""
        figures = {"by_layer": _by_layer(result), "gains": _gains(result)}
        return figures | {"sparse": _sparse_figure(result)} if result.data.sizes["dimensions"] else figures


def _with_ends(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean, lower and upper end as three arrays."""
    ends = tuple(enumerate(("", "_low", "_high")))
    return {f"{name}{end}": triple[place] for name, triple in values.items() for place, end in ends}


def _table(data: Any) -> Any:
    """A line for each layer and number of dimensions."""
    import pandas as pd

    names = [f"{variable.name}{end}" for variable in _MEASURES for end in ("", "_low", "_high")]
    whole = data[[*names, "penalty", "validation_loss", "unconverged"]].to_dataframe().reset_index()
    whole.insert(1, "dimensions", data.sizes["d_model"])
    if not data.sizes["dimensions"]:
        return whole
    sparse = data[[f"sparse_accuracy{end}" for end in ("", "_low", "_high")]].to_dataframe().reset_index()
    sparse.columns = [name.removeprefix("sparse_") for name in sparse.columns]
    return pd.concat([whole, sparse]).sort_values(["layer", "dimensions"], ignore_index=True)


def _band(data: Any, name: str, legend: str, colour: str, dash: str = "solid") -> Band:
    values, low, high = (data[name + end].to_numpy() for end in ("", "_low", "_high"))
    if values.ndim == 0:
        values, low, high = (float(number) for number in (values, low, high))
    return Band(legend, values, None if np.isnan(low).all() else (low, high), colour, dash)


def _figure(result: Result, bands: list[Band], measure: str, unit: str) -> Any:
    data = result.data
    name, model = label(data.attrs["label"], 40), model_label(result)
    tested = f"{counted(int(data['test_rows'].sum()), 'token')} of {counted(data['test_documents'], 'test document')}"
    return layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"{measure} for {name}: {model}",
        subtitle=f"{tested}; bands: 95 % intervals over documents",
        unit=unit,
    )


def _by_layer(result: Result) -> Any:
    data = result.data
    bands = [
        _band(data, "accuracy", "linear probe", CATEGORIES[0]),
        _band(data, "control_accuracy", "control task", NEUTRAL, "dashdot"),
        _band(data, "shuffled_accuracy", "shuffled labels", NEUTRAL, "longdash"),
        _band(data, "token_accuracy", "token identity", NEUTRAL, "dash"),
        _band(data, "majority_accuracy", "majority", NEUTRAL, "dot"),
    ]
    return _figure(result, bands, "Accuracy of linear probes", _SHARE)


def _gains(result: Result) -> Any:
    bands = [
        _band(result.data, "selectivity", "selectivity: accuracy − control task", CATEGORIES[0]),
        _band(result.data, "gain", "gain: accuracy − token identity", CATEGORIES[1]),
    ]
    return _figure(result, bands, "Selectivity and gain of linear probes", _SHARE)


def _sparse_figure(result: Result) -> Any:
    data = result.data
    bands = [_band(data, "accuracy", "all dimensions", NEUTRAL)]
    for place, number in enumerate(data["dimensions"].to_numpy().tolist()):
        colour = CATEGORIES[place % len(CATEGORIES)]
        bands.append(_band(data.sel(dimensions=number), "sparse_accuracy", f"{number}", colour))
    return _figure(result, bands[::-1], "Accuracy by number of dimensions", _SHARE)
