"""Versions of Python and of the libraries that compute."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version

_LIBRARIES = ("torch", "transformers", "transformer-lens", "tokenizers", "numpy", "pyarrow")


def library_versions() -> dict[str, str]:
    """Returns the versions that may change the last bit of a number: Python's, ours, the libraries'."""
    return {
        "python": platform.python_version(),
        "workbench": version("interp-workbench"),
        **_installed(),
    }


@cache
def _installed() -> dict[str, str]:
    """Versions of the libraries, which each take milliseconds to find: a process does not change them."""
    return {name: version(name) for name in _LIBRARIES}
