"""File of the unembedding in a store: linked from a store beside it that has the same, else written by the model.

Stores of one model in one folder then keep these bytes once, and each of them is complete: a copy of its folder has a
file of its own. The bytes disappear with the last of the stores.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from workbench.io import files
from workbench.io.checksums import check_files
from workbench.io.errors import WorkbenchError
from workbench.io.tensors import VERIFY
from workbench.store.manifest import MANIFEST, UNEMBED, Manifest, ModelRecord, parse_manifest, write_manifest

LEFT_OUT = "it was recorded with unembed=False; record it again without that, or give the probe another store"
"""Reason in the manifest of a store whose unembedding was not asked for."""

WriteUnembed = Callable[[Path], object]
"""Writes final norm, unembedding and vocabulary to a path. A text that it returns is the reason why the first two are
left out."""


def add_unembed(path: Path, manifest: Manifest, write: WriteUnembed | None, reason: str | None) -> Manifest:
    """Adds the unembedding to the store at `path`, or the reason why there is none; returns its new manifest.

    The manifest is on the disk before, without it: a crash here leaves a store.

    Args:
        path: The store.
        manifest: Its manifest.
        write: Called if no store beside it has the same. None: there is no unembedding.
        reason: Reason for that.
    """
    checksum = None
    if write is not None:
        with files.scratch_folder(path / UNEMBED) as partial:
            new = partial / UNEMBED
            linked = _link_other(path, manifest.model, new)
            if linked is not None:
                checksum, reason = linked.unembed, linked.unembed_reason
            else:
                answer = write(new)
                reason = answer if isinstance(answer, str) else None
                if new.exists():
                    os.chmod(new, partial.stat().st_mode & 0o666)  # as every other file here, not 0600
                    files.fsync(new)
                    checksum = files.sha256_file(new)
            if checksum is not None:
                os.replace(new, path / UNEMBED)
        files.fsync(path)
    recording = manifest.recording
    if checksum is not None and "unembed" in recording:
        recording = recording | {"unembed": True}
    reason = reason if checksum else reason or "not asked for"
    rows = manifest.fingerprint if manifest.complete else None
    manifest = replace(manifest, unembed=checksum, unembed_reason=reason, recording=recording, rows_fingerprint=rows)
    write_manifest(path, manifest)
    return manifest


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file that is never changed in place a second name; a copy where the disk has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        files.fsync(target)


def _link_other(path: Path, model: ModelRecord, new: Path) -> Manifest | None:
    """Manifest of a store of the same model, whose file has now the name `new` too; None: there is none."""
    for file, manifest in _unembeddings_beside(path, model):
        with suppress(WorkbenchError, OSError):  # damaged, or removed meanwhile: it is written anew
            check_files([(file, manifest.unembed or "")], VERIFY)
            link_or_copy(file, new)
            return manifest
        files.remove(new)
    return None


def _unembeddings_beside(path: Path, model: ModelRecord) -> Iterator[tuple[Path, Manifest]]:
    """Files of the unembedding of a model in the stores beside `path`, with the manifests of these.

    Only this user's: another one could change the bytes later.
    """
    expected = _identity(model)
    for entry in sorted(os.scandir(path.absolute().parent), key=lambda entry: entry.name):
        with suppress(WorkbenchError, OSError):
            source = Path(entry.path) / MANIFEST
            if entry.name == path.name or not entry.is_dir(follow_symlinks=False) or not source.is_file():
                continue
            text = source.read_bytes()
            if model.fingerprint.encode() not in text:  # most manifests need not be parsed
                continue
            manifest = parse_manifest(text, source)
            file = source.with_name(UNEMBED)
            if manifest.unembed and _identity(manifest.model) == expected and file.stat().st_uid == os.geteuid():
                yield file, manifest


def _identity(model: ModelRecord) -> ModelRecord | None:
    """A model without its name; None, which equals no model, where its behaviour is not known."""
    return replace(model, name="", revision=None) if model.identity else None
