"""A store with an unembedding, and everything that is read of it but the values of its activations."""

from __future__ import annotations

from pathlib import Path

import torch

from workbench.model.unembed import Unembed, load_unembed
from workbench.store.manifest import read_counts
from workbench.store.query import query_tokens
from workbench.store.reader import open_store

SEGMENTS = [[3, 2], [4], [1, 1, 5]]
UNEMBED = Unembed(
    torch.arange(120.0).reshape(40, 3), None, "rms", torch.ones(3), torch.zeros(3), 1e-5, tokens=("a", "é", "日") * 13
)


def answers(path: Path):
    """Everything that is read of a store but the values of the activations."""
    store, unembed = open_store(path), load_unembed(path)
    selected = store.where("position > 0 AND source = 'web'")
    return (
        store.manifest,
        store.tokens.to_pydict(),
        query_tokens(path, store.manifest, "token IN (' Monday', '日') OR char_start = 3").to_pydict(),
        selected.ids.tolist(),
        selected.tokens.to_pydict(),
        read_counts(path, store.manifest),
        unembed.weight.tolist(),
        unembed.tokens,
    )
