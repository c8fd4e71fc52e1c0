"""Records of a store: parsed strictly, written last, byte-identical for the same recording.

`manifest.json` lists the committed segments with a checksum of each one's `segment.json`, which in turn holds the
checksums of the segment's files. Segments that the manifest does not list are not read.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from workbench.io.checks import check
from workbench.io.counted import counted
from workbench.io.errors import DataError, RequestError, nearest
from workbench.io.files import replace_file, sha256_bytes
from workbench.io.findings import FileRecord
from workbench.io.parse import VERIFY_STORE, check_checksum, checksum, from_json, parse, to_checked_json
from workbench.io.reading import read_file
from workbench.sites.absent_sites import AbsentSites
from workbench.sites.score_rule import ScoreRule
from workbench.store.added_records import merged_record, record_names
from workbench.store.identity import Identity, difference
from workbench.store.stored_changes import Ran, StoredChanges, check_metric, metric_name, none_ran
from workbench.store.text_notes import text_notes

FORMAT = "workbench.activations"
VERSION = 2
"""Version of the format that is written; stores of version 1 are read, and become version 2 when rows are appended."""
MANIFEST = "manifest.json"
SEGMENTS = "segments"
TOKENS = "tokens.parquet"
UNEMBED = "unembed.safetensors"
FEATURES = "features"
"""Folder of the folders of sparse features."""
LENSES = "lenses"
"""Folder of the folders of lenses that were fitted for the store."""

_NEW_MODEL_KEYS = {"causal": True} | dict.fromkeys(("identity", "score_rules", "absent_sites", "tokenizer_settings"))
"""Keys of the model that version 2 added, with the values that hold for stores of version 1."""

_NEW_SITE_KEYS: dict[str, Any] = {"synonyms": []}
"""Keys of a site that version 2 added."""

_NEW_PART_KEYS = {"cut_documents": None, "columns": None, "documents_with_added_tokens": 0, "generation": []}
"""Keys of a part that version 2 added."""

_NEW_SEGMENT_KEYS: dict[str, Any] = {"added": []}
"""Keys of a segment that version 2 added."""

_NEW_KEYS = {"complete": False, "interventions": None, "gradient_of": None, "rows_fingerprint": None}
"""Keys of the manifest that version 2 added; `parse_manifest` finds whether a store of version 1 is complete."""

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Stored types and the bytes of one value."""


@dataclass(frozen=True)
class SiteRecord:
    """A recorded site of the model: in every segment one file with one tensor [rows, *shape]."""

    name: str
    """TransformerLens name: `blocks.3.hook_resid_post`."""
    short: str | None
    """Short form `resid_post.3`; None where there is none."""
    axes: tuple[str, ...]
    """Axis names, the first is `row`: ("row", "d_model"), ("row", "head", "key")."""
    shape: tuple[int, ...]
    """Lengths of the axes after `row`."""
    dtype: str
    """float16, bfloat16 or float32."""
    synonyms: tuple[str, ...] = field(default=(), compare=False)
    """Other names of the tensor: TransformerLens' and that of the module whose output it is."""

    def __post_init__(self) -> None:
        for name in (self.name, self.short):
            if name is not None and not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):  # it becomes a file name
                raise ValueError(f"{name!r} is not a site name; use letters, digits, '_', '.' and '-' only")
        check(f"dtype of {self.name}", self.dtype, one_of=ITEM_BYTES)
        if self.axes[:1] != ("row",) or len(self.axes) != len(self.shape) + 1 or min(self.shape, default=1) < 1:
            raise ValueError(f"axes {self.axes} of {self.name} do not fit the shape (row, {self.shape})")

    def has_name(self, name: str) -> bool:
        """Returns True for the short form, the name and the synonyms."""
        return name in (self.name, self.short, *self.synonyms)

    @property
    def label(self) -> str:
        """The short form, or the name where there is none: the name of the site in errors, tensors and files."""
        return self.short or self.name

    @property
    def file(self) -> str:
        """Name of the site's file in every segment."""
        return f"{self.label}.safetensors"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ModelRecord:
    """The recorded model; two models whose `difference` is None give the same activations."""

    name: str
    """Hub id or name of the model's folder, without the path to it."""
    architecture: str
    fingerprint: str
    """SHA-256 of the weights."""
    config_fingerprint: str
    tokenizer_fingerprint: str | None
    """None: recorded from token ids, without a tokenizer."""
    dtype: str
    """Type in which the model computed."""
    revision: str | None
    n_layers: int
    d_model: int
    vocab: int
    adapter: str | None
    """TransformerLens adapter that gave the site names; None: found by structure."""
    causal: bool
    """True if no position attends to a later one."""
    identity: Identity | None = None
    """Facts that decide what its forward pass computes, hooks and adapters included; None: recorded by a version that
    did not measure them."""
    score_rules: tuple[ScoreRule, ...] | None = None
    """Rules by which layers score their queries and keys, without layers that attend in their own way; None: recorded
    by a version that did not keep them."""
    absent_sites: tuple[AbsentSites, ...] | None = None
    """Sites with short names that it does not offer; None as for the rules."""
    tokenizer_settings: str | None = None
    """SHA-256 of the tokenizer's special tokens and switches; None as for the rules, or without a tokenizer."""

    def difference(self, present: ModelRecord) -> str | None:
        """Returns a phrase that names what differs in the model `present`; None if both give the same activations."""
        if self.identity is not None and present.identity is not None:
            return difference(self.identity, present.identity)
        if self.fingerprint != present.fingerprint:
            return f"its weights are other ones ({present.fingerprint[:12]}, not {self.fingerprint[:12]})"
        if self.config_fingerprint != present.config_fingerprint:
            return f"its config is another one ({present.config_fingerprint[:12]}, not {self.config_fingerprint[:12]})"
        if self.dtype != present.dtype:
            return f"it computes in {present.dtype}, not in {self.dtype}"
        return None


@dataclass(frozen=True)
class Part:
    """Texts of one recording call, as planned; a store that was appended to has several."""

    rows: int
    sequences: int
    documents: int
    skipped_documents: int
    """Documents without a token."""
    replaced_characters: int
    """Characters that are not valid Unicode, stored as U+FFFD."""
    cut_documents: int | None = None
    """Documents whose tokens are in several sequences. None: not counted, in version 1."""
    columns: str | None = None
    """SHA-256 over the metadata and spans of the documents. None: not computed, in version 1."""
    documents_with_added_tokens: int = field(default=0, compare=False)
    """Texts that had BOS or EOS already, which was not added again."""
    generation: tuple[dict[str, Any], ...] = ()
    """Settings with which texts were generated, each once; empty for other texts."""

    def same_counts(self, other: Part) -> bool:
        """Returns True if both have the same counts, as far as both were counted."""
        counted = None not in (self.cut_documents, other.cut_documents)
        cut = other.cut_documents if counted else self.cut_documents
        return self == replace(other, cut_documents=cut, columns=self.columns)

    def same_columns(self, other: Part) -> bool:
        """Returns True if the documents of both have the same metadata and spans, as far as both are known."""
        return self.columns == other.columns or None in (self.columns, other.columns)


@dataclass(frozen=True)
class Segment:
    """Consecutive committed rows of the store."""

    name: str
    """Folder under `segments/`: 00000, 00001, ..."""
    rows: int
    sequences: int
    part: int
    """Index of the part that its texts belong to."""
    digest: str
    """SHA-256 over the token ids and sequence lengths."""
    checksum: str
    """SHA-256 of its `segment.json`."""
    added: tuple[str, ...] = ()
    """SHA-256 of its `segment.1.json`, ...: records of sites that were added to the store later."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{5,}", self.name, re.ASCII):
            raise ValueError(f"{self.name!r} is not a segment name; five digits or more expected")
        if self.rows < 1:
            raise ValueError(f"segment {self.name} has {self.rows} rows; at least 1 expected")


@dataclass(frozen=True)
class SegmentRecord:
    """`segment.json`: files of a segment, and counts of its recording."""

    files: dict[str, FileRecord]
    rows: int
    sequences: int
    overflow: dict[str, int]
    """Number of values beyond the stored type's range, stored as its largest, by site name; only counts above 0."""
    nonfinite: dict[str, int]
    """Number of NaN and infinite values of the model, by site name; only counts above 0."""
    model: str
    """Fingerprint of the model."""
    interventions: tuple[Ran, ...] = ()
    """What each intervention did to the rows of the segment."""


@dataclass(frozen=True)
class Manifest:
    """Description of a store: model, sites, settings, committed segments."""

    model: ModelRecord
    sites: tuple[SiteRecord, ...]
    recording: dict[str, Any]
    """Settings: the fields of `Recording`, and `features` where features were extracted from a site that is not
    stored."""
    tokens_added: dict[str, tuple[int, ...]]
    """Token ids added around each sequence: `prefix` (BOS) and `suffix`."""
    environment: dict[str, str]
    """Library versions at the time of the recording."""
    unembed: str | None
    """SHA-256 of `unembed.safetensors` (final norm and W_U, embedding and tokenizer); None: the store has none."""
    unembed_reason: str | None
    """Reason why there is no unembedding; None where there is one. With a file, this has embedding and tokenizer."""
    parts: tuple[Part, ...] = ()
    segments: tuple[Segment, ...] = ()
    complete: bool = False
    """True once every row of all parts is committed; False while there is no part yet."""
    interventions: StoredChanges | None = None
    """Interventions with which the model ran; None: it ran as it is."""
    gradient_of: dict[str, Any] | None = None
    """Metric whose gradients with respect to each site are stored as sites `grad.`; None: no gradients."""
    rows_fingerprint: str | None = None
    """Fingerprint from before sites or the unembedding were added or deleted, which changes no row. None: they are as
    they were recorded."""
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.gradient_of is not None:
            check_metric(self.gradient_of)

    @property
    def rows(self) -> int:
        """Committed rows."""
        return sum(segment.rows for segment in self.segments)

    @property
    def planned_rows(self) -> int:
        """Rows of all parts, committed or not yet."""
        return sum(part.rows for part in self.parts)

    @property
    def has_unembed(self) -> bool:
        """True for a store with final norm and unembedding, which lenses need."""
        return self.unembed is not None and self.unembed_reason is None

    @property
    def chosen(self) -> bool:
        """True for a store of chosen rows: the model saw other tokens of their sequences, too."""
        return any(self.recording.get(name) for name in ("where", "keep"))

    @property
    def choice(self) -> str:
        """The settings that chose the rows, for messages."""
        chosen = {name: self.recording.get(name) for name in ("where", "keep")}
        return ", ".join(f"{name}={value!r}" for name, value in chosen.items() if value)

    @property
    def without_segments(self) -> Manifest:
        """The manifest of the same parts before the first segment: the same at every stage of the recording."""
        changes = self.interventions
        changes = changes and replace(changes, ran=none_ran(len(changes.records)))
        return replace(self, segments=(), complete=False, interventions=changes, rows_fingerprint=None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: two stores with the same fingerprint have the same rows of the same model.

        It stays the same when sites are added or deleted.
        """
        return self.rows_fingerprint or checksum(_body(self))

    @cached_property
    def starts(self) -> Int64[np.ndarray, " segments_plus_1"]:
        """First row of each segment, then the number of committed rows: (0,) for a store without segments."""
        return np.cumsum([0, *(segment.rows for segment in self.segments)], dtype=np.int64)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Returns the manifest of the store at `path`, as it is now.

    Raises:
        RequestError: No store there, or one written by a newer version.
        DataError: A manifest that is damaged or not of this format.
    """
    return parse_manifest(read_manifest_text(path), Path(path) / MANIFEST)


def read_manifest_text(path: str | os.PathLike[str]) -> bytes:
    """Returns the bytes of `manifest.json`.

    Raises:
        RequestError: `path` is not a store; the text names the nearest stores.
        DataError: The manifest is there and cannot be read, or is no regular file.
    """
    path = Path(path)
    try:
        return read_file(path / MANIFEST, "restore it from a copy")
    except DataError as error:
        unreadable = error
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path} is a file; a store is a directory with a {MANIFEST}")
    if path.is_dir() and not (path / MANIFEST).exists():
        raise RequestError(f"{path} is no store: it has no {MANIFEST}{_nearest_store(path)}")
    if not path.parent.is_dir():
        raise RequestError(f"no store at {path}: the folder {path.parent} does not exist")
    if not path.exists():
        raise RequestError(f"no store at {path}{_nearest_store(path)}")
    raise unreadable


def parse_manifest(text: bytes, source: Path) -> Manifest:
    """Parses the bytes of a `manifest.json` and checks them against their checksum; `source` names it in errors."""
    value = from_json(text, source)
    if value.get("format") != FORMAT:
        raise DataError(f"{source}: format is {value.get('format')!r}, expected {FORMAT!r}; this is no store")
    version = value.get("version")
    if isinstance(version, int) and version > VERSION:
        raise RequestError(
            f"{source} has format version {version} and this workbench reads up to {VERSION}; upgrade the workbench"
        )
    if version not in (1, VERSION):
        raise DataError(f"{source}: version is {version!r}, expected 1 or {VERSION}")
    body = dict(value)
    value.pop("checksum", None)
    manifest = parse(Manifest, _with_new_keys(value) if version == 1 else value, str(source))
    if version == 1:
        manifest = replace(manifest, complete=bool(manifest.parts) and manifest.rows == manifest.planned_rows)
    check_checksum(body, source, "restore it from a copy")
    if problem := _not_as_planned(manifest):
        raise DataError(f"{source}: {problem}; restore it from a copy")
    return manifest


def _not_as_planned(manifest: Manifest) -> str | None:
    """A reason why these segments cannot be those of these parts. None: they are, all of them or the first ones."""
    remaining_counts = [[part.rows, part.sequences] for part in manifest.parts]
    for number, segment in enumerate(manifest.segments):
        if segment.name != f"{number:05d}":
            return f"segment {number} is named {segment.name}, expected {number:05d}"
        if not 0 <= segment.part < len(remaining_counts):
            return f"segment {segment.name} is of part {segment.part}, and there are {len(remaining_counts)} parts"
        if any(rows for rows, _ in remaining_counts[: segment.part]):
            return f"segment {segment.name} is of part {segment.part}, and rows of an earlier part are missing"
        remaining_counts[segment.part][0] -= segment.rows
        remaining_counts[segment.part][1] -= segment.sequences
        if min(remaining_counts[segment.part]) < 0:
            return f"part {segment.part} has more rows or sequences than planned"
    if manifest.complete != (bool(remaining_counts) and not any(map(any, remaining_counts))):
        state = "complete" if manifest.complete else "not complete"
        return f"it counts as {state} with {manifest.rows} of {manifest.planned_rows} planned rows"
    return None


def _with_new_keys(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 with the values of the keys that version 2 added; its own keys are left as they are."""
    model, parts, sites = value.get("model"), value.get("parts"), value.get("sites")
    value = _NEW_KEYS | value
    if isinstance(sites, list):
        value["sites"] = [_NEW_SITE_KEYS | site if isinstance(site, dict) else site for site in sites]
    if isinstance(model, dict):
        value["model"] = _NEW_MODEL_KEYS | model
    if isinstance(parts, list):
        value["parts"] = [_NEW_PART_KEYS | part if isinstance(part, dict) else part for part in parts]
    segments = value.get("segments")
    if isinstance(segments, list):
        value["segments"] = [_NEW_SEGMENT_KEYS | entry if isinstance(entry, dict) else entry for entry in segments]
    return value


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replaces the manifest of the store at `path`, atomically and durably."""
    replace_file(path / MANIFEST, to_checked_json(_body(replace(manifest, version=VERSION))).encode())


def _body(manifest: Manifest) -> dict[str, Any]:
    """The manifest as it is written, without its checksum: one of version 1 has only the keys of version 1."""
    body = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
    if manifest.version == 1:
        body = _without(body, _NEW_KEYS)
        body["sites"] = [_without(vars(site), _NEW_SITE_KEYS) for site in manifest.sites]
        body["model"] = _without(vars(manifest.model), _NEW_MODEL_KEYS)
        body["parts"] = [_without(vars(part), _NEW_PART_KEYS) for part in manifest.parts]
        body["segments"] = [_without(vars(segment), _NEW_SEGMENT_KEYS) for segment in manifest.segments]
    return body


def _without(entries: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in keys}


def parse_segment(text: bytes, source: Path) -> SegmentRecord:
    """Parses the bytes of a `segment.json`; `source` names it in errors."""
    return parse(SegmentRecord, {"interventions": []} | from_json(text, source), str(source))


def read_counts(path: str | os.PathLike[str], manifest: Manifest) -> tuple[Counter[str], Counter[str]]:
    """Returns, by site name, the numbers of values that overflowed the stored type, and of NaN or infinite values.

    Reads every `segment.json`.

    Raises:
        DataError: One of them is missing or damaged.
    """
    overflow, nonfinite = Counter(), Counter()
    for segment in manifest.segments:
        record = read_segment_record(path, segment)  # has counts of deleted sites too
        overflow.update(record.overflow)
        nonfinite.update(record.nonfinite)
    return overflow, nonfinite


def read_segment_record(path: str | os.PathLike[str], segment: Segment) -> SegmentRecord:
    """Returns the `segment.json` of one segment of the store at `path`, with the records of sites that were added.

    Raises:
        DataError: One is missing, damaged, or not the one that the manifest lists.
    """
    records = []
    for name, recorded in zip(record_names(segment), (segment.checksum, *segment.added), strict=True):
        source = Path(path) / SEGMENTS / segment.name / name
        text = read_file(source, VERIFY_STORE)
        if sha256_bytes(text) != recorded:
            raise DataError(f"{source} is damaged: its bytes are not those that were recorded; {VERIFY_STORE}")
        records.append(parse_segment(text, source))
    return merged_record(records)


def as_lines(named: Mapping[str, str]) -> str:
    """Returns facts as text, one line each."""
    return "\n".join(f"{name:<8} {fact}" for name, fact in named.items())


def facts(path: str | os.PathLike[str], manifest: Manifest) -> dict[str, str]:
    """Returns a summary of the store by name: path, model, sites, rows, texts and unembedding."""
    model, parts = manifest.model, manifest.parts
    state = "complete" if manifest.complete else f"of {manifest.planned_rows:,} planned; the same command resumes it"
    lines = {
        "store": str(path),
        "model": f"{model.name} ({model.architecture}, {model.n_layers} layers, d_model {model.d_model})",
        "sites": short_list([f"{site.label} {site.shape} {site.dtype}" for site in manifest.sites]),
        "rows": f"{manifest.rows:,} in {counted(len(manifest.segments), 'segment')} ({state})",
        "texts": f"{counted(sum(part.documents for part in parts), 'document')}, "
        f"{counted(sum(part.sequences for part in parts), 'sequence')}, {counted(len(parts), 'part')}",
        "unembed": "yes" if manifest.has_unembed else f"none: {manifest.unembed_reason}",
    }
    if manifest.interventions:
        lines["changed"] = f"the model ran with interventions: {short_list(manifest.interventions.names)}"
    if manifest.gradient_of:
        lines["gradient"] = f"of {metric_name(manifest.gradient_of)}"
    if notes := text_notes(manifest.parts):
        lines["notes"] = "; ".join(notes)
    if features := sorted(entry.name for entry in Path(path).glob(f"{FEATURES}/[!.]*")):
        lines["features"] = short_list(features)
    return lines


def short_list(names: list[str], limit: int = 8) -> str:
    """Returns the number of names and the names, a long list shortened: "12: resid_post.0, ..., resid_post.11"."""
    if not names:
        return "none"
    return f"{len(names)}: {', '.join(names if len(names) <= limit else [*names[: limit - 2], '...', names[-1]])}"


def _nearest_store(path: Path) -> str:
    place = path.absolute().parent
    return nearest(path.name, sorted(entry.name for entry in place.iterdir() if (entry / MANIFEST).is_file()))
