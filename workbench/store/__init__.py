"""The store: a directory of activations whose rows are tokens, in formats that other tools open.

Reading needs torch and is loaded when asked for; everything else answers without it.
"""

from __future__ import annotations

from typing import Any

from workbench.store.manifest import Manifest, ModelRecord, Part, Segment, SiteRecord, describe, read_manifest

__all__ = [
    "ActivationArray",
    "Manifest",
    "ModelRecord",
    "Part",
    "Rows",
    "Segment",
    "SiteRecord",
    "Store",
    "describe",
    "open_store",
    "read_manifest",
]


def __getattr__(name: str) -> Any:
    if name in ("ActivationArray", "Rows", "Store", "open_store"):
        from workbench.store import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
