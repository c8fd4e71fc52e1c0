"""Staging of segments: any process may write one, in any order; one process at a time commits them to the manifest.

A segment is written to a scratch folder, checksummed and renamed: its folder exists as a whole or not at all. Then its
row of the manifest is submitted in a file beside it, `00017.json`, until the process that holds the manifest commits
it. A writer that dies leaves nothing that is read, and finished segments are not written again.
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
from workbench.io.parse import VERIFY_STORE, parse, read_json, to_json
from workbench.io.reading import explain_unreadable, read_file
from workbench.store.added_records import SEGMENT
from workbench.store.manifest import SEGMENTS, TOKENS, Manifest, Segment, SegmentRecord, parse_segment
from workbench.store.segment import SegmentWriter
from workbench.store.token_table import check_tokens

_SUBMITTED = ".json"


@dataclass(frozen=True)
class PlannedSegment:
    """A segment as planned, before it is written."""

    name: str
    """Folder under `segments/`: 00000, 00001, ..."""
    part: int
    """Index of the part that its texts belong to."""
    rows: int
    sequences: int
    first_row: int
    """Row of the store at which it begins."""
    first_sequence: int
    """Sequence of the store at which it begins."""
    digest: str
    """SHA-256 over its token ids and sequence lengths."""

    def row(self, checksum: str) -> Segment:
        """Returns its row of the manifest; `checksum` is that of its `segment.json`."""
        return Segment(self.name, self.rows, self.sequences, self.part, self.digest, checksum)


@contextmanager
def stage_segment(path: Path, manifest: Manifest, planned: PlannedSegment, tokens: pa.Table) -> Iterator[SegmentWriter]:
    """Yields a writer of a segment; at the end of the block its folder has its name, ready for `submit_segment`.

    Other processes may write at the same time, even the same segment: the first to finish wins. An exception leaves
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


def submit_segment(path: Path, planned: PlannedSegment) -> Segment:
    """Writes the row of a finished segment beside it and returns it: from then on the segment survives its writer.

    Raises:
        DataError: `segment.json` cannot be read.
    """
    folder = path / SEGMENTS / planned.name
    row = planned.row(_checksum(folder))
    files.replace_file(folder.with_name(planned.name + _SUBMITTED), to_json(row).encode())
    return row


def submitted_row(path: Path, name: str) -> Segment | None:
    """Returns the row submitted under this name, if it fits its segment; None otherwise."""
    source = path / SEGMENTS / (name + _SUBMITTED)
    try:
        row = parse(Segment, read_json(source), str(source))
        return row if row.checksum == _checksum(path / SEGMENTS / name) else None
    except DataError:
        return None


def unfinished_segments(path: Path, manifest: Manifest, planned: Iterable[PlannedSegment]) -> list[PlannedSegment]:
    """Returns the planned segments that are still to be written, and removes what exists of them.

    No other process may be writing them.
    """
    to_write, unfinished = [], defaultdict(list)
    for entry in (path / SEGMENTS).glob(f"*{files.PARTIAL}"):
        unfinished[entry.name.removeprefix(".").split(".")[0]].append(entry)
    for segment in planned:
        row = submitted_row(path, segment.name)
        if row is None or row != segment.row(row.checksum) or not _matches_store(path, manifest, row):
            discard(path, segment.name)
            for entry in unfinished[segment.name]:
                files.remove(entry)
            to_write.append(segment)
    return to_write


def discard(path: Path, name: str) -> None:
    """Removes a segment that is not committed, and its row."""
    files.remove(path / SEGMENTS / (name + _SUBMITTED))
    files.remove(path / SEGMENTS / name)


def remove_rows(path: Path, names: Iterable[str]) -> None:
    """Removes the rows of segments that the manifest lists."""
    for name in names:
        files.remove(path / SEGMENTS / (name + _SUBMITTED))


def _matches_store(path: Path, manifest: Manifest, row: Segment) -> bool:
    """True if the segment's files are those of this store's model and sites, by name and size."""
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
    """Keeps the folder of a process that finished this segment first if it has the same tokens, else replaces it."""
    if _record(folder).files[TOKENS] != _record(partial).files[TOKENS]:
        files.remove(folder)
        files.commit_folder(partial, folder)


def _record(folder: Path) -> SegmentRecord:
    return parse_segment(read_file(folder / SEGMENT, VERIFY_STORE), folder / SEGMENT)


def _checksum(folder: Path) -> str:
    with explain_unreadable(folder / SEGMENT, "record it again"):
        return files.sha256_file(folder / SEGMENT)
