"""Verification of saved results."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from workbench.io.errors import WorkbenchError
from workbench.io.findings import Finding, Progress, check_listed
from workbench.results.result import RESULT_FILES, listed_files, load_result

RECORD = RESULT_FILES[0]


def check_result(path: Path, progress: Progress, prefix: str = "") -> Iterator[Finding]:
    """Yields the findings of a saved result: its record, the checksums of its files, and all of it as it is read.

    Args:
        path: Folder of the result.
        progress: Called with numbers of bytes.
        prefix: Comes before the names of files in the findings: `results/`.
    """
    try:
        listed = listed_files(path)
    except (WorkbenchError, OSError, ValueError) as error:
        yield Finding("", prefix + RECORD, "unreadable", str(error))
        return
    if listed is None:
        detail = "saved before checksums were recorded; the files are read as a whole instead"
        yield Finding("", prefix + RECORD, "no checksums", detail, "note")
    problems = list(check_listed(path, listed or {}, progress, prefix))
    yield from problems
    if not problems:
        try:
            load_result(path)
        except WorkbenchError as error:
            yield Finding("", prefix + RECORD, "unreadable", str(error))
    known = {RECORD, *(listed or {})}
    for entry in sorted(entry for entry in path.rglob("*") if not entry.is_dir()):
        name = entry.relative_to(path).as_posix()
        is_known = any(fnmatchcase(name, pattern) for pattern in RESULT_FILES) if listed is None else name in known
        if not is_known:
            yield Finding("", prefix + name, "unlisted", "not a file of this result; it is not read", "note")
