"""Next-token loss and predictions of a model that runs with an autoencoder's reconstruction at a site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.model.forward import run
from workbench.model.intervene import intervene
from workbench.model.load import Model, batch_tokens
from workbench.model.reload import check_recorded
from workbench.model.row_changes import Change, RowFunction
from workbench.sae.autoencoder import Sae
from workbench.sae.input_rows import InputRows
from workbench.sae.reconstruction import Documents, Ratio, exact
from workbench.store.reader import ActivationArray, Store

_LOGIT_BYTES = 128 << 20  # float32 logits of one batch, at most; those of the unchanged model stay beside them
_WIDE_BYTES = 32 << 20  # float64 logits of the rows that are compared together

_PASSES = ("clean", "spliced", "zeroed")


@dataclass(frozen=True)
class SplicedLoss:
    """Effect of the reconstruction on the model's predictions: unchanged, spliced, and with zeros at the site.

    Losses are means of the next-token cross-entropy; divergences are means of KL(unchanged ‖ changed) between
    next-token distributions. Both in nats.
    """

    tokens: int
    """Number of predicted tokens."""
    clean: float
    """Loss of the unchanged model."""
    spliced: float
    """Loss with the SAE's reconstruction in place of the site's activations; special tokens keep theirs."""
    zeroed: float
    """Loss with zeros in place of the same activations."""
    kl_spliced: float = float("nan")
    """Divergence with the reconstruction: 0 if no prediction changes; under the null, an SAE that is no better than
    zeros, `kl_zeroed`."""
    kl_zeroed: float = float("nan")
    """Divergence with zeros."""

    @property
    def increase(self) -> float:
        """Increase of the loss, spliced - clean, in nats: 0 for a perfect reconstruction; under the null, an SAE that
        is no better than zeros, zeroed - clean."""
        return self.spliced - self.clean

    @property
    def recovered(self) -> float:
        """Loss recovered, (zeroed - spliced) / (zeroed - clean), the cross-entropy loss score of SAELens: 1 for a
        perfect reconstruction, 0 under the null, one as bad as zeros. NaN if zeros do not change the loss."""
        change = self.zeroed - self.clean
        return (self.zeroed - self.spliced) / change if change else float("nan")

    @property
    def kl_score(self) -> float:
        """1 - kl_spliced / kl_zeroed: 1 for unchanged predictions, 0 under the null, as bad as zeros. NaN if zeros
        change no prediction."""
        return 1 - self.kl_spliced / self.kl_zeroed if self.kl_zeroed else float("nan")


def spliced_ratios(
    array: ActivationArray, sae: Sae, model: Model, documents: Documents
) -> tuple[int, dict[str, Ratio]]:
    """Returns the number of predicted tokens, and losses and divergences as ratios of sums over documents.

    Raises:
        RequestError: Another model than the store's, a site that cannot be replaced, or no row with a next token.
    """
    if isinstance(array, InputRows):
        raise RequestError(
            f"model: SAE {sae.name!r} reads {array.site.label} as it is not in the model, so its reconstruction cannot "
            "take the place of activations; leave model out"
        )
    check_recorded(array.store, model)
    replacements: dict[str, Change | None] = {
        "clean": None,
        "spliced": lambda rows, _chosen: _reconstruction(sae, rows),
        "zeroed": lambda rows, _chosen: torch.zeros_like(rows),
    }
    names = ("tokens", "rows", *_PASSES, *(f"kl_{name}" for name in _PASSES))
    sums = {name: np.zeros(documents.count) for name in names}
    for batch in sequence_batches(array.store, documents, batch_limit(model)):
        for name, (number, values) in _measure(model, array.name, batch, replacements).items():
            np.add.at(sums[name], number.numpy(), values.numpy())
    tokens = int(sums["tokens"].sum())
    if not tokens:
        raise RequestError("rows: none has a next token in its document, so there is no loss; choose others")
    clean, spliced, zeroed = (sums[name] for name in _PASSES)
    return tokens, {
        **{f"loss_{name}": (sums[name], sums["tokens"]) for name in _PASSES},
        "loss_increase": (spliced - clean, sums["tokens"]),
        "loss_recovered": (zeroed - spliced, zeroed - clean),
        **{f"kl_{name}": (sums[f"kl_{name}"], sums["rows"]) for name in _PASSES[1:]},
        "kl_score": (sums["kl_zeroed"] - sums["kl_spliced"], sums["kl_zeroed"]),
    }


def _reconstruction(sae: Sae, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
    """The SAE's reconstruction in place of rows of the model, with the mean that a centring SAE does not see."""
    reconstruction = sae.decode(sae.encode(rows))
    mean = rows.flatten(1).float().mean(1, keepdim=True).to(reconstruction.device) if sae.centres else 0
    return (reconstruction + mean).reshape(rows.shape)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, on the CPU."""

    ids: Int64[Tensor, "batch position"]
    mask: Int64[Tensor, "batch position"]
    replaced: Bool[Tensor, "batch position"]
    targets: Int64[Tensor, "batch position"]
    """Next token; -1 if it is not evaluated."""
    document: Int64[Tensor, "batch position"]
    """Number of the document of an evaluated row; -1: not evaluated."""
    row: Int64[Tensor, "batch position"]
    """Id of each token's row in the store; -1: padding."""


def _measure(
    model: Model,
    site: str,
    batch: Batch,
    replacements: Mapping[str, Change | None],
) -> dict[str, tuple[Int64[Tensor, " row"], Float[Tensor, " row"]]]:
    """Document and value of every evaluated row, for each measure."""
    rows = batch.document >= 0
    number, targets = batch.document[rows], batch.targets[rows]
    follows = targets >= 0
    ones = torch.ones(len(number), dtype=torch.float64, device="cpu")
    measures, clean = {"rows": (number, ones), "tokens": (number, follows.double())}, None
    for name, replace in replacements.items():
        changes = [] if replace is None else [RowFunction(site, replace, name, at=batch.replaced)]
        with intervene(model, *changes) if changes and bool(batch.replaced.any()) else nullcontext():
            logits = run(model.module, batch.ids, batch.mask).logits
        logits = logits[rows.to(logits.device)]
        losses, divergences = loss_and_divergence(logits, targets, logits if clean is None else clean)
        clean = logits if clean is None else clean
        measures[name] = number, torch.where(follows, losses, 0)
        measures[f"kl_{name}"] = number, divergences
    return measures


def loss_and_divergence(
    logits: Float[Tensor, "row vocab"], targets: Int64[Tensor, " row"], clean: Float[Tensor, "row vocab"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Returns the cross-entropy of the targets and KL(clean ‖ logits) of each row, in nats, computed in float64."""
    step = max(1, _WIDE_BYTES // (8 * clean.shape[1]))
    losses, divergences = (torch.zeros(len(targets), dtype=torch.float64, device="cpu") for _ in range(2))
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        after = exact(logits[part]).log_softmax(-1)
        target = targets[part].clamp(min=0).to(after.device)[:, None]
        losses[part] = -after.gather(1, target)[:, 0].cpu()
        if clean is not logits:
            before = exact(clean[part]).log_softmax(-1)
            probability = before.exp()  # a token of probability 0 adds nothing
            divergences[part] = torch.where(probability > 0, probability * (before - after), 0).sum(-1).cpu()
    return losses, divergences


def batch_limit(model: Model) -> int:
    """Returns the tokens of a batch whose logits are kept."""
    return max(1, min(batch_tokens(model), _LOGIT_BYTES // (4 * model.vocab)))


def sequence_batches(
    store: Store, documents: Documents, tokens: int, replaced: Bool[np.ndarray, " all_rows"] | None = None
) -> Iterator[Batch]:
    """Yields the sequences that have evaluated rows, in order, in batches of at most `tokens` tokens or one sequence.

    Args:
        store: The store.
        documents: The evaluated rows.
        tokens: Tokens of a batch, padding included.
        replaced: Rows of the store that are replaced. None: all but special tokens.
    """
    store.require_whole_sequences("a run of the model over the texts")
    table = store.tokens
    names = ("token_id", "sequence", "document", "is_special")
    ids, sequence, document, special = (table[name].to_numpy() for name in names)
    follows = (sequence[1:] == sequence[:-1]) & (document[1:] == document[:-1])
    targets, number = np.full((2, len(ids)), -1, np.int64)
    rows = documents.ids
    number[rows] = documents.number
    known = rows[np.append(follows, False)[rows]]
    targets[known] = ids[known + 1]
    starts = np.flatnonzero(np.append(True, sequence[1:] != sequence[:-1]))
    ends = np.append(starts[1:], len(ids))
    columns = (ids.astype(np.int64), ~special if replaced is None else replaced, targets, number)
    batch: list[slice] = []
    for index in np.unique(np.searchsorted(starts, rows, side="right") - 1):
        span = slice(int(starts[index]), int(ends[index]))
        if batch and max(_length(part) for part in [*batch, span]) * (len(batch) + 1) > tokens:
            yield _padded(batch, *columns)
            batch = []
        batch.append(span)
    if batch:
        yield _padded(batch, *columns)


def _padded(
    spans: list[slice],
    ids: Int[np.ndarray, " row"],
    ordinary: Bool[np.ndarray, " row"],
    targets: Int64[np.ndarray, " row"],
    number: Int64[np.ndarray, " row"],
) -> Batch:
    shape = (len(spans), max(map(_length, spans)))
    batch = Batch(
        torch.zeros(shape, dtype=torch.int64, device="cpu"),
        torch.zeros(shape, dtype=torch.int64, device="cpu"),
        torch.zeros(shape, dtype=torch.bool, device="cpu"),
        *(torch.full(shape, -1, dtype=torch.int64, device="cpu") for _ in range(3)),
    )
    for line, span in enumerate(spans):
        filled = slice(_length(span))
        batch.ids[line, filled] = torch.from_numpy(ids[span])
        batch.mask[line, filled] = 1
        batch.replaced[line, filled] = torch.from_numpy(ordinary[span])
        batch.targets[line, filled] = torch.from_numpy(targets[span])
        batch.document[line, filled] = torch.from_numpy(number[span])
        batch.row[line, filled] = torch.arange(span.start, span.stop, device="cpu")
    return batch


def _length(span: slice) -> int:
    return span.stop - span.start
