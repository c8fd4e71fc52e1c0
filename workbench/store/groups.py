"""Groups: the token tables of many segments in one file, so that a query of a large store opens few files.

`tokens/00000-00063-1f2e3d4c5b6a-SHA256.parquet` has a row group for each of these segments. The tables of the segments
remain the original: a group is a copy of them, named after their checksums and after its own SHA-256, and may be
removed at any time; a query then reads the segments' files. Opening a file costs a query as much as reading some
thousand rows of it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from workbench.io import files
from workbench.io.checksums import check_files
from workbench.io.errors import DataError
from workbench.io.tensors import VERIFY
from workbench.store.manifest import SEGMENTS, TOKENS, Manifest, Segment, read_segment_record
from workbench.store.token_table import parquet_options, read_schema, read_tokens

_LOG = logging.getLogger(__name__)
_reported: set[Path] = set()  # damaged files that this process has warned of

GROUPS = "tokens"
SIZE = 64
"""Segments of a group; fewer, at the end of a store, are not grouped."""


def token_files(path: Path, manifest: Manifest) -> list[tuple[Path, int]]:
    """Returns the files with the tokens of all committed rows, in row order, each with a part whose columns it has.

    A file is that of a group where it exists, else of a segment. Each is compared with its recorded checksum at its
    first use in this process. A damaged group is left out with a warning, since the segments have its tokens.

    Raises:
        DataError: A segment's table is missing or damaged.
    """
    existing = group_files(path)
    paths: list[tuple[Path, int]] = []
    for group in _groups(manifest):
        file = existing.get(_prefix(group)) if len(group) == SIZE else None
        if file and _is_sound(file):
            paths.append((file, group[0].part))
        else:
            paths += zip(segment_tables(path, group), [segment.part for segment in group], strict=True)
    return paths


def segment_tables(path: Path, segments: Iterable[Segment]) -> list[Path]:
    """Returns the files with the token tables of some segments, after a comparison with their recorded checksums.

    Raises:
        DataError: A table, or the record of its segment, is missing or damaged.
    """
    tables = [(path / SEGMENTS / segment.name / TOKENS, segment) for segment in segments]
    check_files([(file, _recorded(path, segment)) for file, segment in tables], VERIFY)
    return [file for file, _ in tables]


def write_groups(path: Path, manifest: Manifest) -> None:
    """Writes the last groups that are complete and missing, where all parts have the same columns.

    Memory: one segment's table at a time.
    """
    existing = group_files(path)
    for group in reversed(list(_groups(manifest))):
        if len(group) < SIZE:
            continue
        if _prefix(group) in existing:
            return
        _write(path / GROUPS, path, group)


def group_files(path: Path) -> dict[str, Path]:
    """Returns the files of groups by the part of their names that says of which segments they are."""
    names = sorted(os.listdir(path / GROUPS)) if (path / GROUPS).is_dir() else []
    return {name.rpartition("-")[0]: path / GROUPS / name for name in names if name.endswith(".parquet")}


def complete_groups(path: Path, manifest: Manifest) -> dict[Path, tuple[Segment, ...]]:
    """Returns the segments of each group that exists."""
    existing = group_files(path)
    groups = {_prefix(group): group for group in _groups(manifest) if len(group) == SIZE}
    return {existing[prefix]: group for prefix, group in groups.items() if prefix in existing}


def group_checksum(file: Path) -> str:
    """Returns the SHA-256 that the name of a group says it has."""
    return file.stem.rpartition("-")[2]


def _write(folder: Path, store: Path, group: Sequence[Segment]) -> None:
    tables = segment_tables(store, group)
    first = {segment.part: table for table, segment in zip(reversed(tables), reversed(group), strict=True)}
    schema, *other_schemas = [read_schema(table) for table in first.values()]  # of the first segment of each part
    if not all(schema.equals(other_schema) for other_schema in other_schemas):
        return
    folder.mkdir(exist_ok=True)
    with files.scratch_folder(folder / _prefix(group)) as scratch:
        partial = scratch / TOKENS
        with pq.ParquetWriter(partial, schema, **parquet_options(schema)) as writer:
            for table, segment in zip(tables, group, strict=True):
                writer.write_table(read_tokens([table]).combine_chunks(), row_group_size=segment.rows)
        files.fsync(partial)
        os.replace(partial, folder / f"{_prefix(group)}-{files.sha256_file(partial)}.parquet")
    files.fsync(folder)
    files.remove(folder / f"{_prefix(group)}.parquet")  # of version 1, without its checksum


def _is_sound(file: Path) -> bool:
    try:
        check_files([(file, group_checksum(file))], "remove it")
    except DataError as error:
        if file not in _reported:
            _reported.add(file)
            _LOG.warning(f"{error}; the tables of its segments are read instead")
        return False
    return True


@functools.lru_cache(1 << 17)  # the segment's checksum is that of its record
def _recorded(path: Path, segment: Segment) -> str:
    return read_segment_record(path, segment).files[TOKENS].sha256


def _prefix(group: Sequence[Segment]) -> str:
    digest = files.sha256_bytes("".join(segment.checksum for segment in group).encode())
    return f"{group[0].name}-{group[-1].name}-{digest[:12]}"


def _groups(manifest: Manifest) -> Iterator[tuple[Segment, ...]]:
    for first in range(0, len(manifest.segments), SIZE):
        yield manifest.segments[first : first + SIZE]
