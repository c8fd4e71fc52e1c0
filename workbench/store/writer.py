"""Writer of a store: segments are committed as a whole, and nothing that a crash leaves is ever read.

A segment is written to a scratch folder, checksummed and renamed; then the manifest is replaced, by one process at a
time. Needs a POSIX system (`flock`, `pwrite`).
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from workbench.io import files
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.parse import from_json, to_json
from workbench.sites.settings import Recording
from workbench.store import staging
from workbench.store.groups import GROUPS, write_groups
from workbench.store.manifest import (
    MANIFEST,
    SEGMENTS,
    TOKENS,
    UNEMBED,
    Manifest,
    ModelRecord,
    Part,
    Segment,
    SiteRecord,
    read_manifest,
    read_segment_record,
    write_manifest,
)
from workbench.store.segment import SegmentWriter
from workbench.store.staging import PlannedSegment
from workbench.store.stored_changes import StoredChanges, added, metric_name
from workbench.store.token_table import ROW_BYTES, check_columns, check_tokens, read_schema
from workbench.store.unembedding import LEFT_OUT, WriteUnembed, add_unembed

_LOG = logging.getLogger(__name__)

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_HEADERS = 4096  # bytes, at most, of a site's header and its share of the manifest


def required_bytes(sites: Iterable[SiteRecord], rows: int) -> int:
    """Returns the bytes of a recording of `rows` tokens: exact for activations, estimated for the rest."""
    return sum(site.row_bytes * rows + _HEADERS for site in sites) + ROW_BYTES * rows


def check_space(path: str | os.PathLike[str], needed: int) -> None:
    """Refuses a recording that does not fit on the disk of `path`, before anything is written.

    Quotas are not checked here; writing reports them.

    Raises:
        RequestError: `needed` bytes are more than the disk has free.
    """
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RequestError(
            f"{path} needs {files.human_bytes(needed)} and its disk has {files.human_bytes(free)} free; "
            "record fewer sites or rows, use a smaller dtype, or choose another out"
        )


class OtherRecording(RequestError):
    """A store that holds, or has begun, another recording than the requested one."""


@contextmanager
def open_writer(
    path: str | os.PathLike[str],
    *,
    model: ModelRecord,
    sites: Sequence[SiteRecord],
    recording: Recording,
    tokens_added: Mapping[str, Sequence[int]],
    environment: Mapping[str, str],
    unembed: WriteUnembed | None,
    unembed_reason: str | None,
    features: str | None = None,
    interventions: StoredChanges | None = None,
    gradient_of: dict[str, Any] | None = None,
    shared: bool = False,
) -> Iterator[Writer]:
    """Creates the store at `path`, or reopens it to resume or append, and locks it until the end of the block.

    Args:
        path: An empty or new directory, or a store.
        model: The recorded model; a store of another model is refused.
        sites: The recorded sites, the same in every segment.
        recording: The settings; a store of other settings is refused.
        tokens_added: `prefix` and `suffix`: token ids added around each sequence.
        environment: Library versions. A store of other versions is resumed with a warning.
        unembed: Writes the final norm and unembedding to the path it is given, or returns the reason why there is none.
            Called for a new store if none beside it has the same; for one that was made without if it is wanted now.
        unembed_reason: Reason why there is no unembedding, where `unembed` is None.
        features: Label of the SAE's features that are extracted from a site that is not stored; a store of others is
            refused.
        interventions: Interventions with which the model runs; a store of others is refused.
        gradient_of: Metric whose gradients are stored; a store of those of another one is refused.
        shared: True if other processes write other segments of the same recording at the same time.

    Raises:
        RequestError: The path is taken by something else or by another writer, or the store has other settings.
        DataError: The disk is full.
    """
    path = Path(path)
    requested = Manifest(
        model=model,
        sites=tuple(sites),
        recording=from_json(to_json(recording), "recording") | ({"features": features} if features else {}),
        tokens_added={name: tuple(map(int, tokens_added[name])) for name in ("prefix", "suffix")},
        environment=dict(environment),
        unembed=None,
        unembed_reason=None,
        interventions=interventions,
        gradient_of=gradient_of and from_json(to_json(gradient_of), "gradient_of"),
    )
    with files.locked(path, shared=shared):
        with _turn(path, shared), explain_full_disk(path, "the unembedding", 0), _explain_read_only(path):
            manifest = (
                _reopen(path, requested, shared) if (path / MANIFEST).exists() else _create(path, requested, shared)
            )
            may_add = unembed is not None and manifest.complete and not is_read_only(path)
            left_out = may_add and manifest.unembed_reason == LEFT_OUT
            if manifest.unembed is None and (manifest.unembed_reason is None or left_out):
                manifest = add_unembed(path, manifest, unembed, unembed_reason)
        with _explain_read_only(path):
            yield Writer(path, manifest, shared)


def is_read_only(path: Path) -> bool:
    """Returns True for a store on a disk, or with permissions, that do not let this process write to it."""
    return not os.access(path, os.W_OK)


@contextmanager
def _explain_read_only(path: Path) -> Iterator[None]:
    """Inside, a write that the disk or the permissions refuse raises RequestError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _READ_ONLY or not str(error.filename).startswith(str(path)):
            raise
        raise RequestError(f"{path} cannot be written ({error.strerror}); choose another out") from error


def _turn(path: Path, shared: bool) -> AbstractContextManager[None]:
    """Inside, no other process changes the manifest. A process that has locked the whole store need not wait."""
    return files.locked(path / SEGMENTS, wait=lambda: None) if shared else nullcontext()


class Writer:
    """An open store that this process may write to. Made by `open_writer`."""

    def __init__(self, path: Path, manifest: Manifest, shared: bool) -> None:
        self.path = path
        self.manifest = manifest
        """The manifest as this process knows it; replaced with each commit."""
        self._shared = shared
        self._started = False
        self._planned: dict[str, PlannedSegment] = {}  # may be committed; rows of other texts may exist
        self._schema: pa.Schema | None = None

    def begin(self, part: Part, append: bool) -> int:
        """Begins or resumes the recording of `part`; returns the number of its committed segments.

        Without `append` the store must be new or have this part alone. With it, an unfinished last part is resumed, and
        must be this one; otherwise the part is added after the others, with its first committed segment: until then the
        store on the disk stays as it was, complete.
        """
        if self._shared and append:  # the last process could not distinguish a part to add from a finished one
            raise RequestError("several processes that share a store cannot append to it; append with one")
        with self._turn():
            parts, unfinished = self.manifest.parts, not self.manifest.complete
            same_texts = bool(parts) and parts[-1].same_counts(part) and parts[-1].same_columns(part)
            if len(parts) > 1 and not append:
                raise RequestError(
                    f"{self.path} was appended to and holds {len(parts)} parts; pass append=True to add texts; "
                    "sites are added with texts=None, in a shell by workbench add"
                )
            if not parts:
                self._replace(_with_parts(self.manifest, (part,)))
            elif append and not unfinished:  # the first commit lists the part: a refused append leaves the store alone
                _remove_leftovers(self.path, self.manifest, keep=())  # of an append that may have had other texts
                self.manifest = _with_parts(self.manifest, (*parts, part))
            elif not same_texts and unfinished and not self._part_segments():  # without a committed segment
                if not self._shared:
                    _remove_leftovers(self.path, self.manifest, keep=())
                self._replace(_with_parts(self.manifest, (*parts[:-1], part)))
            elif not parts[-1].same_counts(part):
                hint = "resume that part with its own texts" if append else "pass append=True to add texts"
                raise OtherRecording(
                    f"{self.path} holds other texts: {_texts(parts[-1])} in the store, {_texts(part)} requested; "
                    f"{hint}, or choose another out"
                )
            elif not same_texts:
                raise OtherRecording(
                    f"{self.path} holds other texts than those requested, or other metadata or spans of them; give the "
                    "same, or choose another out"
                )
            self._started = True
            return len(self._part_segments())

    def ends_with(self, part: Part, digests: Sequence[str]) -> bool:
        """Returns whether the store is complete and its last part has these texts, in segments with these digests."""
        manifest = self.manifest
        if not manifest.complete or not manifest.parts[-1].same_columns(part):
            return False
        return [segment.digest for segment in self._part_segments()] == list(digests)

    def check(self, index: int, digest: str) -> None:
        """Refuses to resume with other texts: `digest` must be that of the committed segment.

        `index` counts the segments of the part, from 0.
        """
        segments = self._part_segments()
        if segments[index].digest != digest:
            number = len(self.manifest.segments) - len(segments) + index
            first, after = self.manifest.starts[number : number + 2]
            raise OtherRecording(
                f"the texts differ from the recorded ones in segment {segments[index].name} of {self.path} "
                f"(rows {first} to {after - 1}); give the same texts in the same order, or choose another out"
            )

    def resume_segments(
        self, planned: Sequence[PlannedSegment], share: Sequence[PlannedSegment] | None = None
    ) -> list[PlannedSegment]:
        """Returns the segments of the part that are still to be written, and removes what a crash left of them.

        A finished segment that the manifest does not list yet, because its writer or the committer died, is kept.

        Args:
            planned: All segments of the part.
            share: The segments that this process writes. None: all.
        """
        with self._turn():
            planned = planned[len(self._part_segments()) :]
            chosen = set(planned if share is None else share)
            assigned = [segment for segment in planned if segment in chosen]
            to_write = staging.unfinished_segments(self.path, self.manifest, assigned)
            self._planned = {segment.name: segment for segment in planned}
            if not self._shared and not is_read_only(self.path):
                _remove_leftovers(self.path, self.manifest, self._planned)
            self._commit_submitted()
        return to_write

    def commit_submitted(self) -> None:
        """Commits, in their order, the submitted segments that follow the committed ones; later ones stay submitted.

        Raises:
            RequestError: A segment with other token columns than its part's, or another recording at this path.
            DataError: The disk is full.
        """
        with self._turn(), explain_full_disk(self.path, "the manifest", self.manifest.rows):
            self._commit_submitted()

    @contextmanager
    def segment(self, rows: int, sequences: int, digest: str, tokens: pa.Table) -> Iterator[SegmentWriter]:
        """Yields a writer of the next segment and commits it at the end; an exception leaves the store unchanged.

        Args:
            rows: Rows of the segment; each must be written once, for every site.
            sequences: Sequences of the segment.
            digest: SHA-256 over its token ids and sequence lengths.
            tokens: Its token table: the columns of `workbench.store.token_table`, then metadata.

        Raises:
            DataError: The disk is full, or a row was not written.
        """
        manifest, name = self.manifest, f"{len(self.manifest.segments):05d}"
        part = manifest.parts[-1]
        remaining = part.rows - sum(segment.rows for segment in self._part_segments())
        if not 1 <= rows <= remaining:
            raise RequestError(f"segment {name} has {rows} rows; 1 to {remaining} of the planned {part.rows} are left")
        check_tokens(tokens, rows, manifest.rows, self._token_schema())
        first_sequence = sum(segment.sequences for segment in manifest.segments)
        planned = PlannedSegment(name, len(manifest.parts) - 1, rows, sequences, manifest.rows, first_sequence, digest)
        with explain_full_disk(self.path, f"segment {name}", manifest.rows):
            staging.discard(self.path, name)
            with staging.stage_segment(self.path, manifest, planned, tokens) as segment:
                yield segment
            staging.submit_segment(self.path, planned)
            self._planned[name] = planned
            self._commit_submitted()

    def _commit_submitted(self) -> None:
        listed = self.manifest.segments
        rows: list[Segment] = []
        while planned := self._planned.get(f"{len(listed) + len(rows):05d}"):
            row = staging.submitted_row(self.path, planned.name)
            if row is None or row != planned.row(row.checksum):
                break
            schema = read_schema(self.path / SEGMENTS / row.name / TOKENS)
            self._schema = self._token_schema() or schema
            check_columns(schema, self._schema)
            rows.append(row)
        if rows:
            try:
                self._replace(_with_ran(self.path, _with_segments(self.manifest, (*listed, *rows)), rows))
            finally:  # also if the disk failed after the new manifest was in place
                listed = self.manifest.segments[len(listed) :]
                staging.remove_rows(self.path, [row.name for row in listed])
            write_groups(self.path, self.manifest)

    def _part_segments(self) -> list[Segment]:
        return [segment for segment in self.manifest.segments if segment.part == len(self.manifest.parts) - 1]

    def _token_schema(self) -> pa.Schema | None:
        """Columns of the part; None before its first segment is committed."""
        if self._schema is None and (segments := self._part_segments()):
            self._schema = read_schema(self.path / SEGMENTS / segments[0].name / TOKENS)
        return self._schema

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside, this process alone changes the manifest, and knows the commits of others."""
        with _turn(self.path, self._shared):
            if self._shared:
                existing = read_manifest(self.path)
                if self._started and existing.without_segments != self.manifest.without_segments:
                    raise RequestError(
                        f"{self.path}: another process makes another recording there; all processes that share a "
                        "store need the same texts, model and settings"
                    )
                self.manifest = existing
            yield

    def _replace(self, manifest: Manifest) -> None:
        try:
            write_manifest(self.path, manifest)
        except BaseException:  # the manifest on the disk decides what is committed
            self.manifest = read_manifest(self.path)
            raise
        self.manifest = manifest


def _with_parts(manifest: Manifest, parts: tuple[Part, ...]) -> Manifest:
    return _with_segments(replace(manifest, parts=parts, rows_fingerprint=None), manifest.segments)


def _with_segments(manifest: Manifest, segments: tuple[Segment, ...]) -> Manifest:
    manifest = replace(manifest, segments=segments)
    return replace(manifest, complete=manifest.rows == manifest.planned_rows)


def _with_ran(path: Path, manifest: Manifest, rows: Iterable[Segment]) -> Manifest:
    """The manifest with what the interventions did to new segments added to their counts."""
    changes = manifest.interventions
    if changes is None:
        return manifest
    counts = changes.ran
    for row in rows:
        counts = added(counts, read_segment_record(path, row).interventions)
    return replace(manifest, interventions=replace(changes, ran=counts))


def _create(path: Path, manifest: Manifest, shared: bool) -> Manifest:
    entries = (entry for entry in path.iterdir() if not entry.name.endswith(files.PARTIAL))
    names = sorted(entry.name for entry in entries if not (shared and entry.name == SEGMENTS))
    if names:
        raise RequestError(
            f"out={path} is not empty and not a store: it holds {names[0]} and no {MANIFEST}; choose another out"
        )
    for leftover in () if shared else path.glob(f".{MANIFEST}.*{files.PARTIAL}"):
        files.remove(leftover)
    write_manifest(path, manifest)
    return manifest


def _reopen(path: Path, requested: Manifest, shared: bool) -> Manifest:
    """The manifest of the same recording, after removing leftovers of a crash unless the store is shared."""
    existing = read_manifest(path)
    newer = requested.recording.keys() - existing.recording.keys() - {"unembed"}  # settings newer than the store
    newer -= {name for name in ("where", "keep") if requested.recording.get(name)}  # these have no effect only if None
    apart = newer | _free_settings(existing, requested)
    settings, recorded = (
        {name: value for name, value in _settings(manifest).items() if name not in apart}
        for manifest in (requested, existing)
    )
    differences = _differences(recorded, settings)
    if difference := existing.model.difference(requested.model):
        differences.insert(0, f"the model is not the recorded one: {difference}")
    if (differences or newer) and not existing.segments:  # nothing is committed: the settings may change
        files.remove(path / UNEMBED)
        _remove_leftovers(path, existing, keep=())
        write_manifest(path, requested)
        return requested
    if differences:
        more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise OtherRecording(
            f"{path} was recorded with other settings: {'; '.join(differences[:6])}{more}; request the same, or choose "
            "another out"
        )
    if differences := _differences(existing.environment, requested.environment):
        _LOG.warning(
            f"{path} was started with other library versions: {'; '.join(differences)}; further rows may differ in the "
            "last bits"
        )
    if is_read_only(path):
        if not existing.complete:
            raise RequestError(
                f"{path} is read-only and has {existing.rows:,} of {existing.planned_rows:,} planned rows; make it "
                "writable to resume, or choose another out"
            )
    elif not shared:
        remove_leftovers(path, existing)
        write_groups(path, existing)  # a crash may have come between a commit and its group
    return existing


def _free_settings(existing: Manifest, requested: Manifest) -> set[str]:
    """Settings that need not be equal: a finished store may have more sites than requested, and get those it lacks."""
    if not existing.complete or not requested.sites:
        return set()
    common_names = {site.name for site in existing.sites} & {site.name for site in requested.sites}
    sites = {_site_setting(site) for site in (*existing.sites, *requested.sites) if site.name not in common_names}
    return {*sites, "dtype"}  # each site has a type of its own


def _site_setting(site: SiteRecord) -> str:
    return f"site {site.label}"


def remove_leftovers(path: Path, manifest: Manifest) -> None:
    """Removes what a crash left in a store that no process is writing: all but committed and finished segments."""
    for entry in (*path.glob(f"*{files.PARTIAL}"), *path.glob(f"{GROUPS}/*{files.PARTIAL}")):
        files.remove(entry)
    _remove_leftovers(path, manifest, keep=None)


def _remove_leftovers(path: Path, manifest: Manifest, keep: Collection[str] | None) -> None:
    """Removes segments that are neither committed nor finished; of the finished ones keeps `keep`, None: all."""
    listed = {segment.name for segment in manifest.segments}
    for entry in list((path / SEGMENTS).iterdir()) if (path / SEGMENTS).is_dir() else ():
        name, _, suffix = entry.name.removeprefix(".").partition(".")
        if not name.isdecimal() or (suffix not in ("", "json") and not entry.name.endswith(files.PARTIAL)):
            continue  # a file of somebody else
        finished = name not in listed and (keep is None or name in keep) and staging.submitted_row(path, name)
        if not (finished if suffix else finished or name in listed) or entry.name.endswith(files.PARTIAL):
            files.remove(entry)


def _settings(manifest: Manifest) -> dict[str, object]:
    """Settings that must be equal for two recordings to give the same bytes, under the names of the API."""
    model, changes = manifest.model, manifest.interventions
    apart = ("sites", "unembed")  # the sites are resolved below; an unembedding can be added
    recording = {name: value for name, value in manifest.recording.items() if name not in apart}
    return {
        "architecture": model.architecture,
        "tokenizer": model.tokenizer_fingerprint and model.tokenizer_fingerprint[:12],
        **recording,
        "interventions": changes and f"{len(changes.records)} ({changes.digest[:12]})",
        "gradient_of": manifest.gradient_of and metric_name(manifest.gradient_of),
        **{f"{name} tokens": list(ids) for name, ids in manifest.tokens_added.items()},
        **{_site_setting(site): f"{site.axes} {site.shape} {site.dtype}" for site in manifest.sites},
    }


def _differences(existing: Mapping[str, object], requested: Mapping[str, object]) -> list[str]:
    values = ((name, existing.get(name), requested.get(name)) for name in dict.fromkeys((*existing, *requested)))
    return [
        f"{name}: {'none' if stored is None else stored} in the store, {'none' if new is None else new} requested"
        for name, stored, new in values
        if stored != new
    ]


def _texts(part: Part) -> str:
    rows, sequences = counted(part.rows, "row"), counted(part.sequences, "sequence")
    return f"{rows} of {sequences} from {counted(part.documents, 'document')}"


def explain_full_disk(path: Path, content: str, rows: int) -> AbstractContextManager[None]:
    """Inside, a full disk raises DataError with what was being written and that `rows` are safe."""
    state = f"{rows} rows are committed and readable"
    return files.explain_full_disk(f"{content} of {path}", "run the same command to resume", state)
