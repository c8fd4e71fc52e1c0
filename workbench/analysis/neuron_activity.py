"""Activity of neurons over the rows of a store: how often, how strongly, and where most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from workbench.analysis.read_layers import choose_layers, require_any
from workbench.store.reader import ActivationArray, Store

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class NeuronActivity:
    """What the neurons of one layer do over some rows."""

    rate: Float[np.ndarray, " neuron"]
    """Share of rows at which it is active."""
    mean: Float[np.ndarray, " neuron"]
    largest: Float[np.ndarray, " neuron"]
    """Activation farthest from 0, with its sign."""
    rows: Int[np.ndarray, "neuron rank"]
    """Ids of the rows of its largest activations, in falling order; -1 where there are fewer rows."""


def layer_neurons(store: Store, layers: Sequence[int] | None) -> tuple[list[int], list[str]]:
    """Returns the layers at which mlp_post was recorded, or those of `layers`, and the sites' labels.

    Raises:
        RequestError: No mlp_post was recorded, or not at one of `layers`.
    """
    shorts = [site.short or "" for site in store.sites]
    known_layers = sorted(int(short.split(".")[1]) for short in shorts if short.startswith("mlp_post."))
    require_any(store, "mlp_post")
    chosen_layers = choose_layers(known_layers, layers, store.manifest.model.n_layers)
    return chosen_layers, [f"mlp_post.{layer}" for layer in chosen_layers]


def neuron_activity(
    array: ActivationArray, ids: Int[np.ndarray, " row"], top: int, threshold: float, both: bool
) -> NeuronActivity:
    """Returns the activity of each neuron over rows of `mlp_post`.

    Args:
        array: Activations of one layer.
        ids: The rows.
        top: Number of rows to keep for each neuron.
        threshold: A neuron is active above this.
        both: Activations below minus the threshold are active, too, and the largest are those farthest from 0.
    """
    neurons = int(np.prod(array.shape[1:]))
    active, total = np.zeros(neurons), np.zeros(neurons)
    best = torch.full((0, neurons), -torch.inf)
    signed, rows = torch.zeros(0, neurons), torch.zeros(0, neurons, dtype=torch.int64)
    least, most = torch.full((neurons,), torch.inf), torch.full((neurons,), -torch.inf)
    step = max(1, _BLOCK_BYTES // (4 * neurons))
    for first in range(0, len(ids), step):
        part = ids[first : first + step]
        values = array[part].float().reshape(len(part), neurons)
        size = values.abs() if both else values
        active += (size > threshold).sum(0).numpy()
        total += values.double().sum(0).numpy()
        least, most = torch.minimum(least, values.amin(0)), torch.maximum(most, values.amax(0))
        strongest = size.topk(min(top, len(part)), dim=0)
        best = torch.cat([best, strongest.values])
        rows = torch.cat([rows, torch.from_numpy(part)[strongest.indices]])
        signed = torch.cat([signed, values.gather(0, strongest.indices)])
        topk = best.topk(min(top, len(best)), dim=0)
        best, rows, signed = topk.values, rows.gather(0, topk.indices), signed.gather(0, topk.indices)
    top_rows = np.full((neurons, top), -1)
    top_rows[:, : len(rows)] = rows.T.numpy()
    largest = torch.where(most >= -least, most, least)
    return NeuronActivity(active / len(ids), total / len(ids), largest.double().numpy(), top_rows)
