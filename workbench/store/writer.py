"""Writing a store: segments are committed as a whole, one writer at a time, and nothing a crash leaves is ever read.

A segment is written under a temporary name, put on the disk, checksummed and renamed; then the manifest is replaced.
Needs a POSIX system (`flock`, `pwrite`).
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from workbench.errors import RequestError
from workbench.settings import Recording
from workbench.store import files
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
    write_manifest,
)
from workbench.store.parse import from_json, to_json
from workbench.store.segment import SegmentWriter
from workbench.store.tokens import ROW_BYTES, check_tokens, read_schema

_HEADERS = 4096  # bytes, at most, of a site's header and its share of the manifest


def required_bytes(sites: Iterable[SiteRecord], rows: int) -> int:
    """Bytes a recording of `rows` tokens will take on the disk: exact for activations, estimated for the rest."""
    return sum(site.row_bytes * rows + _HEADERS for site in sites) + ROW_BYTES * rows


def check_space(path: str | os.PathLike[str], needed: int) -> None:
    """Refuse, before anything is written, what will not fit on the disk that holds (or would hold) `path`.

    Quotas are not looked at: they are met, and reported, while writing.

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


@contextmanager
def open_writer(
    path: str | os.PathLike[str],
    *,
    model: ModelRecord,
    sites: Sequence[SiteRecord],
    recording: Recording,
    tokens_added: Mapping[str, Sequence[int]],
    environment: Mapping[str, str],
    unembed: Callable[[Path], None] | None,
    unembed_reason: str | None,
    features: str | None = None,
) -> Iterator[Writer]:
    """Create the store at `path`, or reopen it to resume or append, holding it alone until the block is left.

    Args:
        path: An empty or new directory, or a store.
        model: What is recorded; a store of another model is refused.
        sites: What is recorded; the same in every segment.
        recording: The settings asked for; a store of others is refused.
        tokens_added: `prefix` and `suffix`: token ids put around each sequence.
        environment: Library versions. A store of others is resumed with a warning.
        unembed: Writes the final norm and unembedding to the path it is given; called for a new store only.
        unembed_reason: Why there is no unembedding, where `unembed` is None.
        features: Which features of an SAE are extracted from a site that is not stored; a store of others is refused.

    Raises:
        RequestError: The path is taken by something else or by another writer, or the store was recorded otherwise.
        DataError: The disk is full.
    """
    path = Path(path)
    asked = Manifest(
        model=model,
        sites=tuple(sites),
        recording=from_json(to_json(recording), "recording") | ({"features": features} if features else {}),
        tokens_added={name: tuple(map(int, tokens_added[name])) for name in ("prefix", "suffix")},
        environment=dict(environment),
        unembed=None,
        unembed_reason=None,
    )
    with files.locked(path):
        with explain_full_disk(path, "the unembedding", 0):
            manifest = _reopen(path, asked) if (path / MANIFEST).exists() else _create(path, asked)
            if manifest.unembed is None and manifest.unembed_reason is None:
                manifest = _add_unembed(path, manifest, unembed, unembed_reason)
        yield Writer(path, manifest)


class Writer:
    """An open store that this process alone may add to. Made by `open_writer`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        """What is committed so far; replaced with each commit."""
        self._schema: pa.Schema | None = None

    def begin(self, part: Part, append: bool) -> int:
        """Begin or resume the recording of `part`; gives the number of its segments that are committed already.

        Without `append` the store must be new or hold this very part. With it, an unfinished last part is resumed
        first: it must be this one; otherwise the part is added after the others.
        """
        parts, unfinished = self.manifest.parts, not self.manifest.complete
        if len(parts) > 1 and not append:
            raise RequestError(
                f"{self.path} was appended to and holds {len(parts)} parts; pass append=True to add texts"
            )
        if not parts or (append and not unfinished):
            self._replace(replace(self.manifest, parts=(*parts, part)))
        elif parts[-1] != part and unfinished and not self._part_segments():  # begun, and came to nothing
            self._replace(replace(self.manifest, parts=(*parts[:-1], part)))
        elif parts[-1] != part:
            hint = "resume that part with its own texts" if append else "pass append=True to add texts"
            raise RequestError(
                f"{self.path} holds other texts: {_texts(parts[-1])} in the store, {_texts(part)} asked; "
                f"{hint}, or choose another out"
            )
        return len(self._part_segments())

    def check(self, index: int, digest: str) -> None:
        """Refuse to resume on other texts: `digest` of the part's segment `index` must be that of the committed one.

        `index` counts the segments of the part that was begun, from 0.
        """
        segments = self._part_segments()
        if segments[index].digest != digest:
            number = len(self.manifest.segments) - len(segments) + index
            first, after = self.manifest.starts[number : number + 2]
            raise RequestError(
                f"the texts differ from the recorded ones in segment {segments[index].name} of {self.path} "
                f"(rows {first} to {after - 1}); give the same texts in the same order, or choose another out"
            )

    @contextmanager
    def segment(self, rows: int, sequences: int, digest: str, tokens: pa.Table) -> Iterator[SegmentWriter]:
        """Write the next segment inside the block and commit it at its end; an exception leaves the store as it was.

        Args:
            rows: Rows of the segment; each must be written once, for every site.
            sequences: Sequences of the segment.
            digest: SHA-256 over its token ids and sequence lengths.
            tokens: Its token table: the columns of `workbench.store.tokens`, then metadata.

        Raises:
            DataError: The disk is full, or a row was not written.
        """
        manifest, name = self.manifest, f"{len(self.manifest.segments):05d}"
        part = manifest.parts[-1]
        planned = part.rows - sum(segment.rows for segment in self._part_segments())
        if not 1 <= rows <= planned:
            raise RequestError(f"segment {name} has {rows} rows; 1 to {planned} of the planned {part.rows} are left")
        check_tokens(tokens, rows, manifest.rows, self._token_schema())
        folder = self.path / SEGMENTS / name
        partial = folder.with_name(name + files.PARTIAL)
        with explain_full_disk(self.path, f"segment {name}", manifest.rows):
            try:
                files.remove(partial)
                files.remove(folder)
                partial.mkdir(parents=True)
                segment = SegmentWriter(partial, manifest, rows, tokens)
                yield segment
                checksum = segment.finish(sequences)
                files.rename_durably(partial, folder)
                committed = Segment(name, rows, sequences, len(manifest.parts) - 1, digest, checksum)
                self._replace(replace(manifest, segments=(*manifest.segments, committed)))
            except BaseException:
                files.remove(partial)
                raise
        self._schema = tokens.schema

    def _part_segments(self) -> list[Segment]:
        return [segment for segment in self.manifest.segments if segment.part == len(self.manifest.parts) - 1]

    def _token_schema(self) -> pa.Schema | None:
        if self._schema is None and self.manifest.segments:
            self._schema = read_schema(self.path / SEGMENTS / self.manifest.segments[0].name / TOKENS)
        return self._schema

    def _replace(self, manifest: Manifest) -> None:
        try:
            write_manifest(self.path, manifest)
        except BaseException:  # before or after the new one took its place? what the disk says is what is committed
            self.manifest = read_manifest(self.path)
            raise
        self.manifest = manifest


def _create(path: Path, manifest: Manifest) -> Manifest:
    others = sorted(entry.name for entry in path.iterdir() if entry.name != MANIFEST + files.PARTIAL)
    if others:
        raise RequestError(
            f"out={path} is not empty and no store: it holds {others[0]} and no {MANIFEST}; choose another out"
        )
    write_manifest(path, manifest)
    return manifest


def _reopen(path: Path, asked: Manifest) -> Manifest:
    """The store's manifest, after refusing one of another recording and removing what a crash left behind."""
    found = read_manifest(path)
    newer = asked.recording.keys() - found.recording.keys()  # settings that there were not when the store was begun
    wanted = {name: value for name, value in _settings(asked).items() if name not in newer}
    differences = _differences(_settings(found), wanted)
    if (differences or newer) and not found.segments:  # an earlier request that came to nothing binds nobody
        files.remove(path / UNEMBED)
        write_manifest(path, asked)
        return asked
    if differences:
        more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise RequestError(
            f"{path} was recorded otherwise: {'; '.join(differences[:6])}{more}; ask for the same or choose another out"
        )
    if differences := _differences(found.environment, asked.environment):
        warnings.warn(
            f"{path} was begun with other versions: {'; '.join(differences)}; further rows may differ in the last bits",
            stacklevel=4,
        )
    listed = {segment.name for segment in found.segments}
    leftovers = list(path.glob(f"*{files.PARTIAL}"))
    if (path / SEGMENTS).is_dir():
        leftovers += [
            entry
            for entry in (path / SEGMENTS).iterdir()
            if re.fullmatch(rf"\d+({re.escape(files.PARTIAL)})?", entry.name) and entry.name not in listed
        ]
    for entry in leftovers:
        files.remove(entry)
    return found


def _add_unembed(
    path: Path, manifest: Manifest, unembed: Callable[[Path], None] | None, reason: str | None
) -> Manifest:
    # The manifest comes first without it, so that a crash here leaves what is recognised as a store
    if unembed is None:
        manifest = replace(manifest, unembed_reason=reason or "not asked for")
    else:
        partial = path / (UNEMBED + files.PARTIAL)
        unembed(partial)
        files.fsync(partial)
        files.rename_durably(partial, path / UNEMBED)
        manifest = replace(manifest, unembed=files.sha256_file(path / UNEMBED))
    write_manifest(path, manifest)
    return manifest


def _settings(manifest: Manifest) -> dict[str, object]:
    """What must be equal for two recordings to give the same bytes, under the names a user knows."""
    model = manifest.model
    asked = {name: value for name, value in manifest.recording.items() if name != "sites"}  # `sites` as resolved count
    return {
        "model": f"{model.architecture} with weights {model.fingerprint[:12]}",
        "model config": model.config_fingerprint[:12],
        "model dtype": model.dtype,
        "tokenizer": model.tokenizer_fingerprint and model.tokenizer_fingerprint[:12],
        **asked,
        **{f"{name} tokens": list(ids) for name, ids in manifest.tokens_added.items()},
        **{f"site {site.label}": f"{site.axes} {site.shape} {site.dtype}" for site in manifest.sites},
    }


def _differences(found: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    return [
        f"{name}: {found.get(name, 'none')} in the store, {asked.get(name, 'none')} asked"
        for name in dict.fromkeys((*found, *asked))
        if found.get(name) != asked.get(name)
    ]


def _texts(part: Part) -> str:
    return f"{part.rows} rows of {part.sequences} sequences from {part.documents} documents"


def explain_full_disk(path: Path, what: str, rows: int) -> AbstractContextManager[None]:
    """Inside, a full disk raises DataError that says what was being written and that `rows` are safe."""
    kept = f"{rows} rows are committed and readable; free space and run the same command to resume"
    return files.explain_full_disk(f"{what} of {path}", kept)
