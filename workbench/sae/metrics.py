"""Quality of a sparse autoencoder on a store: L0, explained variance, dead features, and loss recovered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.forward import run
from workbench.model.interventions import splice
from workbench.model.load import Model, batch_tokens
from workbench.model.reload import check_recorded
from workbench.sae.load import Sae
from workbench.sae.site import block_rows, encode_checked, matching_site
from workbench.sites.grammar import Site
from workbench.store.lost_values import finite_rows
from workbench.store.reader import ActivationArray, Rows, Store

_LOGIT_BYTES = 256 << 20  # float32 logits of one batch, at most


@dataclass(frozen=True)
class SplicedLoss:
    """Mean next-token cross-entropy in nats: unchanged, with the SAE's reconstruction, and with zeros at the site."""

    tokens: int
    """Number of predicted tokens."""
    clean: float
    spliced: float
    """Loss with the SAE's reconstruction in place of the site's activations; special tokens keep theirs."""
    zeroed: float
    """Loss with zeros in place of the same activations."""

    @property
    def recovered(self) -> float:
        """Loss recovered, (zeroed - spliced) / (zeroed - clean): 1 for a perfect reconstruction, 0 for one as bad as
        zeros. NaN if zeros do not change the loss."""
        increase = self.zeroed - self.clean
        return (self.zeroed - self.spliced) / increase if increase else float("nan")


@dataclass(frozen=True)
class SaeMetrics:
    """Result of `sae_metrics`."""

    rows: int
    """Number of rows (tokens) evaluated."""
    l0: float
    """Mean number of active features per row, 0 to d_sae."""
    explained_variance: float
    """1 - Σ|x - x̂|² / Σ|x - x̄|² over the rows, x̄ their mean: 1 is perfect, 0 as good as the constant x̄, below 0 worse.
    NaN if all rows are equal."""
    dead_share: float
    """Share of features that are active on none of the rows, 0 to 1."""
    loss: SplicedLoss | None
    """None if no model was given."""
    notes: tuple[str, ...] = ()
    """Sentences about rows that were left out and about clipped values; none if there are none."""


@plain_torch()
def sae_metrics(
    store: Store,
    sae: Sae,
    site: str | tuple[str, int] | None = None,
    *,
    model: Model | None = None,
    rows: str | Rows | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
) -> SaeMetrics:
    """Returns L0, explained variance and dead share of `sae` on the rows of a site; with `model`, the loss recovered.

    With `model`, every sequence that contains selected rows runs three times: unchanged, with the site's activations
    replaced by the SAE's reconstruction, and by zeros; activations of special tokens are never replaced. The loss is
    that of the next tokens of the selected rows, within their document and sequence.

    Cost: one pass with sums in float64; memory a few blocks of 64 MiB, with `model` also a batch and its logits, at
    most 256 MiB.

    Args:
        store: The recording.
        sae: The autoencoder.
        site: The site to read. None: the one that the SAE was trained on.
        model: The recorded model. None: the loss is not computed.
        rows: SQL over the token table, or `Rows`. None: all but special tokens; BOS, an attention sink, can have a
            hundred times the norm of other tokens, and would dominate the variance.
        force: Allow an SAE of another site or model.
        allow_nonfinite: Leave out rows with NaN or infinite values, and count them in `notes`.

    Raises:
        RequestError: As `extract_features`; a transcoder, whose output is another site than its input; a temporal SAE,
            whose features are a residual of a prediction; no rows; another model than the store's; a site that cannot
            be replaced.
    """
    array = matching_site(store, sae, site, force=force)
    if sae.sequential:
        raise RequestError(f"SAE {sae.name!r} is temporal: its features alone do not reconstruct a row")
    if not sae.reconstructs:
        kind = sae.architecture if "transcoder" in sae.architecture else "transcoder"
        raise RequestError(f"SAE {sae.name!r} is a {kind}: its output is another site than its input")
    if not isinstance(rows, Rows):
        rows = store.where("NOT is_special" if rows is None else rows)
    ids = rows.ids_in(store)
    if not len(ids):
        raise RequestError(f"rows: none of the {store.rows} rows of {store.path} is selected; choose others")
    finite = finite_rows(store, [array.name], ids, allow_nonfinite=allow_nonfinite)
    spliced = None if model is None else _spliced_loss(array, sae, model, finite.rows)
    return SaeMetrics(len(finite.rows), *_fit(array, sae, finite.rows), spliced, tuple(finite.notes))


def _fit(array: ActivationArray, sae: Sae, ids: Int64[np.ndarray, " row"]) -> tuple[float, float, float]:
    """L0, explained variance and dead share over the rows `ids`."""
    entries, error, moments = 0, 0.0, _Moments()
    alive = np.zeros(sae.d_sae, bool)
    step = block_rows(sae)
    for start in range(0, len(ids), step):
        block = ids[start : start + step]
        values = array[block]
        activations = encode_checked(array, sae, block, values)
        x = sae.input_rows(values).cpu().double()
        error += float((x - sae.decode(activations).cpu().double()).square().sum())
        moments.add(x.numpy())
        active = activations != 0
        entries += int(active.sum())
        alive |= active.any(0).cpu().numpy()
    explained = 1 - error / moments.spread if moments.spread else float("nan")
    return entries / len(ids), explained, 1 - float(alive.mean())


class _Moments:
    """Running count, mean and sum of squared deviations of rows (update of Chan, Golub and LeVeque)."""

    def __init__(self) -> None:
        self.rows, self.spread, self.mean = 0, 0.0, np.zeros(())

    def add(self, x: Float[np.ndarray, "row d_model"]) -> None:
        rows, mean = self.rows + len(x), x.mean(0)
        shift = mean - self.mean
        self.spread += float(np.square(x - mean).sum() + np.square(shift).sum() * self.rows * len(x) / rows)
        self.mean = self.mean + shift * len(x) / rows
        self.rows = rows


@dataclass(frozen=True)
class _Batch:
    """Right-padded sequences."""

    ids: Int64[Tensor, "batch position"]
    mask: Int64[Tensor, "batch position"]
    replaced: Bool[Tensor, "batch position"]
    targets: Int64[Tensor, "batch position"]
    """Next token; -1 if it is not evaluated."""


def _spliced_loss(array: ActivationArray, sae: Sae, model: Model, ids: Int64[np.ndarray, " row"]) -> SplicedLoss:
    check_recorded(array.store, model)
    (site,) = model.site_map.select((array.name,))
    replacements: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "spliced": lambda rows: _reconstruction(sae, rows),
        "zeroed": torch.zeros_like,
    }
    totals, tokens = dict.fromkeys(replacements, 0.0), 0
    most = min(batch_tokens(model), _LOGIT_BYTES // (4 * model.vocab))
    for batch in _batches(array.store, ids, max(1, most)):
        tokens += int((batch.targets >= 0).sum())
        for name, replace in replacements.items():
            totals[name] += _loss(model.module, site, batch, replace)
    if not tokens:
        raise RequestError("rows: none has a next token in its document, so there is no loss; choose others")
    return SplicedLoss(tokens, **{name: total / tokens for name, total in totals.items()})


def _reconstruction(sae: Sae, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
    """The SAE's reconstruction in place of rows of the model, with the mean that a centring SAE does not see."""
    reconstruction = sae.decode(sae.encode(rows))
    mean = rows.flatten(1).float().mean(1, keepdim=True).to(reconstruction.device) if sae.centres else 0
    return (reconstruction + mean).reshape(rows.shape)


def _loss(module: nn.Module, site: Site, batch: _Batch, replace: Callable[[Tensor], Tensor] | None) -> float:
    """Sum of the cross-entropy over a batch's targets."""
    with splice(module, site, batch.replaced, replace) if replace else nullcontext():
        logits = run(module, batch.ids, batch.mask).logits
    targets = batch.targets.to(logits.device)
    valid = targets >= 0
    losses = nn.functional.cross_entropy(logits[valid].float(), targets[valid], reduction="none")
    return float(losses.cpu().double().sum())


def _batches(store: Store, rows: Int64[np.ndarray, " row"], tokens: int) -> Iterator[_Batch]:
    """Batches of the sequences that contain `rows`, in order, of at most `tokens` tokens or one sequence each."""
    table = store.tokens
    names = ("token_id", "sequence", "document", "is_special")
    ids, sequence, document, special = (table[name].to_numpy() for name in names)
    follows = (sequence[1:] == sequence[:-1]) & (document[1:] == document[:-1])
    targets = np.full(len(ids), -1, np.int64)
    known = rows[np.append(follows, False)[rows]]
    targets[known] = ids[known + 1]
    starts = np.flatnonzero(np.append(True, sequence[1:] != sequence[:-1]))
    ends = np.append(starts[1:], len(ids))
    sequence_ids = np.unique(np.searchsorted(starts, rows, side="right") - 1)
    batch: list[slice] = []
    for index in sequence_ids:
        span = slice(int(starts[index]), int(ends[index]))
        if batch and max(_length(part) for part in [*batch, span]) * (len(batch) + 1) > tokens:
            yield _padded(batch, ids, ~special, targets)
            batch = []
        batch.append(span)
    if batch:
        yield _padded(batch, ids, ~special, targets)


def _padded(
    spans: list[slice],
    ids: Int[np.ndarray, " row"],
    ordinary: Bool[np.ndarray, " row"],
    targets: Int64[np.ndarray, " row"],
) -> _Batch:
    shape = (len(spans), max(map(_length, spans)))
    batch = _Batch(
        torch.zeros(shape, dtype=torch.int64, device="cpu"),
        torch.zeros(shape, dtype=torch.int64, device="cpu"),
        torch.zeros(shape, dtype=torch.bool, device="cpu"),
        torch.full(shape, -1, dtype=torch.int64, device="cpu"),
    )
    for line, span in enumerate(spans):
        filled = slice(_length(span))
        batch.ids[line, filled] = torch.from_numpy(ids[span].astype(np.int64))
        batch.mask[line, filled] = 1
        batch.replaced[line, filled] = torch.from_numpy(ordinary[span])
        batch.targets[line, filled] = torch.from_numpy(targets[span])
    return batch


def _length(span: slice) -> int:
    return span.stop - span.start
