"""Sites that are added to a finished store, or deleted from it.

The files of new sites are written into the folders of the segments, beside those that are there and are not touched,
with a record of their own: `segment.1.json`, `segment.2.json`, .... Nothing reads them before the manifest lists them,
all at once: a kill at any point leaves the store as it was or with all new sites. Deletion first takes the sites out of
the manifest, then removes their files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from workbench.io import files
from workbench.io.errors import DataError, RequestError, nearest
from workbench.io.parse import VERIFY_STORE
from workbench.io.reading import read_file
from workbench.io.tensors import read_header
from workbench.store.added_records import SEGMENT, record_names
from workbench.store.manifest import (
    SEGMENTS,
    TOKENS,
    Manifest,
    Segment,
    SiteRecord,
    parse_segment,
    read_manifest,
    write_manifest,
)
from workbench.store.segment import SegmentWriter


@contextmanager
def stage_sites(
    path: Path, manifest: Manifest, segment: Segment, sites: Sequence[SiteRecord]
) -> Iterator[SegmentWriter]:
    """Yields a writer of more sites of a committed segment; at the end of the block their files wait for `add_sites`.

    An exception leaves nothing behind.
    """
    folder = path / SEGMENTS / segment.name
    with files.scratch_folder(folder) as partial:
        writer = SegmentWriter(partial, manifest, segment.rows, None, sites)
        yield writer
        writer.finish(segment.sequences)
        for site in sites:
            os.replace(partial / site.file, folder / site.file)
        files.fsync(folder)
        os.replace(partial / SEGMENT, folder / _new_record(segment))  # last: from here on they are whole
        files.fsync(folder)


def staged_checksum(path: Path, manifest: Manifest, segment: Segment, sites: Sequence[SiteRecord]) -> str | None:
    """Returns the checksum of the record of new sites that wait in a segment; None where they are not all there."""
    folder = path / SEGMENTS / segment.name
    source = folder / _new_record(segment)
    if not source.exists():
        return None
    try:
        text = read_file(source, VERIFY_STORE)
        record = parse_segment(text, source)
        expected = {site.file: (site.label, site.dtype, (segment.rows, *site.shape)) for site in sites}
        headers = {name: read_header(folder / name) for name in record.files if name in expected}
        sizes = {name: (folder / name).stat().st_size for name in record.files}
    except (OSError, DataError):
        return None
    whole = (
        record.model == manifest.model.fingerprint
        and record.files.keys() == expected.keys()
        and sizes == {name: file.bytes for name, file in record.files.items()}
        and expected == {name: (header.name, header.dtype, header.shape) for name, header in headers.items()}
    )
    return files.sha256_bytes(text) if whole else None


def add_sites(
    path: Path,
    manifest: Manifest,
    sites: Sequence[SiteRecord],
    order: Sequence[str],
    checksums: Sequence[str],
) -> Manifest:
    """Adds sites whose files wait in every segment to the manifest, and returns it.

    Args:
        path: The store.
        manifest: Its manifest, complete.
        sites: The new sites.
        order: Names of sites in the order of the forward pass.
        checksums: Checksum of the new record in each segment.
    """
    all_sites = sorted((*manifest.sites, *sites), key=lambda site: order.index(site.name))
    segments = tuple(
        replace(segment, added=(*segment.added, checksum))
        for segment, checksum in zip(manifest.segments, checksums, strict=True)
    )
    manifest = replace(
        manifest,
        sites=tuple(all_sites),
        segments=segments,
        recording=manifest.recording | {"sites": [site.label for site in all_sites]},
        rows_fingerprint=manifest.fingerprint,
    )
    write_manifest(path, manifest)
    return manifest


def delete_sites(path: str | os.PathLike[str], labels: Sequence[str] | str) -> Manifest:
    """Deletes sites and their files from a finished store, and returns its new manifest.

    Args:
        path: The store.
        labels: Sites by label (`resid_post.3`), name, or kind (`resid_post`: every layer).

    Raises:
        RequestError: No site, one that is not recorded, all sites, or a store that is not finished.
        DataError: The disk is full or failing; the same call continues.
    """
    path, labels = Path(path), [labels] if isinstance(labels, str) else labels
    if not labels:
        raise RequestError("sites is empty; name one or more, such as resid_post.3")
    read_manifest(path)  # before the folder is made, to be locked
    with files.locked(path), files.explain_full_disk(str(path), "delete the sites again"):
        manifest = read_manifest(path)
        if not manifest.complete:
            raise RequestError(f"{path} is not finished: sites are deleted from a complete store; resume it first")
        remove_unlisted(path, manifest)  # a crash may have come before the files of a deleted site were removed
        deleted = {site.name for label in labels for site in _named(manifest, label, path)}
        remaining_sites = tuple(site for site in manifest.sites if site.name not in deleted)
        if not remaining_sites:
            raise RequestError(f"sites: these are all sites of {path}; remove the store: workbench rm {path}")
        if deleted:
            manifest = replace(
                manifest,
                sites=remaining_sites,
                recording=manifest.recording | {"sites": [site.label for site in remaining_sites]},
                rows_fingerprint=manifest.fingerprint,
            )
            write_manifest(path, manifest)
            remove_unlisted(path, manifest)
    return manifest


def remove_unlisted(path: Path, manifest: Manifest, waiting: Sequence[SiteRecord] = ()) -> None:
    """Removes files of sites that the store does not have: of deleted ones, and of abandoned additions.

    Args:
        path: The store.
        manifest: Its manifest.
        waiting: New sites whose whole files are kept.
    """
    for entry in path.glob(f".*{files.PARTIAL}"):
        files.remove(entry)
    listed = {site.file for site in manifest.sites}
    for segment in manifest.segments:
        folder = path / SEGMENTS / segment.name
        keep = listed | {TOKENS, *record_names(segment)}
        if waiting and staged_checksum(path, manifest, segment, waiting):
            keep |= {_new_record(segment), *(site.file for site in waiting)}
        for pattern in ("*.safetensors", "segment.*.json"):
            for entry in folder.glob(pattern):
                if entry.name not in keep:
                    files.remove(entry)
        for entry in (path / SEGMENTS).glob(f".{segment.name}.*{files.PARTIAL}"):
            files.remove(entry)


def _named(manifest: Manifest, label: str, path: Path) -> list[SiteRecord]:
    matches = [site for site in manifest.sites if site.has_name(label) or site.label.rpartition(".")[0] == label]
    if not matches:
        known = [name for site in manifest.sites for name in (site.label, site.label.rpartition(".")[0]) if name]
        raise RequestError(f"sites: {label} is not recorded in {path}{nearest(label, list(dict.fromkeys(known)))}")
    return matches


def _new_record(segment: Segment) -> str:
    return record_names(replace(segment, added=(*segment.added, "")))[-1]
