"""What entry points bring: probes and experiments by name, told and found without importing all of them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workbench.io.errors import RequestError, nearest


def load_named(kind: str, name: str, known: Mapping[str, EntryPoint]) -> Any:
    """What is registered as `name`, a `kind` such as "probe". Raises RequestError with the nearest names."""
    if name not in known:
        raise RequestError(f"{kind} {name!r} is not installed{nearest(name, known)}; known: {', '.join(known)}")
    return known[name].load()


def parsed(entry: EntryPoint) -> ast.Module | None:
    """The module of an entry point as its source has it: importing every one would take seconds. None where there is no
    module, so that one half uninstalled does not hide the others."""
    try:
        spec = find_spec(entry.module)
    except ModuleNotFoundError:
        return None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else "")


def no_module(entry: EntryPoint) -> str:
    """What is told in place of a summary where `parsed` finds no module."""
    return f"cannot be loaded: there is no module {entry.module}"
