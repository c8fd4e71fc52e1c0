"""Effects of interventions on a model's predictions over the texts of a store: one plain pass, one for each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from workbench.analysis.rows import next_tokens, selected_rows
from workbench.io.counted import counted
from workbench.io.errors import DataError, RequestError
from workbench.io.progress import progress
from workbench.io.torch_state import plain_torch
from workbench.model.forward import run
from workbench.model.intervene import Intervened, Intervention
from workbench.model.load import Model
from workbench.results.bootstrap import resampled_means
from workbench.sae.reconstruction import Documents, exact
from workbench.sae.spliced_loss import Batch, batch_limit, sequence_batches
from workbench.store.reader import Store

MEASURES = {
    "loss": "nats",
    "accuracy": "share of tokens",
    "entropy": "nats",
    "kl": "nats",
    "agreement": "share of tokens",
}
"""Measure -> units: cross-entropy of the target; targets that are the most probable token; entropy of the prediction;
KL(plain ‖ changed); tokens whose most probable next token is that of the plain model. Computed in float64."""

PLAIN = "plain"
"""Name of the pass without a change."""

_WIDE_BYTES = 32 << 20  # float64 logits of the rows that are measured together

Change = Callable[[Batch], Sequence[Intervention]]
"""Makes the records of one batch; none where nothing of the batch is changed."""


@dataclass(frozen=True)
class MeasuredRows:
    """Rows (tokens) of a store at which predictions are measured."""

    store: Store
    groups: Mapping[str, Int64[np.ndarray, " _"]]
    """Name to ids of rows; a mean is over each. A row may be in several groups."""
    targets: Int64[np.ndarray, " all_rows"] | None = None
    """Token whose loss and accuracy are measured at each row of the store, -1: none. None: the next token."""

    @property
    def ids(self) -> Int64[np.ndarray, " row"]:
        """All measured rows, ascending. RequestError if there is none."""
        ids = np.unique(np.concatenate([np.zeros(0, np.int64), *self.groups.values()]))
        if not len(ids):
            raise RequestError(f"no token of {self.store.path.name} is measured; choose others, or record more")
        return ids


def predicting_rows(store: Store, where: str | None, limit: int, seed: int) -> Int64[np.ndarray, " row"]:
    """Returns rows behind another token and before one, in whole sequences drawn at random until `limit` is reached.

    Args:
        store: The store.
        where: SQL over the token table: rows that count. None: all.
        limit: Number of rows after which no further sequence is drawn.
        seed: Random seed of the order of sequences.

    Raises:
        RequestError: No row is left, or a store of chosen rows.
    """
    rows = selected_rows(store, where)
    tokens = store.tokens
    position, sequence = (tokens[name].to_numpy() for name in ("position", "sequence"))
    rows = rows[(next_tokens(store)[rows] >= 0) & (position[rows] > 0)]
    if not len(rows):
        raise RequestError(f"where {where!r} selects no token that has one before it and one after it")
    numbers, counts = np.unique(sequence[rows], return_counts=True)
    order = np.random.default_rng(seed).permutation(len(numbers))
    before = np.cumsum(counts[order]) - counts[order]
    return rows[np.isin(sequence[rows], numbers[order[before < limit]])]


def document_halves(
    store: Store, rows: Int64[np.ndarray, " row"], seed: int
) -> tuple[Int64[np.ndarray, " first"], Int64[np.ndarray, " second"], str]:
    """Returns the rows of two halves of the documents: one to choose by, one to measure on; and a note on few.

    A single document is both halves.
    """
    document = store.tokens["document"].to_numpy()[rows]
    documents = np.random.default_rng(seed).permutation(np.unique(document))
    if len(documents) < 2:
        return rows, rows, "chosen and measured on the same document"
    first = np.isin(document, documents[: len(documents) // 2])
    document_count = len(documents) - len(documents) // 2
    return (
        rows[first],
        rows[~first],
        f"intervals over {counted(document_count, 'document')}" if document_count < 10 else "",
    )


@dataclass(frozen=True)
class ChangeEffects:
    """Sums of all measures over rows, by document, of the plain model and of each change."""

    changes: tuple[str, ...]
    """Names of the changes, `PLAIN` first."""
    groups: tuple[str, ...]
    totals: Float64[np.ndarray, "document change group measure"]
    counts: Float64[np.ndarray, "document group measure"]
    chosen: Mapping[str, int] = field(default_factory=dict)
    """Tokens that each change chose: rows that were changed, or queries whose attention was."""

    def means(
        self, *, resamples: int = 1000, seed: int = 0
    ) -> tuple[Float64[np.ndarray, "change group measure"], Float64[np.ndarray, "resample change group measure"]]:
        """Returns means over rows, and their bootstrap over documents; all changes share their resamples.

        Effects are differences from the first change, the plain model: of the means, and resample by resample.
        """
        shape = self.totals.shape
        counts = np.broadcast_to(self.counts[:, None], shape)
        flat = (part.reshape(shape[0], -1) for part in (self.totals, counts))
        mean, resampled = resampled_means(*flat, resamples=resamples, seed=seed)
        return mean.reshape(shape[1:]), resampled.reshape(-1, *shape[1:])

    def effects(
        self, *, resamples: int = 1000, seed: int = 0
    ) -> tuple[Float64[np.ndarray, "change group measure"], Float64[np.ndarray, "resample change group measure"]]:
        """Returns what `means` does, minus the plain model, whose own line is left out. 0 where nothing changes."""
        mean, resampled = self.means(resamples=resamples, seed=seed)
        return mean[1:] - mean[:1], resampled[:, 1:] - resampled[:, :1]


@plain_torch()
def change_effects(
    model: Model,
    rows: MeasuredRows,
    changes: Mapping[str, Change],
    *,
    label: str = "changes",
    show_progress: bool = True,
) -> ChangeEffects:
    """Measures predictions of the plain model and under each change, on whole sequences of a store.

    Costs 1 + changes passes over the sequences that have measured rows; memory is two batches of logits (128 MiB each)
    and the log-probabilities of one in float64 (256 MiB).

    Args:
        model: The recorded model.
        rows: The measured rows.
        changes: Name to the function that makes the records of a batch.
        label: Name of the progress bar.
        show_progress: Show a progress bar.

    Raises:
        RequestError: No measured row, a store of chosen rows, or a record that does not fit the model.
        DataError: A change chose no token at all, or made values that are not finite.
    """
    store, ids = rows.store, rows.ids
    documents = Documents.of(store.tokens["document"].to_numpy(), ids)
    targets = next_tokens(store) if rows.targets is None else rows.targets
    member = {name: np.isin(np.arange(store.rows), group) for name, group in rows.groups.items()}
    names = (PLAIN, *changes)
    sums = _Sums(documents.count, names, tuple(rows.groups))
    with progress(label, len(ids) * len(names), "rows", show=show_progress) as advance:
        for batch in sequence_batches(store, documents, batch_limit(model)):
            measured_rows = batch.document >= 0
            row, number = batch.row[measured_rows].numpy(), batch.document[measured_rows].numpy()
            inside = np.stack([mask[row] for mask in member.values()])
            target = torch.from_numpy(targets[row])
            plain = _logits(model, batch, measured_rows)
            sums.add(0, number, inside, measures(plain, target).numpy())
            before = plain_log_probabilities(plain)
            advance(len(row))
            for index, (name, change) in enumerate(changes.items(), start=1):
                after, chosen_count = _changed_logits(model, batch, measured_rows, change(batch), plain)
                sums.chosen[name] += chosen_count
                values = measures(after, target, None if after is plain else before)
                sums.add(index, number, inside, values.numpy())
                advance(len(row))
    for name, chosen_count in sums.chosen.items():
        if not chosen_count:
            raise DataError(
                f"{label}, {name}: no token of the {len(ids):,} measured ones' sequences is changed; record longer "
                "texts"
            )
    return ChangeEffects(names, sums.groups, sums.totals, sums.counts, sums.chosen)


def measures(
    logits: Float[Tensor, "row vocab"],
    targets: Int64[Tensor, " row"],
    before: Float64[Tensor, "row vocab"] | None = None,
) -> Float64[Tensor, "measure row"]:
    """Returns `MEASURES` of each row, on the CPU; loss and accuracy are NaN where the target is -1.

    Args:
        logits: Logits of the model.
        targets: Token whose loss and accuracy are measured, -1: none.
        before: Log-probabilities of the plain model. None: those of `logits`.
    """
    values = torch.zeros(len(MEASURES), len(targets), dtype=torch.float64, device="cpu")
    for part in _parts(logits):
        after, target = exact(logits[part]).log_softmax(-1), targets[part]
        probability = after.exp()
        index = target.clamp(min=0).to(after.device)
        top = after.argmax(-1)
        values[0, part] = -after.gather(1, index[:, None])[:, 0].cpu()
        values[1, part] = (top == index).double().cpu()
        values[2, part] = -torch.where(probability > 0, probability * after, 0).sum(-1).cpu()
        values[:2, part] = torch.where(target >= 0, values[:2, part], torch.nan)
        if before is not None:
            before_logs = before[part]
            probability = before_logs.exp()  # a token of probability 0 adds nothing
            values[3, part] = torch.where(probability > 0, probability * (before_logs - after), 0).sum(-1).cpu()
            values[4, part] = (top == before_logs.argmax(-1)).double().cpu()
        else:
            values[4, part] = 1
    return values


def plain_log_probabilities(logits: Float[Tensor, "row vocab"]) -> Float64[Tensor, "row vocab"]:
    """Returns the log-probability of every token in the plain model, with which `measures` compares changes."""
    return torch.cat([exact(logits[part]).log_softmax(-1) for part in _parts(logits)])


def _parts(logits: Float[Tensor, "row vocab"]) -> Iterator[slice]:
    """Slices of rows that are measured together."""
    step = max(1, _WIDE_BYTES // (8 * logits.shape[1]))
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _changed_logits(
    model: Model,
    batch: Batch,
    measured_rows: Bool[Tensor, "batch position"],
    records: Sequence[Intervention],
    plain: Tensor,
) -> tuple[Tensor, int]:
    """Logits of the measured rows under some records, and the number of tokens that they chose."""
    if not records:
        return plain, 0
    with Intervened(model, tuple(records), proof=False) as applied:
        logits = _logits(model, batch, measured_rows)
    for record, count in zip(records, applied.counts, strict=True):
        if not count.finite:
            raise DataError(f"{record}: its new values are not finite; look for NaN in the model")
    return logits, sum(count.rows - count.exempt for count in applied.counts)


def _logits(model: Model, batch: Batch, measured_rows: Bool[Tensor, "batch position"]) -> Float[Tensor, "row vocab"]:
    logits = run(model.module, batch.ids, batch.mask).logits
    return logits[measured_rows.to(logits.device)]


class _Sums:
    """Sums of measures by document, change and group."""

    def __init__(self, documents: int, changes: Sequence[str], groups: tuple[str, ...]) -> None:
        self.groups = groups
        self.totals = np.zeros((documents, len(changes), len(groups), len(MEASURES)))
        self.counts = np.zeros((documents, len(groups), len(MEASURES)))
        self.chosen = dict.fromkeys(changes[1:], 0)

    def add(
        self,
        change: int,
        document: Int64[np.ndarray, " row"],
        inside: Bool[np.ndarray, "group row"],
        values: Float64[np.ndarray, "measure row"],
    ) -> None:
        for group, mask in enumerate(inside):
            for measure, value in enumerate(values):
                valid = mask & ~np.isnan(value)
                np.add.at(self.totals[:, change, group, measure], document[valid], value[valid])
                if change == 0:
                    np.add.at(self.counts[:, group, measure], document[valid], 1)
