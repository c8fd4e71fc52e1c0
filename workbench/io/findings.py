"""Findings of a verification: one table for stores, features, results and runs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.io.errors import DataError, printable
from workbench.io.reading import open_file

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int], object]
"""Called with the bytes of each block that was read."""

Severity = Literal["error", "note"]

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Finding:
    """A problem, or a note."""

    segment: str
    """Name of the segment of a store; empty for other files."""
    file: str
    """The file, relative to the folder that was verified or to its segment."""
    finding: str
    """missing segment, missing file, truncated, size differs, checksum differs, unreadable, wrong model, wrong tensor,
    wrong tokens, wrong features, wrong name, not finite, overflow, incomplete, changed texts, no checksums, leftover,
    waiting or unlisted."""
    detail: str
    severity: Severity = "error"


def findings_table(findings: Iterable[Finding]) -> pd.DataFrame:
    """Returns findings as a table with the columns segment, file, finding, detail, severity."""
    import pandas as pd  # takes seconds

    columns = [field.name for field in dataclasses.fields(Finding)]
    lines = [[printable(text) for text in dataclasses.astuple(finding)] for finding in findings]
    return pd.DataFrame(lines, columns=columns)


def check_listed(
    folder: Path, listed: Mapping[str, FileRecord], progress: Progress, prefix: str = ""
) -> Iterator[Finding]:
    """Yields the files in `folder` that are missing, or differ from the recorded size or SHA-256.

    `prefix` comes before their names in the findings. Reads every byte once.
    """
    for name, record in listed.items():
        path = folder / name
        if not os.path.lexists(path):
            yield Finding("", prefix + name, "missing file", "its record lists it")
            continue
        try:
            size, actual = _sha256(path, progress)
        except (DataError, OSError) as error:
            yield Finding("", prefix + name, "unreadable", str(error))
            continue
        if size != record.bytes:
            finding = "truncated" if size < record.bytes else "size differs"
            yield Finding("", prefix + name, finding, f"{size} bytes, recorded {record.bytes}")
        elif actual != record.sha256:
            detail = f"SHA-256 {actual[:12]}, recorded {record.sha256[:12]}"
            yield Finding("", prefix + name, "checksum differs", detail)


def check_unlisted(folder: Path, known: Collection[str], kind: str, prefix: str = "") -> Iterator[Finding]:
    """Yields a note for each entry of `folder` whose name is not `known`; `kind`: "a run"."""
    for name in sorted(entry.name for entry in folder.iterdir()):
        if name not in known:
            yield Finding("", prefix + name, "unlisted", f"not a file of {kind}; it is not read", "note")


def _sha256(path: Path, progress: Progress) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open_file(path, "restore it from a copy") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            progress(len(block))
    return size, digest.hexdigest()
