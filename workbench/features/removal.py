"""Removal of any folder that the workbench writes, and of nothing that others have put there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePath

from workbench.io.checks import as_path
from workbench.io.errors import RequestError
from workbench.io.files import explain_full_disk, locked, remove_known
from workbench.results.check_result import RECORD
from workbench.results.result import RESULT_FILES
from workbench.runs.folders import CONFIG, ENVIRONMENT, LOG, RESULTS
from workbench.runs.sweep import RUNS, SUMMARY, TABLE
from workbench.store.manifest import MANIFEST
from workbench.store.owned_files import FEATURE_FILES, STORE_FILES

_RESULT = tuple(RESULT_FILES)
_RUN = (CONFIG, LOG, *(f"{RESULTS}/{name}" for name in _RESULT), ENVIRONMENT)
_SWEEP = (*(f"*/{name}" for name in _RUN), *(f"{SUMMARY}/{name}" for name in (*_RESULT, TABLE, RUNS)))


def remove(path: str | os.PathLike[str]) -> list[Path]:
    """Removes a store, features, a result, a run or a sweep; returns the files of others in it, which stay.

    The file that makes the folder what it is goes last, so that a killed call is continued by the same one. That may
    leave a folder with nothing but empty ones in it, which goes too.

    Raises:
        RequestError: There is no such folder, or a process writes to it.
        DataError: The disk fails or is read-only; the same call continues.
    """
    path = as_path("path", path)
    if path.is_symlink() or not path.is_dir():
        raise RequestError(f"{path} is no folder of the workbench; give a store, features, a result, a run or a sweep")
    if all(entry.is_dir() and not entry.is_symlink() for entry in path.rglob("*")):
        shutil.rmtree(path)
        return []
    patterns, last = _files_of(path)
    with locked(path), explain_full_disk(str(path), "remove it again"):
        return remove_known(path, [PurePath(pattern).parts for pattern in patterns], last)


def _files_of(path: Path) -> tuple[tuple[str, ...], str]:
    """Patterns of the files of a folder, and the name of the one that is removed last."""
    kinds = {
        MANIFEST: STORE_FILES,
        "features.json": FEATURE_FILES,
        RECORD: _RESULT,
        ENVIRONMENT: _RUN,
        f"{SUMMARY}/{RUNS}": _SWEEP,
    }
    for name, patterns in kinds.items():
        if (path / name).is_file():
            return patterns, name
    raise RequestError(f"{path} holds no store, features, result, run or sweep; nothing was removed")
