"""The folder in which features are made: its state, read once, and its steps from nothing to named features.

Features NAME are made in the hidden folder `.NAME.partial` beside their place. It holds `extraction.json`, the request
and its progress, and committed segments, written by any process. Segments are merged into the order by row, which is
indexed by feature; then the folder gets its name. After a kill at any moment, the same request continues and ends in
the same bytes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import version
from pathlib import Path

from workbench.features.feature_segments import SegmentFolder
from workbench.features.records import BY_ROW, RECORD, FeaturesRecord, SaeRecord, SiteFeatures, read_record
from workbench.io import files
from workbench.io.errors import RequestError
from workbench.io.parse import parse, read_json, to_checked_json, to_json
from workbench.sae.saved import SAVED
from workbench.store.manifest import FEATURES, SiteRecord

_LOG = logging.getLogger(__name__)

_PROGRESS, _SEGMENTS = "extraction.json", "segments"
_LONGEST_NAME = 200  # of 255 bytes that file systems allow


@dataclass(frozen=True)
class ExtractionRecord:
    """`extraction.json`: the requested features and their progress."""

    sae: SaeRecord
    site: str
    reads: tuple[SiteFeatures, ...]
    store_fingerprint: str
    rows: int
    dtype: str
    environment: dict[str, str]
    overflow: int | None
    """Activations beyond the range of `dtype`. None: the segments are not merged yet."""


class Stage(Enum):
    """Progress of an extraction."""

    EMPTY = 0
    """Nothing that is worth resuming."""
    ENCODING = 1
    """Rows are encoded segment by segment."""
    MERGED = 2
    """The order by row is complete."""
    INDEXED = 3
    """The folder lacks only its name."""
    COMPLETE = 4
    """The features are at their place."""


@dataclass(frozen=True)
class ExtractionFolder:
    """The folder in which the features `target` are made, and the state in which `read_folder` found it.

    Each step leaves the files of its stage on disk and returns the folder at the next stage.
    """

    target: Path
    record: ExtractionRecord
    """Request and progress; of a resumed extraction with the library versions of its start."""
    stage: Stage

    @property
    def path(self) -> Path:
        """The hidden folder."""
        return partial_path(self.target)

    @property
    def segments(self) -> SegmentFolder:
        """The folder of committed segments."""
        return segment_folder(self.target)

    def begin(self, shared: bool) -> ExtractionFolder:
        """Starts or resumes the extraction; removes what a crash left, but what others may be writing if `shared`."""
        if self.stage is Stage.COMPLETE:  # finished by another process while this one waited for the lock
            files.remove(self.path)
        if self.stage in (Stage.INDEXED, Stage.COMPLETE):
            return self
        started = replace(self, stage=Stage.MERGED if self.stage is Stage.MERGED else Stage.ENCODING)
        if not (self.path / _PROGRESS).is_file():
            self._keep_only()
        started._write_record()
        self._keep_only(_PROGRESS, *((BY_ROW,) if started.stage is Stage.MERGED else (_SEGMENTS, SAVED)))
        self.segments.path.mkdir(exist_ok=True)
        if not shared:
            self.segments.clean()
        return started

    def merged(self, overflow: int) -> ExtractionFolder:
        """Notes that the order by row is complete, and removes the segments."""
        merged = replace(self, record=replace(self.record, overflow=overflow), stage=Stage.MERGED)
        merged._write_record()
        files.remove(self.segments.path)
        return merged

    def indexed(self, record: FeaturesRecord) -> ExtractionFolder:
        """Writes the record that makes the folder features."""
        files.replace_file(self.path / RECORD, to_checked_json(record, finite=False).encode())
        return replace(self, stage=Stage.INDEXED)

    def commit(self) -> ExtractionFolder:
        """Gives the folder its name."""
        for leftover in (_SEGMENTS, SAVED, _PROGRESS):
            files.remove(self.path / leftover)
        files.commit_folder(self.path, self.target)
        return replace(self, stage=Stage.COMPLETE)

    def _write_record(self) -> None:
        files.replace_file(self.path / _PROGRESS, to_json(self.record, finite=False).encode())

    def _keep_only(self, *names: str) -> None:
        for leftover in self.path.iterdir():
            if leftover.name not in names:
                files.remove(leftover)


def read_folder(target: Path, request: ExtractionRecord) -> ExtractionFolder:
    """Returns the folder in which `request` is made, in its state on disk.

    Raises:
        RequestError: The target, or the unfinished folder, has other features.
    """
    if is_complete(target, request):
        return ExtractionFolder(target, request, Stage.COMPLETE)
    partial = partial_path(target)
    if (partial / RECORD).is_file() and not _differences(read_record(partial), request):
        return ExtractionFolder(target, request, Stage.INDEXED)
    record = _read_progress(partial)
    if record is None or _is_empty(partial):
        return ExtractionFolder(target, request, Stage.EMPTY)
    if differences := _differences(record, request):
        raise RequestError(
            f"unfinished features {target.name} are others: {differences}; repeat their settings to resume, choose "
            f"another name, or remove {partial}"
        )
    if record.environment != request.environment:
        _LOG.warning(
            f"features {target.name} were started with other library versions; further rows may differ in the last bits"
        )
    return ExtractionFolder(target, record, Stage.ENCODING if record.overflow is None else Stage.MERGED)


def is_complete(target: Path, request: ExtractionRecord) -> bool:
    """Returns True if `target` has the requested features, False if nothing; RequestError if anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target / RECORD).is_file():
        raise RequestError(f"{target} exists and is not a folder of features; choose another name or out")
    if differences := _differences(read_record(target), request):
        raise RequestError(f"features {target.name} exist and differ: {differences}; choose another name")
    return True


def replace_fingerprint(target: Path, old: str, new: str) -> bool:
    """Gives unfinished features of a store the store's new fingerprint, in place of the old one.

    Returns False if neither finished nor unfinished features are there.
    """
    partial = partial_path(target)
    record = _read_progress(partial)
    if record is None:
        return any((folder / RECORD).is_file() for folder in (target, partial))
    if record.store_fingerprint == old:
        record = replace(record, store_fingerprint=new)
        files.replace_file(partial / _PROGRESS, to_json(record, finite=False).encode())
    return True


@contextmanager
def locked_folder(target: Path, shared: bool) -> Iterator[None]:
    """Locks the hidden folder of `target`; after an exception removes it if it has nothing worth resuming.

    Args:
        target: Place of the features.
        shared: Other processes may write the same features; they hold the lock together.
    """
    partial = partial_path(target)
    with files.locked(partial, shared=shared):
        try:
            yield
        except BaseException:
            if not shared and _is_empty(partial):
                files.remove(partial)
            raise


def exclusive_turn(target: Path, shared: bool) -> AbstractContextManager[None]:
    """Returns a context in which no other process that shares the work begins, merges or indexes."""
    return files.locked(target.parent, wait=lambda: None) if shared else nullcontext()


def extraction_record(
    sae: SaeRecord, site: str, reads: tuple[SiteFeatures, ...], fingerprint: str, rows: int, dtype: str
) -> ExtractionRecord:
    """Returns the request of features of a store with this fingerprint and number of rows."""
    environment = {library: version(library) for library in ("interp-workbench", "sae-lens", "torch")}
    return ExtractionRecord(sae, site, reads, fingerprint, rows, dtype, environment, overflow=None)


def target_path(store: Path, site: SiteRecord, sae: str, name: str | None = None) -> Path:
    """Returns the place of features in a store. `name` None: made of the site and the SAE's name."""
    name = _folder_name(f"{site.label}-{sae}") if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise RequestError(f"name {name!r} cannot be a folder; use letters, digits, '_', '.' and '-' only")
    return store / FEATURES / name


def _folder_name(text: str) -> str:
    """A text as the name of a folder; long ones and letters beyond ASCII, which are lost, leave a digest of it."""
    name = re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)
    if len(name) <= _LONGEST_NAME and text.isascii():
        return name
    return f"{name[:_LONGEST_NAME]}-{files.sha256_bytes(text.encode())[:8]}"


def partial_path(target: Path) -> Path:
    """Returns the hidden folder in which the features `target` are made."""
    return target.with_name(f".{target.name}{files.PARTIAL}")


def segment_folder(target: Path) -> SegmentFolder:
    """Returns the folder of committed segments of the unfinished features `target`."""
    return SegmentFolder(partial_path(target) / _SEGMENTS)


def _read_progress(partial: Path) -> ExtractionRecord | None:
    source = partial / _PROGRESS
    if not source.is_file():
        return None
    advice = f"remove {partial} to extract anew"
    value = read_json(source, advice)
    if "reads" not in value:  # begun by an earlier version, which read one site
        raise RequestError(f"{source} was written by an earlier version; {advice}")
    return parse(ExtractionRecord, value, str(source))


def _is_empty(partial: Path) -> bool:
    """Returns True if there is nothing to resume."""
    return not (partial / BY_ROW).exists() and not any(SegmentFolder(partial / _SEGMENTS).spans())


def _differences(existing: FeaturesRecord | ExtractionRecord, request: ExtractionRecord) -> str:
    """The settings in which existing features differ from the requested ones; empty if they are the same."""
    pairs = (
        ("SAE", existing.sae.fingerprint, request.sae.fingerprint, _sae_text(existing.sae), _sae_text(request.sae)),
        ("site", _sites(existing), _sites(request), existing.site, request.site),
        ("dtype", existing.dtype, request.dtype, existing.dtype, request.dtype),
        (
            "store",
            (existing.store_fingerprint, existing.rows),
            (request.store_fingerprint, request.rows),
            _store_text(existing),
            _store_text(request),
        ),
    )
    differing = (
        (name, text, request_text)
        for name, existing_value, requested_value, text, request_text in pairs
        if existing_value != requested_value
    )
    return "; ".join(f"{name} is {text}, requested is {request_text}" for name, text, request_text in differing)


def _sites(record: FeaturesRecord | ExtractionRecord) -> tuple[str, list[str]]:
    return record.site, [reading.site for reading in record.reads]


def _sae_text(sae: SaeRecord) -> str:
    return f"{sae.name} ({sae.fingerprint[:12]})"


def _store_text(record: FeaturesRecord | ExtractionRecord) -> str:
    return f"{record.store_fingerprint[:12]} of {record.rows} rows"
