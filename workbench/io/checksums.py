"""Recorded checksums of files, compared at the first use of a file in a process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workbench.io.errors import DataError
from workbench.io.reading import explain_unreadable, open_file

_THREADS = min(8, os.cpu_count() or 1)  # hashing releases the lock

_sound: dict[str, tuple[int | str, ...]] = {}
"""Files that had their recorded checksum, with the state in which they had it."""


def check_files(recorded: Collection[tuple[Path, str]], advice: str) -> None:
    """Compares files with their recorded SHA-256, each once in a process unless it changes.

    Costs about 1 s a gigabyte and core, the first time.

    Args:
        recorded: Files and their hex SHA-256.
        advice: Next step for the user, the end of the error.

    Raises:
        DataError: A file is missing, cannot be read, or has other bytes; the text names it.
    """
    if len(recorded) < 2:
        for path, sha256 in recorded:
            _check(path, sha256, advice)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        for checked in [pool.submit(_check, path, sha256, advice) for path, sha256 in recorded]:
            checked.result()


def _check(path: Path, sha256: str, advice: str) -> None:
    with open_file(path, advice) as file, explain_unreadable(path, advice):
        stat = os.fstat(file.fileno())
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256)
        if _sound.get(str(path)) == state:
            return
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise DataError(f"{path} is damaged: its bytes are not those that were recorded; {advice}")
    _sound[str(path)] = state
