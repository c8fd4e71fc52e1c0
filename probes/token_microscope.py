"""Token microscope: how far each token's step from layer to layer is from linear, and what its state keeps of the text.

With X and Y the states of all tokens at two layers, centred and divided by their norm (Razzhigaev et al. 2025),

    A* = argmin_A |X A - Y|        linearity = 1 - |X A* - Y|^2        nonlinearity of token i = |x_i A* - y_i|

anisotropy is the share of the variance in the first principal direction, intrinsic dimension that of TwoNN. Contextual
memory is the loss of a reader that must recover the text before a token from its state; the paper trains a decoder of
the prefix, for which a store does not suffice. Our stand-in is the mean loss of linear softmax probes for the three
tokens before, trained on other documents: low where the state keeps its context.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    Curve,
    LayerProbe,
    Model,
    Panel,
    RequestError,
    Result,
    SoftmaxFit,
    Store,
    Variable,
    axis_title,
    check_fields,
    clustered_means,
    counted,
    dataset,
    distinct,
    document_folds,
    fit_softmax,
    group_intervals,
    intervals,
    label,
    layer_panels,
    layers_text,
    nearest_neighbours,
    plain_torch,
    progress,
    selected_rows,
    split_by_document,
    token_classes,
    tokens_at,
    two_nn_first_fifth,
    usable_device,
    value_text,
    with_interval,
    with_note,
    with_progress,
)

_LAYER, _TOKEN, _CLASS = ("layer",), ("layer", "row"), ("class",)
_SHARE = "share of variance"
_NORMALISED = "of the Frobenius norm"
_VARIABLES: tuple[Variable, ...] = (
    Variable("linearity", _LAYER, _SHARE, "of the next layer, explained by a linear map of this one", "noise"),
    Variable("linearity_heldout", _LAYER, _SHARE, "the same on documents that the map was not fitted on", "0"),
    Variable("linearity_step", _LAYER, _SHARE, "of the difference of both layers, explained by a linear map", "noise"),
    Variable("linearity_shuffled", _LAYER, _SHARE, "linearity with the next layer's tokens shuffled", "noise"),
    Variable("noise", (), _SHARE, "expected linearity of independent Gaussian layers: d_model / (tokens - 1)"),
    Variable("anisotropy", _LAYER, _SHARE, "of the first principal direction, 0 to 1", "isotropic_anisotropy"),
    Variable("isotropic_anisotropy", (), _SHARE, "of isotropic Gaussian states: (1 + sqrt(d / n))^2 / d"),
    Variable("intrinsic_dimension", _LAYER, "dimensions", "TwoNN by regression on the first fifth of the ratios"),
    Variable("nonlinearity", _TOKEN, _NORMALISED, "|A* x - y| of each token, x and y normalised; NaN at the last"),
    Variable("nonlinearity_relative", _TOKEN, "1", "the same divided by |y|", "sqrt(1 - linearity) on average"),
    Variable("contextual_memory", ("row",), "nats", "mean loss of probes for the tokens before, on held-out documents"),
    Variable("memory_unigram", (), "nats", "mean loss of the frequencies of the training tokens on the same targets"),
    Variable("memory_layer", (), "layer", "layer that the probes read"),
    Variable("coverage", (), "share of targets", "tokens before that training documents have: what probes can name"),
    *with_interval(
        Variable("correlation", (), "1", "Pearson over tokens, layer mean of nonlinearity and contextual memory", "0")
    ),
    *with_interval(Variable("correlation_within", (), "1", "the same after the mean of each class is taken off", "0")),
    *with_interval(Variable("class_nonlinearity", _CLASS, _NORMALISED, "layer mean of nonlinearity in each class")),
    *with_interval(Variable("class_memory", _CLASS, "nats", "contextual memory in each class")),
    Variable("class_tokens", _CLASS, "tokens", "tokens of each class"),
    Variable("rows", (), "tokens", "tokens that the maps are fitted on"),
    Variable("memory_rows", (), "tokens", "held-out tokens with a contextual memory"),
    *LOST_VARIABLES,
)
_FEW = 10
_RANK = 1e-10
"""Smallest pivot of a Gram matrix, relative to its largest entry, for which no eigenvalues are needed."""


@dataclass(frozen=True)
class TokenMicroscope(LayerProbe):
    """Measures linearity of layers and non-linearity and contextual memory of tokens, by class of token."""

    name: ClassVar[str] = "token-microscope"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Razzhigaev et al. 2025, LLM-Microscope, arXiv 2502.15007",
        "Razzhigaev et al. 2024, Your transformer is secretly linear, arXiv 2405.12250",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "linearity_shuffled": "the next layer's tokens shuffled: what a map of this size fits to noise",
        "linearity_heldout": "documents that the map was not fitted on",
        "memory_unigram": "loss of the tokens before by their frequencies alone",
        "random weights": "the same architecture with random weights",
    }

    site: str = "resid_post"
    """Kind of site to read, at every layer that was recorded."""
    where: str | None = "position > 0"
    """SQL over the token table: the tokens to read. The default leaves out first tokens: one massive row in a hundred
    makes linearity .9999. None: all."""
    label: str | None = None
    """Column with the class of each token, such as part of speech. None: English closed classes, by the text."""
    memory_layer: int | None = None
    """Layer whose states the probes of contextual memory read. None: a quarter of the way up."""
    offsets: tuple[int, ...] = (-1, -2, -3)
    """Tokens that the probes must recover, relative to the token."""
    held_out: float = 0.3
    """Share of the documents on which contextual memory is measured; half as many more choose the probes' epoch."""
    epochs: int = 8
    """Maximum epochs of the probes. 0: no contextual memory."""
    learning_rate: float = 1e-2
    """AdamW learning rate of the probes, decayed linearly to 0."""
    dimension_rows: int = 2000
    """Maximum tokens, drawn at random, whose neighbours give the intrinsic dimension; the paper has 4,096."""
    rows_per_dimension: int = 5
    """Minimum tokens for each dimension of a state; fewer are refused, because maps fit noise."""
    folds: int = 5
    """Parts of the documents, each held out once for linearity_heldout."""
    detail: int = 10_000
    """Maximum number of tokens with their own rows in table and data, from the first selected one on."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of splits, of shuffled and drawn tokens, and of the bootstrap."""
    device: str | None = None
    """Device of the maps and probes: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "folds", at_least=2, at_most=100, whole=True)
        check_fields(self, "resamples", "rows_per_dimension", at_least=1, whole=True)
        check_fields(self, "detail", "seed", at_least=0, whole=True)
        check_fields(self, "epochs", at_least=0, at_most=10_000, whole=True)
        check_fields(self, "dimension_rows", at_least=_FEW, whole=True)
        check_fields(self, "held_out", above=0, below=0.6)
        check_fields(self, "learning_rate", above=0, below=float("inf"))
        if not self.offsets or any(offset >= 0 for offset in self.offsets):
            raise RequestError(f"offsets must be one or more negative whole numbers, not {self.offsets}")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads each site twice.

        Costs layers x rows x d_model^2 operations in float64 for the maps, layers x dimension_rows^2 x d_model for the
        dimension, and epochs x rows x offsets products with a map from d_model to the distinct tokens for the probes.
        Memory: four arrays rows x d_model in float64, and 20 d_model^2.

        Raises:
            RequestError: The site was not recorded at two layers, tokens are fewer than 5 a dimension, the class is no
                column, or values are NaN or infinite.
        """
        layers, labels = self.recorded(store, self.site)
        if len(layers) < 2:
            raise RequestError(f"linearity needs {self.site} at two layers or more")
        rows = self.finite_rows(store, labels, selected_rows(store, self.where))
        d_model, number = store[labels[0]].shape[1], len(rows.rows)
        if number < (least := self.rows_per_dimension * d_model):
            raise RequestError(
                f"{counted(number, 'token')} are too few for maps of {d_model} dimensions, which would fit "
                f"noise; {least:,} or "
                "more are needed"
            )
        documents = store.tokens["document"].to_numpy()[rows.rows]
        folds = document_folds(documents, min(self.folds, len(np.unique(documents))), self.seed)
        arrays: dict[str, Any] = _layers(self, store, labels, rows.rows, folds)
        nonlinearity = arrays["nonlinearity"]
        arrays |= {"noise": d_model / (number - 1), "rows": number}
        arrays["isotropic_anisotropy"] = (1 + (d_model / number) ** 0.5) ** 2 / d_model
        memory, more, notes = _memory(self, store, layers, rows.rows, documents)
        names, classes = token_classes(store, rows.rows, self.label)
        mean = nonlinearity[:-1].mean(0, dtype=float)
        arrays |= more | _by_class(self, mean, memory, classes, len(names), documents)
        arrays |= _correlations(self, mean, memory, classes, documents)
        detail = slice(0, self.detail)
        arrays |= {name: arrays[name][:, detail] for name in ("nonlinearity", "nonlinearity_relative")}
        arrays["contextual_memory"] = memory[detail]
        coords = {"layer": layers, "row": rows.rows[detail], "class": list(names)}
        data = dataset(_VARIABLES, {name: np.asarray(array) for name, array in arrays.items()}, coords)
        known = [names[index] if index >= 0 else "" for index in classes[detail]]
        if gaps := [layer for layer, next_layer in itertools.pairwise(layers) if next_layer > layer + 1]:
            notes.append(f"steps from layers {layers_text(gaps)} span several blocks, which were not recorded")
        table = _table(store, rows.rows[detail], known, mean[detail], memory[detail])
        return self.result(store, data, table, rows, notes)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the least linear step beside its controls, anisotropy, and the correlation with memory."""
        data = result.data
        steps = data.isel(layer=slice(0, -1))
        ranked = steps["linearity_heldout" if steps["linearity_heldout"].notnull().all() else "linearity"]
        least = steps.isel(layer=int(ranked.to_numpy().argmin()))
        most = data.isel(layer=int(data["anisotropy"].to_numpy().argmax()))
        names = ("linearity", "linearity_heldout", "linearity_shuffled")
        inside, outside, shuffled = (float(steps[name].mean()) for name in names)
        text = (
            f"Mean linearity of a step {inside:z.3f} (held out {outside:z.3f}, shuffled {shuffled:z.3f}); least linear "
            f"after layer {int(least['layer'])}: held out {float(least['linearity_heldout']):z.3f}. Largest anisotropy "
            f"{float(most['anisotropy']):z.2f} at layer {int(most['layer'])} (isotropic "
            f"{float(data['isotropic_anisotropy']):z.3f})"
        )
        if "correlation" in data:
            text += (
                f". Contextual memory (stand-in: loss of the {len(result.provenance['settings']['offsets'])} tokens "
                f"before) {float(data['contextual_memory'].mean()):z.2f} nats at layer {int(data['memory_layer'])}, "
                f"frequencies alone {float(data['memory_unigram']):z.2f}; correlation with non-linearity "
                f"{value_text(data, 'correlation')}, within classes {value_text(data, 'correlation_within')}"
            )
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "layers", linearity, anisotropy and dimension; "classes", non-linearity and memory by class."""
        figures = {"layers": _layer_figure(result), "classes": _class_figure(result, "class_nonlinearity")}
        if "class_memory" in result.data:
            figures["memory"] = _class_figure(result, "class_memory")
        return figures


# ---- layers ---------------------------------------------------------------------------------------------


def _layers(
    probe: TokenMicroscope, store: Store, labels: list[str], rows: Int[np.ndarray, " row"], folds: np.ndarray
) -> dict[str, np.ndarray]:
    """All measures of layers and of single tokens; steps are NaN at the last layer."""
    draw = np.random.default_rng(probe.seed)
    order = torch.from_numpy(draw.permutation(len(rows)))
    drawn = np.sort(draw.permutation(len(rows))[: probe.dimension_rows])
    device = usable_device(probe.device)
    names = ("linearity", "linearity_heldout", "linearity_step", "linearity_shuffled")
    arrays = {name: np.full(len(labels), np.nan) for name in (*names, "anisotropy", "intrinsic_dimension")}
    arrays |= {
        name: np.full((len(labels), len(rows)), np.nan, np.float32)
        for name in ("nonlinearity", "nonlinearity_relative")
    }
    parts = [torch.from_numpy(np.flatnonzero(folds == fold)).to(device) for fold in np.unique(folds)]
    before: _Layer | None = None
    for layer, name in with_progress(list(enumerate(labels)), "token microscope", "layers"):
        states = store[name][rows]
        after = _Layer(_normalised(states.to(device), name), parts)
        cloud = states[torch.from_numpy(drawn)].double()
        points = cloud[torch.from_numpy(distinct(cloud))]
        if len(points) >= _FEW:
            arrays["intrinsic_dimension"][layer] = two_nn_first_fifth(nearest_neighbours(points, 2).distance)
        spectrum = torch.linalg.eigvalsh(after.gram)
        arrays["anisotropy"][layer] = float(spectrum[-1] / spectrum.sum())
        if before is not None:
            for measure, value in _step(before, after, order).items():
                arrays[measure][layer - 1] = value
        before = after
    return arrays


@dataclass(frozen=True)
class _Layer:
    """Normalised states of a layer, and their second moments in each fold."""

    x: Float[Tensor, "row d"]
    folds: list[Tensor]

    @cached_property
    def grams(self) -> Float[Tensor, "fold d d"]:
        return self.cross(self.x)

    @cached_property
    def gram(self) -> Float[Tensor, "d d"]:
        return self.grams.sum(0)

    def cross(self, y: Float[Tensor, "row d"]) -> Float[Tensor, "fold d d"]:
        """Moments with another layer, in each fold."""
        return torch.stack([self.x[rows].T @ y[rows] for rows in self.folds])


def _step(before: _Layer, after: _Layer, order: Int[Tensor, " row"]) -> dict[str, Any]:
    """Measures of the step between two layers.

    With G = X'X and C = X'Y the map is A = G^-1 C, and it explains tr(C' A) of |Y|^2: all but the error of each token
    follows from products of d x d. Those of the step Y - X are C - G over the step's norm.
    """
    crosses, gram = before.cross(after.x), before.gram
    cross, shuffled = crosses.sum(0), before.x.T @ after.x[order]
    best, noise = _solve(gram, torch.cat([cross, shuffled], dim=1)).chunk(2, dim=1)
    errors = (before.x @ best - after.x).norm(dim=1)
    measures: dict[str, Any] = {
        "linearity": float((cross * best).sum()),
        "linearity_shuffled": float((shuffled * noise).sum()),
        "nonlinearity": errors.cpu().numpy(),
        "nonlinearity_relative": (errors / after.x.norm(dim=1)).cpu().numpy(),
    }
    if size := float((after.x - before.x).square().sum()):
        change = best - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        measures["linearity_step"] = float(((cross - gram) * change).sum()) / size
    if (number := len(crosses)) > 1:
        lost = 0.0
        for fold in range(number):
            training_folds = [n for n in range(number) if n != fold]
            fold_map = _solve(before.grams[training_folds].sum(0), crosses[training_folds].sum(0))
            size = (fold_map * (before.grams[fold] @ fold_map)).sum()
            lost += float(after.grams[fold].trace() - 2 * (fold_map * crosses[fold]).sum() + size)
        measures["linearity_heldout"] = 1 - lost
    return measures


def _solve(gram: Float[Tensor, "d d"], cross: Float[Tensor, "d columns"]) -> Float[Tensor, "d columns"]:
    """Returns the least-squares map; the smallest one for directions that rows do not have."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if not int(failed) and float(diagonal.min() ** 2) > _RANK * float(gram.diagonal().max()):
        return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > 1e-12 * values[-1], 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross))


def _normalised(states: Tensor, name: str) -> Float[Tensor, "row d"]:
    """Centred rows of Frobenius norm 1, in float64."""
    centred = states.double()
    centred = centred - centred.mean(0)
    norm = centred.norm()
    if not float(norm):
        raise RequestError(f"{name} is the same for all selected tokens; nothing can be compared")
    return centred / norm


# ---- contextual memory ----------------------------------------------------------------------------------


def _memory(
    probe: TokenMicroscope, store: Store, layers: list[int], rows: Int[np.ndarray, " row"], documents: np.ndarray
) -> tuple[Float[np.ndarray, " row"], dict[str, Any], list[str]]:
    """Loss of the tokens before each held-out token, NaN elsewhere; measures of it, and notes."""
    memory = np.full(len(rows), np.nan, np.float32)
    if not probe.epochs:
        return memory, {}, []
    if len(np.unique(documents)) < 3:
        return memory, {}, ["contextual memory not computed: it needs three documents or more"]
    if probe.memory_layer is not None:
        layer = probe.memory_layer + store.manifest.model.n_layers * (probe.memory_layer < 0)
        if layer not in layers:
            raise RequestError(f"memory_layer {probe.memory_layer} was not read; layers are {layers}")
    else:
        layer = layers[len(layers) // 4]
    targets = np.stack([tokens_at(store, offset)[rows] for offset in probe.offsets])
    parts = split_by_document(documents, probe.held_out, purpose="contextual memory", seed=probe.seed)
    training, validation, tested = (np.flatnonzero(part & (targets >= 0).all(0)) for part in parts)
    if not (len(training) and len(validation) and len(tested)):
        return memory, {}, ["contextual memory not computed: too few tokens have the tokens before them"]
    site, device = store[f"{probe.site}.{layer}"], usable_device(probe.device)

    def states(index: np.ndarray) -> Tensor:
        return site[rows[index]].float().to(device)

    fit = SoftmaxFit(epochs=probe.epochs, learning_rate=probe.learning_rate, seed=probe.seed)
    steps = probe.epochs * -(-len(training) // fit.batch)
    with progress("contextual memory", steps, "steps") as tick:
        probes = fit_softmax(states, training, targets[:, training], validation, targets[:, validation], fit, tick=tick)
    classes = probes.class_of(targets[:, tested])
    losses = np.full(classes.shape, np.nan)
    with torch.no_grad():
        for first in range(0, len(tested), fit.batch):
            part = slice(first, first + fit.batch)
            x = states(tested[part])
            for number, target in enumerate(classes[:, part]):
                log = probes.log_probabilities(number, x).cpu().numpy()
                picked = np.take_along_axis(log, target.clip(min=0)[:, None], 1)[:, 0]
                losses[number, part] = np.where(target >= 0, -picked, np.nan)
    unigram = np.full(classes.shape, np.nan)
    for number, target in enumerate(classes):
        counts = np.bincount(probes.class_of(targets[number, training]), minlength=len(probes.classes))
        share = np.where(counts > 0, counts, np.nan) / counts.sum()
        unigram[number] = np.where(target >= 0, -np.log(share[target.clip(min=0)]), np.nan)
    known = (classes >= 0).any(0)
    memory[tested[known]] = np.nanmean(losses[:, known], 0)
    more = {"memory_layer": layer, "coverage": float((classes >= 0).mean()), "memory_rows": int(known.sum())}
    return memory, more | {"memory_unigram": float(np.nanmean(unigram))}, []


def _by_class(
    probe: TokenMicroscope,
    nonlinearity: Float[np.ndarray, " row"],
    memory: Float[np.ndarray, " row"],
    classes: Int[np.ndarray, " row"],
    number: int,
    documents: np.ndarray,
) -> dict[str, np.ndarray]:
    masks = [classes == index for index in range(number)]
    arrays = {"class_tokens": np.array([int(mask.sum()) for mask in masks])}
    for name, values in (("class_nonlinearity", nonlinearity), ("class_memory", memory)):
        if np.isnan(values).all():
            continue
        columns = np.stack([np.where(mask, values, np.nan) for mask in masks], 1)
        mean, resampled = clustered_means(columns, documents, resamples=probe.resamples, seed=probe.seed)
        low, high = intervals(resampled)
        arrays |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return arrays


def _correlations(
    probe: TokenMicroscope, x: np.ndarray, y: np.ndarray, classes: np.ndarray, documents: np.ndarray
) -> dict[str, float]:
    """Pearson correlation over the tokens that have both, plain and within classes, with intervals over documents."""
    known = ~np.isnan(y)
    if known.sum() < _FEW:
        return {}
    x, y, classes, documents = x[known], y[known].astype(float), classes[known], documents[known]
    arrays = {}
    for name in ("correlation", "correlation_within"):
        if name == "correlation_within":
            _, index = np.unique(classes, return_inverse=True)
            counts = np.bincount(index)
            x, y = (part - (np.bincount(index, part) / counts)[index] for part in (x, y))
        a, b = (x - x.mean()) / (x.std() or 1), (y - y.mean()) / (y.std() or 1)
        products = np.stack([a, b, a * a, b * b, a * b], 1)
        mean, resampled = clustered_means(products, documents, resamples=probe.resamples, seed=probe.seed)
        low, high = intervals(_pearson(resampled)[:, None])
        arrays |= {name: float(_pearson(mean[None])[0]), f"{name}_low": float(low[0]), f"{name}_high": float(high[0])}
    return arrays


def _pearson(means: Float[np.ndarray, "sample 5"]) -> Float[np.ndarray, " sample"]:
    a, b, aa, bb, ab = means.T
    variance = (aa - a * a) * (bb - b * b)
    return np.divide(ab - a * b, np.sqrt(variance), out=np.full(len(means), np.nan), where=variance > 0)


def _table(
    store: Store, rows: np.ndarray, names: list[str], nonlinearity: np.ndarray, memory: np.ndarray
) -> pd.DataFrame:
    """A line for each kept token."""
    tokens = store.tokens.take(rows)
    columns = {name: tokens[name].to_numpy() for name in ("row", "sequence", "position", "document")}
    columns["token"] = np.array(tokens["token"].to_pylist(), dtype=object)
    return pd.DataFrame(columns | {"class": names, "nonlinearity": nonlinearity, "contextual_memory": memory})


# ---- figures --------------------------------------------------------------------------------------------


def _layer_figure(result: Result) -> Any:
    data = result.data
    noise, isotropic = float(data["noise"]), float(data["isotropic_anisotropy"])
    linear = [
        Curve("in sample", data["linearity"].to_numpy(), CATEGORIES[0]),
        Curve("held out", data["linearity_heldout"].to_numpy(), CATEGORIES[1]),
        Curve("of the step, in sample", data["linearity_step"].to_numpy(), CATEGORIES[2]),
        Curve("expected of noise", noise, NEUTRAL, "dash"),
    ]
    spread = [
        Curve("anisotropy", data["anisotropy"].to_numpy(), CATEGORIES[3], legend=False),
        Curve("expected of noise", isotropic, NEUTRAL, "dash", legend=False),
    ]
    return layer_panels(
        [[Panel("linearity of the step to the next layer", linear), Panel("anisotropy", spread)]],
        layers=data["layer"].to_numpy().tolist(),
        title=f"Linearity and anisotropy of {label(str(result.provenance['model']), 60)}",
        subtitle=f"{counted(data['rows'], 'token')}; held out: documents that the map was not fitted on",
        unit="share of variance",
    )


def _class_figure(result: Result, name: str) -> Any:
    data = result.data
    places = np.flatnonzero(~np.isnan(data[name].to_numpy()))
    values = np.stack([data[f"{name}{end}"].to_numpy()[places] for end in ("", "_low", "_high")])
    order = np.argsort(values[0])
    words = {"class_nonlinearity": "Non-linearity", "class_memory": "Contextual memory"}
    counts = data["class_tokens"].to_numpy()[places][order]
    names = [label(str(text), 24).replace("·", " ") for text in data["class"].to_numpy()[places][order]]
    figure = group_intervals(
        {words[name]: values[:, order]},
        categories=[f"{text}<br>{count:,}" for text, count in zip(names, counts.tolist(), strict=True)],
        hover="%{x}",
        title=f"{words[name]} by class of token in {label(str(result.provenance['model']), 60)}",
        subtitle="mean and 95 % interval over documents; below each class its tokens",
    )
    return figure.update_yaxes(title=axis_title(data[name].attrs, words[name].lower())).update_layout(showlegend=False)
