"""From a store's activations to sparse features: encoded and committed by segments, merged and indexed at the end.

What is being made lies in a hidden folder beside its place: `extraction.json`, which says what was asked, and segments,
each there as a whole or not at all, written by any process. They are merged into the order by row, which is indexed by
feature; then the folder gets its name. Killed at any moment, the same call goes on and ends in the same bytes.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.features.feature_segments import Segment, Span, clear, commit, committed, joined, missing, read
from workbench.features.feature_store import (
    BY_FEATURE,
    BY_ROW,
    RECORD,
    Features,
    FeaturesRecord,
    SaeRecord,
    by_feature_layout,
    by_row_layout,
    open_features,
    read_record,
)
from workbench.features.index import ENTRIES, entry_rows, invert
from workbench.io import files
from workbench.io.errors import RequestError
from workbench.io.parse import from_json, parse, to_json
from workbench.io.progress import progress
from workbench.io.tasks import Begin, ThisProcess, Workers, lost_task
from workbench.io.tensors import array_bytes, map_arrays, new_arrays
from workbench.sae.encode import Above, Encoder, NotFinite, SparseRows, TopK, encoder
from workbench.sae.load import Sae
from workbench.sae.saved import SAVED, SavedSae, save_sae
from workbench.sae.site import matching_site, not_finite
from workbench.sae.sparsity import Bound, Entries, SparsityRule, find_cut, sparsity_record
from workbench.store.manifest import FEATURES, FileRecord, SiteRecord
from workbench.store.reader import ActivationArray, Store, open_store

_LOG = logging.getLogger(__name__)

STATE, SEGMENTS = "extraction.json", "segments"
_SEGMENT_ROWS = 1 << 16
BLOCKS = 4  # encoded at a time: even if every feature is active they are some hundred MB

DTYPES = ("float32", "float16")
"""Stored types of activations."""


def extract_features(
    store: Store,
    sae: Sae,
    site: str | tuple[str, int] | None = None,
    *,
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
    batch_rows: int | None = None,
    dtype: str = "float32",
    sparsity: SparsityRule | None = None,
    precision: str | None = None,
    force: bool = False,
    workers: Workers | None = None,
    show_progress: bool = True,
) -> Features | None:
    """Encodes every row of a site and keeps what is not 0: the same support and values as `sae.encode` in float32.

    Args:
        store: Its rows become the features' rows, special tokens' (BOS) too: rows are dense. Their activations are
            often the largest; `Features.enrichment` and `sae_metrics` leave them out.
        sae: From `load_sae`; computes where it was loaded to.
        site: The site to read. None: the one that the SAE was trained on.
        name: Folder under the store's `features/`. None: the site and the SAE's name.
        out: Another folder instead.
        batch_rows: Rows encoded at a time. None: four dense blocks of the encoder, each of 40 MiB or 64 rows. Of a
            temporal SAE as many sequences as fit in them, and at least one.
        dtype: Stored type of activations: float32, or float16 in half the bytes, where values beyond its range are
            stored as its largest and counted.
        sparsity: Which pre-activations are kept, as far as they are above 0: TopK(k) of each row, MutualChoice(k) or
            FeatureChoice(k) of all rows. None: those that the SAE's activation function keeps.
        precision: float32, or bfloat16 for bounds first; the features are the same. None: the device's faster one.
        force: Use an SAE of another site or model.
        workers: Processes that encode side by side, `RayWorkers` or a `Share`. None: this one.
        show_progress: Say how far it is.

    Gives None only to a `Share` that leaves rows to others: the last of them to finish has the features.

    Costs one product with the encoder; memory is a few dense blocks and a segment. While the index is built the disk
    holds the features nearly twice; with MutualChoice and FeatureChoice up to ten times before, because what stays is
    known only at the end. Interrupted or killed, the same call resumes: what is committed stays. Features of the same
    SAE, store and settings are opened instead of made again.

    Raises RequestError: a site that was not recorded or is not as wide as the SAE's input; another site or model than
    the SAE's, unless `force`; a name taken by other features, or by others that are not finished; a sparsity rule for
    an SAE without pre-activations. Raises DataError: activations that are not finite, a full disk.
    """
    check_dtype(dtype)
    if batch_rows is not None and batch_rows < 1:
        raise RequestError(f"batch_rows must be at least 1, not {batch_rows}")
    array = matching_site(store, sae, site, force=force)
    made = Extraction(array, sae, sparsity, batch_rows, precision, show_progress)
    made.check()
    asked = asked_state(sae_record(sae, sparsity), array.name, store.manifest.fingerprint, store.rows, dtype)
    return finish(made, target_of(store.path, array.site, asked.sae.name, name, out), asked, workers)


def check_dtype(dtype: str) -> None:
    """Raises RequestError for a type that activations are not stored in."""
    if dtype not in DTYPES:
        raise RequestError(f"dtype must be {' or '.join(DTYPES)}, not {dtype!r}")


def finish(made: Extraction, target: Path, asked: State, workers: Workers | None = None) -> Features | None:
    """The features at `target`, made from where their making stopped; where they are there, they are opened. None where
    other processes that share the work have rows left."""
    store, shared = made.array.store, workers is not None and workers.shared
    if _holds_same(target, asked):
        return open_features(target, store)
    partial = partial_of(target)
    full = files.explain_full_disk(
        f"features {target}", "what is committed stays; free space and run the same command to resume"
    )
    with files.locked(partial, shared=shared), full:
        try:
            with turn(target, shared):
                if _holds_same(target, asked):  # another process finished them before the lock was free
                    files.remove(partial)
                    return open_features(target, store)
                state = None if _finished(partial, asked) else begin(partial, target, asked, shared)
            if state and state.overflow is None:
                made.encode(partial / SEGMENTS, workers or ThisProcess())
            with turn(target, shared):
                if not _holds_same(target, asked) and not _complete(made, partial, target, asked, shared):
                    return None
        except BaseException:
            if not shared:
                remove_if_empty(partial)
            raise
    features = open_features(target, store)
    if overflow := features.record.overflow:
        _LOG.warning(
            f"{overflow} activations are beyond float16's range and stored as its largest; dtype='float32' keeps them"
        )
    return features


def turn(target: Path, shared: bool) -> AbstractContextManager[None]:
    """Inside, no other of the processes that share the work begins, merges or indexes."""
    return files.locked(target.parent, wait=lambda: None) if shared else nullcontext()


def _complete(made: Extraction, partial: Path, target: Path, asked: State, shared: bool) -> bool:
    """Merge and index what is encoded, and name it; False where rows are left to others that share the work."""
    if not _finished(partial, asked):
        state = begin(partial, target, asked, shared)
        if state.overflow is None:
            if missing(partial / SEGMENTS, made.spans()):
                return False
            state = made.merge(partial, state)
        made.write_index(partial, target, state)
    for leftover in (SEGMENTS, SAVED, STATE):
        files.remove(partial / leftover)
    files.commit_folder(partial, target)
    return True


@dataclass(frozen=True)
class State:
    """`extraction.json`: what was asked, and how far its making is."""

    sae: SaeRecord
    site: str
    store_fingerprint: str
    rows: int
    dtype: str
    environment: dict[str, str]
    overflow: int | None
    """Activations beyond the range of `dtype`, once the segments are merged."""


@dataclass(frozen=True)
class Extraction:
    """The making of features from one array, step by step, each of which leaves its files finished in the folder."""

    array: ActivationArray
    sae: Sae
    sparsity: SparsityRule | None = None
    batch_rows: int | None = None
    precision: str | None = None
    show_progress: bool = True

    @cached_property
    def encoder(self) -> Encoder:
        if self.sparsity is None or isinstance(self.sparsity, TopK):
            return encoder(self.sae, self.sparsity, self.precision)
        # its threshold rises as rows are seen, and bounds are made for one threshold
        return encoder(self.sae, Above(torch.zeros(self.sae.d_sae, device=self.sae.device)), "float32")

    @cached_property
    def ends(self) -> Int64[np.ndarray, " sequence"] | None:
        """Rows behind the last of each sequence, for an autoencoder that takes sequences."""
        return _sequence_ends(self.array.store) if self.sae.sequential else None

    def check(self) -> None:
        """Raises RequestError for what cannot be, before anything is written."""
        self.quotas()
        _ = self.encoder

    @property
    def how(self) -> dict[str, Any]:
        """Its settings, for an extraction of the same rows elsewhere."""
        return {"sparsity": self.sparsity, "batch_rows": self.batch_rows, "precision": self.precision}

    def spans(self) -> list[Span]:
        """All rows, divided as they are encoded: the same for every process."""
        found, done = [], 0
        while done < len(self.array):
            found.append((done, self._end(done, _SEGMENT_ROWS)))
            done = found[-1][1]
        return found

    def encode(self, folder: Path, workers: Workers) -> None:
        """Encodes the rows that are not committed, of the share of them that this process has."""
        spans = workers.share_of(self.spans())
        left = missing(folder, spans)
        rows, rows_left = (sum(stop - first for first, stop in some) for some in (spans, left))
        unsettled = 0
        with (
            progress("extracting features", rows, "rows", shown=self.show_progress, done=rows - rows_left) as advance,
            closing(self._encode_by(workers, folder, left, advance)) as answers,
        ):
            for encoded, count in answers:
                unsettled += count
                if workers.remote:
                    advance(sum(stop - first for first, stop in encoded))
        if unsettled:
            _LOG.info(f"{unsettled:,} of {rows:,} rows used the exact float32 path")

    def _encode_by(
        self, workers: Workers, folder: Path, spans: Sequence[Span], advance: Callable[[int], None]
    ) -> Generator[tuple[Sequence[Span], int], None, None]:
        """Has workers write these spans: remote ones one at a time; this process all, one while it encodes the next."""

        def on_lost(lost: Sequence[Span] | None, error: Exception) -> int:
            description = f"rows {lost[0][0]} to {lost[-1][1] - 1}" if lost else "first rows"
            raise lost_task(f"{description} of {folder.parent}", error)

        def begin_here(_device: str | None) -> Callable[[Sequence[Span]], int]:
            return lambda some: self.write_segments(folder, some, advance)

        begin: Begin[Sequence[Span], int] = begin_here
        given, tasks = (), [tuple(spans)] if spans else []
        if workers.remote and spans:
            sae = save_sae(self.sae, folder.parent)
            given = self.array.store.path, self.array.site, sae, self.how, folder
            begin, tasks = begin_spans, [(span,) for span in spans]
        return workers.map(begin, given, tasks, on_lost)

    def write_segments(self, folder: Path, spans: Sequence[Span], advance: Callable[[int], None]) -> int:
        """Encode the rows of these spans that no committed segment has; gives how many bounds did not settle.

        A segment is written while the next is encoded.
        """
        bound, unsettled = None, 0
        if self.quotas() is not None:
            for rows in committed(folder):
                bound = self._raised(bound, read(folder, rows, self.kind))
        with ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for done, end in missing(folder, spans):
                while done < end:
                    stop, parts, entries = done, [], 0
                    making = self.encoder if bound is None else _above(self.encoder, bound)
                    for block in self._blocks(done, end):
                        found = self._encode(making, stop, block)
                        parts.append(self.on_the_host(found))
                        stop += len(block)
                        entries += len(found.feature)
                        unsettled += found.unsettled
                        advance(len(block))
                        if entries >= ENTRIES:
                            break
                    segment = joined(parts)
                    bound = self._raised(bound, segment)
                    if writing:
                        writing.result()
                    writing = writer.submit(commit, folder, (done, stop), segment)
                    done = stop
            if writing:
                writing.result()
        return unsettled

    def merge(self, folder: Path, state: State) -> State:
        """All segments as one file in the order by row, cut as the sparsity rule says; then they are removed."""
        rows = list(committed(folder / SEGMENTS))
        parts = [read(folder / SEGMENTS, own, self.kind) for own in rows]

        def entries() -> Iterator[Entries]:
            return ((part.feature, part.value) for part in parts)

        cut = find_cut(entries, quotas) if (quotas := self.quotas()) is not None else None
        kept = cut.masks(entries()) if cut else (np.ones(len(part.feature), bool) for part in parts)
        size = cut.entries if cut else sum(len(part.feature) for part in parts)
        layout = by_row_layout(len(self.array), self.encoder.sae.d_sae, size, state.dtype)
        limit, overflow = float(torch.finfo(getattr(torch, state.dtype)).max), 0
        lengths = np.zeros(len(self.array), np.int64)
        with new_arrays(folder / BY_ROW, layout) as file:
            for (first, last), part, own in zip(rows, parts, kept, strict=True):
                value = part.value[own]
                overflow += int((np.abs(value) > limit).sum())
                file.append("feature", part.feature[own])
                file.append("value", value.clip(-limit, limit).astype(state.dtype))
                row = entry_rows(part.indptr, 0, len(own))[own]
                lengths[first:last] = np.bincount(row, minlength=last - first)
            file.append("indptr", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        state = replace(state, overflow=overflow)
        files.replace_file(folder / STATE, to_json(state).encode())
        files.remove(folder / SEGMENTS)
        return state

    def write_index(self, folder: Path, target: Path, state: State) -> None:
        """The order by feature, and the record that makes the folder features."""
        store, features = self.array.store, self.encoder.sae.d_sae
        entries = _entries(folder / BY_ROW, len(self.array), features, state.dtype)
        size = (len(self.array), features, entries, state.dtype)
        by_row = map_arrays(folder / BY_ROW, by_row_layout(*size))
        counts = np.zeros(features, np.int64)
        for start in range(0, entries, ENTRIES):
            counts += np.bincount(by_row["feature"][start : start + ENTRIES], minlength=features)
        layout = by_feature_layout(*size)
        with new_arrays(folder / BY_FEATURE, layout) as file:
            invert(
                by_row["indptr"], by_row["feature"], by_row["value"], counts, file, folder / "dealt", layout["row"][0]
            )
        record = FeaturesRecord(
            sae=state.sae,
            site=state.site,
            store=os.path.relpath(store.path, target),
            store_fingerprint=state.store_fingerprint,
            rows=store.rows,
            features=features,
            entries=entries,
            dtype=state.dtype,
            overflow=state.overflow or 0,
            files={
                name: FileRecord((folder / name).stat().st_size, files.sha256_file(folder / name))
                for name in (BY_FEATURE, BY_ROW)
            },
            environment=state.environment,
        )
        files.replace_file(folder / RECORD, to_json(record).encode())

    @property
    def kind(self) -> str:
        """Type of feature ids."""
        return by_row_layout(0, self.encoder.sae.d_sae, 0, "float32")["feature"][0]

    def quotas(self) -> Int64[np.ndarray, " group"] | None:
        """Entries that may stay of each group of features; None where rows do not compete. Raises as `quotas` does."""
        if self.sparsity is None or isinstance(self.sparsity, TopK):
            return None
        return self.sparsity.quotas(len(self.array), self.encoder.sae.d_sae)

    def _raised(self, bound: Bound | None, segment: Segment) -> Bound | None:
        """The bound after a segment. It depends on committed segments alone, and so goes on unchanged after a kill."""
        if (quotas := self.quotas()) is None:
            return None
        entries = segment.feature, segment.value
        bound = bound or Bound(quotas, self.encoder.sae.d_sae, entries)
        bound.add(entries)
        return bound

    def _blocks(self, start: int, stop: int) -> Iterator[Float[Tensor, "row ..."]]:
        """Rows on the encoder's device, the next ones read, and copied, while these are encoded."""
        step = self.batch_rows or BLOCKS * self.encoder.block_rows
        device = self.encoder.sae.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None

        def read(first: int) -> Tensor:
            rows = self.array[first : min(self._end(first, step), stop)]
            if stream is None:
                return rows
            with torch.cuda.stream(stream):
                rows = rows.pin_memory().to(device, non_blocking=True)
            stream.synchronize()  # in this thread: the pinned rows are free again, and those copied are complete
            return rows

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, start)
            while start < stop:
                rows = coming.result()
                start += len(rows)
                if start < stop:
                    coming = reader.submit(read, start)
                if stream is not None:
                    rows.record_stream(torch.cuda.current_stream(device))
                yield rows

    def _encode(self, making: Encoder, first: int, rows: Float[Tensor, "row ..."]) -> SparseRows:
        try:
            return making(rows, self._lengths(first, first + len(rows)))
        except NotFinite as error:
            raise not_finite(self.array, self.encoder.sae, first + error.row, error.features) from None

    def on_the_host(self, found: SparseRows) -> Segment:
        indptr, feature, value = (part.cpu().numpy() for part in (found.indptr, found.feature, found.value))
        return Segment(indptr, feature.astype(self.kind), value)

    def _end(self, first: int, rows: int) -> int:
        """Where about `rows` rows from `first` on end: where a sequence does, if they are needed whole."""
        stop = min(first + rows, len(self.array))
        if self.ends is None:
            return stop
        before, within = np.searchsorted(self.ends, [first, stop], side="right")
        return int(self.ends[max(before, within - 1)])

    def _lengths(self, first: int, stop: int) -> list[int] | None:
        """Of the sequences that these rows are."""
        if self.ends is None:
            return None
        inside = self.ends[(self.ends > first) & (self.ends <= stop)]
        return np.diff(inside, prepend=first).tolist()


def begin_spans(
    device: str, store: Path, site: SiteRecord, sae: SavedSae, how: Mapping[str, Any], folder: Path
) -> Callable[[Sequence[Span]], int]:
    """Returns the function that encodes and writes spans in another process, and counts rows as `write_segments` does.

    Raises:
        RequestError: The folder where the features are made is not visible from here.
    """
    if not folder.is_dir():
        raise RequestError(
            f"a worker on {socket.gethostname()} finds no {folder.parent}; features must be on a disk that all "
            "machines share"
        )
    made = Extraction(ActivationArray(open_store(store), site), sae.load(device), **how, show_progress=False)
    return lambda spans: made.write_segments(folder, spans, lambda _rows: None)


def _sequence_ends(store: Store) -> Int64[np.ndarray, " sequence"]:
    sequence = store.tokens["sequence"].to_numpy()
    return np.flatnonzero(np.append(sequence[1:] != sequence[:-1], True)[: len(sequence)]) + 1


def _above(making: Encoder, bound: Bound) -> Encoder:
    threshold = torch.from_numpy(np.array(bound.threshold())).to(making.sae.device)
    return replace(making, choice=Above(threshold))


def asked_state(sae: SaeRecord, site: str, fingerprint: str, rows: int, dtype: str) -> State:
    """What is asked of `rows` rows of a store with this fingerprint, nothing being made yet."""
    environment = {library: version(library) for library in ("interp-workbench", "sae-lens", "torch")}
    return State(sae, site, fingerprint, rows, dtype, environment, overflow=None)


def sae_record(sae: Sae, sparsity: SparsityRule | None) -> SaeRecord:
    """With a sparsity rule the autoencoder counts as another one: it changes the mathematics as its settings do."""
    if sparsity is None:
        return SaeRecord(sae.name, sae.fingerprint(), sae.config())
    made = sparsity_record(sparsity)
    fingerprint = files.sha256_bytes(f"{sae.fingerprint()} {made}".encode())
    return SaeRecord(f"{sae.name}-{made['choice']}-{sparsity.k}", fingerprint, sae.config() | {"allocation": made})


def read_state(partial: Path) -> State:
    """What was asked of the features that are made in this folder, and how far they are."""
    source = partial / STATE
    return parse(State, from_json(source.read_bytes(), source), str(source))


def begin(partial: Path, target: Path, asked: State, shared: bool = False) -> State:
    """What is there of these features, after removing what a crash left behind (unless others that share the work may
    be writing it); RequestError where it is of others."""
    state = asked
    if (partial / STATE).is_file():
        found = read_state(partial)
        if not (partial / BY_ROW).exists() and not any(committed(partial / SEGMENTS)):
            found = asked  # what came to nothing binds nobody
        if differing := _differing(found, asked):
            raise RequestError(
                f"features {target.name} were begun otherwise: {differing}; ask for the same to resume, choose "
                f"another name, or remove {partial}"
            )
        if found.environment != asked.environment:
            _LOG.warning(
                f"features {target.name} were begun with other library versions; further rows may differ in the last "
                "bits"
            )
        state = found
    else:
        for leftover in partial.iterdir():
            files.remove(leftover)
    files.replace_file(partial / STATE, to_json(state).encode())
    keep = {STATE, SEGMENTS, SAVED} if state.overflow is None else {STATE, BY_ROW}
    for leftover in partial.iterdir():
        if leftover.name not in keep:
            files.remove(leftover)
    (partial / SEGMENTS).mkdir(exist_ok=True)
    if not shared:
        clear(partial / SEGMENTS)
    return state


def partial_of(target: Path) -> Path:
    """The hidden folder in which the features of `target` are made."""
    return target.with_name(f".{target.name}{files.PARTIAL}")


def remove_if_empty(partial: Path) -> None:
    """Removes what holds nothing that would be worth resuming."""
    if not (partial / BY_ROW).exists() and not any(committed(partial / SEGMENTS)):
        files.remove(partial)


def _finished(partial: Path, asked: State) -> bool:
    """Whether the folder lacks nothing but its name."""
    if not (partial / RECORD).is_file():
        return False
    return not _differing(read_record(partial), asked)


def _entries(path: Path, rows: int, features: int, dtype: str) -> int:
    """Entries of a finished order by row, which its size tells."""
    kinds = by_row_layout(rows, features, 1, dtype)
    width = sum(np.dtype(kinds[name][0]).itemsize for name in ("feature", "value"))
    return (array_bytes(path) - 8 * (rows + 1)) // width


def target_of(
    store: Path, site: SiteRecord, sae: str, name: str | None = None, out: str | os.PathLike[str] | None = None
) -> Path:
    """Where features lie: by default in the store, under the site's and the SAE's names."""
    if out is not None and name is not None:
        raise RequestError("give name, a folder in the store, or out, a folder anywhere, not both")
    if out is not None:
        return Path(out).absolute()
    name = re.sub(r"[^\w.-]+", "-", f"{site.label}-{sae}", flags=re.ASCII) if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise RequestError(f"name {name!r} is no folder's name; letters, digits, '_', '.' and '-' only")
    return store / FEATURES / name


def _holds_same(target: Path, asked: State) -> bool:
    """Whether `target` holds just these features, or nothing yet; RequestError where it holds anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target / RECORD).is_file():
        raise RequestError(f"{target} exists and holds no features; choose another name or out")
    if differing := _differing(read_record(target), asked):
        raise RequestError(f"features {target.name} exist and differ: {differing}; choose another name")
    return True


def _differing(found: FeaturesRecord | State, asked: State) -> str:
    return "; ".join(
        f"{what} is {has}, asked is {wants}"
        for what, has, wants, same in (
            ("SAE", _sae_text(found.sae), _sae_text(asked.sae), found.sae.fingerprint == asked.sae.fingerprint),
            ("site", found.site, asked.site, found.site == asked.site),
            ("dtype", found.dtype, asked.dtype, found.dtype == asked.dtype),
            (
                "store",
                f"{found.store_fingerprint[:12]} of {found.rows} rows",
                f"{asked.store_fingerprint[:12]} of {asked.rows} rows",
                found.store_fingerprint == asked.store_fingerprint,
            ),
        )
        if not same
    )


def _sae_text(sae: SaeRecord) -> str:
    return f"{sae.name} ({sae.fingerprint[:12]})"
