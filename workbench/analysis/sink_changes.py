"""Changes of attention to keys that are found in the recorded attention: sinks of each head, or random keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workbench.analysis.change_effects import Change
from workbench.analysis.received import attention_source, read_attention
from workbench.model.intervene import Intervention
from workbench.sae.spliced_loss import Batch
from workbench.store.reader import Store

KeyChoice = Mapping[int, Bool[np.ndarray, "all_rows head"]]
"""Keys that are changed for each head, by layer."""


@dataclass(frozen=True)
class Received:
    """Attention that every key of some sequences receives, by layer."""

    starts: Int64[np.ndarray, " sequence"]
    """Id of the first row of each sequence."""
    lengths: Int64[np.ndarray, " sequence"]
    rows: int
    """Rows of the store."""
    alpha: Mapping[int, Float[np.ndarray, "all_rows head"]]
    """Mean attention from the queries that see a key; NaN in other sequences."""

    @property
    def layers(self) -> list[int]:
        """Layers of which attention was recorded."""
        return list(self.alpha)

    def top_keys(self, before: int) -> KeyChoice:
        """Returns for each head and sequence the key with the largest alpha among the first `before` positions."""
        choice = {}
        for layer, alpha in self.alpha.items():
            choice[layer] = np.zeros(alpha.shape, bool)
            heads = np.arange(alpha.shape[1])
            for start, length in zip(self.starts, self.lengths, strict=True):
                choice[layer][start + alpha[start : start + min(before, length)].argmax(0), heads] = True
        return choice

    def hidden_sinks(self, threshold: float | None, min_visible: int) -> KeyChoice:
        """Returns for each head the keys behind position 0 with alpha above a threshold (Yu et al. 2024).

        Args:
            threshold: Smallest alpha; None: 5 / length of the sequence.
            min_visible: Queries that must see a key: the means of the last ones are noise.
        """
        choice = {}
        for layer, alpha in self.alpha.items():
            choice[layer] = np.zeros(alpha.shape, bool)
            for start, length in zip(self.starts, self.lengths, strict=True):
                inside = slice(start + 1, start + max(1, length - min_visible + 1))
                choice[layer][inside] = alpha[inside] > (5 / length if threshold is None else threshold)
        return choice

    def random_keys(self, like: KeyChoice, first: int, last: int, seed: int) -> KeyChoice:
        """Returns as many random keys as `like` has, for each head and sequence, at positions first to last - 1.

        Heads with equally many keys in a sequence get the same ones.
        """
        draw, choice = np.random.default_rng(seed), {layer: np.zeros_like(keys) for layer, keys in like.items()}
        for start, length in zip(self.starts, self.lengths, strict=True):
            order = start + first + draw.permutation(max(1, min(last, int(length)) - first))
            for layer, keys in like.items():
                counts = keys[start : start + length].sum(0)
                for head, count in enumerate(counts):
                    choice[layer][order[:count], head] = True
        return choice


def read_received(store: Store, rows: Int64[np.ndarray, " row"], layers: Sequence[int] | None = None) -> Received:
    """Reads the attention that keys receive in the sequences of some rows, from `pattern` or `attn_received`.

    Raises:
        RequestError: No attention was recorded, or not at one of `layers`, or a store of chosen rows.
    """
    store.require_whole_sequences("attention to keys of whole sequences")
    source, layers = attention_source(store, layers)
    sequence = store.tokens["sequence"].to_numpy()
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    lengths = np.diff(starts, append=store.rows)
    has_rows = np.isin(starts, starts[np.searchsorted(starts, rows, side="right") - 1])
    starts, lengths = starts[has_rows].astype(np.int64), lengths[has_rows].astype(np.int64)
    alpha = {}
    for layer in layers:
        parts = [
            read_attention(store, source, layer, np.arange(start, start + length)[None], 0)["alpha"][0]
            for start, length in zip(starts, lengths, strict=True)
        ]
        alpha[layer] = np.full((store.rows, parts[0].shape[1]), np.nan)
        for start, part in zip(starts, parts, strict=True):
            alpha[layer][start : start + len(part)] = part
    return Received(starts, lengths, store.rows, alpha)


def change_keys(
    choice: KeyChoice, make: Callable[[int, Sequence[int], Bool[Tensor, "batch position"]], Intervention]
) -> Change:
    """Returns the change that `make` describes at the chosen keys; heads with the same keys share a record.

    Args:
        choice: Keys of each head, by layer.
        make: From layer, heads and a mask of keys to a record.
    """

    def change(batch: Batch) -> list[Intervention]:
        row, real = batch.row.clamp(min=0).numpy(), batch.row.numpy() >= 0
        records = []
        for layer, keys in choice.items():
            masks = keys[row] & real[..., None]
            groups: dict[bytes, list[int]] = {}
            for head in np.flatnonzero(masks.any((0, 1))).tolist():
                groups.setdefault(masks[..., head].tobytes(), []).append(head)
            records += [make(layer, heads, torch.from_numpy(masks[..., heads[0]].copy())) for heads in groups.values()]
        return records

    return change
