"""Effect of changing a feature on the model's predictions, beside random features that are active as often."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workbench.corpus.tokenizer import token_texts
from workbench.features.feature_store import Features
from workbench.features.labels import with_names
from workbench.features.promoted import running_sae
from workbench.features.queries import text_counts, text_rows
from workbench.io.checks import check, check_kind, check_resampling
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.saving import save_texts
from workbench.io.spreadsheet import csv_text
from workbench.io.torch_state import plain_torch
from workbench.model.forward import hook_tensor, run
from workbench.model.intervene import Intervened, intervene
from workbench.model.load import Model
from workbench.model.reload import recorded_model
from workbench.model.row_changes import RowFunction, changeable_place
from workbench.results.bootstrap import intervals, resampled_means
from workbench.sae.autoencoder import Sae
from workbench.sae.decoder import extremes
from workbench.sae.feature_record import Feature, check_changeable
from workbench.sae.reconstruction import Documents
from workbench.sae.site import block_rows
from workbench.sae.spliced_loss import Batch, batch_limit, loss_and_divergence, sequence_batches
from workbench.store.reader import Rows, Store

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEASURES = {
    "loss_increase": "nats",
    "kl": "nats",
    "top1_changed": "share of tokens",
}
"""Measure -> units: change of the next-token cross-entropy, changed - clean; KL(clean ‖ changed) between next-token
distributions; tokens after which the most probable token is another one. All 0 where nothing changes."""

SCOPES = ("all", "changed")
"""Rows (tokens) that a mean is over: all text of the sequences, or those where the feature's activation changes."""

_TOKENS = 10  # raised and lowered tokens that are kept
_POOL = 10  # nearest features by density that controls are drawn from
_WIDE = 16 << 20  # values of float64 logits at a time


@dataclass(frozen=True)
class FeatureEffect:
    """Result of `feature_effect`."""

    feature: int
    controls: tuple[int, ...]
    """Random features with about as many active rows of text."""
    change: str
    """What was done: "ablate feature 17"."""
    rows: int
    """Rows of text that the means with scope "all" are over."""
    documents: int
    table: pd.DataFrame
    """Columns change ("feature", "control" or "difference"), feature, scope, measure, value, low, high (95 % CI over
    documents, NaN from a single one), units, rows. "difference" is the feature minus the mean of its controls, paired
    by document; under the null, a feature like any other of its density, 0."""
    changed: pd.DataFrame
    """A line per feature: feature, density (share of text on which it is active), changed (rows whose activation
    changed), relative_change (mean of ‖x' - x‖ / ‖x‖ over them)."""
    logits: pd.DataFrame
    """Tokens whose logits rise and fall most on changed rows, largest first: token_id, token, logit (mean change, minus
    the mean over the vocabulary; null 0), control (the same for the controls' changes)."""

    def figure(self, measure: str = "loss_increase") -> go.Figure:
        """Returns one measure for the feature and each control, on changed rows and on all, with 95 % intervals."""
        from workbench.figures.feature_questions import effect_figure  # a second: plotly

        check("measure", measure, one_of=tuple(MEASURES))
        return effect_figure(self.table.loc[self.table["measure"] == measure], self.change, self.documents)

    def save(self, folder: str | Path) -> Path:
        """Writes effect.csv, changed.csv and logits.csv into an empty or new folder; RequestError if it is neither."""
        tables = {"effect.csv": self.table, "changed.csv": self.changed, "logits.csv": self.logits}
        return save_texts(folder, {name: csv_text(table) for name, table in tables.items()})


@plain_torch()
def feature_effect(
    features: Features,
    sae: Sae,
    feature: int,
    op: Literal["ablate", "clamp", "add"] = "ablate",
    value: float | int | None = None,
    *,
    model: Model | None = None,
    rows: str | Rows | None = None,
    controls: int = 3,
    resamples: int = 1000,
    seed: int = 0,
    device: str | None = None,
    show_progress: bool = True,
) -> FeatureEffect:
    """Returns how the model's predictions on the texts of a store change with a feature ablated, clamped or added to.

    Every sequence with chosen rows runs unchanged, with the feature changed at the chosen rows (see `Feature`), and
    with each control changed in the same way. Control features are drawn at random among the ten whose number of active
    rows of text is nearest; for "clamp" and "add" they get the same value. A pass in which no activation changes is
    skipped: its effect is 0. Cost: 2 + controls passes over the sequences; memory of three batches of logits.

    Args:
        features: Features of the recorded texts.
        sae: The SAE that made them; its activation function, or the rule TopK(k) that the features were made under,
            decides the activations in the running model.
        feature: Id of the feature.
        op: "ablate": f' = 0; "clamp": f' = value; "add": f' = f + value.
        value: In units of the feature's activation; None for "ablate".
        model: The recorded model. None: loaded by the name that the store records.
        rows: SQL over the token table, or `Rows`: where the feature is changed. None: all but special tokens.
        controls: Number of control features.
        resamples: Resamples of the documents, for the intervals.
        seed: Random seed of controls and resamples.
        device: Device of the model, if it is loaded here. None: the GPU if there is one.
        show_progress: Show a progress bar.

    Raises:
        RequestError: Another SAE or model, a site that cannot be changed, no rows, too few features, or an ablated one
            that is never active on text.
    """
    check_resampling(resamples, seed)
    check_changeable(sae := running_sae(features, sae))
    counts, chosen_features = _chosen_features(features, feature, op, controls, seed)
    model = recorded_model(features.store, model, device)
    site = features.record.site  # by force: it was chosen when the features were extracted
    work = _Work(sae, model, [Feature(sae, index, op, value, site, force=True) for index in chosen_features])
    documents, replaced_rows = _rows(features, rows)
    sums = work.measure_all(features.store, documents, replaced_rows, show_progress)
    density = counts / max(1, int(text_rows(features.store).sum()))
    return FeatureEffect(
        int(feature),
        tuple(chosen_features[1:]),
        str(work.records[0]),
        len(documents.ids),
        documents.count,
        with_names(sums.table(chosen_features, resamples, seed), features.labels),
        with_names(sums.changed(chosen_features, density), features.labels),
        sums.tokens(model),
    )


def _chosen_features(
    features: Features, feature: int, op: str, controls: int, seed: int
) -> tuple[Int64[np.ndarray, " feature"], list[int]]:
    """Active rows of text of every feature; the feature and its controls."""
    check("controls", controls, at_least=0, whole=True)
    features.rows_of(feature)
    counts = text_counts(features)
    if op == "ablate" and not counts[feature]:
        raise RequestError(f"feature {feature} is active on no row of text: ablating it changes nothing; take another")
    return counts, [int(feature), *density_controls(counts, feature, controls, seed)]


def density_controls(counts: Int64[np.ndarray, " feature"], feature: int, controls: int, seed: int) -> tuple[int, ...]:
    """Returns features drawn at random from those whose number of active rows is nearest to that of `feature`.

    Args:
        counts: Active rows of each feature.
        feature: The feature to match.
        controls: Number of features to draw, out of the ten nearest, or as many as are drawn if more.
        seed: Random seed.

    Raises:
        RequestError: There are fewer other features that are active at all than controls.
    """
    candidates = np.flatnonzero(counts > 0) if counts[feature] else np.arange(len(counts))
    candidates = candidates[candidates != feature]
    if len(candidates) < controls:
        raise RequestError(
            f"controls is {controls}, and {len(candidates)} other features are active on text; give fewer"
        )
    distance = np.abs(counts[candidates] - counts[feature]) / np.maximum(1, counts[candidates] + counts[feature])
    nearest = candidates[np.argsort(distance, kind="stable")[: max(_POOL, controls)]]
    return tuple(map(int, np.sort(np.random.default_rng(seed).choice(nearest, controls, replace=False))))


def _rows(features: Features, rows: str | Rows | None) -> tuple[Documents, Bool[np.ndarray, " row"]]:
    """Measured rows, all text of the sequences with chosen rows, and a mask of the chosen rows."""
    features.store.require_whole_sequences("the effect of a feature on the model")
    store, text = features.store, text_rows(features.store)
    replaced_rows = text
    check_kind("rows", rows, (str, Rows, NoneType), "SQL or rows, such as store.where('position > 0')")
    if rows is not None:
        chosen_rows = store.where(rows) if isinstance(rows, str) else rows
        replaced_rows = np.zeros(store.rows, bool)
        replaced_rows[chosen_rows.ids_in(store)] = True
    if not replaced_rows.any():
        raise RequestError(f"rows: none of the {counted(store.rows, 'row')} of {store.path} is selected; choose others")
    sequence = store.tokens["sequence"].to_numpy()
    measured_rows = text & np.isin(sequence, np.unique(sequence[replaced_rows]))
    if not measured_rows.any():
        raise RequestError("rows: their sequences have no text, only special tokens; choose others")
    return Documents.of(store.tokens["document"].to_numpy(), np.flatnonzero(measured_rows)), replaced_rows


class _Work:
    """The passes of a batch: unchanged, and one for each changed feature."""

    def __init__(self, sae: Sae, model: Model, records: Sequence[Feature]) -> None:
        self.sae, self.model, self.records = sae, model, records
        self.where = changeable_place(model, records[0].place)
        self.changes = [record.change(model, self.where) for record in records]  # checked once for all batches

    def measure_all(
        self, store: Store, documents: Documents, replaced_rows: Bool[np.ndarray, " row"], show_progress: bool
    ) -> _Sums:
        """Sums of the effects of every change over all sequences with chosen rows."""
        sums = _Sums(len(self.records), documents, self.model.vocab)
        with progress("effect", len(documents.ids), "rows", show=show_progress) as advance:
            for batch in sequence_batches(store, documents, batch_limit(self.model), replaced_rows):
                self.measure(batch, sums)
                advance(int((batch.document >= 0).sum()))
        return sums

    def measure(self, batch: Batch, sums: _Sums) -> None:
        """Adds the effect of every change on a batch."""
        rows = batch.document >= 0
        clean, values = self._pass(batch, None)
        changes = self._changes(values, batch.replaced)
        before = clean[rows.to(clean.device)]
        losses, _ = loss_and_divergence(before, batch.targets[rows], before)
        for index, record in enumerate(self.records):
            after, relative = before, 0.0
            if bool(changes[index].any()):
                change = RowFunction(record.place, self.changes[index], str(record), at=batch.replaced)
                with intervene(self.model, change) as applied:
                    after, _ = self._pass(batch, applied)
                relative = float((applied.table()["relative_change"] * applied.table()["rows"]).iloc[0])
                after = after[rows.to(after.device)]
            changed_losses, divergences = loss_and_divergence(after, batch.targets[rows], before)
            values_of = {
                "loss_increase": torch.where(batch.targets[rows] >= 0, changed_losses - losses, torch.nan),
                "kl": divergences,
                "top1_changed": (after.argmax(-1) != before.argmax(-1)).double().cpu(),
            }
            sums.add(index, batch.document[rows].numpy(), changes[index][rows].numpy(), values_of)
            sums.add_logits(index, before, after, changes[index][rows], int(changes[index].sum()), relative)

    def _pass(self, batch: Batch, applied: Intervened | None) -> tuple[Tensor, Tensor | None]:
        """Logits of a pass and, where nothing is changed, the rows of the site."""
        site_rows: list[Tensor | None] = []
        tap = self.where.site.tap
        part = self.model.module.get_submodule(tap.path)
        side = "in" if tap.part == "in" else "out"
        with hook_tensor(part, side, site_rows.append) if applied is None else nullcontext():
            logits = run(self.model.module, batch.ids, batch.mask).logits
        return logits, site_rows[0] if site_rows else None

    def _changes(
        self, values: Tensor | None, replaced_rows: Bool[Tensor, "batch position"]
    ) -> Bool[Tensor, "change batch position"]:
        """Rows at which each record changes the activation."""
        assert values is not None
        masks = torch.zeros(len(self.records), replaced_rows.numel(), dtype=torch.bool, device="cpu")
        row_index = replaced_rows.flatten().nonzero()[:, 0]
        ids = [record.id for record in self.records]
        rows = values.reshape(replaced_rows.numel(), *self.where.shape)
        for part in row_index.split(block_rows(self.sae)):
            activations = self.sae.encode(rows[part.to(rows.device)])[:, ids].cpu()
            for index, record in enumerate(self.records):
                masks[index, part] = record.target(activations[:, index]) != activations[:, index]
        return masks.reshape(len(self.records), *replaced_rows.shape)


class _Sums:
    """Sums over documents of every measure, for each change, on all rows and on changed ones; and of logits."""

    def __init__(self, changes: int, documents: Documents, vocab: int) -> None:
        shape = (documents.count, changes, len(SCOPES), len(MEASURES))
        self.totals, self.counts = np.zeros(shape), np.zeros(shape)
        self.logits = np.zeros((changes, vocab))
        self.rows, self.chosen, self.relative = np.zeros(changes, int), np.zeros(changes, int), np.zeros(changes)

    def add(
        self,
        change: int,
        document: Int64[np.ndarray, " row"],
        changed_rows: Bool[np.ndarray, " row"],
        values: dict[str, Float[Tensor, " row"]],
    ) -> None:
        for scope, rows in enumerate((np.ones_like(changed_rows), changed_rows)):
            for measure, name in enumerate(MEASURES):
                value = values[name].numpy()
                valid = rows & ~np.isnan(value)
                np.add.at(self.totals[:, change, scope, measure], document[valid], value[valid])
                np.add.at(self.counts[:, change, scope, measure], document[valid], 1)

    def add_logits(
        self, change: int, before: Tensor, after: Tensor, changed_rows: Bool[Tensor, " row"], rows: int, relative: float
    ) -> None:
        """Adds the change of the logits at changed rows, minus its mean over the vocabulary."""
        self.rows[change] += int(changed_rows.sum())
        self.chosen[change] += rows
        self.relative[change] += relative
        for part in changed_rows.nonzero()[:, 0].split(max(1, _WIDE // before.shape[1])):
            index = part.to(before.device)
            step = (after[index].float() - before[index].float()).sum(0).double().cpu().numpy()
            self.logits[change] += step - step.mean()

    def table(self, features: Sequence[int], resamples: int, seed: int) -> pd.DataFrame:
        shape = self.totals.shape
        flat = (part.reshape(shape[0], -1) for part in (self.totals, self.counts))
        mean, resampled = resampled_means(*flat, resamples=resamples, seed=seed)
        mean, resampled = mean.reshape(shape[1:]), resampled.reshape(-1, *shape[1:])
        lines = [("feature" if index == 0 else "control", feature) for index, feature in enumerate(features)]
        if len(features) > 1:
            lines.append(("difference", features[0]))
            mean = np.concatenate([mean, mean[:1] - mean[1:].mean(0)])
            resampled = np.concatenate([resampled, resampled[:, :1] - resampled[:, 1:].mean(1, keepdims=True)], axis=1)
        low, high = intervals(resampled)
        counts = self.counts.sum(0)
        return pd.DataFrame(
            [
                {
                    "change": change,
                    "feature": feature,
                    "scope": scope,
                    "measure": measure,
                    "value": mean[line, s, m],
                    "low": low[line, s, m],
                    "high": high[line, s, m],
                    "units": units,
                    "rows": int(counts[0 if change == "difference" else line, s, m]),
                }
                for line, (change, feature) in enumerate(lines)
                for s, scope in enumerate(SCOPES)
                for m, (measure, units) in enumerate(MEASURES.items())
            ]
        )

    def changed(self, features: Sequence[int], density: Float[np.ndarray, " feature"]) -> pd.DataFrame:
        relative = np.divide(self.relative, self.chosen, out=np.full(len(features), np.nan), where=self.chosen > 0)
        table = {"feature": features, "density": density[list(features)], "changed": self.chosen}
        return pd.DataFrame(table | {"relative_change": relative})

    def tokens(self, model: Model) -> pd.DataFrame:
        means = self.logits / np.maximum(self.rows, 1)[:, None]
        token_ids = extremes(means[0], _TOKENS)
        control = means[1:].mean(0)[token_ids] if len(means) > 1 else np.full(len(token_ids), np.nan)
        texts = token_texts(model.tokenizer, token_ids)
        return pd.DataFrame({"token_id": token_ids, "token": texts, "logit": means[0][token_ids], "control": control})
