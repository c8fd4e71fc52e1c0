"""k-sparse probing: how well k features of an SAE detect each value of a label, beside shuffled labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Int64
from scipy.sparse import csc_array, csr_array, vstack

from workbench.analysis.labelled_rows import shuffle_labels
from workbench.analysis.logistic import fit_logistic
from workbench.features.feature_store import Features
from workbench.features.index import feature_groups
from workbench.features.labels import with_names
from workbench.features.queries import coded_labels, label_columns, text_rows
from workbench.io.checks import check, check_resampling, whole_number
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.saving import save_texts
from workbench.io.spreadsheet import csv_text
from workbench.results.bootstrap import central, resampled_means

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CELLS = 1 << 22  # sums of features and values in memory at a time


@dataclass(frozen=True)
class SparseProbes:
    """Result of `sparse_probe`."""

    table: pd.DataFrame
    """A line per label, value and k: label; value; k; features, the chosen ones, largest difference first; tokens,
    test rows with the value; f1, accuracy, with the ends of their 95 % CI over documents in f1_low, f1_high, ...;
    shuffled_f1, shuffled_accuracy, the same with shuffled labels, with ends; always_f1, that of a probe that says yes
    to every row, 2p / (1 + p); features_description where features have labels. F1 is 2 TP / (2 TP + FP + FN) and 0 to
    1."""
    documents: tuple[int, int]
    """Number of training and of test documents."""
    shuffled: dict[str, str]
    """What was permuted for each label: "documents" if every document has a single value, else "tokens"."""
    left_out: int
    """Values that have no token in the training or in the test documents."""

    def figure(self, label: str | None = None, values: int = 6) -> go.Figure:
        """Returns F1 against k for the best `values` values of a label, and dashed with shuffled labels."""
        from workbench.figures.feature_questions import sparse_probe_figure  # a second: plotly

        labels = list(dict.fromkeys(self.table["label"]))
        label = labels[0] if label is None else label
        check("label", label, one_of=labels)
        check("values", values, at_least=1, whole=True)
        return sparse_probe_figure(self.table.loc[self.table["label"] == label], str(label), values, self.documents[1])

    def save(self, folder: str | Path) -> Path:
        """Writes probes.csv into an empty or new folder; RequestError if it is neither."""
        return save_texts(folder, {"probes.csv": csv_text(self.table)})


def sparse_probe(
    features: Features,
    labels: str | Sequence[str] | Mapping[str, Any] | None = None,
    *,
    k: Sequence[int] = (1, 2, 5, 10),
    least: int = 20,
    held_out: float = 0.3,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
) -> SparseProbes:
    """Returns how well probes on k features detect each value of a label among the tokens of text.

    For each value and k: the k features with the largest absolute difference between their mean activation on training
    rows with the value and without it, in standard deviations of the feature, and a logistic regression on them with
    balanced class weights, tested on other documents. The same with shuffled labels, features chosen anew, shows what
    chance alone reaches: the value under the null. If a label is the same for all tokens of a document, whole documents
    are shuffled, else tokens. Source: Gurnee et al., arXiv 2305.01610, where differences are not scaled, so that
    features of large activations come first.

    Cost: one pass over the entries per label, and fits over the rows on which chosen features are active. Memory:
    32 MiB and the entries of the chosen features.

    Args:
        features: The features.
        labels: Columns of the token table, or your own labels as name -> one value per row (None: no value). None:
            every label that the spans of the texts defined.
        k: Numbers of features.
        least: Smallest number of tokens of a value.
        held_out: Share of the documents to test on.
        resamples: Resamples of the test documents, for the intervals.
        seed: Random seed of split, shuffle and resamples.
        show_progress: Show a progress bar.

    Raises:
        RequestError: No such column, a single document, no value in training and test documents, or wrong settings.
    """
    _check_settings(features, k, least, held_out)
    check_resampling(resamples, seed)
    draw = np.random.default_rng(seed)
    text, lines, shuffled, left_out = text_rows(features.store), [], dict[str, str](), 0
    split = _Split.of(features.store.tokens["document"].to_numpy(), text, held_out, draw)
    score = partial(_scores, features, split=split, resamples=resamples, seed=seed)
    for name, column in label_columns(features.store, labels).items():
        _, values, codes = coded_labels(name, column, text, least)
        shuffled[name], permuted = shuffle_labels(codes, split.document, (split.training, split.test), draw)
        usable = [value for value in range(len(values)) if split.usable(codes, value) and split.usable(permuted, value)]
        left_out += len(values) - len(usable)
        orders = [_largest_differences(features, part, split, len(values), max(k)) for part in (codes, permuted)]
        with progress(f"probing {name}", len(usable), "values", show=show_progress) as advance:
            for value in usable:
                for size in k:
                    real, null = (order[value][:size] for order in orders)
                    scores = score(real, codes == value), score(null, permuted == value)
                    lines.append(_line(name, values[value], size, real, *scores))
                advance(1)
    if not lines:
        raise RequestError(f"labels: no value has {least} tokens, and some in training and test documents; lower least")
    table = with_names(pd.DataFrame(lines), features.labels, "features", "features_description")
    return SparseProbes(table, split.documents, shuffled, left_out)


def _check_settings(features: Features, k: Sequence[int], least: int, held_out: float | int) -> None:
    for number in k:
        check("k", number, at_least=1, at_most=features.shape[1], whole=True)
    if not k:
        raise RequestError("k is empty; name one or more numbers of features")
    least = whole_number("least", least, at_least=1)
    check("held_out", held_out, above=0, below=1)


@dataclass(frozen=True)
class _Split:
    """Rows of text, divided by document into training and test rows."""

    document: Int64[np.ndarray, " row"]
    """Number of each row's document."""
    training: Bool[np.ndarray, " row"]
    test: Bool[np.ndarray, " row"]
    documents: tuple[int, int]

    @classmethod
    def of(
        cls,
        document: Int[np.ndarray, " row"],
        text: Bool[np.ndarray, " row"],
        held_out: float,
        draw: np.random.Generator,
    ) -> _Split:
        number = np.unique(document, return_inverse=True)[1]
        shuffled_documents = draw.permutation(np.unique(number[text]))
        if len(shuffled_documents) < 2:
            raise RequestError(
                f"the store has {counted(len(shuffled_documents), 'document')}; probes need some to learn "
                "and others to be tested"
            )
        tested = min(len(shuffled_documents) - 1, max(1, round(held_out * len(shuffled_documents))))
        test = text & np.isin(number, shuffled_documents[:tested])
        return cls(number, text & ~test, test, (len(shuffled_documents) - tested, tested))

    def usable(self, codes: Int[np.ndarray, " row"], value: int) -> bool:
        """True if rows with the value and without it are in both parts."""
        has = codes == value
        return all(0 < int(has[part].sum()) < int(part.sum()) for part in (self.training, self.test))


def _largest_differences(
    features: Features, codes: Int[np.ndarray, " row"], split: _Split, values: int, k: int
) -> Int64[np.ndarray, "value k"]:
    """Features with the largest absolute difference of means in standard deviations, on training rows, largest first,
    ties by feature."""
    codes = np.where(split.training, codes, -1)
    positive = np.bincount(codes[codes >= 0], minlength=values)
    negative = int(split.training.sum()) - positive
    best = np.empty((values, 0))
    best_features = np.empty((values, 0), np.int64)
    indptr = features.by_feature["indptr"]
    for group in feature_groups(indptr, most=max(1, _CELLS // max(1, values))):
        entries = slice(int(indptr[group.start]), int(indptr[group.stop]))
        rows = features.by_feature["row"][entries]
        activation = features.by_feature["value"][entries].astype(np.float64)
        number = np.repeat(np.arange(group.stop - group.start), features.counts[group])
        size = group.stop - group.start
        total = np.bincount(number, activation * split.training[rows], minlength=size)
        has_value = codes[rows] >= 0
        cell = number[has_value] * values + codes[rows][has_value]
        sums = np.bincount(cell, activation[has_value], minlength=size * values).reshape(size, values).T
        squares = np.bincount(number, activation**2 * split.training[rows], minlength=size)
        rows_of_all = max(1, int(split.training.sum()))
        spread = np.sqrt(np.maximum(squares / rows_of_all - (total / rows_of_all) ** 2, 0))
        with np.errstate(invalid="ignore", divide="ignore"):  # a value without training rows is not used
            gap = np.abs(sums / positive[:, None] - (total - sums) / negative[:, None]) / spread
        best = np.concatenate([best, np.nan_to_num(gap)], axis=1)
        best_features = np.concatenate(
            [best_features, np.broadcast_to(np.arange(group.start, group.stop), gap.shape)], axis=1
        )
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, best_features = np.take_along_axis(best, order, 1), np.take_along_axis(best_features, order, 1)
    return best_features


class _Score(NamedTuple):
    """F1 and accuracy with the ends of their intervals, and the number of positive and of all test rows."""

    f1: tuple[float, float, float]
    accuracy: tuple[float, float, float]
    positive: int
    rows: int


def _scores(
    features: Features,
    chosen_features: Int64[np.ndarray, " k"],
    has: Bool[np.ndarray, " row"],
    split: _Split,
    resamples: int,
    seed: int,
) -> _Score:
    """Fits on the training rows and tests on the others. Rows on which no chosen feature is active count by number."""
    rows, x = _columns(features, chosen_features)
    coefficients, intercept = _fit(x, rows, has, split.training)
    test = split.test[rows]
    says = np.asarray(x @ coefficients + intercept > 0)[test]
    document, truth = split.document[rows[test]], has[rows[test]]
    documents = int(split.document.max()) + 1
    everywhere = np.bincount(split.document[split.test], minlength=documents)
    positive = np.bincount(split.document[split.test & has], minlength=documents)
    active = np.bincount(document, minlength=documents)
    active_positive = np.bincount(document[truth], minlength=documents)
    hits = np.bincount(document[says & truth], minlength=documents)
    claims = np.bincount(document[says], minlength=documents)
    if intercept > 0:  # rows without an active feature
        hits = hits + positive - active_positive
        claims = claims + everywhere - active
    right = everywhere - claims - positive + 2 * hits
    tested = everywhere > 0
    totals = np.stack([2.0 * hits, right.astype(float)], axis=1)[tested]
    counts = np.stack([claims + positive, everywhere], axis=1).astype(float)[tested]
    mean, resampled = resampled_means(totals, counts, resamples=resamples, seed=seed)
    f1, accuracy = ((float(mean[m]), *central(resampled[:, m])) for m in range(2))
    return _Score(f1, accuracy, int(positive.sum()), int(everywhere.sum()))


def _columns(
    features: Features, chosen_features: Int64[np.ndarray, " k"]
) -> tuple[Int64[np.ndarray, " active"], csr_array]:
    """Rows on which some of the features are active, and their activations."""
    parts = [features.rows_of(feature) for feature in chosen_features]
    rows = np.unique(np.concatenate([np.asarray(part[0], np.int64) for part in parts]))
    indices = [np.searchsorted(rows, part[0]) for part in parts]
    indptr = np.cumsum([0, *(len(index) for index in indices)])
    values = np.concatenate([part[1].astype(np.float64) for part in parts])
    return rows, csc_array((values, np.concatenate(indices), indptr), shape=(len(rows), len(chosen_features))).tocsr()


def _fit(
    x: Any, rows: Int64[np.ndarray, " active"], has: Bool[np.ndarray, " row"], training: Bool[np.ndarray, " row"]
) -> tuple[Float[np.ndarray, " k"], float]:
    """Coefficients and intercept; rows without an active feature are two rows of zeros with their number as weight."""
    in_training = training[rows]
    truth = has[rows[in_training]]
    positive, everywhere = int((has & training).sum()), int(training.sum())
    zeros = np.array([positive - truth.sum(), everywhere - positive - (~truth).sum()])
    weight = np.concatenate([np.ones(len(truth)), zeros])
    inputs: Any = vstack([x[in_training], csr_array((2, x.shape[1]))], format="csr")
    nonzero = weight > 0
    return fit_logistic(inputs[nonzero], np.concatenate([truth, [True, False]])[nonzero], weight[nonzero])


def _line(
    label: str, value: Any, k: int, features: Int64[np.ndarray, " k"], score: _Score, shuffled: _Score
) -> dict[str, Any]:
    share = score.positive / score.rows
    line = {"label": label, "value": value, "k": k, "features": tuple(map(int, features)), "tokens": score.positive}
    for prefix, probe_score in (("", score), ("shuffled_", shuffled)):
        for name, numbers in (("f1", probe_score.f1), ("accuracy", probe_score.accuracy)):
            line |= dict(zip((f"{prefix}{name}{end}" for end in ("", "_low", "_high")), numbers, strict=True))
    return line | {"always_f1": 2 * share / (1 + share)}
