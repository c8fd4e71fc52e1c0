"""A copy of a store that is complete in itself: a folder, or one tar file, to keep or to send away."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

from workbench.io import files
from workbench.io.checks import as_path
from workbench.io.checksums import check_files
from workbench.io.errors import RequestError
from workbench.io.tensors import VERIFY
from workbench.store.added_records import record_names
from workbench.store.groups import complete_groups, group_checksum
from workbench.store.manifest import (
    FEATURES,
    LENSES,
    MANIFEST,
    SEGMENTS,
    TOKENS,
    UNEMBED,
    Manifest,
    read_manifest,
    read_segment_record,
)
from workbench.store.unchanged import refuse_changed
from workbench.store.writer import check_space

_TAR = ".tar"


def pack(store: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Copies all that belongs to a store, its features and lenses included, and returns the path of the copy.

    Every file is compared with its recorded checksum first. The copy shares no bytes with other stores, and has nothing
    that an interrupted recording left. `workbench verify` checks it on the other side, after `tar -xf` of a tar file.

    Args:
        store: The store, or its path.
        out: A new folder; or a name that ends in .tar, for one file with the folder in it.

    Raises:
        RequestError: There is no store, or something at `out`, which is inside of the store, or not enough space.
        DataError: A damaged file, or a full disk.
    """
    path, out = as_path("store", store).absolute(), as_path("out", out)
    manifest = read_manifest(path)
    refuse_changed(store, path, manifest)
    if out.suffix == _TAR:
        if out.exists():
            raise RequestError(f"out={out} exists; choose another name")
    else:
        files.refuse_full(out)
    if out.resolve().is_relative_to(path.resolve()):
        raise RequestError(f"out={out} is inside of the store; choose a place beside it")
    files.check_writable(out)
    recorded = _recorded(path, manifest)
    check_files([(path / name, sha256) for name, sha256 in recorded.items()], VERIFY)
    names = sorted([*recorded, *_record_files(manifest), *_made_files(path), MANIFEST])
    check_space(out, sum((path / name).stat().st_size for name in names))
    with files.explain_full_disk(str(out), "pack it again"):
        if out.suffix == _TAR:
            _write_tar(path, names, out)
        else:
            _write_folder(path, names, out)
    return out


def _recorded(path: Path, manifest: Manifest) -> dict[str, str]:
    """Files with a recorded SHA-256, relative to the store."""
    recorded = {UNEMBED: manifest.unembed} if manifest.unembed else {}
    recorded |= {str(file.relative_to(path)): group_checksum(file) for file in complete_groups(path, manifest)}
    present = {TOKENS, *(site.file for site in manifest.sites)}
    for segment in manifest.segments:
        files_of = read_segment_record(path, segment).files
        recorded |= {f"{SEGMENTS}/{segment.name}/{name}": files_of[name].sha256 for name in sorted(present)}
    return recorded


def _record_files(manifest: Manifest) -> list[str]:
    return [f"{SEGMENTS}/{segment.name}/{name}" for segment in manifest.segments for name in record_names(segment)]


def _made_files(path: Path) -> list[str]:
    """Files of features and of lenses."""
    folders = (entry for kind in (FEATURES, LENSES) for entry in path.glob(f"{kind}/[!.]*") if entry.is_dir())
    return [str(file.relative_to(path)) for folder in folders for file in folder.rglob("*") if file.is_file()]


def _write_folder(path: Path, names: Iterable[str], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch_folder(out) as partial:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / name, partial / name)
        files.fsync_tree(partial)
        files.commit_folder(partial, out)


def _write_tar(path: Path, names: Iterable[str], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(out) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            with open(path / name, "rb") as source:
                entry = tarfile.TarInfo(f"{out.stem}/{name}")
                entry.size, entry.mode = os.fstat(source.fileno()).st_size, 0o644
                archive.addfile(entry, source)
