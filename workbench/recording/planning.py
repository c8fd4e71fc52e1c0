"""Stage 1 of a recording: what is recorded, which tokens, in which segments. The model does not run over the texts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from workbench.corpus.aligned import aligned_pairs
from workbench.corpus.chats import only_chats, render_chats
from workbench.corpus.layout import Layout, Sequences, digest, plan_sequences, segment_plan
from workbench.corpus.sources import Texts, read_documents
from workbench.corpus.tokenizer import AddedTokens, added_tokens
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.model.gradients import check_gradients
from workbench.model.intervene import Intervention
from workbench.model.load import Model
from workbench.model.logit_metrics import Metric
from workbench.model.stored_model import model_record
from workbench.recording.choosing import choose_rows, chosen_digest, chosen_rows, chosen_segments
from workbench.recording.segment_changes import RecordedChanges, plan_changes
from workbench.recording.segment_gradients import check_metric, check_next_tokens, gradient_record
from workbench.sites.grammar import Site
from workbench.sites.settings import Recording
from workbench.store.manifest import Manifest, ModelRecord, Part, SiteRecord
from workbench.store.new_columns import check_new_columns
from workbench.store.staging import PlannedSegment
from workbench.store.writer import Writer

if TYPE_CHECKING:
    from workbench.features.while_recording import EncodedSites, RecordedFeatures

_LOG = logging.getLogger(__name__)

AGAIN = "again"
Append = bool | Literal["again"]
"""True: add texts to a store, unless it ends with them. "again": add them even then."""

_SITES = ("resid_post",)
_SEGMENT_BYTES = 256 << 20
_SEGMENT_ROWS = 65_536


@dataclass(frozen=True)
class RecordingPlan:
    """A recording as requested of one model, before its texts are read."""

    model: ModelRecord
    """The model, as the store records it."""
    settings: Recording
    """Settings with the default sites filled in."""
    context: int
    """Tokens in the longest sequence."""
    added: AddedTokens
    sites: tuple[SiteRecord, ...]
    """Sites that are stored."""
    features: EncodedSites | None
    """Sites whose SAE features are extracted."""
    changes: RecordedChanges | None = None
    """Interventions with which the model runs."""
    gradient_of: Metric | None = None
    """Metric whose gradients with respect to each site are stored."""

    @property
    def encoded_only(self) -> EncodedSites | None:
        """The sites whose features are extracted, unless the activations of all of them are stored."""
        return self.features if len(self.all_sites) > len(self.sites) else None

    @property
    def all_sites(self) -> tuple[SiteRecord, ...]:
        """Sites that are stored, then those that are only encoded."""
        stored = {site.name for site in self.sites}
        encoded = self.features.reading.recorded if self.features else ()
        return (*self.sites, *(site for site in encoded if site.name not in stored))

    @property
    def segment_rows(self) -> int:
        """Rows of a full segment."""
        return self.settings.segment_rows or default_segment_rows(self.all_sites)


@dataclass(frozen=True)
class PartPlan:
    """Facts that a process with the model needs to write any segment of a part. Small: it is sent to other machines."""

    store: Path
    tokens: Path
    """Folder of the planned sequences."""
    manifest: Manifest
    """Manifest of the store, without its segments."""
    settings: Recording
    row_offset: int
    """Rows of the store before the part."""
    sequence_offset: int
    document_offset: int
    interventions: tuple[Intervention, ...] = ()
    gradient_of: Metric | None = None


def plan_recording(
    model: Model,
    settings: Recording,
    out: Path,
    features: RecordedFeatures | None = None,
    present: ModelRecord | None = None,
    interventions: Sequence[Intervention] = (),
    gradient_of: Metric | None = None,
) -> RecordingPlan:
    """Resolves a request against a model: its sites, its context, its features.

    Args:
        model: The model that will run.
        settings: Settings as requested.
        out: Path of the store.
        features: SAE features to extract while recording.
        present: What a store records of the model. None: it is measured, which takes a checksum of the weights.
        interventions: Interventions with which the model runs.
        gradient_of: Metric whose gradients are stored.

    Raises:
        RequestError: An unknown site, a context beyond the model's, an SAE that does not fit, or a metric or site
            without gradients.
    """
    if settings.sites is None and features is None:
        settings = replace(settings, sites=_SITES)
    sites = model.site_map.select(settings.sites or ())
    if not model.site_map.causal:
        _LOG.warning(
            f"model {model.name!r} is not causal: later tokens change what it computes at earlier positions; probes of "
            "next-token prediction will refuse the store. If it was trained as a decoder (BERT's kind), load it with "
            "is_decoder=True"
        )
    context = context_length(settings, model)
    check_metric(model, gradient_of, sites)
    if gradient_of is not None and features is not None:
        raise RequestError("gradient_of does not go with sae; extract the features from the finished store")
    changes = plan_changes(model, interventions, sites)
    if gradient_of is not None:
        check_gradients(model, sites)
    encoded = None
    if features is not None:
        record_of = partial(_site_record, context=context, dtype=settings.dtype)
        encoded = features.of(model, out, sites, record_of)
    described = present or model_record(model)
    added = added_tokens(model.tokenizer, settings.bos)
    records = tuple(
        replace(_site_record(site, context, settings.dtype), synonyms=model.site_map.names_of(site)) for site in sites
    )
    return RecordingPlan(
        model=described,
        settings=settings,
        context=context,
        added=added,
        sites=(*records, *(map(gradient_record, records) if gradient_of else ())),
        features=encoded,
        changes=changes,
        gradient_of=gradient_of,
    )


def plan_tokens(plan: RecordingPlan, model: Model, texts: Texts, folder: Path, show_progress: bool) -> Sequences:
    """Reads the texts and tokenizes them into sequences, in files in `folder`.

    Raises:
        RequestError: Texts that cannot be read, token ids that are not the model's, texts without a tokenizer, no
            tokens at all, or no next token under a loss.
    """
    settings, tokenizer = plan.settings, model.tokenizer
    documents = read_documents(
        texts, text_column=settings.text_column, metadata=settings.metadata, span_column=settings.span_column
    )
    documents = only_chats(documents) if settings.generation_prompt else documents
    documents = render_chats(documents, tokenizer, settings.generation_prompt)
    documents = aligned_pairs(documents, tokenizer, settings.unaligned_pairs)
    with progress("tokenizing", None, "tokens", show=show_progress) as advance:
        layout = Layout(plan.context, plan.added, settings.packed, settings.max_rows, model.vocab)
        sequences = plan_sequences(documents, tokenizer, layout, folder, advance)
    check_next_tokens(plan.gradient_of, sequences.lengths)
    choose_rows(settings, model, sequences, folder)
    return sequences


def plan_part(
    plan: RecordingPlan, writer: Writer, sequences: Sequences, folder: Path, append: Append
) -> tuple[PartPlan, list[PlannedSegment]]:
    """Begins or resumes a part of the store; returns its plan and all its segments, committed ones included.

    Args:
        plan: The recording.
        writer: The open store.
        sequences: Planned sequences of the part.
        folder: Folder of their files.
        append: Add the part after those of the store; texts that it ends with already only if it is "again".

    Raises:
        RequestError: The store holds other texts, or columns that do not fit those of the texts.
    """
    lengths, starts = sequences.lengths, sequences.starts
    manifest = writer.manifest
    chosen = chosen_rows(folder)
    ends = starts if chosen is None else np.searchsorted(chosen, starts)  # rows before each sequence
    if manifest.complete and not append:  # its segments may have been planned for fewer sites
        cuts = _committed_cuts(manifest)
    elif chosen is not None:
        cuts = chosen_segments(np.diff(ends), lengths, plan.segment_rows)
    else:
        cuts = segment_plan(lengths, plan.segment_rows)
    cuts = [(first, min(last, len(lengths))) for first, last in cuts if first < len(lengths)]
    digests = [digest(sequences.token_ids[starts[first] : starts[last]], lengths[first:last]) for first, last in cuts]
    if chosen is not None:
        parts = [chosen[ends[first] : ends[last]] - starts[first] for first, last in cuts]
        digests = [chosen_digest(planned, rows) for planned, rows in zip(digests, parts, strict=True)]
    committed = _begin(writer, sequences, int(ends[-1]), digests, append)
    before = writer.manifest.parts[:-1]
    part_plan = PartPlan(
        store=writer.path.absolute(),
        tokens=folder.absolute(),
        manifest=writer.manifest.without_segments,
        settings=plan.settings,
        row_offset=sum(part.rows for part in before),
        sequence_offset=sum(part.sequences for part in before),
        document_offset=sum(part.documents for part in before),
        interventions=plan.changes.records if plan.changes else (),
        gradient_of=plan.gradient_of,
    )
    first_number = len(writer.manifest.segments) - committed
    return part_plan, [
        PlannedSegment(
            name=f"{number:05d}",
            part=len(before),
            rows=int(ends[last] - ends[first]),
            sequences=last - first,
            first_row=int(ends[first]) + part_plan.row_offset,
            first_sequence=first + part_plan.sequence_offset,
            digest=known,
        )
        for number, ((first, last), known) in enumerate(zip(cuts, digests, strict=True), first_number)
    ]


def _committed_cuts(manifest: Manifest) -> list[tuple[int, int]]:
    """First sequence, and the one after the last, of each segment of the last part."""
    last = len(manifest.parts) - 1
    ends = np.cumsum([0, *(segment.sequences for segment in manifest.segments if segment.part == last)]).tolist()
    return list(itertools.pairwise(ends))


def _begin(writer: Writer, sequences: Sequences, rows: int, digests: Sequence[str], append: Append) -> int:
    """Begins or resumes the part of these sequences; returns the number of its committed segments."""
    part = Part(
        rows=rows,
        sequences=len(sequences.lengths),
        documents=sequences.documents,
        skipped_documents=sequences.skipped_documents,
        replaced_characters=sequences.replaced_characters,
        cut_documents=sequences.cut_documents,
        columns=sequences.columns,
        documents_with_added_tokens=sequences.documents_with_added_tokens,
        generation=sequences.generation,
    )
    if append and append != AGAIN and writer.ends_with(part, digests):
        _LOG.warning(
            f"append: {writer.path} ends with these texts already, {part.rows:,} rows; nothing is added. To add them "
            'once more, pass append="again" (--append again)'
        )
        return len(digests)
    parts = writer.manifest.parts
    number = len(parts) if append and writer.manifest.complete else max(0, len(parts) - 1)
    check_new_columns(writer.path, writer.manifest, number, sequences)
    committed = writer.begin(part, append=bool(append))
    for index, known in enumerate(digests[:committed]):
        writer.check(index, known)
    return committed


def context_length(settings: Recording, model: Model) -> int:
    """Returns the number of tokens in the longest sequence.

    Raises:
        RequestError: The context is longer than the model was built for.
    """
    limit = model.context_limit
    if settings.context is None:
        return min(256, limit or 256)
    if limit is not None and settings.context > limit:
        raise RequestError(
            f"context {settings.context} is more than model {model.name!r} was built for; give {limit} tokens or fewer"
        )
    return settings.context


def default_segment_rows(sites: Sequence[SiteRecord]) -> int:
    """Returns the rows of a segment of about 256 MiB, at most 65,536."""
    return max(1, min(_SEGMENT_ROWS, _SEGMENT_BYTES // sum(site.row_bytes for site in sites)))


def _site_record(site: Site, context: int, dtype: str) -> SiteRecord:
    shape = tuple(context if length is None else length for length in site.shape)
    return SiteRecord(name=site.name, short=site.short, axes=("row", *site.axes), shape=shape, dtype=dtype)
