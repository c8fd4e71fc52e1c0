"""The plan of a recording: what every process that writes a part of it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workbench.sites.settings import Recording
from workbench.store.manifest import Manifest


@dataclass(frozen=True)
class PartPlan:
    """Facts that a process with the model needs to write any segment of a part. Small: it is sent to other machines."""

    store: Path
    tokens: Path
    """Folder of the planned sequences."""
    manifest: Manifest
    """Manifest of the store, without its segments."""
    settings: Recording
    row_offset: int
    """Rows of the store before the part."""
    sequence_offset: int
    document_offset: int
