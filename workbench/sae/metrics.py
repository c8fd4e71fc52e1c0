"""Quality of a sparse autoencoder on a store: sparsity, fit, dead features, and effect on the model's predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64

from workbench.io.checks import check_kind, check_resampling
from workbench.io.errors import RequestError
from workbench.io.saving import save_texts
from workbench.io.spreadsheet import csv_text
from workbench.io.torch_state import plain_torch
from workbench.model.load import Model
from workbench.results.bootstrap import Interval
from workbench.sae.autoencoder import Sae
from workbench.sae.input_rows import reading_of
from workbench.sae.reconstruction import Documents, fit, ratio_intervals
from workbench.sae.site import matching_site
from workbench.sae.spliced_loss import SplicedLoss, spliced_ratios
from workbench.store.lost_values import FiniteRows, finite_rows
from workbench.store.reader import ActivationArray, Rows, Store, StoreOrPath

_FAR = 25.0  # times the median of |x - x̄|²
_LOSSES = ("loss_clean", "loss_spliced", "loss_zeroed", "kl_spliced", "kl_zeroed")  # in the order of `SplicedLoss`


@dataclass(frozen=True)
class SaeMetrics:
    """Result of `sae_metrics`: means over rows (tokens) x with reconstruction x̂. `table` has their intervals."""

    rows: int
    """Number of rows (tokens) evaluated."""
    documents: int
    """Number of documents that these rows belong to, which are resampled for the intervals."""
    l0: float
    """Mean number of active features per row, 0 to d_sae. Under the null, pre-activations with random signs and a ReLU,
    d_sae / 2."""
    l1: float
    """Mean sum of the absolute activations of a row, from 0; its scale is that of the activations, so that only SAEs of
    one scale can be compared."""
    explained_variance: float
    """1 - Σ|x - x̂|² / Σ|x - x̄|² over the rows, x̄ their mean (`explained_variance` of SAELens): 1 is perfect; under the
    null, the constant x̂ = x̄, 0; below 0 is worse. NaN if all rows are equal."""
    explained_variance_by_row: float
    """Mean over rows of 1 - |x - x̂|² / |x - x̄|² (`explained_variance_legacy` of SAELens, which takes x̄ of each batch).
    Rows near x̄ count as much as others, so it is the lower one where these are reconstructed badly. Under the null, the
    constant x̄, 0. Rows equal to x̄ are left out."""
    mse: float
    """Mean of |x - x̂|², the sum over d_model; in squared units of the site. 0 is perfect; under the null, the constant
    x̄, the variance of the rows."""
    cosine: float
    """Mean cosine of x and x̂, -1 to 1: 1 is perfect; under the null, a random direction, 0 ± 1/√d_model. 0 for a row of
    zeros. The constant x̄ is no 0: its cosine is high where rows share a large mean."""
    l2_ratio: float
    """Mean of |x̂| / |x|: 1 is perfect, below 1 shrinks; under the null, the constant x̂ = 0, 0. Rows of zeros are left
    out."""
    relative_bias: float
    """Relative reconstruction bias, Σ|x̂|² / Σ x·x̂ (equation 10 of Rajamanoharan et al. 2024): 1 is unbiased, also
    under the null of the constant x̄; below 1 if scaling x̂ up would lower the error, as shrinkage by an L1 loss does."""
    dead_share: float
    """Share of features that are active on none of the rows, 0 to 1; falls with the number of rows. Under the null, all
    features active on a row with probability l0 / d_sae independently, (1 - l0 / d_sae)^rows."""
    loss: SplicedLoss | None
    """None if no model was given."""
    notes: tuple[str, ...] = ()
    """Sentences about rows that were left out, clipped values, and a few rows that dominate the variance; none if there
    are none."""
    intervals: Mapping[str, Interval] = field(default_factory=dict, repr=False, compare=False)
    """95 % intervals of all metrics by name. Those of `loss` are loss_clean, ..., loss_recovered, kl_score."""
    density: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False, compare=False)
    """One line per feature: feature; active, its number of active rows; density, active / rows, 0 to 1, with mean l0 /
    d_sae; low and high, Wilson's 95 % interval for the number of independent rows that the documents amount to, which
    for a feature that is never active is the number of documents."""

    @property
    def table(self) -> pd.DataFrame:
        """One line per metric: metric, value, low, high; the last two are the 95 % interval over documents."""
        lines = [(name, *interval) for name, interval in self.intervals.items()]
        return pd.DataFrame(lines, columns=["metric", "value", "low", "high"])

    def save(self, folder: str | Path) -> Path:
        """Writes metrics.csv (`table`) and density.csv into an empty or new folder; RequestError if it is neither."""
        return save_texts(folder, {"metrics.csv": csv_text(self.table), "density.csv": csv_text(self.density)})


@plain_torch()
def sae_metrics(
    store: StoreOrPath,
    sae: Sae,
    site: str | tuple[str, int] | Sequence[str] | None = None,
    *,
    model: Model | None = None,
    rows: str | Rows | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> SaeMetrics:
    """Returns sparsity, fit and dead features of `sae` on the rows of a site; with `model`, its effect on predictions.

    Definitions are those of `sae_lens.evals`, which gives the same numbers on the same tokens. Intervals: the central
    95 % over documents drawn with replacement, x̄ fixed; NaN if all rows are of one document. That of `dead_share` is a
    jackknife over documents, that of `density` Wilson's.

    With `model`, every sequence that contains selected rows runs three times: unchanged, with the site's activations
    replaced by the SAE's reconstruction, and by zeros; activations of special tokens are never replaced. The loss is
    that of the next tokens of the selected rows, within their document and sequence; the divergence that of the
    predictions after all selected rows.

    Cost: the rows are read twice and encoded once, sums in float64; memory a few blocks of 64 MiB and 16 bytes a row,
    with `model` also a batch and three copies of its logits, of at most 128 MiB.

    Args:
        store: The recording, or its path.
        sae: The autoencoder.
        site: The site to read. None: the one that the SAE was trained on.
        model: The recorded model. None: loss and divergence are not computed.
        rows: SQL over the token table, or `Rows`. None: all but special tokens; BOS, an attention sink, can have a
            hundred times the norm of other tokens, and would dominate the variance.
        force: Allow an SAE of another site or model.
        allow_nonfinite: Leave out rows with NaN or infinite values, and count them in `notes`.
        resamples: Number of resamples for the intervals.
        seed: Random seed of the resamples.

    Raises:
        RequestError: As `extract_features`; a transcoder or temporal SAE, whose features do not reconstruct the rows;
            no rows; another model than the store's; a site that cannot be replaced.
    """
    check_resampling(resamples, seed)
    check_kind("model", model, (Model, NoneType), "a loaded model, such as wb.load_model('demo')")
    array = matching_site(store, sae, site, force=force)
    finite = _evaluated_rows(array, sae, rows, allow_nonfinite)
    documents = Documents.of(array.store.tokens["document"].to_numpy(), finite.rows)
    tokens, spliced = (0, {}) if model is None else spliced_ratios(array, sae, model, documents)
    ratios, counts, spread = fit(array, sae, documents)
    intervals = ratio_intervals(ratios | spliced, resamples, seed)
    fitted = {name: intervals[name] for name in ratios} | {"dead_share": counts.dead_share()}
    return SaeMetrics(
        len(finite.rows),
        documents.count,
        **{name: interval.mean for name, interval in fitted.items()},
        loss=SplicedLoss(tokens, *(intervals[name].mean for name in _LOSSES)) if spliced else None,
        notes=(*finite.notes, *_massive_rows(array.store, documents.ids, spread)),
        intervals=fitted | intervals,
        density=counts.table(),
    )


def _massive_rows(store: Store, ids: Int64[np.ndarray, " row"], spread: Float[np.ndarray, " row"]) -> Iterator[str]:
    """A sentence where rows more than five times as far from the mean as the median row have half of the variance."""
    far = spread > _FAR * np.median(spread)
    share = float(spread[far].sum() / spread.sum()) if far.any() else 0.0
    if share >= 0.5:
        first = int((Rows(store, ids[far]).tokens["position"].to_numpy() == 0).sum())
        yield (
            f"{int(far.sum()):,} of the {len(ids):,} rows have {100 * share:.0f} % of the variance, {first:,} of "
            "them the first of their sequence, as attention sinks are: mse and explained_variance are mostly theirs; "
            "rows='position > 0' leaves first tokens out"
        )


def _evaluated_rows(array: ActivationArray, sae: Sae, rows: str | Rows | None, allow_nonfinite: bool) -> FiniteRows:
    """The selected rows; RequestError for an SAE that reconstructs no rows, and for no rows."""
    store = array.store
    if sae.sequential:
        raise RequestError(f"SAE {sae.name!r} is temporal: its features alone do not reconstruct a row")
    if not sae.reconstructs:
        kind = sae.architecture if "transcoder" in sae.architecture else "transcoder"
        raise RequestError(f"SAE {sae.name!r} is a {kind}: its output is another site than its input")
    if not isinstance(rows, Rows):
        rows = store.where("NOT is_special" if rows is None else rows)
    ids: Int64[np.ndarray, " row"] = rows.ids_in(store)
    if not len(ids):
        raise RequestError(f"rows: none of the {store.rows} rows of {store.path} is selected; choose others")
    return finite_rows(store, [site.name for site in reading_of(array).recorded], ids, allow_nonfinite=allow_nonfinite)
