"""Records a model into a store: one pass over the texts, every site asked for, bounded memory.

The texts become sequences first, so rows and disk need are known before the model runs. Then, segment by
segment: sequences of like length share a forward pass, padding is dropped on the device, values are brought
to the stored type, and a background thread copies and writes them while the next pass computes.
"""

from __future__ import annotations

import platform
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench import corpus
from workbench.capture import capture
from workbench.errors import RequestError
from workbench.lens import NoUnembed, measure_unembed, save_unembed
from workbench.models import Model, load_model
from workbench.progress import progress
from workbench.settings import Recording, recording
from workbench.sites import Site
from workbench.store.manifest import ModelRecord, Part, SiteRecord, read_counts
from workbench.store.segment import SegmentWriter
from workbench.store.writer import Writer, check_space, explain_full_disk, open_writer, required_bytes

if TYPE_CHECKING:
    from workbench.sae.load import Sae
    from workbench.sae.recording import EncodedSite, RecordedFeatures
    from workbench.store.reader import Store

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
    show_progress: bool = True,
) -> Store:
    """Runs `model` over `texts` once and stores every activation of `sites` under `out`; returns the opened store.

    `model`: what `load_model` gives or takes. `texts`: a .txt, .jsonl or .parquet file, "hf:NAME" of a dataset, a
    Dataset object, a list of strings, or lists of token ids (taken as they are). The settings are those of
    `Recording`. If `out` holds an unfinished recording of the same model, texts and settings it is resumed;
    a finished one is returned as it is; `append=True` adds the texts after what is there.

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
        from workbench.sae.recording import RecordedFeatures  # SAELens' import takes seconds

        features = RecordedFeatures(sae, sae_site, sae_dtype, sae_force)
    return record_with(settings, model, texts, out=out, features=features, append=append, show_progress=show_progress)


def record_with(
    settings: Recording,
    model: Model | Any,
    texts: Any,
    *,
    out: str | Path,
    features: RecordedFeatures | None = None,
    append: bool = False,
    show_progress: bool = True,
) -> Store:
    """`record` with its settings as one frozen record, and those of an SAE as another."""

    corpus.check_source(texts)
    model = model if isinstance(model, Model) else load_model(model)
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
    unembed, reason = _unembed(model)
    with (
        open_writer(
            Path(out),
            model=_model_record(model),
            sites=records,
            recording=settings,
            tokens_added={"prefix": list(added.prefix), "suffix": list(added.suffix)},
            environment=_environment(model),
            unembed=unembed,
            unembed_reason=reason,
            features=passing and passing.label,
        ) as writer,
        _scratch(Path(out)) as workdir,
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
        _record_part(writer, model, taps, records, passing, sequences, settings, append, show_progress)
    from workbench.store.reader import open_store  # not before: what it needs is not what recording needs

    store = open_store(out)
    _warn_of_lost_values(store, [*records, passing.site] if passing else records)
    if encoded:
        encoded.finish(store, show_progress=show_progress)
    return store


def _warn_of_lost_values(store: Store, sites: Sequence[SiteRecord]) -> None:
    overflow, nonfinite = read_counts(store.path, store.manifest)
    for site in sites:
        if count := overflow[site.name]:
            limit = torch.finfo(getattr(torch, site.dtype)).max
            warnings.warn(
                f"{count:,} values of {site.label} are beyond {site.dtype} and stored as ±{limit:g}; "
                "record with dtype='bfloat16' or 'float32' to keep them",
                stacklevel=4,
            )
        if count := nonfinite[site.name]:
            warnings.warn(
                f"{count:,} values of {site.label} came as NaN or infinite from the model and are stored as they came; "
                "a model loaded in another dtype may not have them",
                stacklevel=4,
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


def _record_part(
    writer: Writer,
    model: Model,
    taps: Sequence[Site],
    records: Sequence[SiteRecord],
    passing: EncodedSite | None,
    sequences: corpus.Sequences,
    settings: Recording,
    append: bool,
    show_progress: bool,
) -> None:
    """Everything after planning: what is committed is checked, the rest is run and committed segment by segment."""
    lengths = sequences.lengths
    held = [*records, passing.site] if passing else records
    plan = corpus.segment_plan(lengths, settings.segment_rows or _segment_rows(held))
    part = Part(
        rows=int(lengths.sum()),
        sequences=len(lengths),
        documents=sequences.documents,
        skipped_documents=sequences.skipped_documents,
        replaced_characters=sequences.replaced_characters,
    )
    spans = [sequences.token_ids[sequences.starts[first] : sequences.starts[last]] for first, last in plan]
    digests = [corpus.digest(ids, lengths[first:last]) for ids, (first, last) in zip(spans, plan, strict=True)]
    begun = writer.begin(part, append=append)
    for index, digest in enumerate(digests[:begun]):
        writer.check(index, digest)
    rows_left = sum(len(ids) for ids in spans[begun:])
    check_space(writer.path, required_bytes(records, rows_left))
    before = writer.manifest.parts[:-1]
    offsets = {
        "row_offset": sum(part.rows for part in before),
        "sequence_offset": sum(part.sequences for part in before),
        "document_offset": sum(part.documents for part in before),
    }
    text_of = partial(corpus.token_texts, model.tokenizer)
    with (
        passing.writer(writer.path, writer.manifest) if passing and rows_left else nullcontext() as encode,
        progress("recording", part.rows, "rows", shown=show_progress, done=part.rows - rows_left) as tick,
    ):
        for (first, last), ids, digest in list(zip(plan, spans, digests, strict=True))[begun:]:
            table = corpus.token_table(sequences, first, last, text_of=text_of, **offsets)
            with writer.segment(rows=len(ids), sequences=last - first, digest=digest, tokens=table) as segment:
                if encode is None:
                    _fill(segment, model, taps, ids, lengths[first:last], settings, tick)
                    continue
                passed = _Passed(segment, passing.site, len(ids))
                _fill(passed, model, [*taps, passing.tap], ids, lengths[first:last], settings, tick)
                encode(writer.manifest.rows, passed.values, lengths[first:last].tolist())


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
        for batch in corpus.batch_plan(lengths, settings.batch_tokens or _batch_tokens(model)):
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


def _environment(model: Model) -> dict[str, str]:
    """What may change the last bit of a number: versions and kind of device."""
    versions = {name: version(name) for name in _LIBRARIES}
    return {
        "python": platform.python_version(),
        "workbench": version("interp-workbench"),
        **versions,
        "device": model.device.type,
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


def _batch_tokens(model: Model) -> int:
    """On a CPU as many tokens as its caches hold the activations of, measured at 768 x 2,048; a GPU wants more."""
    return max(2048, min(8192, 768 * 2048 // model.d_model)) if model.device.type == "cpu" else 16_384


def _segment_rows(records: Sequence[SiteRecord]) -> int:
    return max(1, min(_SEGMENT_ROWS, _SEGMENT_BYTES // sum(record.row_bytes for record in records)))


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder for the planned tokens, on the store's own disk; gone afterwards, and before if left by a kill."""
    path = out / "tokens.partial"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
