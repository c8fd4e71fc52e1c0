"""Recording of a model into a store: one pass over the texts, all requested sites, bounded memory.

Three stages. Plan (`planning`): the texts become sequences, so that rows and disk space are known before the model
runs. Write (`segments`, `transfer`): sequences of similar length share a forward pass; padding is dropped on the
device, values are converted to the stored type, and a thread copies and writes them while the next pass computes.
Finish: the store is opened, lost values are reported, features are indexed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.corpus.sources import Texts, check_source, read_documents
from workbench.io.errors import RequestError
from workbench.io.tasks import ThisProcess, Workers
from workbench.io.versions import library_versions
from workbench.model.load import Model, load_model
from workbench.recording.planning import RecordingPlan, plan_part, plan_recording, plan_tokens
from workbench.recording.segments import SegmentRecorder, write_part
from workbench.sites.settings import Recording, recording
from workbench.store.manifest import SiteRecord, read_counts
from workbench.store.writer import Writer, explain_full_disk, open_writer

if TYPE_CHECKING:
    from workbench.features.while_recording import RecordedFeatures
    from workbench.sae.load import Sae
    from workbench.store.reader import Store

_LOG = logging.getLogger(__name__)


def record(
    model: Model | Any,
    texts: Texts,
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
    texts: Texts,
    *,
    out: str | Path,
    features: RecordedFeatures | None = None,
    append: bool = False,
    workers: Workers | None = None,
    show_progress: bool = True,
) -> Store:
    """`record` with its settings as one frozen record, and those of an SAE as another."""

    check_source(texts)
    workers = workers or ThisProcess()
    if not isinstance(model, Model):
        model = load_model(model, device=workers.planning_device if isinstance(model, str | Path) else None)
    plan = plan_recording(model, settings, Path(out), features)
    documents = read_documents(
        texts,
        text_column=plan.settings.text_column,
        metadata=plan.settings.metadata,
        span_column=plan.settings.span_column,
    )
    device = workers.device_type(model.device.type)
    with _opened(plan, device, append, workers.shared) as writer, _scratch(plan.out, workers.suffix) as folder:
        with explain_full_disk(writer.path, "the planned tokens", writer.manifest.rows):
            sequences = plan_tokens(plan, model, documents, folder, show_progress)
        part, segments = plan_part(plan, writer, sequences, folder, append)
        write_part(SegmentRecorder(part, model, plan.encoded_only), segments, writer, workers, show_progress)
    return finish_recording(plan, workers, show_progress)


@contextmanager
def _opened(plan: RecordingPlan, device: str, append: bool, shared: bool) -> Iterator[Writer]:
    """The store of the recording, made or reopened, and held until the block is left."""
    with open_writer(
        plan.out,
        model=plan.model,
        sites=plan.sites,
        recording=plan.settings,
        tokens_added={"prefix": list(plan.added.prefix), "suffix": list(plan.added.suffix)},
        environment=library_versions() | {"device": device},
        unembed=plan.unembed,
        unembed_reason=plan.unembed_reason,
        features=plan.encoded_only and plan.encoded_only.label,
        shared=shared,
    ) as writer:
        if plan.encoded_only and append and writer.manifest.rows and writer.manifest.complete:
            raise RequestError(
                f"append: features of the {writer.manifest.rows:,} rows before need their "
                f"{plan.encoded_only.site.label} again, which was not stored; choose another out"
            )
        yield writer


@contextmanager
def _scratch(out: Path, suffix: str) -> Iterator[Path]:
    """A folder for the planned tokens, on the store's own disk; gone afterwards, and before if left by a kill."""
    path = out / f"tokens{suffix}.partial"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def finish_recording(plan: RecordingPlan, workers: Workers, show_progress: bool) -> Store:
    """Stage 3 of a recording: opens the store, warns of values that were lost, completes the features."""
    from workbench.store.reader import open_store  # takes seconds: DuckDB, pandas and xarray

    store = open_store(plan.out)
    _warn_of_lost_values(store, plan.all_sites)
    if plan.features and store.manifest.complete:  # else the last process that shares the recording completes them
        plan.features.finish(store, workers, show_progress=show_progress)
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
