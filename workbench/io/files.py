"""Files that are there as a whole or not at all, their checksums, and directories that one process writes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.io.errors import DataError, RequestError

PARTIAL = ".partial"
"""Suffix of everything that is still being written; nobody reads it, and the next writer removes it."""

DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
"""What the system answers to a write that finds no room: no space, file size limit, quota."""


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in blocks: memory stays bounded, one pass over the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Replace a file: at any moment, and after any crash, a reader finds the old bytes or the new ones, whole."""
    partial = path.with_name(path.name + PARTIAL)
    write_durably(partial, data)
    rename_durably(partial, path)


def rename_durably(partial: Path, path: Path) -> None:
    """Give a finished file or directory its name, and wait until the name is on the disk."""
    os.replace(partial, path)
    fsync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a whole directory, where it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def human_bytes(count: int) -> str:
    """A number of bytes as people read it, in binary units: 0 B, 1.5 KiB, 256.0 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@contextmanager
def explain_full_disk(what: str, kept: str) -> Iterator[None]:
    """Inside, a full disk raises DataError that says what was being written, and what is kept and to be done."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DataError(f"disk full while writing {what} ({error.strerror}): {kept}") from error


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the directory, made where it does not exist: alone, or `shared` with others that share it too.

    The lock is the kernel's: it ends with the process. Where another process holds it: RequestError, or, with `wait`,
    which is called once before, waiting for its turn.
    """
    while True:
        descriptor = _opened_folder(path)
        try:
            _lock(path, descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
            if _is_at(path, descriptor):  # else whom we waited for has renamed or removed it
                yield
                return
        finally:
            os.close(descriptor)


def _opened_folder(path: Path) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RequestError(f"out={path} cannot be made a directory: {error.strerror}; choose another out") from None


def _lock(path: Path, descriptor: int, kind: int, wait: Callable[[], None] | None) -> None:
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise RequestError(
                    f"{path} is being written by another process; wait for it or choose another out"
                ) from None
            wait()
            fcntl.flock(descriptor, kind)
    except OSError as error:  # some network file systems
        raise RequestError(f"{path} cannot be locked: {error.strerror}; choose an out on a local disk") from None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
