"""Verification of any folder that the workbench writes: stores with their features, features, results, runs, sweeps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.io.checks import as_path
from workbench.io.errors import DataError, RequestError, WorkbenchError
from workbench.io.findings import Finding, Progress, check_listed, check_unlisted, findings_table
from workbench.store.manifest import FEATURES, MANIFEST, read_manifest
from workbench.store.verify import check_store

if TYPE_CHECKING:
    import pandas as pd

_RECORD = "features.json"  # as in `feature_store`, whose import takes seconds


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> pd.DataFrame:
    """Checks every file of a store and its features, of features, a result, a run or a sweep.

    A sound folder has no row of severity "error". A damaged file does not stop the check of the others. Reads every
    byte once, in bounded memory.

    Args:
        path: The folder.
        progress: Called with the bytes of each block.

    Returns:
        A table with the columns segment, file, finding, detail, severity.

    Raises:
        RequestError: `path` is none of these, or of a newer version.
    """
    return findings_table(_check(as_path("path", path), progress or (lambda _: None)))


def check_features(path: Path, progress: Progress, prefix: str = "") -> Iterator[Finding]:
    """Yields the findings of extracted features: their record, checksums of their files, and order of their entries.

    Args:
        path: Folder of the features.
        progress: Called with numbers of bytes.
        prefix: Comes before the names of files in the findings.
    """
    from workbench.features.feature_store import open_features  # takes seconds: torch
    from workbench.features.labels import LABELS, load_labels
    from workbench.features.records import read_record

    try:
        record = read_record(path)
    except DataError as error:
        yield Finding("", prefix + _RECORD, "unreadable", str(error))
        return
    problems = list(check_listed(path, record.files, progress, prefix))
    yield from problems
    if not problems:
        try:
            open_features(path)
        except RequestError as error:
            yield Finding("", prefix + _RECORD, "wrong features", str(error), "note")
        except DataError as error:
            yield Finding("", prefix + _RECORD, "wrong features", str(error))
    try:
        load_labels(path, record.sae.fingerprint, record.features)
    except WorkbenchError as error:
        yield Finding("", prefix + LABELS, "unreadable", str(error))
    if record.overflow:
        detail = f"{record.overflow:,} activations are beyond {record.dtype} and stored as its largest value"
        yield Finding("", prefix + _RECORD, "overflow", detail, "note")
    yield from check_unlisted(path, (_RECORD, LABELS, *record.files), "these features", prefix)


def _check(path: Path, progress: Progress) -> Iterator[Finding]:
    from workbench.results.check_result import RECORD, check_result
    from workbench.runs.check_run import check_run, check_sweep, is_sweep
    from workbench.runs.folders import ENVIRONMENT, RESULTS

    if (path / MANIFEST).exists():
        yield from check_store(path, progress)
        for folder in sorted((path / FEATURES).glob("[!.]*")):
            yield from _check_features_of_store(folder, progress)
    elif (path / _RECORD).exists():
        yield from check_features(path, progress)
    elif (path / RECORD).exists():
        yield from check_result(path, progress)
    elif (path / ENVIRONMENT).exists() or (path / RESULTS / RECORD).exists():
        yield from check_run(path, progress)
    elif path.is_dir() and is_sweep(path):
        yield from check_sweep(path, progress)
    elif path.is_dir():
        raise RequestError(f"{path} is no store, features, result, run or sweep; name the folder of one")
    else:
        read_manifest(path)  # refuses it, with the nearest stores


def _check_features_of_store(folder: Path, progress: Progress) -> Iterator[Finding]:
    prefix = f"{FEATURES}/{folder.name}/"
    if not (folder / _RECORD).exists():
        yield Finding("", prefix.rstrip("/"), "unlisted", "not features; it is not read", "note")
        return
    try:
        yield from check_features(folder, progress, prefix)
    except WorkbenchError as error:
        yield Finding("", prefix + _RECORD, "unreadable", str(error))
