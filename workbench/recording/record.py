"""Records a model into a store: one pass over the texts, every site asked for, bounded memory.

The texts become sequences first, so rows and disk need are known before the model runs. Then, segment by
segment: sequences of like length share a forward pass, padding is dropped on the device, values are brought
to the stored type, and a background thread copies and writes them while the next pass computes.
"""

from __future__ import annotations

import logging
import platform
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench import corpus
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.model.capture import capture
from workbench.model.load import Model, batch_tokens, load_model
from workbench.model.unembed import NoUnembed, measure_unembed, save_unembed
from workbench.sites.grammar import Site
from workbench.sites.settings import Recording, recording
from workbench.store.manifest import Manifest, ModelRecord, Part, SiteRecord, read_counts
from workbench.store.segment import SegmentWriter
from workbench.store.staging import PlannedSegment, hand_in, staged
from workbench.store.writer import Writer, check_space, explain_full_disk, open_writer, required_bytes

if TYPE_CHECKING:
    from workbench.features.while_recording import EncodedSite, RecordedFeatures
    from workbench.sae.load import Sae
    from workbench.store.reader import Store

_LOG = logging.getLogger(__name__)

_SITES = ("resid_post",)
_SEGMENT_BYTES = 256 << 20
_SEGMENT_ROWS = 65_536
_BACKLOG = 8
_LIBRARIES = ("torch", "transformers", "transformer-lens", "tokenizers", "numpy", "pyarrow")


def record(
    model: Model | Any,
    texts: Any,
    *,
    out: str | Path,
    sites: Sequence[str] | str | None = Recording.sites,
    context: int | None = Recording.context,
    dtype: str | torch.dtype = Recording.dtype,
    bos: str = Recording.bos,
    packed: bool = Recording.packed,
    max_rows: int | None = Recording.max_rows,
    text_column: str = Recording.text_column,
    metadata: Sequence[str] | None = Recording.metadata,
    span_column: str | None = Recording.span_column,
    batch_tokens: int | None = Recording.batch_tokens,
    segment_rows: int | None = Recording.segment_rows,
    sae: Sae | None = None,
    sae_site: str | None = None,
    sae_dtype: str = "float32",
    sae_force: bool = False,
    append: bool = False,
    workers: Workers | None = None,
    show_progress: bool = True,
) -> Store:
    """Runs `model` over `texts` once and stores every activation of `sites` under `out`; returns the opened store.

    `model`: what `load_model` gives or takes. `texts`: a .txt, .jsonl or .parquet file, "hf:NAME" of a dataset, a
    Dataset object, a list of strings, or lists of token ids (taken as they are). The settings are those of
    `Recording`. If `out` holds an unfinished recording of the same model, texts and settings it is resumed;
    a finished one is returned as it is; `append=True` adds the texts after what is there. `workers`: processes that
    write segments side by side, `RayWorkers` or a `Share` of `workbench.parallel.workers`; None: this one.

    `sae`: what `load_sae` gives. Its features are extracted into the store's `features/`, the same that
    `extract_features` makes of a recorded site, up to the last bits where threads share a product. The site itself is
    stored only if it is among `sites`, which by default are none then. `sae_site`: another site than the one it was
    trained on; `sae_dtype`: the stored type of features, float32 or float16; `sae_force`: use an SAE of another site or
    model.

    The same request gives the same bytes on the same machine, interrupted or not. Memory: the model, one batch and
    its backlog, whatever the number of rows. Disk: `rows x sum of site sizes`, compared with the free space
    before the first pass.

    Raises RequestError for a request that cannot be met (unknown site, other settings than the store's, not
    enough space, an SAE of another width, site or model), DataError when the disk fails or a row to be encoded is not
    finite; what is committed stays readable.
    """
    settings = recording(
        sites=sites,
        context=context,
        dtype=dtype,
        bos=bos,
        packed=packed,
        max_rows=max_rows,
        text_column=text_column,
        metadata=metadata,
        span_column=span_column,
        batch_tokens=batch_tokens,
        segment_rows=segment_rows,
    )
    features = None
    if sae is None and (sae_site is not None or sae_force):
        raise RequestError("sae_site and sae_force are for sae; give it too")
    if sae is not None:
        from workbench.features.while_recording import RecordedFeatures  # SAELens' import takes seconds

        features = RecordedFeatures(sae, sae_site, sae_dtype, sae_force)
    return record_with(
        settings,
        model,
        texts,
        out=out,
        features=features,
        append=append,
        workers=workers,
        show_progress=show_progress,
    )


def record_with(
    settings: Recording,
    model: Model | Any,
    texts: Any,
    *,
    out: str | Path,
    features: RecordedFeatures | None = None,
    append: bool = False,
    workers: Workers | None = None,
    show_progress: bool = True,
) -> Store:
    """`record` with its settings as one frozen record, and those of an SAE as another."""

    corpus.check_source(texts)
    who = workers or ThisProcess()
    if not isinstance(model, Model):
        model = load_model(model, device=who.own_device if isinstance(model, str | Path) else None)
    if settings.sites is None and features is None:
        settings = replace(settings, sites=_SITES)
    taps = model.site_map.select(settings.sites or ())
    context = context_length(settings, model)
    added = corpus.added_tokens(model.tokenizer, settings.bos)
    documents = corpus.read_documents(
        texts,
        text_column=settings.text_column,
        metadata=settings.metadata,
        span_column=settings.span_column,
    )
    records = [_site_record(site, context, settings.dtype) for site in taps]
    encoded = passing = None
    if features is not None:
        tap = features.tap(model.site_map, taps)
        encoded = features.of(tap, _site_record(tap, context, settings.dtype), model.name, Path(out))
        passing = encoded if tap not in taps else None  # its activations are not stored
    held = [*records, passing.site] if passing else records
    unembed, reason = _unembed(model)
    with (
        open_writer(
            Path(out),
            model=_model_record(model),
            sites=records,
            recording=settings,
            tokens_added={"prefix": list(added.prefix), "suffix": list(added.suffix)},
            environment=environment() | {"device": who.device(model)},
            unembed=unembed,
            unembed_reason=reason,
            features=passing and passing.label,
            shared=who.shared,
        ) as writer,
        _scratch(Path(out), who.name) as workdir,
        progress("tokenizing", None, "tokens", shown=show_progress) as tick,
    ):
        if passing and append and writer.manifest.rows and writer.manifest.complete:
            raise RequestError(
                f"append: features of the {writer.manifest.rows:,} rows before need their {passing.site.label} again, "
                "which was not stored; choose another out"
            )
        with explain_full_disk(writer.path, "the planned tokens", writer.manifest.rows):
            sequences = corpus.plan_sequences(
                documents,
                model.tokenizer,
                context=context,
                added=added,
                packed=settings.packed,
                max_rows=settings.max_rows,
                workdir=workdir,
                vocab=model.vocab,
                progress=tick,
            )
        _record_part(writer, who, model, sequences, held, passing, workdir, settings, append, show_progress)
    from workbench.store.reader import open_store  # not before: what it needs is not what recording needs

    store = open_store(out)
    _warn_of_lost_values(store, held)
    if encoded and store.manifest.complete:  # else the last of those that share the recording does it
        encoded.finish(store, workers, show_progress=show_progress)
    return store


def _warn_of_lost_values(store: Store, sites: Sequence[SiteRecord]) -> None:
    overflow, nonfinite = read_counts(store.path, store.manifest)
    for site in sites:
        if count := overflow[site.name]:
            limit = torch.finfo(getattr(torch, site.dtype)).max
            _LOG.warning(
                f"{count:,} values of {site.label} are beyond {site.dtype} and stored as ±{limit:g}; "
                "record with dtype='bfloat16' or 'float32' to keep them"
            )
        if count := nonfinite[site.name]:
            _LOG.warning(
                f"{count:,} values of {site.label} came as NaN or infinite from the model and are stored as they came; "
                "a model loaded in another dtype may not have them"
            )


def context_length(settings: Recording, model: Model) -> int:
    """Tokens in the longest sequence. Raises RequestError beyond what the model was built for."""
    limit = model.context_limit
    if settings.context is None:
        return min(256, limit or 256)
    if limit is not None and settings.context > limit:
        raise RequestError(
            f"context {settings.context} is more than model {model.name!r} was built for; give {limit} tokens or fewer"
        )
    return settings.context


@runtime_checkable  # for the shape checks of the tests
class Workers(Protocol):
    """Who writes the segments of a recording."""

    own_device: str | None
    """Where the process that plans loads the model; None: the GPU if there is one."""
    shared: bool
    """Whether other processes write the same store at this moment."""
    name: str
    """What tells this process's files in the store from those of others that share it."""

    def device(self, model: Model) -> str:
        """Kind of device that computes: cpu, cuda."""

    def own(self, planned: Sequence[PlannedSegment]) -> Sequence[PlannedSegment]:
        """Which of the part's segments this process has to do with."""

    def write(
        self, recorder: SegmentRecorder, left: Sequence[PlannedSegment], tick: Callable[[int], None]
    ) -> Generator[None, None, None]:
        """Have these segments written; yields whenever one has been handed in."""


@dataclass(frozen=True)
class ThisProcess:
    """One segment after another, here."""

    own_device: str | None = None
    shared: bool = False
    name: str = ""

    def device(self, model: Model) -> str:
        return model.device.type

    def own(self, planned: Sequence[PlannedSegment]) -> Sequence[PlannedSegment]:
        return planned

    def write(
        self, recorder: SegmentRecorder, left: Sequence[PlannedSegment], tick: Callable[[int], None]
    ) -> Generator[None, None, None]:
        for segment in left:
            recorder.write(segment, tick)
            yield


@dataclass(frozen=True)
class Work:
    """All that a process with the model needs to write any segment of a part. Small: it travels to other machines."""

    store: Path
    plan: Path
    """Folder of the planned sequences."""
    manifest: Manifest
    """The store's, without its segments."""
    settings: Recording
    row_offset: int
    """Rows of the store before the part."""
    sequence_offset: int
    document_offset: int


@dataclass(frozen=True)
class SegmentRecorder:
    """Runs a model over planned segments and writes them."""

    work: Work
    model: Model
    passing: EncodedSite | None = None
    """A site whose features are extracted and whose activations are not stored."""

    @cached_property
    def taps(self) -> tuple[Site, ...]:
        return self.model.site_map.select(self.work.settings.sites or ())

    @cached_property
    def sequences(self) -> corpus.Sequences:
        return corpus.open_sequences(self.work.plan)

    @cached_property
    def encode(self) -> Callable[[int, Tensor, Sequence[int]], None] | None:
        """What makes the features of `passing`."""
        return self.passing.encoder(self.work.store, self.work.manifest) if self.passing else None

    def write(self, planned: PlannedSegment, tick: Callable[[int], None]) -> None:
        """One segment, from forward passes to a finished folder that waits for its commit."""
        work, sequences = self.work, self.sequences
        first = planned.first_sequence - work.sequence_offset
        last = first + planned.sequences
        lengths = sequences.lengths[first:last]
        ids = sequences.token_ids[sequences.starts[first] : sequences.starts[last]]
        table = corpus.token_table(
            sequences,
            first,
            last,
            row_offset=work.row_offset,
            sequence_offset=work.sequence_offset,
            document_offset=work.document_offset,
            text_of=partial(corpus.token_texts, self.model.tokenizer),
        )
        what = f"segment {planned.name}"
        with explain_full_disk(work.store, what, planned.first_row):
            with staged(work.store, work.manifest, planned, table) as segment:
                if self.encode is None:
                    _fill(segment, self.model, self.taps, ids, lengths, work.settings, tick)
                else:  # its features first: a segment that is finished has them
                    passed = _Passed(segment, self.passing.site, planned.rows)
                    _fill(passed, self.model, [*self.taps, self.passing.tap], ids, lengths, work.settings, tick)
                    self.encode(planned.first_row, passed.values, lengths.tolist())
            hand_in(work.store, planned)


def _record_part(
    writer: Writer,
    workers: Workers,
    model: Model,
    sequences: corpus.Sequences,
    held: Sequence[SiteRecord],
    passing: EncodedSite | None,
    plan: Path,
    settings: Recording,
    append: bool,
    show_progress: bool,
) -> None:
    """Everything after planning: what is committed is checked, the rest is run and committed segment by segment."""
    lengths = sequences.lengths
    part = Part(
        rows=int(lengths.sum()),
        sequences=len(lengths),
        documents=sequences.documents,
        skipped_documents=sequences.skipped_documents,
        replaced_characters=sequences.replaced_characters,
    )
    begun = writer.begin(part, append=append)
    before, committed = writer.manifest.parts[:-1], writer.manifest.segments
    work = Work(
        store=writer.path.absolute(),
        plan=plan.absolute(),
        manifest=replace(writer.manifest, segments=()),
        settings=settings,
        row_offset=sum(part.rows for part in before),
        sequence_offset=sum(part.sequences for part in before),
        document_offset=sum(part.documents for part in before),
    )
    planned = [
        PlannedSegment(
            name=f"{len(committed) - begun + index:05d}",
            part=len(before),
            rows=int(sequences.starts[last] - sequences.starts[first]),
            sequences=last - first,
            first_row=int(sequences.starts[first]) + work.row_offset,
            first_sequence=first + work.sequence_offset,
            digest=corpus.digest(
                sequences.token_ids[sequences.starts[first] : sequences.starts[last]], lengths[first:last]
            ),
        )
        for index, (first, last) in enumerate(corpus.segment_plan(lengths, settings.segment_rows or segment_rows(held)))
    ]
    for index, segment in enumerate(planned[:begun]):
        writer.check(index, segment.digest)
    own = workers.own(planned)
    left = writer.take_up(planned, own)
    rows, rows_left = (sum(segment.rows for segment in some) for some in (own, left))
    check_space(writer.path, required_bytes(writer.manifest.sites, rows_left))
    features = passing.opened(writer.path, writer.manifest, own, left, workers.shared) if passing and left else None
    with (
        features or nullcontext(),
        progress("recording", rows, "rows", shown=show_progress, done=rows - rows_left) as tick,
        closing(workers.write(SegmentRecorder(work, model, passing), left, tick)) as handed_in,
    ):
        for _ in handed_in:
            writer.commit_waiting()
    writer.commit_waiting()


class _Passed:
    """A segment being written, of which one more site is kept in memory and not written."""

    def __init__(self, segment: SegmentWriter, site: SiteRecord, rows: int) -> None:
        self._segment, self._site = segment, site
        self.values = torch.empty((rows, *site.shape), dtype=getattr(torch, site.dtype))
        """What passed at the site: [row, *shape], as it would be stored."""
        self.count = segment.count

    def shape(self, site: str) -> tuple[int, ...]:
        return self._site.shape if site == self._site.name else self._segment.shape(site)

    def write(self, site: str, first_row: int, rows: np.ndarray) -> None:
        if site == self._site.name:
            _as_numpy(self.values)[first_row : first_row + len(rows)] = rows
        else:
            self._segment.write(site, first_row, rows)


def _fill(
    segment: SegmentWriter | _Passed,
    model: Model,
    taps: Sequence[Site],
    ids: Int[np.ndarray, " row"],
    lengths: Int[np.ndarray, " sequence"],
    settings: Recording,
    tick: Callable[[int], None],
) -> None:
    """Runs the model over one segment's sequences and writes every site's rows."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    dtype = getattr(torch, settings.dtype)
    with _backlog() as submit:
        for batch in corpus.batch_plan(lengths, settings.batch_tokens or batch_tokens(model)):
            tokens, mask = _padded(ids, starts[batch], lengths[batch])
            rows = _Rows(starts[batch], lengths[batch])

            def receive(site: Site, tensor: Tensor, first: int, rows: _Rows = rows) -> None:
                if site.axes[-1:] == ("key",):
                    tensor = torch.nn.functional.pad(tensor, (0, segment.shape(site.name)[-1] - tensor.shape[-1]))
                real, runs = rows.take(tensor, first)
                submit(_write, segment, site.name, _to_host(*_stored(real, dtype)), runs)

            capture(model.module, taps, tokens, mask, receive)
            tick(int(lengths[batch].sum()))


class _Rows:
    """The real rows of one right-padded batch: which they are in the batch, and where they go in the segment."""

    def __init__(self, starts: Int[np.ndarray, " batch"], lengths: Int[np.ndarray, " batch"]) -> None:
        self.starts, self.lengths = starts, lengths

    def take(self, tensor: Tensor, first: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """From `[batch, position, ...]`, whose positions begin at `first`: real rows `[row, ...]`, and runs of
        (row in the segment, row here, how many)."""
        positions = tensor.shape[1]
        counts = np.clip(self.lengths - first, 0, positions)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        flat = tensor.flatten(0, 1)
        if offsets[-1] < len(flat):
            here = np.concatenate([np.arange(n) + i * positions for i, n in enumerate(counts)])
            flat = flat.index_select(0, torch.from_numpy(here).to(flat.device))
        runs = [
            (int(start + first), int(offset), int(n))
            for start, offset, n in zip(self.starts, offsets[:-1], counts, strict=True)
            if n
        ]
        return flat, runs


def _stored(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | int, Tensor | int]:
    """`x` in the stored type, in memory of its own; how many finite values were beyond its range (they become
    its largest), and how many were not finite to begin with (they stay)."""
    limit = torch.finfo(dtype).max
    fresh = {"copy": True, "memory_format": torch.contiguous_format}  # heads of a lone sequence may come as a view
    if x.device.type == "cpu" and x.numel():
        low, high = torch.aminmax(x)
        if low >= -limit and high <= limit:  # false for NaN too
            return x.to(dtype, **fresh), 0, 0
    finite = torch.isfinite(x)
    beyond = finite & (x.abs() > limit)
    clamped = torch.where(finite, x.clamp(-limit, limit), x)
    return clamped.to(dtype, **fresh), beyond.sum(), (~finite).sum()


def _to_host(x: Tensor, *counts: Tensor | int) -> Callable[[], tuple[np.ndarray, list[int]]]:
    """Starts the copy to host memory; the returned function waits for it. On a GPU the copy runs on its own
    stream into pinned memory, beside the next forward pass."""
    if x.device.type != "cuda":
        return lambda: (_as_numpy(x.cpu()), [int(n) for n in counts])
    stream = _copy_stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(x, non_blocking=True)
        x.record_stream(stream)
        copied = torch.cuda.Event()
        copied.record(stream)

    def arrived() -> tuple[np.ndarray, list[int]]:
        copied.synchronize()
        return _as_numpy(host), [int(n) for n in counts]

    return arrived


_streams: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _as_numpy(x: Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits travel as uint16."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _write(segment: SegmentWriter | _Passed, name: str, arrived: Callable, runs: list[tuple[int, int, int]]) -> None:
    array, (overflow, nonfinite) = arrived()
    for row, first, n in runs:
        segment.write(name, row, array[first : first + n])
    segment.count(name, overflow=overflow, nonfinite=nonfinite)


@contextmanager
def _backlog() -> Iterator[Callable[..., None]]:
    """Yields `submit(function, *arguments)`: run in order by one background thread, at most a few waiting, so
    a slow disk slows the model instead of filling memory. An error there is raised here."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as pool:

        def submit(function: Callable, *arguments: Any) -> None:
            while len(waiting) >= _BACKLOG:
                waiting.popleft().result()
            waiting.append(pool.submit(function, *arguments))

        try:
            yield submit
            while waiting:
                waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _padded(
    ids: Int[np.ndarray, " row"], starts: Int[np.ndarray, " batch"], lengths: Int[np.ndarray, " batch"]
) -> tuple[Int[Tensor, "batch position"], Int[Tensor, "batch position"]]:
    """Token ids and attention mask of some sequences, padded on the right."""
    tokens = torch.zeros(len(starts), int(lengths.max()), dtype=torch.long)
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        tokens[row, :n] = torch.from_numpy(ids[start : start + n].astype(np.int64))
    mask = torch.arange(tokens.shape[1]) < torch.from_numpy(np.asarray(lengths))[:, None]
    return tokens, mask.long()


# ---- what the manifest says of it -----------------------------------------------------------------------


def _site_record(site: Site, context: int, dtype: str) -> SiteRecord:
    shape = tuple(context if length is None else length for length in site.shape)
    return SiteRecord(name=site.name, short=site.short, axes=("row", *site.axes), shape=shape, dtype=dtype)


def _model_record(model: Model) -> ModelRecord:
    sites = model.site_map
    return ModelRecord(
        name=model.name,
        architecture=model.architecture,
        fingerprint=model.fingerprint(),
        config_fingerprint=model.config_fingerprint(),
        tokenizer_fingerprint=model.tokenizer_fingerprint(),
        dtype=str(model.dtype).removeprefix("torch."),
        revision=model.revision,
        n_layers=sites.n_layers,
        d_model=model.d_model,
        vocab=model.vocab,
        adapter=sites.adapter,
    )


def environment() -> dict[str, str]:
    """What may change the last bit of a number, the kind of device aside: versions."""
    versions = {name: version(name) for name in _LIBRARIES}
    return {
        "python": platform.python_version(),
        "workbench": version("interp-workbench"),
        **versions,
    }


def _unembed(model: Model) -> tuple[Callable[[Path], None] | None, str | None]:
    """How to write the unembedding, or why there is none."""
    try:
        unembed = measure_unembed(model.module, model.site_map.last_block)
    except NoUnembed as error:
        return None, str(error)

    def write(path: Path) -> None:
        named = unembed
        if model.tokenizer is not None:
            named = replace(unembed, tokens=tuple(corpus.token_texts(model.tokenizer, range(unembed.vocab))))
        save_unembed(named, path, model.module.get_output_embeddings().weight.dtype)

    return write, None


def segment_rows(records: Sequence[SiteRecord]) -> int:
    """Rows of a segment, where nobody asks for another number."""
    return max(1, min(_SEGMENT_ROWS, _SEGMENT_BYTES // sum(record.row_bytes for record in records)))


@contextmanager
def _scratch(out: Path, name: str) -> Iterator[Path]:
    """A folder for the planned tokens, on the store's own disk; gone afterwards, and before if left by a kill."""
    path = out / f"tokens{name}.partial"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
