"""Several stores of the same sites of one model as one store, whose tokens name the store that they come from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from workbench.io import files
from workbench.io.checks import as_path
from workbench.io.errors import RequestError, shown
from workbench.io.findings import FileRecord
from workbench.io.parse import from_json, to_json
from workbench.sites.settings import Recording
from workbench.store import staging
from workbench.store.added_records import SEGMENT
from workbench.store.groups import segment_tables, write_groups
from workbench.store.manifest import (
    MANIFEST,
    SEGMENTS,
    TOKENS,
    UNEMBED,
    Manifest,
    Segment,
    read_manifest,
    read_segment_record,
    write_manifest,
)
from workbench.store.new_columns import check_common_columns
from workbench.store.reader import Store, open_store
from workbench.store.staging import PlannedSegment
from workbench.store.token_table import encode_tokens, read_tokens
from workbench.store.unchanged import refuse_changed
from workbench.store.unembedding import link_or_copy
from workbench.store.writer import check_space, required_bytes

_OF_TEXTS = frozenset(
    {"sites", "dtype", "max_rows", "text_column", "metadata", "span_column", "batch_tokens", "segment_rows", "unembed"}
    | {"generation_prompt", "unaligned_pairs", "features"}
)
"""Settings in which merged stores may differ: they choose texts and sizes, or appear in the sites themselves."""

_UNFINISHED = "the merge is not finished; the same call resumes it"

Stores = Sequence[Store | str | os.PathLike[str]] | Mapping[str, Store | str | os.PathLike[str]]


def merge(stores: Stores, out: str | os.PathLike[str], *, column: str = "store") -> Store:
    """Writes the rows of several stores, one store after another, as one store, and returns it.

    Rows, sequences and documents are counted on. Activations are hard links to the files of the stores, copies on
    another disk; a killed call is resumed by the same one. Features are not merged: extract them again.

    Args:
        stores: Two or more complete stores of the same sites of the same model, or their paths; or a mapping of names
            to them.
        out: Folder of the new store.
        column: New column of the token table with the name of the store that a row comes from.

    Raises:
        RequestError: Stores that differ in model, sites or settings; names that are not distinct; a column that exists.
        DataError: A damaged file, or a full disk.
    """
    sources = _sources(stores)
    _check(sources, column)
    out = as_path("out", out)
    requested, planned = _plan(sources, column)
    links = all(os.stat(source.path).st_dev == os.stat(_existing(out)).st_dev for source in sources)
    check_space(out, required_bytes(() if links else requested.sites, requested.rows))
    requested = replace(requested, segments=(), complete=False)
    with files.locked(out), files.explain_full_disk(str(out), "merge again, which resumes"):
        if not _begin(out, requested, sources[0].path):
            segments = tuple(_segment(out, requested, *plan, column) for plan in planned)
            write_manifest(out, replace(requested, segments=segments, complete=True))
        staging.remove_rows(out, [new.name for new, *_ in planned])
        write_groups(out, read_manifest(out))
    return open_store(out)


@dataclass(frozen=True)
class _Source:
    name: str
    path: Path
    manifest: Manifest


_Planned = tuple[PlannedSegment, _Source, Segment, int]
"""A segment of the new store, the store and segment that it comes from, and documents of the stores before."""


def _sources(stores: Stores) -> list[_Source]:
    if isinstance(stores, str | os.PathLike) or not isinstance(stores, Iterable):
        raise RequestError(f"stores must be a list of stores or of their paths, not {shown(stores)}")
    named = stores.items() if isinstance(stores, Mapping) else ((None, store) for store in stores)
    sources = [_source(name, store) for name, store in named]
    if len(sources) < 2:
        raise RequestError(f"stores: {len(sources)} given; merge takes two or more")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise RequestError(
            f"stores: two are named {max(names, key=names.count)}; rename a folder, or in Python give a mapping of "
            "names to stores"
        )
    return sources


def _source(name: str | None, store: str | os.PathLike[str]) -> _Source:
    path = as_path("stores", store)
    manifest = read_manifest(path)
    refuse_changed(store, path, manifest)
    return _Source(path.name if name is None else name, path.absolute(), manifest)


def _check(sources: Sequence[_Source], column: str) -> None:
    """Refuses stores that do not fit each other."""
    first = sources[0]
    for source in sources:
        pair, manifest = f"stores: {source.path} and {first.path}", source.manifest
        if not manifest.complete:
            raise RequestError(f"stores: {source.path} is not complete; resume its recording first")
        if manifest.interventions:
            raise RequestError(
                f"stores: {source.path} was recorded with interventions; merge stores of the model as it is"
            )
        if manifest.gradient_of != first.manifest.gradient_of:
            raise RequestError(f"{pair} hold gradients of different metrics; merge stores of one metric")
        if difference := first.manifest.model.difference(manifest.model):
            raise RequestError(f"{pair} are of two models: {difference}; merge stores of one model")
        if manifest.model.tokenizer_fingerprint != first.manifest.model.tokenizer_fingerprint:
            raise RequestError(f"{pair} are of two tokenizers; merge stores of one")
        sites = [{site.label: site for site in side.manifest.sites} for side in (first, source)]
        for label in dict.fromkeys((*sites[0], *sites[1])):
            first_site, source_site = (by_label.get(label) for by_label in sites)
            if first_site != source_site:
                known = [f"{site.shape} {site.dtype}" if site else "none" for site in (source_site, first_site)]
                raise RequestError(
                    f"{pair} differ in site {label}: {known[0]} and {known[1]}; add or delete sites until they agree"
                )
        settings = [
            {name: value for name, value in side.manifest.recording.items() if name not in _OF_TEXTS}
            | {f"{name} tokens": ids for name, ids in side.manifest.tokens_added.items()}
            for side in (source, first)
        ]
        for name in dict.fromkeys((*settings[0], *settings[1])):
            if settings[0].get(name) != settings[1].get(name):
                raise RequestError(
                    f"{pair} differ in {name}: {settings[0].get(name)} and {settings[1].get(name)}; merge stores of "
                    "equal settings"
                )
    columns = check_common_columns([(source.path, source.manifest) for source in sources])
    if column in columns.names:
        raise RequestError(f"column: the stores have a column {column!r} already; choose another name")


def _plan(sources: Sequence[_Source], column: str) -> tuple[Manifest, list[_Planned]]:
    """The manifest of the new store, with segments that still have the old names and checksums, and its segments."""
    first = sources[0].manifest
    defaults = from_json(to_json(Recording()), "recording")
    recording = {
        name: value if all(s.manifest.recording.get(name) == value for s in sources) else defaults.get(name)
        for name, value in first.recording.items()
        if name != "features"
    }
    recording["sites"] = [site.label for site in first.sites]
    parts, planned, documents, rows, sequences = [], [], 0, 0, 0
    for source in sources:
        offset = len(parts)
        for part in source.manifest.parts:
            text = f"{part.columns} {column} {source.name}"
            parts.append(replace(part, columns=part.columns and files.sha256_bytes(text.encode())))
        for segment in source.manifest.segments:
            new = PlannedSegment(
                name=f"{len(planned):05d}",
                part=segment.part + offset,
                rows=segment.rows,
                sequences=segment.sequences,
                first_row=rows,
                first_sequence=sequences,
                digest=segment.digest,
            )
            planned.append((new, source, segment, documents))
            rows, sequences = rows + segment.rows, sequences + segment.sequences
        documents += sum(part.documents for part in source.manifest.parts)
    manifest = replace(
        first,
        recording=recording,
        parts=tuple(parts),
        segments=tuple(new.row(old.checksum) for new, _, old, _ in planned),
        rows_fingerprint=None,
    )
    return manifest, planned


def _begin(out: Path, requested: Manifest, first: Path) -> bool:
    """Makes the store without segments, or resumes it; True: it is complete already."""
    started = replace(requested, unembed=None, unembed_reason=_UNFINISHED)  # a reader would miss its file
    if (out / MANIFEST).exists():
        existing = read_manifest(out)
        if existing.without_segments != (requested if existing.complete else started):
            raise RequestError(f"out={out} holds another store; choose another out, or remove it: workbench rm {out}")
        if existing.complete:
            return True
    elif foreign_names := [entry.name for entry in out.iterdir() if not entry.name.endswith(files.PARTIAL)]:
        raise RequestError(f"out={out} is not empty: it holds {foreign_names[0]}; choose another out")
    for leftover in (*out.glob(f".*{files.PARTIAL}"), *out.glob(f"{SEGMENTS}/.*{files.PARTIAL}")):
        files.remove(leftover)
    write_manifest(out, started)
    if requested.unembed and not (out / UNEMBED).exists():
        with files.scratch_folder(out / UNEMBED) as partial:
            link_or_copy(first / UNEMBED, partial / UNEMBED)
            os.replace(partial / UNEMBED, out / UNEMBED)
    return False


def _segment(
    out: Path, manifest: Manifest, new: PlannedSegment, source: _Source, old: Segment, documents: int, column: str
) -> Segment:
    """The row of a segment of the new store, which is written unless it is there."""
    row = staging.submitted_row(out, new.name)
    if row is not None and row == new.row(row.checksum):
        return row
    staging.discard(out, new.name)
    folder = out / SEGMENTS / new.name
    folder.parent.mkdir(exist_ok=True)
    known = read_segment_record(source.path, old)
    names = {site.name for site in manifest.sites}
    sites = {site.file: known.files[site.file] for site in manifest.sites}
    tokens = encode_tokens(_tokens(source, old, new, documents, column))
    record = replace(
        known,
        files={TOKENS: FileRecord(len(tokens), files.sha256_bytes(tokens)), **sites},
        overflow={name: count for name, count in known.overflow.items() if name in names},
        nonfinite={name: count for name, count in known.nonfinite.items() if name in names},
    )
    with files.scratch_folder(folder) as partial:
        files.write_file(partial / TOKENS, tokens)
        for name in sites:
            link_or_copy(source.path / SEGMENTS / old.name / name, partial / name)
        files.write_file(partial / SEGMENT, to_json(record).encode())
        files.commit_folder(partial, folder)
    return staging.submit_segment(out, new)


def _tokens(source: _Source, old: Segment, new: PlannedSegment, documents: int, column: str) -> pa.Table:
    """The token table of a segment, counted on from the stores before, with the name of its store."""
    table = read_tokens(segment_tables(source.path, [old]))
    starts = source.manifest.starts
    first_row = int(starts[source.manifest.segments.index(old)])
    first_sequence = table["sequence"][0].as_py()
    offsets = {
        "row": new.first_row - first_row,
        "sequence": new.first_sequence - first_sequence,
        "document": documents,
    }
    for name, offset in offsets.items():
        index = table.schema.get_field_index(name)
        values = pa.array(table[name].to_numpy() + offset, table.schema.field(name).type)
        table = table.set_column(index, table.schema.field(name), values)
    source_names = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(table.num_rows, np.int32)), pa.array([source.name], pa.string())
    )
    return table.append_column(column, source_names)


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
