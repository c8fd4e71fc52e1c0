"""Atomic exchange of two names, which Python's `os` does not offer: Linux' `renameat2` with RENAME_EXCHANGE."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def exchange(first: Path, second: Path) -> bool:
    """Exchanges what two names of one file system stand for; at every moment both names stand for something.

    Returns:
        False where the kernel or the file system (such as NFS) cannot; nothing has changed then.

    Raises:
        OSError: For example, one of the two does not exist.
    """
    call = _renameat2()
    if call is None:
        return False
    sys.audit("os.rename", str(first), str(second), -1, -1)  # as os.rename does
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # another system, or an older C library
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
