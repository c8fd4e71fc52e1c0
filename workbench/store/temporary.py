"""Temporary stores: a folder that lives as long as a handle of it, and at most as long as the process that made it."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

from workbench.store.manifest import MANIFEST, UNEMBED

_PREFIX = "workbench-stores-"
_STALE_SECONDS = 3600

_roots: dict[int, tuple[Path, int]] = {}  # of this process, and of the one that it was forked from
_retired: list[Path] = []
_folders: weakref.WeakValueDictionary[str, TemporaryFolder] = weakref.WeakValueDictionary()


class TemporaryFolder:
    """A new folder for a store, which is removed when nothing refers to this object any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="store-", dir=_root()))
        _folders[str(self.path)] = self
        weakref.finalize(self, _retire, self.path, os.getpid())


def temporary_folder(path: Path) -> TemporaryFolder | None:
    """Returns the temporary folder of this process at or above `path`; None where there is none."""
    places = (str(place) for place in (path, *path.parents))
    return next((folder for place in places if (folder := _folders.get(place))), None)


def _root() -> Path:
    """The folder of this process's temporary stores. It holds a lock, so that others see that it is in use."""
    process = os.getpid()
    if process not in _roots:
        _remove_stale()
        root = Path(tempfile.mkdtemp(prefix=_PREFIX))
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _roots[process] = root, descriptor
        atexit.register(_remove_root, root, process)
    return _roots[process][0]


def _retire(path: Path, process: int) -> None:
    """Removes a store, and all but the unembedding of the last one: a new store of its model links that."""
    if os.getpid() != process:  # a fork has the same objects, and not the folder
        return
    for entry in path.iterdir() if path.is_dir() else ():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name not in (MANIFEST, UNEMBED):
            entry.unlink(missing_ok=True)
    _retired.append(path)
    while len(_retired) > 1:
        shutil.rmtree(_retired.pop(0), ignore_errors=True)


def _remove_root(root: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(root, ignore_errors=True)


def _remove_stale() -> None:
    """Removes what killed processes of this user have left: folders that nobody has locked for an hour."""
    for root in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            stat = root.lstat()
            if stat.st_uid != os.geteuid() or time.time() - stat.st_mtime < _STALE_SECONDS:
                continue
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(root, ignore_errors=True)
            finally:
                os.close(descriptor)
