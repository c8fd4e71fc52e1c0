"""What a recording will take, before anybody commits a cluster to it: from its settings and a short measured sample."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.io.errors import RequestError
from workbench.io.files import human_bytes
from workbench.io.progress import duration
from workbench.io.tasks import Answer, Begin, OnLost, ThisProcess
from workbench.io.tensors import header_bytes, read_header
from workbench.model.load import Model, batch_tokens, load_model
from workbench.recording.planning import context_length, default_segment_rows
from workbench.recording.record import record_with
from workbench.sites.settings import Recording, recording
from workbench.store.groups import SIZE as GROUP_SIZE
from workbench.store.manifest import SEGMENT, SEGMENTS, TOKENS, UNEMBED, Manifest, SiteRecord, read_manifest
from workbench.store.staging import PlannedSegment
from workbench.store.token_table import ROW_BYTES

_ROW_OF_MANIFEST = 300
"""Bytes of a segment in the manifest, about."""


@dataclass(frozen=True)
class Plan:
    """What a recording of `rows` tokens takes."""

    rows: int
    segments: int
    """At most; documents shorter than the context fill segments better."""
    activations: int
    """Bytes of the sites' files: exact for this number of segments."""
    tokens: int
    """Bytes of the token tables: as the sample's; where there are no texts to sample, an estimate on the safe side."""
    others: int
    """Bytes of the unembedding, the manifest and the records of segments."""
    scratch: int
    """Bytes of the planned tokens, which are removed at the end; they lie beside the store."""
    memory: int
    """Most bytes that a worker held in the sample, the loaded model and libraries included."""
    gpu_memory: int | None
    """Likewise on its GPU; None: none was used."""
    rows_per_second: float
    """Of one worker, from the first forward pass to the finished segment."""
    sample_rows: int
    """Rows that were timed."""
    workers: int
    device: str
    """What was measured on."""

    @property
    def disk(self) -> int:
        """Bytes of the finished store."""
        return self.activations + self.tokens + self.others

    @property
    def seconds(self) -> float:
        """Time of all workers together, if each is as fast as the one that was measured."""
        return self.rows / self.rows_per_second / self.workers

    @property
    def bytes_per_second(self) -> float:
        """What the disk has to take."""
        return self.disk / self.seconds

    def __str__(self) -> str:
        who = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        one = f"{self.rows_per_second:,.0f} rows/s, measured on {self.device} over {self.sample_rows:,} rows"
        facts = {
            "rows": f"{self.rows:,} in at most {self.segments:,} segments",
            "disk": f"{human_bytes(self.disk)}: activations {human_bytes(self.activations)}, tokens "
            f"{human_bytes(self.tokens)}, the rest {human_bytes(self.others)}; "
            f"{human_bytes(self.scratch)} more while it runs",
            "memory": f"{human_bytes(self.memory)} a worker"
            + ("" if self.gpu_memory is None else f", {human_bytes(self.gpu_memory)} of its GPU"),
            "time": f"{duration(self.seconds)} with {who}, each {one}",
            "writes": f"{human_bytes(int(self.bytes_per_second))}/s, which the disk must keep up with",
        }
        return "\n".join(f"{name:<7} {fact}" for name, fact in facts.items())


def plan(
    model: Model | Any,
    texts: Any = None,
    *,
    rows: int | float,
    workers: int = 1,
    seconds: int | float = 10.0,
    sites: Sequence[str] | str | None = Recording.sites,
    dtype: Any = Recording.dtype,
    **settings: Any,
) -> Plan:
    """What `record` would take for `rows` tokens with these settings, and `workers` like this process.

    `texts`: what `record` takes, of which the first are recorded as the sample; None: random tokens in sequences as
    long as the context. `settings`: as of `record`. Measures for about `seconds`, into a temporary folder.

    Time leaves out loading the model and tokenizing. Raises RequestError as `record` does.
    """
    own = {name: settings.pop(name, getattr(Recording, name)) for name in ("metadata", "bos")}
    asked = recording(sites=sites, dtype=dtype, **own, **settings)
    return plan_with(asked, model, texts, rows=rows, workers=workers, seconds=seconds)


def plan_with(
    settings: Recording,
    model: Model | Any,
    texts: Any = None,
    *,
    rows: int | float,
    workers: int = 1,
    seconds: float = 10.0,
) -> Plan:
    """`plan` with the settings as one frozen record."""
    if not (rows >= 1 and float(rows).is_integer()):
        raise RequestError(f"rows must be a whole number, at least 1, not {rows:g}")
    if workers < 1:
        raise RequestError(f"workers must be at least 1, not {workers}")
    model = model if isinstance(model, Model) else load_model(model)
    context = context_length(settings, model)
    sampled = replace(settings, context=context)
    batch = max(context, settings.batch_tokens or batch_tokens(model))
    with tempfile.TemporaryDirectory(prefix="workbench-plan-") as folder:
        timed = _Timed()
        segment = settings.segment_rows or batch
        size = min(batch, max(context, 8 * segment))  # a batch, or some small segments; the first warms up
        for name in ("first", "second"):
            sample = replace(sampled, max_rows=2 * size, segment_rows=min(size, settings.segment_rows or size))
            store = Path(folder) / name
            timed.seconds.clear()
            record_with(
                sample,
                model,
                _random_tokens(model, 2 * size, context) if texts is None else texts,
                out=store,
                workers=timed,
                show_progress=False,
            )
            counted = timed.seconds[1:] or timed.seconds
            taken = sum(seconds for _, seconds in counted)
            more = int(seconds / 2 / taken)
            if more < 2 or name == "second":
                break
            size *= more
        return _plan(store, settings, context, int(rows), workers, texts is not None, counted, model.device.type)


@dataclass(frozen=True)
class _Timed(ThisProcess):
    """Writes segments as a recording does, with an eye on the clock."""

    seconds: list[tuple[int, float]] = field(default_factory=list)
    """Of each segment its rows and its time."""

    def map(
        self,
        begin: Begin[PlannedSegment, Answer],
        given: tuple[Any, ...],
        tasks: Sequence[PlannedSegment],
        on_lost: OnLost[PlannedSegment, Answer],
        device: str | None = None,
    ) -> Generator[tuple[PlannedSegment, Answer], None, None]:
        write = begin(device, *given)
        for segment in tasks:
            began = time.perf_counter()
            answer = write(segment)
            self.seconds.append((segment.rows, time.perf_counter() - began))
            yield segment, answer


def _plan(
    store: Path,
    settings: Recording,
    context: int,
    rows: int,
    workers: int,
    real: bool,
    counted: Sequence[tuple[int, float]],
    device: str,
) -> Plan:
    manifest = read_manifest(store)
    whole = settings.segment_rows or default_segment_rows(manifest.sites)
    full = max(context, whole // context * context)  # a segment ends with a sequence
    segments = -(-rows // full)
    last = rows - (segments - 1) * full
    grouped = segments // GROUP_SIZE * GROUP_SIZE / segments  # of these the tables are there twice
    headers = sum(
        _header(store, manifest, site, full) * (segments - 1) + _header(store, manifest, site, last)
        for site in manifest.sites
    )
    tokens = sum((_of_segment(store, manifest, i) / TOKENS).stat().st_size for i in range(len(manifest.segments)))
    unembed = (store / UNEMBED).stat().st_size if manifest.unembed else 0
    record = (_of_segment(store, manifest, 0) / SEGMENT).stat().st_size
    timed_rows = sum(n for n, _ in counted)
    gpu = None
    if device == "cuda":
        import torch

        gpu = torch.cuda.max_memory_allocated()
    return Plan(
        rows=rows,
        segments=segments,
        activations=sum(site.row_bytes for site in manifest.sites) * rows + headers,
        tokens=int(rows * tokens / manifest.rows * (1 + grouped)) if real else rows * ROW_BYTES,
        others=unembed + (record + _ROW_OF_MANIFEST) * segments,
        scratch=rows * 28,
        memory=_peak_memory(),
        gpu_memory=gpu,
        rows_per_second=timed_rows / sum(seconds for _, seconds in counted),
        sample_rows=timed_rows,
        workers=workers,
        device=device,
    )


def _header(store: Path, manifest: Manifest, site: SiteRecord, rows: int) -> int:
    """Bytes before the tensor in a file of the site with so many rows."""
    own = read_header(_of_segment(store, manifest, 0) / site.file)
    return len(header_bytes(own.name, site.dtype, (rows, *site.shape), own.metadata))


def _of_segment(store: Path, manifest: Manifest, index: int) -> Path:
    return store / SEGMENTS / manifest.segments[index].name


def _random_tokens(model: Model, rows: int, context: int) -> list[list[int]]:
    ids = np.random.default_rng(0).integers(0, model.vocab, (-(-rows // context), context))
    return ids.tolist()


def _peak_memory() -> int:
    """Bytes that this process held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
