"""Stores whose activations are made up, so that what a probe must find is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import store_example
import torch

import workbench as wb
from workbench.model.unembed import Unembed, save_unembed
from workbench.recording.transfer import to_stored_type
from workbench.sites.grammar import full_name
from workbench.store.manifest import SiteRecord


def linear_unembed(weight: np.ndarray, tokens: Sequence[str] | None = None) -> Unembed:
    """Logits that are `weight @ state`, without norm."""
    gain = torch.ones(weight.shape[1])
    words = None if tokens is None else tuple(tokens)
    return Unembed(torch.tensor(weight, dtype=torch.float32), None, "none", gain, 0 * gain, 0.0, tokens=words)


def planted_store(
    path: Path,
    documents: Sequence[Sequence[int]],
    sites: Mapping[str, np.ndarray],
    unembed: Unembed | None = None,
    *,
    columns: Mapping[str, Sequence] | None = None,
    n_layers: int | None = None,
    fingerprint: str = store_example.MODEL.fingerprint,
    dtype: str = "float32",
    segments: int = 1,
) -> wb.Store:
    """A store of `documents` of token ids, one sequence each, and `sites`: short name to `[row, *axes]`.

    `columns`: more columns of the token table. A pattern's axes are (row, head, key). Values that are not finite or
    beyond the range of `dtype` are stored and counted as a recording does. `segments`: of equal numbers of documents.
    """
    lengths = [len(ids) for ids in documents]
    ids = np.concatenate([np.asarray(ids) for ids in documents])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    names = [f"t{token_id}" for token_id in ids] if unembed is None else [unembed.token(int(i)) for i in ids]
    tokens = pa.table(
        {
            "row": np.arange(len(ids)),
            "sequence": sequence,
            "position": pa.array(position, pa.int32()),
            "document": sequence,
            "token_id": pa.array(ids, pa.int32()),
            "token": pa.array(names, pa.string()).dictionary_encode(),
            "char_start": pa.array([None] * len(ids), pa.int32()),
            "char_end": pa.array([None] * len(ids), pa.int32()),
            "is_special": np.zeros(len(ids), bool),
            **{name: pa.array(values) for name, values in (columns or {}).items()},
        }
    )
    records = [_record(name, values, dtype) for name, values in sites.items()]
    layers = [int(name.split(".")[1]) for name in sites if "." in name]
    model = replace(
        store_example.MODEL,
        n_layers=n_layers or max(layers) + 1,
        d_model=next((values.shape[1] for values in sites.values() if values.ndim == 2), 1),
        vocab=int(ids.max()) + 1 if unembed is None else unembed.vocab,
        fingerprint=fingerprint,
    )
    write = None if unembed is None else (lambda file: save_unembed(unembed, file, torch.float32))
    reason = "planted without one" if unembed is None else None
    with store_example.writing(path, model=model, sites=records, unembed=write, unembed_reason=reason) as writer:
        parts = np.array_split(np.arange(len(lengths)), segments)
        writer.begin(store_example.part_of([[lengths[i] for i in part] for part in parts]), append=False)
        for part in parts:
            rows = np.flatnonzero(np.isin(sequence, part))
            share = [lengths[i] for i in part]
            digest = store_example.digest(int(rows[0]), share)
            with writer.segment(len(rows), len(part), digest, tokens.take(rows)) as segment:
                for record, values in zip(records, sites.values(), strict=True):
                    stored, overflow, nonfinite = to_stored_type(torch.tensor(values[rows]), getattr(torch, dtype))
                    segment.write(record.name, 0, store_example.as_numpy(stored))
                    segment.count(record.name, overflow=int(overflow), nonfinite=int(nonfinite))
    return wb.open_store(path)


def _record(name: str, values: np.ndarray, dtype: str) -> SiteRecord:
    axes = {
        "pattern": ("row", "head", "key"),
        "v": ("row", "head", "d_head"),
        "z": ("row", "head", "d_head"),
        "rot_q": ("row", "head", "d_head"),
        "rot_k": ("row", "head", "d_head"),
    }.get(name.split(".")[0], ("row", "d_model")[: values.ndim])
    return SiteRecord(full_name(name), name, axes, values.shape[1:], dtype)
