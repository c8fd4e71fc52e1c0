"""Stage 2 of a recording: forward passes over planned sequences, segment by segment, written by any process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.corpus.layout import Sequences, batch_plan, open_sequences
from workbench.corpus.tokenizer import token_texts
from workbench.corpus.tokens import token_table
from workbench.io.errors import RequestError, WorkbenchError
from workbench.io.freed_memory import keep_freed_memory
from workbench.io.progress import progress
from workbench.io.tasks import Begin, Workers, lost_task
from workbench.model.capture import capture
from workbench.model.gradients import capture_gradients
from workbench.model.load import Loading, Model, batch_tokens
from workbench.model.packing import pack_model, unpack_model
from workbench.recording.choosing import chosen_rows, chosen_table
from workbench.recording.planning import PartPlan
from workbench.recording.segment_changes import SegmentChanges, applied
from workbench.recording.segment_gradients import SegmentMetric
from workbench.recording.transfer import BatchRows, ChosenRows, as_numpy, backlog, one_behind, to_host
from workbench.sites.grammar import Site, gradient_name
from workbench.sites.settings import Recording
from workbench.store.manifest import SiteRecord
from workbench.store.segment import SegmentWriter
from workbench.store.staging import PlannedSegment, stage_segment, submit_segment
from workbench.store.writer import Writer, check_space, explain_full_disk, required_bytes

if TYPE_CHECKING:
    from workbench.features.while_recording import EncodedSites, PackedEncodedSites


_GRADIENT_SHARE = 4
"""Divisor of the default tokens of a pass whose graph is kept for the backward pass."""


def write_part(
    recorder: SegmentRecorder,
    segments: Sequence[PlannedSegment],
    writer: Writer,
    workers: Workers,
    show_progress: bool,
) -> None:
    """Writes the segments of a part that are missing, and commits each as soon as those before it are there.

    Args:
        recorder: Model and plan of this process.
        segments: All segments of the part.
        writer: The open store.
        workers: Processes that write.
        show_progress: Show a progress bar.

    Raises:
        RequestError: The disk has not enough free space.
        DataError: The disk is full, a row to encode is not finite, or workers died too often over a segment.
    """
    share = workers.share_of(segments)
    unwritten = writer.resume_segments(segments, share)
    rows, rows_left = (sum(segment.rows for segment in listed) for listed in (share, unwritten))
    check_space(writer.path, required_bytes(writer.manifest.sites, rows_left))
    encoded = recorder.encoded_only if unwritten else None
    try:
        with (
            encoded.locked(writer.path, writer.manifest, share, unwritten, workers.shared)
            if encoded
            else nullcontext(),
            progress("recording", rows, "rows", show=show_progress, initial=rows - rows_left) as advance,
            closing(write_segments(recorder, unwritten, workers, advance)) as written,
        ):
            for _ in written:
                writer.commit_submitted()
    except BaseException:
        with suppress(WorkbenchError):  # the first error says what happened
            writer.commit_submitted()
        raise
    writer.commit_submitted()


def write_segments(
    recorder: SegmentRecorder, segments: Sequence[PlannedSegment], workers: Workers, advance: Callable[[int], None]
) -> Generator[None, None, None]:
    """Writes segments by `workers`; yields after each.

    Of this process's, one is still flushed and checksummed while the passes of the next one run; all are finished, and
    wait to be committed, at the end.

    Args:
        recorder: Model and plan of this process.
        segments: Segments that are not written yet.
        workers: Processes that write.
        advance: Called with numbers of rows as they are recorded.

    Raises:
        DataError: Workers died too often over a segment, or the disk is full.
    """
    plan = recorder.plan

    def on_lost(segment: PlannedSegment | None, error: Exception) -> None:
        description = f"segment {segment.name}" if segment else "a first segment"
        raise lost_task(f"{description} of {plan.store}", error)

    def begin_here(_device: str | None) -> Callable[[PlannedSegment], None]:
        return partial(recorder.write, advance=advance, later=later)

    begin: Begin[PlannedSegment, None] = begin_here
    arguments: tuple[Any, ...] = ()
    if workers.remote and segments:
        features = recorder.encoded_only.pack(plan.store) if recorder.encoded_only else None
        begin, arguments = begin_segments, (plan, pack_model(recorder.model, plan.manifest.model), features)
    with one_behind() as later, closing(workers.map(begin, arguments, segments, on_lost)) as answers:
        for segment, _ in answers:
            if workers.remote:
                advance(segment.rows)
            yield


def begin_segments(
    device: str, plan: PartPlan, model: Loading | bytes, features: PackedEncodedSites | None
) -> Callable[[PlannedSegment], None]:
    """Returns the function that writes a segment in another process.

    Raises:
        RequestError: The store's folder is not visible from here, or the weights differ from the planned ones.
    """
    if not plan.tokens.is_dir():
        raise RequestError(
            f"a worker on {socket.gethostname()} finds no {plan.store}; out must be on a disk that all machines share"
        )
    unpacked = unpack_model(model, device, plan.manifest.model)
    encoded_only = features.unpack(device, unpacked.site_map) if features else None
    return partial(SegmentRecorder(plan, unpacked, encoded_only).write, advance=lambda _rows: None)


@dataclass(frozen=True)
class SegmentRecorder:
    """Runs a model over planned segments and writes them."""

    plan: PartPlan
    model: Model
    encoded_only: EncodedSites | None = None
    """Sites whose features are extracted, of which not all are stored."""

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Returns the sites to record."""
        return self.model.site_map.select(self.plan.settings.sites or ())

    @cached_property
    def sequences(self) -> Sequences:
        """Returns the planned sequences of token ids."""
        return open_sequences(self.plan.tokens)

    @cached_property
    def chosen(self) -> Int[np.ndarray, " row"] | None:
        """Returns the planned rows that are stored; None: all."""
        return chosen_rows(self.plan.tokens)

    @cached_property
    def encode(self) -> Callable[[int, Mapping[str, Tensor], Sequence[int]], None] | None:
        """Encodes the rows of a segment and commits their features: (first row, rows of each site, lengths of the
        sequences)."""
        return self.encoded_only.encoder(self.plan.store, self.plan.manifest) if self.encoded_only else None

    def write(
        self,
        planned: PlannedSegment,
        advance: Callable[[int], None],
        later: Callable[[Callable[[], None]], None] = lambda finish: finish(),
    ) -> None:
        """Writes one segment, from forward passes to a finished folder that waits to be committed.

        Args:
            planned: The segment.
            advance: Called with numbers of rows as they are recorded.
            later: Called with the end of the work: flushing, checksums, the folder's name.
        """
        keep_freed_memory()
        plan, sequences = self.plan, self.sequences
        first = planned.first_sequence - plan.sequence_offset
        last = first + planned.sequences
        lengths = sequences.lengths[first:last]
        ids = sequences.token_ids[sequences.starts[first] : sequences.starts[last]]
        table = self._table(first, last)
        changes = None
        if plan.interventions:
            changes = SegmentChanges(self.model, plan.interventions, planned.first_sequence, lengths, table)
        metric = None
        if plan.gradient_of is not None:
            metric = SegmentMetric(self.model, plan.gradient_of, planned.first_sequence, lengths, table)
        chosen = None
        if self.chosen is not None:
            begin, end = sequences.starts[[first, last]]
            rows = self.chosen[slice(*np.searchsorted(self.chosen, [begin, end]))] - begin
            table = chosen_table(table, rows, planned.first_row)
            chosen = np.split(rows, np.searchsorted(rows, np.cumsum(lengths)[:-1]))
        run = partial(
            fill,
            model=self.model,
            ids=ids,
            lengths=lengths,
            settings=plan.settings,
            advance=advance,
            chosen=chosen,
            changes=changes,
            gradient_of=metric,
        )
        stored = lengths.tolist() if chosen is None else [len(part) for part in chosen if len(part)]
        full_disk = partial(explain_full_disk, plan.store, f"segment {planned.name}", planned.first_row)
        with full_disk(), ExitStack() as stack:
            segment = stack.enter_context(stage_segment(plan.store, plan.manifest, planned, table))
            with applied(changes):
                self._fill(segment, planned, run, stored)
                if changes is not None:
                    segment.interventions = changes.counts()
            staged = stack.pop_all()

        def finish() -> None:
            with full_disk():
                with staged:
                    pass
                submit_segment(plan.store, planned)

        later(finish)

    def _table(self, first: int, last: int) -> pa.Table:
        """Token table of planned sequences."""
        plan = self.plan
        return token_table(
            self.sequences,
            first,
            last,
            row_offset=plan.row_offset,
            sequence_offset=plan.sequence_offset,
            document_offset=plan.document_offset,
            text_of=partial(token_texts, self.model.tokenizer),
        )

    def _fill(
        self, segment: SegmentWriter, planned: PlannedSegment, run: Callable[..., None], stored: Sequence[int]
    ) -> None:
        """Runs the model over a segment and writes its sites, and the features of those that are encoded."""
        encoded = self.encoded_only
        if encoded is None or self.encode is None:
            run(segment, sites=self.sites)
            return
        stored_sites = {site.name for site in self.plan.manifest.sites}
        buffered = SegmentWithBuffers(segment, stored_sites, encoded.reading.recorded, planned.rows)
        extra_sites = [site for site in encoded.sites if site.name not in stored_sites]
        run(buffered, sites=[*self.sites, *extra_sites])
        # before the end: a finished segment has its features
        self.encode(planned.first_row, buffered.values, stored)


class SegmentWithBuffers:
    """A segment being written, and sites that are kept in memory, of which some are written too."""

    def __init__(
        self, segment: SegmentWriter, stored: Set[str], buffered_sites: Sequence[SiteRecord], rows: int
    ) -> None:
        self._segment, self._stored, self._buffered_sites = (
            segment,
            stored,
            {site.name: site for site in buffered_sites},
        )
        self.values = {
            site.name: torch.empty((rows, *site.shape), dtype=getattr(torch, site.dtype)) for site in buffered_sites
        }
        """Activations of the sites in memory in the stored type, axes (row, *shape)."""
        self.count = segment.count

    def shape(self, site: str) -> tuple[int, ...]:
        """Returns the shape of one row at `site`."""
        return self._buffered_sites[site].shape if site in self._buffered_sites else self._segment.shape(site)

    def dtype(self, site: str) -> str:
        """Returns the stored type of `site`."""
        return self._buffered_sites[site].dtype if site in self._buffered_sites else self._segment.dtype(site)

    def write(self, site: str, first_row: int, rows: np.ndarray) -> None:
        """Writes rows of `site` to memory, to the segment, or to both."""
        if site in self._buffered_sites:
            as_numpy(self.values[site])[first_row : first_row + len(rows)] = rows
        if site in self._stored:
            self._segment.write(site, first_row, rows)


def fill(
    segment: SegmentWriter | SegmentWithBuffers,
    model: Model,
    sites: Sequence[Site],
    ids: Int[np.ndarray, " row"],
    lengths: Int[np.ndarray, " sequence"],
    settings: Recording,
    advance: Callable[[int], None],
    *,
    chosen: Sequence[Int[np.ndarray, " _"]] | None = None,
    changes: SegmentChanges | None = None,
    gradient_of: SegmentMetric | None = None,
) -> None:
    """Runs the model over one segment's sequences and writes every site's rows.

    Args:
        segment: Writer of the segment.
        model: The model.
        sites: Sites to record.
        ids: Token ids of all sequences.
        lengths: Tokens of each sequence.
        settings: Tokens in a forward pass.
        advance: Called with numbers of rows as they are recorded.
        chosen: Rows to write of each sequence, counted through the segment; None: all.
        changes: Interventions of the pass.
        gradient_of: Metric whose gradients are written, too.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    counts = lengths if chosen is None else np.array([len(rows) for rows in chosen])
    stored = np.flatnonzero(counts)  # sequences without a chosen row are not run
    first_rows = np.concatenate([[0], np.cumsum(counts)[:-1]])
    with backlog() as submit:
        most = settings.batch_tokens or batch_tokens(model) // (_GRADIENT_SHARE if gradient_of else 1)
        for batch in batch_plan(lengths[stored], most):
            batch = stored[batch]
            tokens, mask = _padded(ids, starts[batch], lengths[batch])
            rows = BatchRows(starts[batch], lengths[batch])
            if chosen is not None:
                rows = ChosenRows(first_rows[batch], [chosen[i] - starts[i] for i in batch])

            def write(name: str, site: Site, tensor: Tensor, first: int, rows: BatchRows = rows) -> None:
                if site.axes[-1:] == ("key",):
                    tensor = torch.nn.functional.pad(tensor, (0, segment.shape(name)[-1] - tensor.shape[-1]))
                real, runs = rows.take(tensor, first)
                submit(_write, segment, name, to_host(real, getattr(torch, segment.dtype(name))), runs)

            def receive(site: Site, tensor: Tensor, first: int, write: Any = write) -> None:
                write(site.name, site, tensor, first)

            def receive_gradient(site: Site, tensor: Tensor, first: int, write: Any = write) -> None:
                write(gradient_name(site.name), site, tensor, first)

            with changes.batch(batch) if changes else nullcontext():
                if gradient_of is None:
                    capture(model.module, sites, tokens, mask, receive)
                else:
                    metric, gradients = gradient_of.of(batch), {"receive_gradient": receive_gradient}
                    capture_gradients(model, sites, tokens, mask, metric, receive=receive, **gradients)
            advance(int(counts[batch].sum()))


def _write(
    segment: SegmentWriter | SegmentWithBuffers,
    name: str,
    arrived: Callable[[], tuple[np.ndarray, list[int]]],
    runs: list[tuple[int, int, int]],
) -> None:
    array, (overflow, nonfinite) = arrived()
    for row, first, n in runs:
        segment.write(name, row, array[first : first + n])
    segment.count(name, overflow=overflow, nonfinite=nonfinite)


def _padded(
    ids: Int[np.ndarray, " row"], starts: Int[np.ndarray, " batch"], lengths: Int[np.ndarray, " batch"]
) -> tuple[Int[Tensor, "batch position"], Int[Tensor, "batch position"]]:
    """Token ids and attention mask of some sequences, padded on the right."""
    tokens = torch.zeros(len(starts), int(lengths.max()), dtype=torch.long)
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        tokens[row, :n] = torch.from_numpy(ids[start : start + n].astype(np.int64))
    mask = torch.arange(tokens.shape[1]) < torch.from_numpy(np.asarray(lengths))[:, None]
    return tokens, mask.long()
