"""Segments on their way into a store: any process may write one, in any order; one at a time lists them.

A segment is written under a name of its writer's own, put on the disk, checksummed and renamed: its folder is there as
a whole or not at all. Its row of the manifest then waits beside it, in a file `00017.json`, until the process that
holds the manifest commits it. A writer that dies leaves nothing that is read, and what was finished is not done again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from workbench.io import files
from workbench.io.errors import DataError
from workbench.io.parse import from_json, parse, to_json
from workbench.store.manifest import (
    SEGMENT,
    SEGMENTS,
    TOKENS,
    Manifest,
    Segment,
    SegmentRecord,
    parse_segment,
)
from workbench.store.segment import SegmentWriter
from workbench.store.token_table import check_tokens

_WAITING = ".json"


@dataclass(frozen=True)
class PlannedSegment:
    """A segment as planned, before anybody has written it."""

    name: str
    """Folder under `segments/`: 00000, 00001, ..."""
    part: int
    """Index of the part its texts come from."""
    rows: int
    sequences: int
    first_row: int
    """Row of the store that its first row is."""
    first_sequence: int
    """Likewise of its first sequence."""
    digest: str
    """SHA-256 over its token ids and sequence lengths."""

    def committed(self, checksum: str) -> Segment:
        """Its row of the manifest; `checksum` is that of its `segment.json`."""
        return Segment(self.name, self.rows, self.sequences, self.part, self.digest, checksum)


@contextmanager
def staged(path: Path, manifest: Manifest, planned: PlannedSegment, tokens: pa.Table) -> Iterator[SegmentWriter]:
    """Write a segment inside the block; at its end its folder has its name, and `hand_in` lets it be committed.

    Safe beside other processes, even one that writes the same segment: the first to finish wins. An exception leaves
    nothing behind.
    """
    check_tokens(tokens, planned.rows, planned.first_row, None)
    folder = path / SEGMENTS / planned.name
    folder.parent.mkdir(exist_ok=True)
    with files.scratch_folder(folder) as partial:
        segment = SegmentWriter(partial, manifest, planned.rows, tokens)
        yield segment
        segment.finish(planned.sequences)
        try:
            files.commit_folder(partial, folder)
        except FileExistsError:
            _settle(partial, folder)


def hand_in(path: Path, planned: PlannedSegment) -> Segment:
    """Let the row of a finished segment wait for its commit; gives that row. DataError where the folder is not whole.

    Costs one small file, durably: from here on the segment survives its writer.
    """
    folder = path / SEGMENTS / planned.name
    row = planned.committed(_checksum(folder))
    files.replace_file(folder.with_name(planned.name + _WAITING), to_json(row).encode())
    return row


def waiting(path: Path, name: str) -> Segment | None:
    """The row that waits under this name, if its segment is there as the row says; None otherwise."""
    source = path / SEGMENTS / (name + _WAITING)
    try:
        row = parse(Segment, from_json(source.read_bytes(), source), str(source))
        return row if row.checksum == _checksum(path / SEGMENTS / name) else None
    except (OSError, DataError):
        return None


def keep_finished(path: Path, manifest: Manifest, planned: Iterable[PlannedSegment]) -> list[PlannedSegment]:
    """Which of the planned segments are still to be written; what is there of those, unfinished or of others, goes.

    Nobody else may be writing them.
    """
    left, unfinished = [], defaultdict(list)
    for entry in (path / SEGMENTS).glob(f"*{files.PARTIAL}"):
        unfinished[entry.name.removeprefix(".").split(".")[0]].append(entry)
    for segment in planned:
        row = waiting(path, segment.name)
        if row is None or row != segment.committed(row.checksum) or not _whole(path, manifest, row):
            discard(path, segment.name)
            for entry in unfinished[segment.name]:
                files.remove(entry)
            left.append(segment)
    return left


def discard(path: Path, name: str) -> None:
    """Remove a segment that is not committed, and the row that waits for it."""
    files.remove(path / SEGMENTS / (name + _WAITING))
    files.remove(path / SEGMENTS / name)


def forget(path: Path, names: Iterable[str]) -> None:
    """These rows stand in the manifest and wait no longer."""
    for name in names:
        files.remove(path / SEGMENTS / (name + _WAITING))


def _whole(path: Path, manifest: Manifest, row: Segment) -> bool:
    """Whether the segment's files are those of this store's model and sites, by name and size."""
    folder = path / SEGMENTS / row.name
    try:
        record = _record(folder)
        sizes = {name: (folder / name).stat().st_size for name in record.files}
    except (OSError, DataError):
        return False
    return (
        record.files.keys() == {TOKENS, *(site.file for site in manifest.sites)}
        and sizes == {name: file.bytes for name, file in record.files.items()}
        and record.model == manifest.model.fingerprint
    )


def _settle(partial: Path, folder: Path) -> None:
    """Another process has finished this segment first: of the same tokens its folder stays, of others it goes."""
    if _record(folder).files[TOKENS] != _record(partial).files[TOKENS]:
        files.remove(folder)
        files.commit_folder(partial, folder)


def _record(folder: Path) -> SegmentRecord:
    return parse_segment((folder / SEGMENT).read_bytes(), folder / SEGMENT)


def _checksum(folder: Path) -> str:
    try:
        return files.sha256_file(folder / SEGMENT)
    except OSError as error:
        raise DataError(f"{folder / SEGMENT} cannot be read: {error.strerror}; record it again") from None
