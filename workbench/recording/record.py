"""Recording of a model into a store: one pass over the texts, all requested sites, bounded memory.

Three stages. Plan (`planning`): the texts become sequences, so that rows and disk space are known before the model
runs. Write (`segments`, `transfer`): sequences of similar length share a forward pass; padding is dropped on the
device, values are converted to the stored type, and a thread copies and writes them while the next pass computes.
Finish: the store is opened, lost values are reported, features are indexed.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from workbench.corpus.sources import Texts, check_source
from workbench.io.checks import as_path, check
from workbench.io.errors import RequestError
from workbench.io.log import PROGRESS
from workbench.io.tasks import ThisProcess, Workers, dtype_for
from workbench.io.torch_state import plain_torch
from workbench.io.versions import library_versions
from workbench.model.load import Model, load_model
from workbench.model.location import locate
from workbench.model.preview import check_config
from workbench.model.stored_model import unembed_writer
from workbench.recording.new_sites import new_sites, record_new_sites, stored_settings
from workbench.recording.overwrite import overwrite_store
from workbench.recording.planning import (
    AGAIN,
    Append,
    RecordingPlan,
    plan_part,
    plan_recording,
    plan_tokens,
)
from workbench.recording.segment_changes import check_changed
from workbench.recording.segments import SegmentRecorder, write_part
from workbench.sites.settings import Recording, RecordingOptions, recording
from workbench.store.manifest import MANIFEST, SiteRecord, read_counts, read_manifest
from workbench.store.temporary import TemporaryFolder
from workbench.store.text_notes import text_notes
from workbench.store.unembedding import LEFT_OUT
from workbench.store.writer import Writer, explain_full_disk, is_read_only, open_writer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.features.while_recording import RecordedFeatures
    from workbench.model.intervene import Intervention
    from workbench.model.logit_metrics import Metric
    from workbench.sae.autoencoder import Sae
    from workbench.store.reader import Store

_LOG = logging.getLogger(__name__)


@plain_torch()
def record(
    model: Model | PreTrainedModel | str | Path,
    texts: Texts | None,
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    settings: Recording | None = None,
    sae: Sae | None = None,
    sae_site: str | Sequence[str] | None = None,
    sae_dtype: str = "float32",
    sae_force: bool = False,
    interventions: Sequence[Intervention] | Intervention = (),
    gradient_of: Metric | None = None,
    append: Append = False,
    workers: Workers | None = None,
    show_progress: bool = True,
    **options: Unpack[RecordingOptions],
) -> Store:
    """Runs a model over texts once and stores the activations of the requested sites.

    The same request gives the same bytes on the same machine; an interrupted one resumes. Memory: the model, one batch
    and its backlog. Disk: rows x bytes of all sites, compared with the free space first.

    Args:
        model: A loaded model, or what `load_model` takes: a directory, a GGUF file, a hub id, a transformers module.
        texts: A file (.txt .json .jsonl .csv .tsv .parquet), "hf:NAME", a Dataset, a table (pandas, Arrow, polars), the
            output of a tokenizer, strings, lists of token ids, chats, or (clean, corrupt) pairs.
            None: the tokens of the store at `out`, to add sites to it.
        out: Store, or its folder. A finished one of the same request is opened and gets the sites that it lacks; an
            unfinished one is resumed. None: a temporary folder, removed with the last handle of the store.
        overwrite: Record anew, in place of a store at `out`, which stays until the new one is complete.
        settings: Settings as one record. None: the defaults.
        sae: An SAE whose features are extracted while the model runs. Its sites are stored only if `sites` names them.
        sae_site: Site that the SAE reads, or a list of several. None: those it was trained on.
        sae_dtype: Stored type of the feature activations, float32 or float16.
        sae_force: Use an SAE that was trained on another site or model.
        interventions: Records that change the model, such as `wb.Zero("z.3")`; part of the store's identity.
        gradient_of: Metric, such as `wb.NextTokenLoss()`, whose gradients are stored, too, as `grad.resid_post.3`.
        append: Add the texts after those of an existing store. "again": even if the store ends with these texts.
        workers: Processes that write segments side by side, `RayWorkers` or a `Share`. None: this process alone.
        show_progress: Show progress bars.
        **options: Fields of `Recording`, packed and max_rows too; each replaces that of `settings`.

            - sites: Sites to record. None: resid_post, or no site if there is an SAE.
            - context: Longest sequence in tokens, BOS included. None: 256, or the model's limit if that is smaller.
            - dtype: Stored type of activations, float16, bfloat16 or float32. bos: "model", "always" or "never".
            - where, keep: Rows to store, by SQL or by position; the model sees all tokens. None: all.

    Returns:
        The opened store.

    Raises:
        RequestError: An unknown site, settings other than the store's, not enough space, an SAE that does not fit.
        DataError: The disk is full, or a row to encode is not finite. What is committed stays readable.
    """
    settings, workers = recording(_first_settings(texts, settings, out), **options), _workers(workers)
    folder = _folder(out, overwrite, append, workers)
    features, model = _features(sae, sae_site, sae_dtype, sae_force), _loaded(model, settings, workers)
    plan = plan_recording(model, settings, path := _path(folder), features, None, _several(interventions), gradient_of)
    return _record_at(plan, model, texts, path, overwrite, append, workers, show_progress)


def _record_at(
    plan: RecordingPlan,
    model: Model,
    texts: Texts | None,
    path: Path,
    overwrite: bool,
    append: Append,
    workers: Workers,
    show_progress: bool,
) -> Store:
    def write(place: Path) -> Store:
        return record_plan(plan, model, texts, place, append, workers, show_progress)

    return overwrite_store(path, write) if overwrite else write(path)


def _workers(workers: Workers | None) -> Workers:
    if isinstance(workers, int):
        raise RequestError(f"workers is {workers}; give wb.RayWorkers({workers})")
    return workers or ThisProcess()


def _several(interventions: Sequence[Intervention] | Intervention) -> Sequence[Intervention]:
    """Records; one alone stands for a sequence of one."""
    return interventions if isinstance(interventions, Sequence) else (interventions,)


def _first_settings(
    texts: Texts | None, settings: Recording | None, out: str | os.PathLike[str] | None
) -> Recording | None:
    """Settings that keywords replace: without texts those of the store."""
    if texts is None:
        return settings or stored_settings(None if out is None else as_path("out", out))
    check_source(texts)
    return settings


def _folder(
    out: str | os.PathLike[str] | None, overwrite: bool, append: Append, workers: Workers
) -> Path | TemporaryFolder:
    check("append", append, one_of=(False, True, AGAIN))
    if (append or workers.shared) and (overwrite or out is None):
        name, conflict = ("overwrite=True" if overwrite else "out=None"), "append" if append else "a Share"
        raise RequestError(f"{name} does not go with {conflict}; leave one of them out")
    return TemporaryFolder() if out is None else as_path("out", out)


def _path(folder: Path | TemporaryFolder) -> Path:
    return folder if isinstance(folder, Path) else folder.path


def record_plan(
    plan: RecordingPlan,
    model: Model,
    texts: Texts | None,
    out: Path,
    append: Append,
    workers: Workers,
    show_progress: bool,
) -> Store:
    """Carries out the plan of a recording, as `record` describes, and returns the opened store."""
    _write(plan, model, texts, out, append, workers, show_progress)
    return finish_recording(out, plan, workers, show_progress)


def _loaded(model: Model | PreTrainedModel | str | Path, settings: Recording, workers: Workers) -> Model:
    if isinstance(model, Model):
        return model
    if isinstance(model, str | Path):
        check_config(locate(model), settings.sites)
        return load_model(model, device=workers.planning_device, dtype=dtype_for(workers))
    return load_model(model)


def _write(
    plan: RecordingPlan,
    model: Model,
    texts: Texts | None,
    out: Path,
    append: Append,
    workers: Workers,
    show_progress: bool,
) -> None:
    """Plans the tokens of the texts and writes what is not in the store yet: rows, then sites."""
    with _without_traces(out, workers), _opened(plan, model, out, workers) as writer:
        if texts is None:
            _check_given_tokens(writer, append)
        else:
            _write_rows(plan, model, texts, writer, append, workers, show_progress)
        if writer.manifest.complete:
            record_new_sites(plan, model, writer, workers, show_progress)


def _write_rows(
    plan: RecordingPlan,
    model: Model,
    texts: Texts,
    writer: Writer,
    append: Append,
    workers: Workers,
    show_progress: bool,
) -> None:
    """Plans the tokens of the texts and writes the rows that are not in the store yet."""
    if append:
        _check_append(plan, writer)
    with (
        explain_full_disk(writer.path, "the planned tokens", writer.manifest.rows),
        _scratch(writer.path, workers.suffix) as folder,
    ):
        sequences = plan_tokens(plan, model, texts, folder, show_progress)
        if plan.changes and not is_read_only(writer.path):
            plan.changes.arrays.write(writer.path)
        part, segments = plan_part(plan, writer, sequences, folder, append)
        write_part(SegmentRecorder(part, model, plan.encoded_only), segments, writer, workers, show_progress)


@contextmanager
def _without_traces(out: Path, workers: Workers) -> Iterator[None]:
    """Inside, a request that is refused before its texts are planned leaves no folder where none was before."""
    new = not out.exists() and not workers.shared
    try:
        yield
    except RequestError:
        if new and (out / MANIFEST).exists() and not read_manifest(out).parts:
            shutil.rmtree(out)
        raise


def _features(sae: Sae | None, site: str | Sequence[str] | None, dtype: str, force: bool) -> RecordedFeatures | None:
    if sae is None:
        if site is not None or force:
            raise RequestError("sae_site and sae_force are for sae; give it too")
        return None
    from workbench.features.while_recording import RecordedFeatures  # takes seconds: SAELens
    from workbench.sae.autoencoder import check_autoencoder

    check_autoencoder(sae)
    return RecordedFeatures(sae, site, dtype, force)


def _opened(plan: RecordingPlan, model: Model, out: Path, workers: Workers) -> AbstractContextManager[Writer]:
    """The store of the recording, made or reopened, and held until the block is left."""
    write_unembed = unembed_writer(model) if plan.settings.unembed else None
    return open_writer(
        out,
        model=plan.model,
        sites=plan.sites,
        recording=plan.settings,
        tokens_added={"prefix": list(plan.added.prefix), "suffix": list(plan.added.suffix)},
        environment=library_versions() | {"device": workers.device_type(model.device.type)},
        unembed=write_unembed,
        unembed_reason=None if plan.settings.unembed else LEFT_OUT,
        features=plan.encoded_only and plan.encoded_only.label,
        interventions=plan.changes and plan.changes.stored,
        gradient_of=plan.gradient_of and plan.gradient_of.described(),
        shared=workers.shared,
    )


@contextmanager
def _scratch(out: Path, suffix: str) -> Iterator[Path]:
    """A folder for the planned tokens, on the store's own disk; gone afterwards, and before if left by a kill.

    Elsewhere for a finished store that is read-only: its tokens are only compared.
    """
    if is_read_only(out):
        with tempfile.TemporaryDirectory(prefix="workbench-tokens-") as folder:
            yield Path(folder)
        return
    path = out / f"tokens{suffix}.partial"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _check_append(plan: RecordingPlan, writer: Writer) -> None:
    if is_read_only(writer.path):
        raise RequestError(f"append: {writer.path} is read-only; make it writable, or append to a copy of it")
    requested = {site.name for site in plan.sites}
    if differing := [site.label for site in writer.manifest.sites if site.name not in requested]:
        raise RequestError(
            f"append: {writer.path} has {differing[0]}, which sites= does not name; name all of its sites"
        )
    if new := new_sites(plan, writer.manifest):
        raise RequestError(
            f"append: {writer.path} does not have {new[0].label}; add the site first, with texts=None or, in a "
            "shell, by workbench add"
        )
    if plan.encoded_only and writer.manifest.complete:
        raise RequestError(
            f"append: features of the {writer.manifest.rows:,} rows before need their "
            f"{plan.encoded_only.reading.site.label} again, which was not stored; choose another out"
        )


def _check_given_tokens(writer: Writer, append: Append) -> None:
    if append:
        raise RequestError("append: texts is None, which adds no rows; give texts, or leave append out")
    if not writer.manifest.complete:
        raise RequestError(f"texts: {writer.path} is not complete; resume it with its texts before sites are added")


def finish_recording(out: Path, plan: RecordingPlan, workers: Workers, show_progress: bool) -> Store:
    """Stage 3 of a recording: opens the store, warns of values that were lost, completes the features."""
    from workbench.store.reader import open_store  # takes seconds: DuckDB, pandas and xarray

    store = open_store(out)
    check_changed(store.manifest)
    _warn_of_lost_values(store, plan.all_sites)
    if notes := text_notes(store.manifest.parts[-1:]):
        PROGRESS.info(f"texts of {out}: {'; '.join(notes)}")
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
