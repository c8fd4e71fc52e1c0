"""Token erasure: last tokens of multi-token words lose the information about their tokens (Feucht et al. 2024).

Linear probes read the token at t + i from the hidden state at t. At the last tokens of words of several tokens their
accuracy drops from early to late layers; at other tokens it does not. The drop, as a score of spans, segments a text
into the model's implicit vocabulary:

    delta(t, i) = p_i^early(x_{t+i} | h_t) - p_i^late(x_{t+i} | h_t)
    psi(p, q)   = [ delta(q, 0) + sum_{t=p..q} sum_{i in -2, -1} s(t, i) delta(t, i) ] / (1 + m)

with s = -1 where t + i lies before p, else 1, and m the number of terms in the sum; terms before the start of the text
are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.probing import (
    LOST_VARIABLES,
    SCORED,
    FiniteRows,
    LayerProbe,
    Model,
    RequestError,
    Result,
    SoftmaxFit,
    SoftmaxProbes,
    Store,
    TrainedErasure,
    Variable,
    Words,
    check_fields,
    choose_layers,
    clustered_means,
    counted,
    dataset,
    erasure_curves,
    find_words,
    fit_softmax,
    intervals,
    note_few_rows,
    plain_torch,
    points_text,
    progress,
    provenance,
    segment_agreement,
    segment_bars,
    selected_rows,
    split_by_document,
    text_segments,
    tokens_at,
    usable_device,
    vocabulary_bars,
    with_interval,
    with_note,
)

_GROUPS = ("last", "control")
_GROUP, _OFFSET = ("group", "offset"), ("offset",)
_ACCURACY = (*_GROUP, "layer")
_SHARE = "share of tokens"

VARIABLES = (
    *with_interval(
        Variable(
            "accuracy", _ACCURACY, _SHARE, "covered test tokens whose token at this offset is the probe's top token"
        )
    ),
    Variable("tokens", _GROUP, "tokens", "covered test tokens: the training rows have their token at this offset"),
    Variable("coverage", _GROUP, _SHARE, "test tokens that are covered, of those with a token at this offset"),
    *with_interval(
        Variable(
            "fall", _OFFSET, _SHARE, "drop of accuracy from layer `early` to `late` at last tokens minus control", "0"
        )
    ),
    *with_interval(
        Variable("fall_from_best", _OFFSET, _SHARE, "the same drop from layer `best` instead of `early`", "0")
    ),
    Variable(
        "best", _OFFSET, "layer", "layer before `late` with the best accuracy at last tokens of validation documents"
    ),
    Variable("training_rows", (), "tokens", "tokens that the probes are trained on"),
    Variable("early", (), "layer", "layer from which erasure is measured"),
    Variable("late", (), "layer", "layer to which erasure is measured"),
    Variable("segments", (), "segments", "segments of several tokens"),
    Variable("words", (), "words of several tokens", "words of several tokens in the test documents"),
    Variable("precision", (), "share of segments", "segments of several tokens that are words"),
    Variable("recall", (), "share of words", "words of several tokens that are segments"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class TokenErasure(LayerProbe):
    """Do last tokens of words erase the tokens before them, and which spans of the text behave like words?"""

    name: ClassVar[str] = "token-erasure"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Feucht et al. 2024, Token erasure, arXiv 2406.20086",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "control group": "tokens outside of words of several tokens: `fall` is the drop at last tokens beyond theirs",
        "fall_low": "lower end of the 95 % interval of `fall` over documents, above 0 if there is erasure",
        "random weights": "the same architecture with random weights, where `fall` is near 0",
    }

    site: str = "resid_post"
    """Kind of site to read at every recorded layer."""
    where: str | None = None
    """SQL condition over the token table that selects the tokens to read. None: all except special tokens."""
    offsets: tuple[int, ...] = (-3, -2, -1, 0, 1)
    """Offsets of the tokens that are read from a state; the erasure score needs 0, -1 and -2."""
    spans: str = "word"
    """Label whose spans are the words; if it was not recorded, words begin at a token with a leading space."""
    early: int | None = None
    """Layer from which erasure is measured. None: L / 32 rounded, layer 1 of 32 in the paper."""
    late: int | None = None
    """Layer to which erasure is measured. None: 9 L / 32 rounded, layer 9 of 32 in the paper, at least `early` + 1."""
    longest: int = 16
    """Maximum tokens of a span that is scored; the paper scores all lengths."""
    held_out: float = 0.3
    """Share of the documents used for testing; half as many are used for early stopping."""
    epochs: int = 8
    """Maximum training epochs."""
    batch: int = 1024
    """Batch size in rows."""
    learning_rate: float = 1e-2
    """AdamW learning rate, decayed linearly to 0."""
    weight_decay: float = 1e-3
    """AdamW weight decay."""
    resamples: int = 1000
    """Bootstrap resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the document split, the order of rows and the bootstrap."""
    device: str | None = None
    """Device for training and testing: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "longest", "epochs", "batch", "resamples", at_least=1, at_most=100_000)
        check_fields(self, "learning_rate", "weight_decay", at_least=0, below=float("inf"))
        check_fields(self, "held_out", above=0, below=0.6)
        if not self.offsets or len(set(self.offsets)) < len(self.offsets):
            raise RequestError(f"offsets must be one or more different whole numbers, not {self.offsets}")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Trains probes on some documents, tests them on others, and segments the test documents.

        Group "last" holds last tokens of words of two or more tokens, at the offsets that stay inside the word or lie
        after it; "control" holds all tokens outside of such words. Words that a sequence border cuts are in neither.
        Only covered tokens count, whose target some training row has: no probe can predict another. With 0, -1 and -2
        among the offsets, `table` has one line per segment: text, psi (-1 to 1; 0: no erasure, as where a target is not
        covered), tokens, first row, whether it is a word, and whether it touches a word that is cut.

        Costs layers x offsets x epochs x rows x 3 products with a map from d_model to the distinct tokens; memory is
        one batch of logits, one layer's maps, and 5 bytes per layer, offset and held-out token.

        Raises:
            RequestError: A site or layer was not recorded, values are NaN or infinite, the model is not causal, or
                fewer than three documents are selected.
        """
        layers, labels = self.recorded(store, self.site)
        scored = self._layers(store, layers)
        rows = self._rows(store, labels)
        return self._result(store, rows, layers, scored, self._fitted(store, rows, labels), len(rows.training))

    @plain_torch()
    def fit(self, store: Store) -> TrainedErasure:
        """Returns the probes, trained as `run` trains them, to be saved and applied to other stores.

        Memory: 4 bytes for each layer, offset, dimension and distinct token of the training documents; `layers` of the
        two that are compared suffice for segments.

        Raises:
            RequestError: As `run`.
        """
        layers, labels = self.recorded(store, self.site)
        rows = self._rows(store, labels)
        fitted = [(probes.to("cpu"), validated) for probes, validated in self._fitted(store, rows, labels)]
        record, known = store.manifest.model, provenance(store, self)
        made_of = {key: known[key] for key in ("store_fingerprint", "settings", "workbench")}
        made_of |= {"method": "token erasure", "training_rows": len(rows.training)}
        return TrainedErasure(
            self.site,
            tuple(layers),
            self.offsets,
            fitted[0][0].classes,
            torch.stack([probes.weight for probes, _ in fitted]),
            torch.stack([probes.scale for probes, _ in fitted]),
            torch.from_numpy(np.stack([validated for _, validated in fitted])).float(),
            record.name,
            record.fingerprint,
            record.n_layers,
            made_of,
        )

    @plain_torch()
    def read(self, probes: TrainedErasure, store: Store) -> Result:
        """Returns accuracy, drop and segments of all selected tokens of a store, by probes that were trained before.

        Raises:
            RequestError: The store is of another model than the probes, the probes have other offsets or lack a layer,
                or as `run`.
        """
        probes.check_model(store)
        if (self.site, self.offsets) != (probes.site, probes.offsets):
            raise RequestError(
                f"site {self.site} and offsets {self.offsets} are not those of the probes, {probes.site} and "
                f"{probes.offsets}; leave them out"
            )
        n_layers = store.manifest.model.n_layers
        layers = choose_layers(probes.layers, self.layers, n_layers, "has no probes; layers with probes are")
        labels = [f"{self.site}.{layer}" for layer in layers]
        store.require(*labels)
        scored, device = self._layers(store, layers), usable_device(self.device)
        rows = self._rows(store, labels, trained=True)
        places = [probes.layers.index(layer) for layer in layers]
        fitted = (
            (probes.probes(layer).to(device), probes.validated[at].numpy())
            for layer, at in zip(layers, places, strict=True)
        )
        same_store = probes.made_of.get("store_fingerprint") == store.manifest.fingerprint
        note = "the probes were trained on documents of this store, which are read too" if same_store else ""
        number = int(probes.made_of.get("training_rows", 0))
        return self._result(store, rows, layers, scored, fitted, number, note)

    def _rows(self, store: Store, labels: list[str], trained: bool = False) -> _Rows:
        """Rows to train on, to validate and to test; of probes that are trained all rows are tested."""
        checked = self.finite_rows(store, labels, selected_rows(store, self.where or "NOT is_special"))
        training, validation, test = np.zeros(0, np.int64), np.zeros(0, np.int64), checked.rows
        if not trained:
            documents = store.tokens["document"].to_numpy()[checked.rows]
            masks = split_by_document(documents, self.held_out, purpose="token erasure", seed=self.seed)
            training, validation, test = (checked.rows[mask] for mask in masks)
        targets = np.stack([tokens_at(store, offset) for offset in self.offsets])
        return _Rows(checked, training, validation, test, targets, *find_words(store, self.spans))

    def _fitted(
        self, store: Store, rows: _Rows, labels: list[str]
    ) -> Iterator[tuple[SoftmaxProbes, Float[np.ndarray, " offset"]]]:
        """Trains the probes of each layer; yields them with the last tokens of validation documents that they read."""
        settings = SoftmaxFit(self.epochs, self.batch, self.learning_rate, self.weight_decay, self.seed)
        training, validation = ((part, rows.targets[:, part]) for part in (rows.training, rows.validation))
        if not (training[1] >= 0).any():
            raise RequestError(f"offsets: no training token has a token at {self.offsets}; choose smaller ones")
        last = rows.covered(rows.validation, np.unique(training[1]), self.offsets)[1][0]
        steps = len(labels) * self.epochs * -(-len(rows.training) // self.batch)
        with progress("token erasure", steps, "steps") as tick:
            for site in labels:
                states = self._states(store, site)
                probes = fit_softmax(states, *training, *validation, settings, tick=tick)
                hits, _ = _read(probes, states, *validation, self.batch)
                yield probes, (hits & last).sum(1)

    def _states(self, store: Store, site: str) -> Callable[[np.ndarray], Tensor]:
        device = usable_device(self.device)
        return lambda ids: store[site][ids].float().to(device)

    def _result(
        self,
        store: Store,
        rows: _Rows,
        layers: list[int],
        scored: tuple[int, int],
        fitted: Iterable[tuple[SoftmaxProbes, np.ndarray]],
        training_rows: int,
        note: str = "",
    ) -> Result:
        """Reads the test rows by the probes of each layer; all variables, and the segments."""
        tested, targets, words = rows.tested, rows.targets[:, rows.tested], rows.words
        hits, likelihoods, validated, classes = [], [], [], np.zeros(0, np.int64)
        for layer, (probes, validation) in zip(layers, fitted, strict=True):
            right, likelihood = _read(probes, self._states(store, f"{self.site}.{layer}"), tested, targets, self.batch)
            hits.append(right)
            likelihoods.append(likelihood.astype(np.float32))
            validated.append(validation)
            classes = probes.classes
        groups, covered = rows.covered(tested, classes, self.offsets)
        early, late = (layers.index(layer) for layer in scored)
        best = np.stack(validated)[:late].argmax(0)
        documents = store.tokens["document"].to_numpy()[tested]
        arrays = self._accuracy(np.stack(hits), covered, documents, (early, late), best)
        with np.errstate(invalid="ignore"):  # a group without tokens
            arrays["coverage"] = np.divide(covered.sum(2), groups.sum(2))
        arrays |= {
            "training_rows": training_rows,
            "early": scored[0],
            "late": scored[1],
            "best": np.array(layers)[best],
        }
        table = pd.DataFrame()
        if set(SCORED) <= set(self.offsets):
            delta = dict(zip(self.offsets, likelihoods[early] - likelihoods[late], strict=True))
            table = text_segments(store, tested, delta, words, self.longest)
            arrays |= segment_agreement(table, words, tested)
        coords = {"group": list(_GROUPS), "offset": list(self.offsets), "layer": layers}
        data = dataset(VARIABLES, arrays, coords)
        data.attrs = {"spans": rows.spans}
        few = note_few_rows(training_rows, store[self.site, layers[0]].shape[1])
        return self.result(store, data, table, rows.checked, [few, note])

    def _layers(self, store: Store, layers: list[int]) -> tuple[int, int]:
        n_layers = store.manifest.model.n_layers
        if n_layers < 2:
            raise RequestError(f"token-erasure compares two layers, and {store.manifest.model.name} has one")
        early = round(n_layers / 32) if self.early is None else self.early
        late = max(early + 1, round(9 * n_layers / 32)) if self.late is None else self.late
        for name, layer in {"early": early, "late": late}.items():
            if layer not in layers:
                store.require(f"{self.site}.{layer}")
                known = ", ".join(map(str, layers))
                raise RequestError(
                    f"{name} is layer {layer}, and layers {known} are read; set {name}, or add the layer"
                )
        if early >= late:
            raise RequestError(f"late must come after early, layer {early}, not at layer {late}")
        return early, late

    def _accuracy(
        self,
        hits: Bool[np.ndarray, "layer offset row"],
        groups: Bool[np.ndarray, "group offset row"],
        document: Int[np.ndarray, " row"],
        scored: tuple[int, int],
        best: Int[np.ndarray, " offset"],
    ) -> dict[str, np.ndarray]:
        """Means over tokens with intervals over documents; groups share resamples, so that their drops compare."""
        values = np.where(groups[:, :, None], hits.transpose(1, 0, 2)[None], np.nan)  # group offset layer row
        shape, rows = values.shape[:3], values.shape[3]
        flat = values.reshape(-1, rows).T
        mean, resampled = clustered_means(flat, document, resamples=self.resamples, seed=self.seed)
        mean, resampled = mean.reshape(shape), resampled.reshape(-1, *shape)
        early, late = scored
        arrays = {"accuracy": mean, "tokens": groups.sum(2)}
        arrays["accuracy_low"], arrays["accuracy_high"] = intervals(resampled)
        for name, start in {"fall": np.full_like(best, early), "fall_from_best": best}.items():
            at = (..., np.arange(len(best)), start)
            drop, resampled_drop = mean[at] - mean[..., late], resampled[at] - resampled[..., late]
            arrays[name] = drop[0] - drop[1]
            low_high = intervals(resampled_drop[:, 0] - resampled_drop[:, 1])
            arrays[f"{name}_low"], arrays[f"{name}_high"] = low_high
        return arrays

    @staticmethod
    def headline(result: Result) -> str:
        """Returns whether last tokens erase the token before, the drops against the control, and the segmentation."""
        data = result.data
        offset = -1 if -1 in data["offset"] else int(data["offset"][0])
        at_offset = data.sel(offset=offset)
        late = int(data["late"])
        starts = {"fall": int(data["early"])} | ({"fall_from_best": int(at_offset["best"])} if "best" in data else {})
        parts, erased = [], False
        for name, start in starts.items():
            last, control = (
                [100 * float(at_offset["accuracy"].sel(group=group, layer=layer)) for layer in (start, late)]
                for group in _GROUPS
            )
            fall = [100 * float(at_offset[f"{name}{end}"]) for end in ("", "_low", "_high")]
            erased |= last[0] > last[1] and fall[1] > 0
            parts.append(
                f"layers {start} to {late}: last tokens of words {last[0]:z.0f} to {last[1]:z.0f} %, control "
                f"{control[0]:z.0f} to {control[1]:z.0f} %, drop beyond the control's {points_text(*fall)}"
            )
        parts = list(dict.fromkeys(parts))  # the early layer may be the best
        finding = "Token erasure" if erased else "No token erasure"
        if np.isnan(float(at_offset["fall_low"])):
            finding = "Token erasure not decided"
        if not int(at_offset["tokens"].min()):
            finding, parts = "Token erasure not measured", ["where a group has no token to compare"]
        texts = [f"{finding} at offset {offset:+d}, {'; '.join(parts)}."]
        if "coverage" in data:
            share = {group: 100 * float(at_offset["coverage"].sel(group=group)) for group in _GROUPS}
            known = [f"{value:z.0f} % of {group} tokens" for group, value in share.items() if not np.isnan(value)]
            texts += [f"Targets in the training documents: {', '.join(known)}."] * bool(known)
        if "precision" in data and not np.isnan(float(data["precision"])):
            recall = float(data["recall"])
            texts.append(
                f"{counted(data['segments'], 'segment')} of several tokens: precision {float(data['precision']):z.2f}, "
                f"recall {'not measured' if np.isnan(recall) else f'{recall:z.2f}'} against {data.attrs['spans']}."
            )
        return with_note(" ".join(texts), result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "accuracy" (by layer), "vocabulary" (spans with the highest psi) and "segments" (of one text)."""
        figures = {"accuracy": erasure_curves(result)}
        if len(result.table):
            figures |= {"vocabulary": vocabulary_bars(result), "segments": segment_bars(result)}
        return figures


@dataclass(frozen=True)
class _Rows:
    """Rows of a store that probes are trained, validated and tested on, the tokens to predict, and the words."""

    checked: FiniteRows
    training: Int[np.ndarray, " training_row"]
    validation: Int[np.ndarray, " validation_row"]
    tested: Int[np.ndarray, " test_row"]
    targets: Int[np.ndarray, "offset store_row"]
    words: Words
    spans: str
    """Description of the words."""

    def covered(
        self, rows: Int[np.ndarray, " row"], classes: Int[np.ndarray, " class"], offsets: tuple[int, ...]
    ) -> tuple[Bool[np.ndarray, "group offset row"], Bool[np.ndarray, "group offset row"]]:
        """Tokens of each group with a target, and those of them whose target is one of `classes`."""
        targets = self.targets[:, rows]
        groups = self.words.groups(rows, offsets) & (targets >= 0)[None]
        return groups, groups & np.isin(targets, classes)[None]


@torch.no_grad()
def _read(
    probes: SoftmaxProbes,
    states: Callable[[np.ndarray], Tensor],
    rows: Int[np.ndarray, " row"],
    targets: Int[np.ndarray, "offset row"],
    batch: int,
) -> tuple[Bool[np.ndarray, "offset row"], Float[np.ndarray, "offset row"]]:
    """Hits of each probe's top token and the target's probability; NaN where there is no target."""
    hits, probability = np.zeros(targets.shape, bool), np.full(targets.shape, np.nan)
    classes = probes.class_of(targets)
    for first in range(0, len(rows), batch):
        part = slice(first, first + batch)
        x = states(rows[part])
        for index in range(len(targets)):
            log = probes.log_probabilities(index, x)
            target = torch.from_numpy(classes[index, part]).to(log.device)
            at = log.gather(1, target.clamp(min=0)[:, None])[:, 0].exp()
            hits[index, part] = (log.argmax(1) == target).cpu().numpy()
            probability[index, part] = torch.where(target >= 0, at, 0.0).cpu().numpy()
    probability[targets < 0] = np.nan
    return hits, probability
