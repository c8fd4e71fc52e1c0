"""Stores of random rows, written as a recording writes them: for benchmarks that need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

import workbench as wb
from workbench.model.unembed import Unembed, save_unembed
from workbench.sites.settings import Recording
from workbench.store.manifest import ModelRecord, Part, SiteRecord
from workbench.store.writer import open_writer

WORDS = 32_000
"""Tokens of the vocabulary: " word0", " word1", ..."""
_SEQUENCE = 128
_DIGITS = "0" * 64


def random_store(
    path: Path,
    rows: int,
    sites: Sequence[SiteRecord] = (),
    draw: Callable[[SiteRecord, int], np.ndarray] | None = None,
    unembed: Unembed | None = None,
    *,
    block: int = 8_192,
) -> wb.Store:
    """Writes a store of random tokens, with the rows that `draw` gives, in one segment.

    Args:
        path: The store to write.
        rows: Number of tokens.
        sites: What is recorded; the model has as many layers as the last of them says.
        draw: Returns that many rows of a site.
        unembed: Unembedding of the store. None: none.
        block: Rows that are drawn and written at a time.
    """
    layers = 1 + max((int(site.label.rpartition(".")[2]) for site in sites), default=0)
    width = max((site.shape[0] for site in sites), default=1)
    model = ModelRecord("drawn", "none", _DIGITS, _DIGITS, _DIGITS, "float32", None, layers, width, WORDS, None, True)
    tokens = token_table(rows)
    part = Part(rows, -(-rows // _SEQUENCE), 1, 0, 0)
    with open_writer(
        path,
        model=model,
        sites=tuple(sites),
        recording=Recording(dtype="float16"),
        tokens_added={"prefix": (), "suffix": ()},
        environment={},
        unembed=None if unembed is None else lambda file: save_unembed(unembed, file, torch.float32),
        unembed_reason="nothing was run" if unembed is None else None,
    ) as writer:
        writer.begin(part, append=False)
        with writer.segment(rows, part.sequences, _DIGITS, tokens) as segment:
            for site in sites if draw else ():
                for first in range(0, rows, block):
                    segment.write(site.name, first, draw(site, min(block, rows - first)))  # pyright: ignore[reportOptionalCall]  # checked above
    return wb.open_store(path)


def token_table(rows: int) -> pa.Table:
    """Returns a table of random tokens in sequences of 128."""
    row = np.arange(rows)
    ids = np.random.default_rng(2).integers(0, WORDS, rows)
    words = pa.array([f" word{i}" for i in range(WORDS)], pa.string())
    return pa.table(
        {
            "row": row,
            "sequence": row // _SEQUENCE,
            "position": pa.array(row % _SEQUENCE, pa.int32()),
            "document": row * 0,
            "token_id": pa.array(ids, pa.int32()),
            "token": pa.DictionaryArray.from_arrays(pa.array(ids, pa.int32()), words),
            "char_start": pa.array(row, pa.int32()),
            "char_end": pa.array(row + 1, pa.int32()),
            "is_special": row % _SEQUENCE == 0,
        }
    )
