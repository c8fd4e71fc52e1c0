"""From committed segments to the two orders of features on disk: by row, and by feature."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from workbench.features.extraction_folder import ExtractionFolder
from workbench.features.feature_segments import SparseSegment
from workbench.features.index import INDEX_MEMORY, entries_in_memory, entry_rows, invert
from workbench.features.records import (
    BY_FEATURE,
    BY_ROW,
    FeaturesRecord,
    by_feature_layout,
    by_row_layout,
    feature_type,
)
from workbench.io import files
from workbench.io.tensors import array_bytes, new_arrays, stream_arrays
from workbench.sae.sparsity import Entries, find_cut
from workbench.store.manifest import FileRecord


def merge_segments(
    folder: ExtractionFolder, features: int, quotas: Int64[np.ndarray, " group"] | None
) -> ExtractionFolder:
    """Merges all segments into the order by row, selects the entries within `quotas`, and removes the segments.

    Args:
        folder: The folder of an extraction whose rows are all encoded.
        features: Number of features of the autoencoder.
        quotas: Number of entries to keep of each group of features. None: all.
    """
    rows, dtype = folder.record.rows, folder.record.dtype
    spans = list(folder.segments.spans())

    def parts() -> Iterator[SparseSegment]:
        return (folder.segments.read(span, feature_type(features)) for span in spans)

    def entries() -> Iterator[Entries]:
        return ((part.feature, part.value) for part in parts())

    cut = None if quotas is None else find_cut(entries, quotas)
    masks = cut.masks(entries()) if cut else (np.ones(len(part.feature), bool) for part in parts())
    size = cut.entries if cut else sum(len(part.feature) for part in parts())
    limit, overflow, written = float(np.finfo(dtype).max), 0, np.zeros(1, np.int64)
    with new_arrays(folder.path / BY_ROW, by_row_layout(rows, features, size, dtype)) as file:
        file.append("indptr", written)
        for (first, stop), part, mask in zip(spans, parts(), masks, strict=True):
            value = part.value[mask]
            overflow += int((np.abs(value) > limit).sum())
            file.append("feature", part.feature[mask])
            file.append("value", value.clip(-limit, limit).astype(dtype))
            row = entry_rows(part.indptr, 0, len(mask))[mask]
            ends = written + np.cumsum(np.bincount(row, minlength=stop - first))
            file.append("indptr", ends)
            written = ends[-1:]
    return folder.merged(overflow)


def write_index(folder: ExtractionFolder, features: int, store: Path, memory: int = INDEX_MEMORY) -> ExtractionFolder:
    """Writes the order by feature and the record that makes the folder features.

    Args:
        folder: The folder of an extraction whose order by row is complete.
        features: Number of features of the autoencoder.
        store: Path of the store.
        memory: Megabytes in which the index is built.
    """
    record, path = folder.record, folder.path
    entries = _entries(path / BY_ROW, record.rows, features, record.dtype)
    size = (record.rows, features, entries, record.dtype)
    by_row = stream_arrays(path / BY_ROW, by_row_layout(*size))
    counts, step = np.zeros(features, np.int64), entries_in_memory(memory)
    for start in range(0, entries, step):
        counts += np.bincount(by_row["feature"][start : start + step], minlength=features)
    layout = by_feature_layout(*size)
    with new_arrays(path / BY_FEATURE, layout) as file:
        arguments = by_row["indptr"], by_row["feature"], by_row["value"], counts, file, path / "spill"
        invert(*arguments, layout["row"][0], step)
    return folder.indexed(
        FeaturesRecord(
            sae=record.sae,
            site=record.site,
            reads=record.reads,
            store=os.path.relpath(store, folder.target),
            store_fingerprint=record.store_fingerprint,
            rows=record.rows,
            features=features,
            entries=entries,
            dtype=record.dtype,
            overflow=record.overflow or 0,
            files={
                name: FileRecord((path / name).stat().st_size, files.sha256_file(path / name))
                for name in (BY_FEATURE, BY_ROW)
            },
            environment=record.environment,
        )
    )


def _entries(path: Path, rows: int, features: int, dtype: str) -> int:
    """Number of entries of a complete order by row, from the size of its file."""
    layout = by_row_layout(rows, features, 1, dtype)
    width = sum(np.dtype(layout[name][0]).itemsize for name in ("feature", "value"))
    return (array_bytes(path) - 8 * (rows + 1)) // width
