"""Verification of run folders and of sweeps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from workbench.io.errors import WorkbenchError
from workbench.io.files import PARTIAL, sha256_bytes
from workbench.io.findings import Finding, Progress, check_unlisted
from workbench.io.parse import read_json
from workbench.results.check_result import RECORD, check_result
from workbench.runs.folders import CONFIG, ENVIRONMENT, LOG, RESULTS
from workbench.runs.sweep import RUNS, SUMMARY, TABLE

_AGAIN = "remove the run and run it again"


def check_run(path: Path, progress: Progress, prefix: str = "") -> Iterator[Finding]:
    """Yields the findings of a run: its records, its name, which has a checksum of the config, and its result.

    Args:
        path: Folder of the run.
        progress: Called with numbers of bytes.
        prefix: Comes before the names of files in the findings.
    """
    for name, keys in ((CONFIG, ("experiment", "config")), (ENVIRONMENT, ("versions", "started", "seconds"))):
        try:
            record = read_json(path / name, _AGAIN, finite=False)
        except WorkbenchError as error:
            finding = "unreadable" if (path / name).exists() else "missing file"
            yield Finding("", prefix + name, finding, str(error))
            continue
        if missing := [key for key in keys if key not in record]:
            yield Finding("", prefix + name, "unreadable", f"it has no {missing[0]}; {_AGAIN}")
        elif name == CONFIG:
            yield from _check_name(path, record["config"], prefix)
    if not (path / LOG).is_file():
        yield Finding("", prefix + LOG, "missing file", "the printed lines and warnings of the run", "note")
    if (path / RESULTS / RECORD).exists():
        yield from check_result(path / RESULTS, progress, f"{prefix}{RESULTS}/")
    else:
        yield Finding("", f"{prefix}{RESULTS}/{RECORD}", "missing file", "every run has a result")
    yield from check_unlisted(path, (CONFIG, ENVIRONMENT, LOG, RESULTS), "a run", prefix)


def check_sweep(path: Path, progress: Progress) -> Iterator[Finding]:
    """Yields the findings of the runs in a folder, and of their summary."""
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name == SUMMARY:
            yield from _check_summary(folder, progress)
        elif folder.name.endswith(PARTIAL):
            detail = "being written, or left by a failed run; the same sweep tries it again"
            yield Finding("", folder.name, "leftover", detail, "note")
        elif (folder / CONFIG).exists() or (folder / ENVIRONMENT).exists():
            yield from check_run(folder, progress, f"{folder.name}/")


def is_sweep(path: Path) -> bool:
    """Returns True for a folder with a summary or with runs."""
    return (path / SUMMARY / RUNS).exists() or any(path.glob(f"*/{ENVIRONMENT}"))


def _check_name(path: Path, config: object, prefix: str) -> Iterator[Finding]:
    named = re.search(r"-([0-9a-f]{8})$", path.name)
    actual = sha256_bytes(json.dumps(config, sort_keys=True).encode())[:8]
    if named is None:
        yield Finding("", prefix + CONFIG, "wrong name", "the folder was renamed; its config is not checked", "note")
    elif named[1] != actual:
        detail = f"the folder is named after another config ({named[1]}, not {actual}); edited or damaged"
        yield Finding("", prefix + CONFIG, "wrong name", detail)


def _check_summary(path: Path, progress: Progress) -> Iterator[Finding]:
    prefix = f"{SUMMARY}/"
    try:
        runs = read_json(path / RUNS, "run the sweep again", finite=False)
        cells = runs["cells"]
        failed = [cell["folder"] for cell in cells if cell["state"] == "failed"]
    except (WorkbenchError, KeyError, TypeError) as error:
        yield Finding("", prefix + RUNS, "unreadable", str(error))
        return
    for name in failed:
        yield Finding("", prefix + RUNS, "incomplete", f"the run {name} failed", "note")
    for cell in cells:
        if cell["state"] == "complete" and not (path.parent / cell["folder"] / CONFIG).exists():
            yield Finding("", prefix + RUNS, "missing file", f"the run {cell['folder']} is not there", "note")
    if (path / RECORD).exists():
        yield from (
            finding for finding in check_result(path, progress, prefix) if finding.file not in _sweep_files(prefix)
        )


def _sweep_files(prefix: str) -> set[str]:
    return {prefix + TABLE, prefix + RUNS}
