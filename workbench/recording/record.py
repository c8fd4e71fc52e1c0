"""Records a model into a store: one pass over the texts, every site asked for, bounded memory.

The texts become sequences first, so rows and disk need are known before the model runs. Then, segment by
segment: sequences of like length share a forward pass, padding is dropped on the device, values are brought
to the stored type, and a background thread copies and writes them while the next pass computes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench import corpus
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.tasks import ThisProcess, Workers
from workbench.io.versions import library_versions
from workbench.model.load import Model, load_model
from workbench.model.unembed import NoUnembed, measure_unembed, save_unembed
from workbench.recording.plan import PartPlan
from workbench.recording.segments import SegmentRecorder, write_segments
from workbench.sites.grammar import Site
from workbench.sites.settings import Recording, recording
from workbench.store.manifest import ModelRecord, Part, SiteRecord, read_counts
from workbench.store.staging import PlannedSegment
from workbench.store.writer import Writer, check_space, explain_full_disk, open_writer, required_bytes

if TYPE_CHECKING:
    from workbench.features.while_recording import EncodedSite, RecordedFeatures
    from workbench.sae.load import Sae
    from workbench.store.reader import Store

_LOG = logging.getLogger(__name__)

_SITES = ("resid_post",)
_SEGMENT_BYTES = 256 << 20
_SEGMENT_ROWS = 65_536


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
    write segments side by side, `RayWorkers` or a `Share`; None: this one.

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
    workers = workers or ThisProcess()
    if not isinstance(model, Model):
        model = load_model(model, device=workers.planning_device if isinstance(model, str | Path) else None)
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
            environment=library_versions() | {"device": workers.device_type(model.device.type)},
            unembed=unembed,
            unembed_reason=reason,
            features=passing and passing.label,
            shared=workers.shared,
        ) as writer,
        _scratch(Path(out), workers.suffix) as workdir,
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
        _record_part(writer, workers, model, sequences, held, passing, workdir, settings, append, show_progress)
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
    part_plan = PartPlan(
        store=writer.path.absolute(),
        tokens=plan.absolute(),
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
            first_row=int(sequences.starts[first]) + part_plan.row_offset,
            first_sequence=first + part_plan.sequence_offset,
            digest=corpus.digest(
                sequences.token_ids[sequences.starts[first] : sequences.starts[last]], lengths[first:last]
            ),
        )
        for index, (first, last) in enumerate(corpus.segment_plan(lengths, settings.segment_rows or segment_rows(held)))
    ]
    for index, segment in enumerate(planned[:begun]):
        writer.check(index, segment.digest)
    own = workers.share_of(planned)
    left = writer.take_up(planned, own)
    rows, rows_left = (sum(segment.rows for segment in some) for some in (own, left))
    check_space(writer.path, required_bytes(writer.manifest.sites, rows_left))
    features = passing.opened(writer.path, writer.manifest, own, left, workers.shared) if passing and left else None
    with (
        features or nullcontext(),
        progress("recording", rows, "rows", shown=show_progress, done=rows - rows_left) as tick,
        closing(write_segments(SegmentRecorder(part_plan, model, passing), left, workers, tick)) as handed_in,
    ):
        for _ in handed_in:
            writer.commit_waiting()
    writer.commit_waiting()


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
