"""A folder on a disk that refuses every write, as a read-only mount does even for root."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_refused: list[str] = []  # folders; a hook of the interpreter cannot be removed


def _hook(event: str, arguments: tuple) -> None:
    if not _refused or not (event in _CHANGES or (event == "open" and (arguments[2] or 0) & _TO_WRITE)):
        return
    for place in arguments[:2]:
        inside = isinstance(place, str | os.PathLike) and os.path.abspath(place).startswith(tuple(_refused))
        if inside and (event != "os.mkdir" or not os.path.exists(place)):  # EEXIST comes first
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(place))


sys.addaudithook(_hook)


@contextmanager
def read_only(folder: Path, *, shows: bool = True) -> Iterator[None]:
    """Inside, nothing in `folder` can be changed. `shows` False: it looks writable, as after an error of the disk."""
    access = os.access

    def looks(path, mode, **options) -> bool:
        inside = os.path.abspath(path).startswith(str(folder))
        return not (shows and inside and mode & os.W_OK) and access(path, mode, **options)

    _refused.append(str(folder))
    try:
        with patch("os.access", looks):
            yield
    finally:
        _refused.remove(str(folder))
