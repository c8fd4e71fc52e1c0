"""Files of one segment while it is written: a tensor file for each site, the token table, and their record."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from workbench.io import files
from workbench.io.parse import to_json
from workbench.io.tensors import TensorFile
from workbench.store.added_records import SEGMENT
from workbench.store.manifest import TOKENS, FileRecord, Manifest, SegmentRecord, SiteRecord
from workbench.store.stored_changes import Ran
from workbench.store.token_table import encode_tokens


class SegmentWriter:
    """Writer of one segment, made by `Writer.segment`; threads that use it must finish before its block ends."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        rows: int,
        tokens: pa.Table | None,
        sites: Sequence[SiteRecord] | None = None,
    ) -> None:
        """`tokens`: its token table, None: it is there already; `sites` to write, None: those of the manifest."""
        self._folder, self._manifest, self._rows = folder, manifest, rows
        if tokens is not None:
            files.write_file(folder / TOKENS, encode_tokens(tokens))
        self._tensors = {
            site.name: TensorFile(
                folder / site.file,
                site.label,
                site.dtype,
                (rows, *site.shape),
                {"site": site.name, "model": manifest.model.fingerprint, "axes": " ".join(site.axes)},
            )
            for site in (manifest.sites if sites is None else sites)
        }
        self._counts = {"overflow": Counter(), "nonfinite": Counter()}
        self._lock = threading.Lock()
        self.interventions: tuple[Ran, ...] = ()
        """What each intervention did to the rows."""

    def write(self, site: str, first_row: int, rows: Shaped[np.ndarray, "row ..."]) -> None:
        """Writes rows of the site with this TransformerLens name; `first_row` counts from the segment's first.

        Contiguous, of the stored type (bfloat16 as uint16 bits), in any order and from any thread.
        """
        self._tensors[site].write(first_row, rows)

    def shape(self, site: str) -> tuple[int, ...]:
        """Returns the shape of one row of the site: (d_model,), (head, context)."""
        return self._tensors[site].shape[1:]

    def dtype(self, site: str) -> str:
        """Returns the stored type of the site."""
        return self._tensors[site].dtype

    def count(self, site: str, *, overflow: int = 0, nonfinite: int = 0) -> None:
        """Adds to the counts of values beyond the stored type's range, and of NaN or infinite values of the model."""
        with self._lock:
            self._counts["overflow"][site] += int(overflow)
            self._counts["nonfinite"][site] += int(nonfinite)

    def finish(self, sequences: int) -> str:
        """Waits until all files are on the disk, writes `segment.json`, and returns its SHA-256."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # waiting and hashing both release the GIL
            list(pool.map(TensorFile.finish, self._tensors.values()))
            paths = sorted(self._folder.iterdir())
            checksums = list(pool.map(files.sha256_file, paths))
        record = SegmentRecord(
            files={path.name: FileRecord(path.stat().st_size, sum) for path, sum in zip(paths, checksums, strict=True)},
            rows=self._rows,
            sequences=sequences,
            overflow=dict(+self._counts["overflow"]),
            nonfinite=dict(+self._counts["nonfinite"]),
            model=self._manifest.model.fingerprint,
            interventions=self.interventions,
        )
        text = to_json(record).encode()
        files.write_file(self._folder / SEGMENT, text)
        files.fsync(self._folder)
        return files.sha256_bytes(text)
