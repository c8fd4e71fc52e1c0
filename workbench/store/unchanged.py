"""Stores that changed after they were opened: their files are not taken for those of the manifest that was read.

A handle reads the manifest when it is opened, and each file at the first read of its rows. In between, a recording with
`overwrite=True` may put other files under the same names, of the same shape. The checksum that the manifest on the disk
has for the segment shows it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.io.errors import DataError, RequestError
from workbench.io.parse import from_json
from workbench.store.manifest import MANIFEST, Manifest, read_manifest_text, short_list


@contextmanager
def unchanged(path: Path, manifest: Manifest, segment: int | None = None) -> Iterator[None]:
    """Inside, files of a store are opened; an error about them names the change of the store that explains it.

    Args:
        path: The store.
        manifest: The manifest of the handle.
        segment: Number of the segment whose files are opened without a comparison of checksums; it is compared with
            that of the manifest on the disk at the end. None: files that are compared with their checksums.

    Raises:
        DataError: The store was recorded anew, removed, or lost sites.
    """
    try:
        yield
    except DataError:
        if change := _change(path, manifest):
            raise DataError(change) from None
        raise
    # After the files are open: a store that takes this one's place later does not change what was opened.
    present = _present(path)
    if segment is not None and present and _checksum(present, segment) != manifest.segments[segment].checksum:
        raise DataError(_anew(path))


def same_rows(manifest: Manifest, other: Manifest) -> bool:
    """Returns True where two manifests of one path have the same rows, of which one may have more at its end."""
    pairs = zip(manifest.segments, other.segments, strict=False)
    return manifest is other or all(segment.checksum == present.checksum for segment, present in pairs)


def refuse_changed(store: object, path: Path, manifest: Manifest) -> None:
    """Raises DataError where `store`, a store or its path, was opened before the one that `manifest` is of."""
    if not same_rows(getattr(store, "manifest", manifest), manifest):
        raise DataError(_anew(path))


def _change(path: Path, manifest: Manifest) -> str | None:
    """What happened to the store since its manifest was read; None: nothing that the manifest on the disk shows."""
    present = _present(path)
    if present is None:
        gone = not os.path.lexists(path / MANIFEST)
        return f"{path} was removed or moved after it was opened; open it where it is now" if gone else None
    checksums, sites = present
    if checksums[: len(manifest.segments)] != tuple(segment.checksum for segment in manifest.segments):
        return _anew(path)
    deleted = [site.label for site in manifest.sites if site.name not in sites]
    if deleted:
        return f"sites were deleted from {path} after it was opened, {short_list(deleted)}; open it again"
    return None


def _anew(path: Path) -> str:
    return f"{path} was recorded anew after it was opened, and what was read before is of the old store; open it again"


def _checksum(present: tuple[tuple[str, ...], frozenset[str]], segment: int) -> str | None:
    return present[0][segment] if segment < len(present[0]) else None


def _present(path: Path) -> tuple[tuple[str, ...], frozenset[str]] | None:
    """Checksums of the segments and names of the sites in the manifest on the disk; None where it cannot be read."""
    try:
        stat = os.stat(path / MANIFEST)
        return _contents(path, (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    except (OSError, DataError, RequestError, KeyError, TypeError):
        return None


@functools.lru_cache(16)
def _contents(path: Path, state: tuple[int, ...]) -> tuple[tuple[str, ...], frozenset[str]]:
    """`state` is that of the file: it is read again when it changes."""
    manifest = from_json(read_manifest_text(path), path / MANIFEST)
    segments = tuple(str(segment["checksum"]) for segment in manifest["segments"])
    return segments, frozenset(str(site["name"]) for site in manifest["sites"])
