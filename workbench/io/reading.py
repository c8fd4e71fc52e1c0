"""Reading of files that anybody may have damaged, replaced or made: regular files, through errors that name them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from workbench.io.errors import DataError

_LARGEST = 1 << 31
"""Bytes of the largest record that is read into memory as a whole."""


def open_file(path: str | os.PathLike[str], advice: str) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading.

    Args:
        path: The file.
        advice: Next step for the user, the end of the error.

    Raises:
        DataError: No file there, one that cannot be read, or a folder, FIFO, socket or device: the open of a FIFO
            would wait for its other end.
    """
    try:
        with explain_unreadable(path, advice):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:  # a NUL in the path
        raise DataError(f"{os.fspath(path)} cannot be the name of a file; {advice}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{os.fspath(path)} is not a regular file; {advice}")
    return open(descriptor, "rb")


@contextmanager
def explain_unreadable(path: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """Inside, an error of the system about a file raises DataError with its name, the reason and `advice`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read: {error.strerror}; {advice}") from None


def read_file(path: str | os.PathLike[str], advice: str) -> bytes:
    """Returns the bytes of a regular file; raises as `open_file` does, and for one of 2 GiB or more."""
    with open_file(path, advice) as file, explain_unreadable(path, advice):
        if os.fstat(file.fileno()).st_size >= _LARGEST:
            raise DataError(f"{os.fspath(path)} is too large for a record; {advice}")
        return file.read()


def check_regular(path: str | os.PathLike[str], advice: str) -> Path:
    """Returns `path`, for a library that opens files itself; raises as `open_file` does."""
    open_file(path, advice).close()
    return Path(path)
