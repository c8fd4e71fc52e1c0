"""Groups: the token tables of many segments in one file, so that a query of a large store opens few files.

`tokens/00000-00063-1f2e3d4c5b6a.parquet` has a row group for each of these segments. The tables of the segments remain
the original: a group is a copy of them, named after their checksums, and may be removed at any time; a query then reads
the segments' files. Opening a file costs a query as much as reading some thousand rows of it.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from workbench.io import files
from workbench.store.manifest import SEGMENTS, TOKENS, Manifest, Segment
from workbench.store.token_table import parquet_options, read_schema, read_tokens

GROUPS = "tokens"
SIZE = 64
"""Segments of a group; fewer, at the end of a store, are not grouped."""


def token_files(path: Path, manifest: Manifest) -> list[tuple[Path, int]]:
    """Returns the files with the tokens of all committed rows, in row order, each with a part whose columns it has.

    A file is that of a group where it exists, else of a segment.
    """
    paths: list[tuple[Path, int]] = []
    for _, group in _groups(manifest):
        file = group_file(path, group)
        if len(group) == SIZE and file.exists():
            paths.append((file, group[0].part))
        else:
            paths += [(path / SEGMENTS / segment.name / TOKENS, segment.part) for segment in group]
    return paths


def write_groups(path: Path, manifest: Manifest) -> None:
    """Writes the last groups that are complete and missing, where all parts have the same columns.

    Memory: one segment's table at a time.
    """
    for _, group in reversed(list(_groups(manifest))):
        file = group_file(path, group)
        if len(group) < SIZE:
            continue
        if file.exists():
            return
        first = {segment.part: segment for segment in reversed(group)}  # first segment of each part
        schema, *others = [read_schema(path / SEGMENTS / segment.name / TOKENS) for segment in first.values()]
        if not all(schema.equals(other) for other in others):
            continue
        file.parent.mkdir(exist_ok=True)
        with files.new_file(file) as output, pq.ParquetWriter(output, schema, **parquet_options(schema)) as writer:
            for segment in group:
                table = read_tokens([path / SEGMENTS / segment.name / TOKENS])
                writer.write_table(table.combine_chunks(), row_group_size=segment.rows)


def complete_groups(path: Path, manifest: Manifest) -> list[tuple[Path, tuple[Segment, ...]]]:
    """Returns the file of each group, whether it exists or not, and its segments."""
    return [(group_file(path, group), group) for _, group in _groups(manifest) if len(group) == SIZE]


def group_file(path: Path, group: tuple[Segment, ...]) -> Path:
    """Returns the path of the group of these segments."""
    digest = files.sha256_bytes("".join(segment.checksum for segment in group).encode())
    return path / GROUPS / f"{group[0].name}-{group[-1].name}-{digest[:12]}.parquet"


def _groups(manifest: Manifest) -> list[tuple[int, tuple[Segment, ...]]]:
    return [(first, manifest.segments[first : first + SIZE]) for first in range(0, len(manifest.segments), SIZE)]
