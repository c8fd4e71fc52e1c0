"""Attention to the first key scaled by a factor: its closed form, and what a softmax temperature would do instead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64

from workbench.analysis.change_effects import MEASURES, MeasuredRows, measures, plain_log_probabilities
from workbench.analysis.rows import next_tokens
from workbench.io.torch_state import plain_torch
from workbench.model.attention import row_entropy
from workbench.model.forward import run
from workbench.model.load import Model
from workbench.sae.reconstruction import Documents
from workbench.sae.spliced_loss import batch_limit, sequence_batches
from workbench.store.layers import offered_label
from workbench.store.reader import Store


def scaled_first(weight: Float[np.ndarray, "*shape"], factor: float) -> Float[np.ndarray, "*shape"]:
    """Returns the weight of the first key after its unnormalised weight is multiplied: γ a / ((γ - 1) a + 1)."""
    divisor = (factor - 1) * weight + 1
    return np.where(divisor > 0, factor * weight / np.where(divisor > 0, divisor, 1), weight)


def scaled_entropy(
    weight: Float[np.ndarray, "*shape"], entropy: Float[np.ndarray, "*shape"], factor: float
) -> Float[np.ndarray, "*shape"]:
    """Returns the entropy of a row of attention after the scaling, in nats; the other keys keep their ratios.

    Args:
        weight: Weight of the first key, 0 to 1.
        entropy: Entropy of the row.
        factor: γ.
    """
    rest = 1 - weight
    other_entropy = np.where(rest > 1e-9, (entropy - _binary(weight)) / np.maximum(rest, 1e-9), 0)
    after = scaled_first(weight, factor)
    return _binary(after) + (1 - after) * np.maximum(other_entropy, 0)


def _binary(share: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Entropy of a share and the rest, in nats."""
    parts = np.stack([share, 1 - share])
    return -np.where(parts > 0, parts * np.log(np.where(parts > 0, parts, 1)), 0).sum(0)


def first_key_rows(
    store: Store, rows: Int64[np.ndarray, " row"]
) -> dict[int, tuple[Float[np.ndarray, "row head"], Float[np.ndarray, "row head"] | None]]:
    """Returns the weight of key 0 and the entropy of each query's attention, by layer; None: it was not recorded.

    Raises:
        RequestError: Neither `pattern` nor `attn_first` was recorded.
    """
    labels = {site.short or "" for site in store.sites}
    by_layer = {}
    for layer in range(store.manifest.model.n_layers):
        if f"pattern.{layer}" in labels:
            pattern = store["pattern", layer]
            parts = [pattern[part].double() for part in np.array_split(rows, max(1, len(rows) // 256))]
            entropy = [row_entropy(part.permute(1, 0, 2)[None])[0] for part in parts]
            by_layer[layer] = torch.cat([part[..., 0] for part in parts]).numpy(), torch.cat(entropy).numpy()
        elif f"attn_first.{layer}" in labels:
            has_entropy = f"attn_entropy.{layer}" in labels
            entropies = store["attn_entropy", layer][rows].double().numpy() if has_entropy else None
            by_layer[layer] = store["attn_first", layer][rows].double().numpy(), entropies
    if not by_layer:
        store.require(offered_label(store.manifest, "attn_first", "pattern"))
    return by_layer


@plain_torch()
def temperature_curve(
    model: Model, rows: MeasuredRows, temperatures: Sequence[float]
) -> Float64[np.ndarray, "temperature measure"]:
    """Returns means of `MEASURES` over the rows with the logits divided by each temperature; one pass of the model."""
    documents = Documents.of(rows.store.tokens["document"].to_numpy(), rows.ids)
    targets = next_tokens(rows.store)
    totals, counts = (np.zeros((len(temperatures), len(MEASURES))) for _ in range(2))
    for batch in sequence_batches(rows.store, documents, batch_limit(model)):
        measured_rows = batch.document >= 0
        logits = run(model.module, batch.ids, batch.mask).logits
        logits = logits[measured_rows.to(logits.device)]
        target = torch.from_numpy(targets[batch.row[measured_rows].numpy()])
        before = plain_log_probabilities(logits)
        for index, temperature in enumerate(temperatures):
            values = measures(logits / temperature, target, before).numpy()
            totals[index] += np.nansum(values, 1)
            counts[index] += (~np.isnan(values)).sum(1)
    return totals / counts
