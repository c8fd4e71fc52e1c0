"""Full check of a store: every byte is read once, and each problem is a row of a table."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.corpus.places import LENGTH
from workbench.io import files
from workbench.io.checks import as_path
from workbench.io.errors import DataError, RequestError, first_line
from workbench.io.findings import FileRecord, Finding, Progress, Severity, check_listed, findings_table
from workbench.io.reading import check_regular, read_file
from workbench.io.tensors import TensorHeader, read_header
from workbench.store.added_records import SEGMENT, merged_record, record_names
from workbench.store.groups import GROUPS, complete_groups, group_checksum
from workbench.store.manifest import (
    MANIFEST,
    SEGMENTS,
    TOKENS,
    UNEMBED,
    Manifest,
    Segment,
    SegmentRecord,
    SiteRecord,
    parse_segment,
    read_manifest,
)
from workbench.store.text_notes import text_notes
from workbench.store.token_table import check_tokens, read_tokens, without_nan

_BLOCK_BYTES = 8 << 20
_EXPONENT = {"float16": ("<u2", 0x7C00), "bfloat16": ("<u2", 0x7F80), "float32": ("<u4", 0x7F800000)}
_UNFINISHED = "being written, or left by a crash; the next recording removes it"


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> pd.DataFrame:
    """Checks the store at `path`; a sound store has no row of severity "error".

    Columns segment, file, finding, detail, severity. A damaged file does not stop the check of the others. Reads
    every byte once, in bounded memory, and calls `progress` with the bytes of each block.

    Raises:
        RequestError: There is no store at `path`, or one of a newer version.
    """
    return findings_table(check_store(as_path("path", path), progress or (lambda _: None)))


def check_store(path: Path, progress: Progress) -> Iterator[Finding]:
    """Yields the findings of `verify` as they are made."""
    try:
        manifest = read_manifest(path)
    except DataError as error:
        yield Finding("", MANIFEST, "unreadable", str(error))
        return
    if not manifest.complete:
        detail = f"{manifest.rows} of {manifest.planned_rows} planned rows are committed"
        yield Finding("", MANIFEST, "incomplete", detail, "note")
    for number, part in enumerate(manifest.parts):
        where = f"part {number}: " if len(manifest.parts) > 1 else ""
        for text in text_notes([part]):
            yield Finding("", MANIFEST, "changed texts", where + text, "note")
    if manifest.unembed is not None:
        size = (path / UNEMBED).stat().st_size if (path / UNEMBED).is_file() else 0  # not recorded, only its SHA-256
        yield from check_listed(path, {UNEMBED: FileRecord(size, manifest.unembed)}, progress)
    yield from _check_leftovers(path, manifest)
    yield from _check_groups(path, manifest, progress)
    row = sequence = 0
    for segment in manifest.segments:
        folder = path / SEGMENTS / segment.name
        yield from _check_segment(_Check(folder, manifest, segment, row, sequence, progress))
        row, sequence = row + segment.rows, sequence + segment.sequences


def _check_leftovers(path: Path, manifest: Manifest) -> Iterator[Finding]:
    listed = {segment.name for segment in manifest.segments}
    inside = [entry for entry in path.glob(f"{SEGMENTS}/*") if entry.name not in listed]
    waiting = {entry.stem for entry in inside if entry.suffix == ".json"} - listed
    for entry in sorted([*path.glob(f"*{files.PARTIAL}"), *inside]):
        if entry.name.endswith(files.PARTIAL):
            yield Finding("", entry.name, "leftover", _UNFINISHED, "note")
        elif entry.name in waiting:
            yield Finding(
                "", entry.name, "waiting", "finished; the recording lists it once those before it are", "note"
            )
        elif entry.stem in waiting:
            continue
        else:
            yield Finding("", entry.name, "unlisted", "the manifest does not list it, so it is not read", "note")


def _check_groups(path: Path, manifest: Manifest, progress: Progress) -> Iterator[Finding]:
    """Queries read groups instead of the tables of the segments, so the two must be equal."""
    groups = complete_groups(path, manifest)
    for entry in sorted((path / GROUPS).glob("*")):
        name = f"{GROUPS}/{entry.name}"
        if entry.name.endswith(files.PARTIAL):
            yield Finding("", name, "leftover", _UNFINISHED, "note")
        elif entry not in groups:
            detail = "made of no segments of this store, or of version 1; it is not read"
            yield Finding("", name, "unlisted", detail, "note")
        elif problem := _problem_of_group(path, entry, groups[entry], progress):
            finding, detail = problem
            yield Finding("", name, finding, f"{detail}; remove it: queries then read the segments' tables")


def _problem_of_group(path: Path, file: Path, group: Sequence[Segment], progress: Progress) -> tuple[str, str] | None:
    """Finding and detail, or None for a sound group."""
    try:
        check_regular(file, "remove it")
        if (actual := files.sha256_file(file)) != group_checksum(file):
            return "checksum differs", f"SHA-256 {actual[:12]}, recorded {group_checksum(file)[:12]}"
        progress(file.stat().st_size)
        with pq.ParquetFile(file) as table:
            if table.num_row_groups != len(group):
                return "wrong tokens", f"{table.num_row_groups} row groups for {len(group)} segments"
            for index, segment in enumerate(group):
                with contextlib.suppress(DataError):  # reported for the segment
                    original = read_tokens([path / SEGMENTS / segment.name / TOKENS])
                    if not without_nan(table.read_row_group(index)).equals(original):
                        return "wrong tokens", f"not those of segment {segment.name}"
    except Exception as error:  # Arrow's readers raise a dozen kinds
        return "unreadable", f"cannot be read ({first_line(error)})"
    return None


@dataclass(frozen=True)
class _Check:
    """Context of the checks of one segment's files."""

    folder: Path
    manifest: Manifest
    segment: Segment
    first_row: int
    first_sequence: int
    progress: Progress
    record: SegmentRecord | None = None
    """`segment.json`; None where it cannot be read."""

    def finding(self, file: str, finding: str, detail: str, severity: Severity = "error") -> Finding:
        return Finding(self.segment.name, file, finding, detail, severity)

    def wrong_model(self, file: str, actual: str) -> Finding:
        model = self.manifest.model
        detail = f"recorded from weights {actual[:12]}, the manifest is of {model.name} with {model.fingerprint[:12]}"
        return self.finding(file, "wrong model", detail)

    def checksum(self, file: str, actual: str) -> Iterator[Finding]:
        listed = self.record.files.get(file) if self.record else None
        if listed and listed.sha256 != actual:
            yield self.finding(file, "checksum differs", f"SHA-256 {actual[:12]}, recorded {listed.sha256[:12]}")


def _check_segment(check: _Check) -> Iterator[Finding]:
    if not check.folder.is_dir():
        last_row = check.first_row + check.segment.rows - 1
        yield check.finding("", "missing segment", f"rows {check.first_row} to {last_row} are gone")
        return
    record, problems = _read_record(check)
    yield from problems
    check = replace(check, record=record)
    sites = {site.file: site for site in check.manifest.sites}
    for file in (TOKENS, *sites):
        listed = record.files.get(file) if record else None
        try:
            size = (check.folder / file).stat().st_size
            check_regular(check.folder / file, "restore it from a copy")
            if listed and size != listed.bytes:
                finding = "truncated" if size < listed.bytes else "size differs"
                yield check.finding(file, finding, f"{size} bytes, recorded {listed.bytes}")
            else:
                yield from _check_tokens(check) if file == TOKENS else _check_tensor(check, sites[file])
        except FileNotFoundError:
            yield check.finding(file, "missing file", "every segment has it")
        except OSError as error:
            yield check.finding(file, "unreadable", str(error.strerror))
        except DataError as error:
            yield check.finding(file, "unreadable", str(error))
    for entry in sorted(check.folder.iterdir()):
        if entry.name not in (*record_names(check.segment), TOKENS, *sites):
            yield check.finding(entry.name, "unlisted", "not a file of this store's sites; it is not read", "note")


def _read_record(check: _Check) -> tuple[SegmentRecord | None, list[Finding]]:
    """`segment.json`, if it can serve to check the other files, and its problems."""
    segment, problems, records = check.segment, [], []
    for name, recorded in zip(record_names(segment), (segment.checksum, *segment.added), strict=True):
        record, its_problems = _read_one_record(check, name, recorded)
        problems += its_problems
        if record is None:
            return None, problems
        records.append(record)
    record = merged_record(records)
    names = {site.name for site in check.manifest.sites}
    for site, count in record.overflow.items():
        if site not in names:  # it was deleted
            continue
        detail = f"{count} values of {site} were beyond the stored type's range and are its largest"
        problems.append(check.finding(SEGMENT, "overflow", detail, "note"))
    return record, problems


def _read_one_record(check: _Check, name: str, recorded: str) -> tuple[SegmentRecord | None, list[Finding]]:
    if not (check.folder / name).exists():
        return None, [check.finding(name, "missing file", "every segment has it; checksums are unknown")]
    try:
        text = read_file(check.folder / name, "restore it from a copy")
    except DataError as error:
        return None, [check.finding(name, "unreadable", str(error))]
    problems = []
    if files.sha256_bytes(text) != recorded:
        detail = "edited or damaged; findings in its segment may follow from it"
        problems.append(check.finding(name, "checksum differs", detail))
    try:
        record = parse_segment(text, check.folder / name)
    except DataError as error:
        return None, [*problems, check.finding(name, "unreadable", str(error))]
    if record.model != check.manifest.model.fingerprint:
        problems.append(check.wrong_model(name, record.model))
    return record, problems


def _check_tensor(check: _Check, site: SiteRecord) -> Iterator[Finding]:
    path, file, record = check.folder / site.file, site.file, check.record
    header = read_header(path)
    checksum, nonfinite, first = _scan(path, header, check.progress)
    yield from check.checksum(file, checksum)
    actual = (header.metadata.get("site"), header.dtype, header.shape, header.metadata.get("axes"))
    expected = (site.name, site.dtype, (check.segment.rows, *site.shape), " ".join(site.axes))
    if actual != expected:
        yield check.finding(file, "wrong tensor", f"holds {actual}, the manifest has {expected}")
    model = header.metadata.get("model", "")
    if model != check.manifest.model.fingerprint and not (record and record.model == model):  # reported already
        yield check.wrong_model(file, model)
    recorded = record.nonfinite.get(site.name, 0) if record else 0
    if nonfinite or recorded:
        detail = f"{nonfinite} values are NaN or infinite, {recorded} of them from the model"
        where = "" if first is None else f"; first in row {check.first_row + first}"
        yield check.finding(file, "not finite", detail + where)  # always an error: means over them are NaN


def _check_tokens(check: _Check) -> Iterator[Finding]:
    path, segment = check.folder / TOKENS, check.segment
    yield from check.checksum(TOKENS, files.sha256_file(path))
    check.progress(path.stat().st_size)
    table = read_tokens([path])
    try:
        check_tokens(table, segment.rows, check.first_row, None)
    except RequestError as error:
        yield check.finding(TOKENS, "wrong tokens", str(error))
        return
    context = check.manifest.recording.get("context")
    wrong_places = _wrong_choice if check.manifest.chosen else _wrong_sequences
    if wrong := wrong_places(table, segment.sequences, check.first_sequence, context):
        yield check.finding(TOKENS, "wrong tokens", wrong)


def _wrong_sequences(table: pa.Table, sequences: int, first_sequence: int, context: object) -> str | None:
    sequence, position = table["sequence"].to_numpy(), table["position"].to_numpy()
    begins = np.flatnonzero(np.diff(sequence, prepend=-1))
    lengths = np.diff(begins, append=len(sequence))
    if not np.array_equal(sequence[begins], np.arange(first_sequence, first_sequence + sequences)):
        return f"sequences are not {first_sequence} to {first_sequence + sequences - 1}, each in one piece"
    if not np.array_equal(position, np.arange(len(position)) - np.repeat(begins, lengths)):
        return "positions do not count from 0 in every sequence"
    if isinstance(context, int) and lengths.max() > context:
        return f"a sequence has {lengths.max()} tokens, more than the context of {context}"
    return None


def _wrong_choice(table: pa.Table, sequences: int, first_sequence: int, context: object) -> str | None:
    """A reason why these cannot be chosen rows of these sequences."""
    if LENGTH not in table.column_names:
        return f"chosen rows without a column {LENGTH}"
    sequence, position, length = (table[name].to_numpy() for name in ("sequence", "position", LENGTH))
    if sequence.min() < first_sequence or sequence.max() >= first_sequence + sequences:
        return f"sequences are not among {first_sequence} to {first_sequence + sequences - 1}"
    step, same_sequence = np.diff(sequence), np.diff(sequence) == 0
    if (step < 0).any() or (np.diff(position)[same_sequence] < 1).any() or (np.diff(length)[same_sequence] != 0).any():
        return "sequences and positions in them do not ascend"
    if position.min() < 0 or (position >= length).any() or (isinstance(context, int) and length.max() > context):
        return "a position is not within its sequence"
    return None


def _scan(path: Path, header: TensorHeader, progress: Progress) -> tuple[str, int, int | None]:
    """SHA-256 of a tensor file, number of values that are NaN or infinite, and row of the first: one pass."""
    kind, exponent = _EXPONENT[header.dtype]
    digest, nonfinite, first, values = hashlib.sha256(), 0, None, 0
    with open(path, "rb") as file:
        digest.update(file.read(header.offset))
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            bad = (np.frombuffer(block, kind) & exponent) == exponent  # an exponent of all ones: NaN or infinite
            if first is None and bad.any():
                first = (values + int(bad.argmax())) // math.prod(header.shape[1:])
            nonfinite += int(np.count_nonzero(bad))
            values += len(bad)
            progress(len(block))
    return digest.hexdigest(), nonfinite, first
