"""Estimates of disk, memory and time of a recording, from its settings and a short measurement."""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import torch

from workbench.corpus.sources import Texts
from workbench.io.checks import check, whole_number
from workbench.io.files import human_bytes
from workbench.io.progress import duration
from workbench.io.tasks import Answer, Begin, OnLost, Task, ThisProcess
from workbench.io.tensors import header_bytes, read_header
from workbench.model.load import Model, batch_tokens, load_model
from workbench.recording.planning import context_length, default_segment_rows
from workbench.recording.record import record
from workbench.sites.settings import Recording, RecordingOptions, recording
from workbench.store.added_records import SEGMENT
from workbench.store.groups import SIZE as GROUP_SIZE
from workbench.store.manifest import SEGMENTS, TOKENS, UNEMBED, Manifest, SiteRecord, read_manifest
from workbench.store.staging import PlannedSegment
from workbench.store.token_table import ROW_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROW_OF_MANIFEST = 300
"""Bytes of a segment in the manifest, about."""


@dataclass(frozen=True, repr=False)
class Plan:
    """Estimate of a recording of `rows` tokens."""

    rows: int
    segments: int
    """Largest number of segments; documents shorter than the context fill segments better."""
    activations: int
    """Bytes of the sites' files: exact for this number of segments."""
    tokens: int
    """Bytes of the token tables, as in the sample; without texts to sample an upper estimate."""
    overhead: int
    """Bytes of the unembedding, the manifest and the records of segments."""
    scratch: int
    """Bytes of the planned tokens, which lie in the store's folder until the recording ends."""
    memory: int
    """Peak memory of a worker in bytes, in the sample, the loaded model and libraries included."""
    gpu_memory: int | None
    """Peak memory of its GPU in bytes; None: no GPU was used."""
    rows_per_second: float
    """Speed of one worker, from the first forward pass to the finished segment."""
    sample_rows: int
    """Number of rows that were timed."""
    workers: int
    device: str
    """Type of device of the measurement."""

    @property
    def disk(self) -> int:
        """Bytes of the finished store."""
        return self.activations + self.tokens + self.overhead

    @property
    def seconds(self) -> float:
        """Duration of the recording, if each worker is as fast as the one that was measured."""
        return self.rows / self.rows_per_second / self.workers

    @property
    def bytes_per_second(self) -> float:
        """Rate at which the disk must be written."""
        return self.disk / self.seconds

    def __repr__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        speed = f"{self.rows_per_second:,.0f} rows/s, measured on {self.device} over {self.sample_rows:,} rows"
        facts = {
            "rows": f"{self.rows:,} in at most {self.segments:,} segments",
            "disk": f"{human_bytes(self.disk)}: activations {human_bytes(self.activations)}, tokens "
            f"{human_bytes(self.tokens)}, the rest {human_bytes(self.overhead)}; "
            f"{human_bytes(self.scratch)} more while it runs",
            "memory": f"{human_bytes(self.memory)} a worker"
            + ("" if self.gpu_memory is None else f", {human_bytes(self.gpu_memory)} of its GPU"),
            "time": f"{duration(self.seconds)} with {workers}, each {speed}",
            "writes": f"{human_bytes(int(self.bytes_per_second))}/s, which the disk must keep up with",
        }
        return "\n".join(f"{name:<7} {fact}" for name, fact in facts.items())


def plan(
    model: Model | PreTrainedModel | str | Path,
    texts: Texts | None = None,
    *,
    rows: int | float,
    settings: Recording | None = None,
    workers: int = 1,
    seconds: int | float = 10.0,
    **options: Unpack[RecordingOptions],
) -> Plan:
    """Estimates disk, memory and time of a recording, from its settings and a short measurement.

    The sample is recorded into a temporary folder. Time does not include loading the model and tokenizing.

    Args:
        model: A loaded model, or what `load_model` takes: a directory, a hub id, a transformers module.
        texts: What `record` takes, of which the first are the sample. None: random tokens in sequences as long as the
            context.
        rows: Number of tokens to record.
        settings: Settings as one record. None: the defaults.
        workers: Number of processes, each as fast as this one.
        seconds: Approximate duration of the measurement.
        **options: Fields of `Recording`, as for `record`; each replaces that of `settings`.

    Returns:
        The estimate; printed, it is a table.

    Raises:
        RequestError: A number out of range, or a request that `record` refuses.
    """
    settings = recording(settings, **options)
    check("rows", rows, at_least=1, whole=True)
    workers = whole_number("workers", workers, at_least=1)
    check("seconds", seconds, above=0, below=math.inf)
    model = model if isinstance(model, Model) else load_model(model)
    context = context_length(settings, model)
    with tempfile.TemporaryDirectory(prefix="workbench-plan-") as folder:
        sample = _measure(model, texts, replace(settings, context=context), seconds, Path(folder))
        whole = settings.segment_rows or default_segment_rows(read_manifest(sample.store).sites)
        full = max(context, whole // context * context)  # a segment ends with a sequence
        return _scaled(sample, int(rows), full, workers)


def _measure(model: Model, texts: Texts | None, settings: Recording, seconds: float, folder: Path) -> _Sample:
    """Records a sample, and a larger one if the first took too little time to measure."""
    context = settings.context or 1
    batch = max(context, settings.batch_tokens or batch_tokens(model))
    size = min(batch, max(context, 8 * (settings.segment_rows or batch)))  # the first of these segments warms up
    clock = _Timed()
    for name in ("first", "second"):
        sample = replace(settings, max_rows=2 * size, segment_rows=min(size, settings.segment_rows or size))
        source = _random_tokens(model, 2 * size, context) if texts is None else texts
        clock.segments.clear()
        record(model, source, out=folder / name, settings=sample, workers=clock, show_progress=False)
        more = int(seconds / 2 / clock.total[1])
        if more < 2:
            break
        size *= more
    return _Sample(folder / name, *clock.total, model.device.type, of_texts=texts is not None)


@dataclass(frozen=True)
class _Timed(ThisProcess):
    """This process, with the time of each segment."""

    segments: list[tuple[int, float]] = field(default_factory=list)
    """Rows and seconds of each segment."""

    def map(
        self,
        begin: Begin[Task, Answer],
        arguments: tuple[Any, ...],
        tasks: Sequence[Task],
        on_lost: OnLost[Task, Answer],
        device: str | None = None,
    ) -> Generator[tuple[Task, Answer], None, None]:
        write = begin(device, *arguments)
        for task in tasks:
            began = time.perf_counter()
            answer = write(task)
            self.segments.append((cast("PlannedSegment", task).rows, time.perf_counter() - began))
            yield task, answer

    @property
    def total(self) -> tuple[int, float]:
        """Rows and seconds in all, without the first segment if there are others: it warms up."""
        segments = self.segments[1:] or self.segments
        return sum(rows for rows, _ in segments), sum(seconds for _, seconds in segments)


@dataclass(frozen=True)
class _Sample:
    store: Path
    rows: int
    """Rows that were timed."""
    seconds: float
    device: str
    of_texts: bool


def _scaled(sample: _Sample, rows: int, segment_rows: int, workers: int) -> Plan:
    """The estimate for `rows` rows in segments of `segment_rows`."""
    store, manifest = sample.store, read_manifest(sample.store)
    segments = -(-rows // segment_rows)
    last = rows - (segments - 1) * segment_rows
    grouped = segments // GROUP_SIZE * GROUP_SIZE / segments  # these have their tables twice
    headers = sum(
        _header(store, manifest, site, segment_rows) * (segments - 1) + _header(store, manifest, site, last)
        for site in manifest.sites
    )
    tokens = sum((_of_segment(store, manifest, i) / TOKENS).stat().st_size for i in range(len(manifest.segments)))
    unembed = (store / UNEMBED).stat().st_size if manifest.unembed else 0
    record_size = (_of_segment(store, manifest, 0) / SEGMENT).stat().st_size
    return Plan(
        rows=rows,
        segments=segments,
        activations=sum(site.row_bytes for site in manifest.sites) * rows + headers,
        tokens=int(rows * tokens / manifest.rows * (1 + grouped)) if sample.of_texts else rows * ROW_BYTES,
        overhead=unembed + (record_size + _ROW_OF_MANIFEST) * segments,
        scratch=rows * 28,
        memory=_peak_memory(),
        gpu_memory=torch.cuda.max_memory_allocated() if sample.device == "cuda" else None,
        rows_per_second=sample.rows / sample.seconds,
        sample_rows=sample.rows,
        workers=workers,
        device=sample.device,
    )


def _header(store: Path, manifest: Manifest, site: SiteRecord, rows: int) -> int:
    """Bytes before the tensor in a file of the site with this number of rows."""
    header = read_header(_of_segment(store, manifest, 0) / site.file)
    return len(header_bytes(header.name, site.dtype, (rows, *site.shape), header.metadata))


def _of_segment(store: Path, manifest: Manifest, index: int) -> Path:
    return store / SEGMENTS / manifest.segments[index].name


def _random_tokens(model: Model, rows: int, context: int) -> list[list[int]]:
    ids = np.random.default_rng(0).integers(0, model.vocab, (-(-rows // context), context))
    return ids.tolist()


def _peak_memory() -> int:
    """Peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
