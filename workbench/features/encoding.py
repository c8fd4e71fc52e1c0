"""Encoding of the rows of a store's array into segments of sparse features, by one process or several."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.features.feature_segments import SegmentFolder, Span, SparseSegment, concatenate
from workbench.features.index import ENTRIES, INDEX_MEMORY
from workbench.features.records import feature_type
from workbench.io.checks import check_fields, check_types
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.tasks import Begin, Workers, lost_task
from workbench.sae.autoencoder import Sae
from workbench.sae.choice import Above, TopK
from workbench.sae.encode import Encoder, LayeredEncoder, NotFinite, SparseRows, encoder
from workbench.sae.input_rows import PackedArray, pack
from workbench.sae.saved import SavedSae, save_sae
from workbench.sae.site import not_finite
from workbench.sae.sparsity import Bound, SparsityRule
from workbench.store.reader import ActivationArray, Store

_LOG = logging.getLogger(__name__)

SEGMENT_ROWS = 1 << 16
"""Rows in a segment, if they have less than about `ENTRIES` entries."""
_BLOCKS = 4  # dense blocks encoded at a time: a few hundred MB even if every feature is active


@dataclass(frozen=True)
class EncodingSettings:
    """Settings of an encoding and its index, as `extract_features` documents them."""

    sparsity: SparsityRule | None = None
    batch_rows: int | None = None
    precision: str | None = None
    index_memory: int = INDEX_MEMORY

    def __post_init__(self) -> None:
        check_types(self)
        check_fields(self, "batch_rows", at_least=1, optional=True)
        check_fields(self, "index_memory", at_least=1)


@dataclass(frozen=True)
class StoreEncoder:
    """Encodes the rows of one array of a store with one autoencoder."""

    array: ActivationArray
    sae: Sae
    settings: EncodingSettings = EncodingSettings()
    show_progress: bool = True

    @cached_property
    def encoder(self) -> Encoder | LayeredEncoder:
        """The encoder; under a rule over all rows it keeps every pre-activation above 0."""
        sparsity = self.settings.sparsity
        if sparsity is None or isinstance(sparsity, TopK):
            return encoder(self.sae, sparsity, self.settings.precision)
        # the threshold rises with the rows, and the bounds of a bfloat16 product hold for one threshold
        return encoder(self.sae, Above(torch.zeros(self.sae.d_sae, device=self.sae.device)), "float32")

    @cached_property
    def ends(self) -> Int64[np.ndarray, " sequence"] | None:
        """Row after the last one of each sequence, for an autoencoder that reads whole sequences."""
        return _sequence_ends(self.array.store) if self.sae.sequential else None

    def check(self) -> None:
        """Raises RequestError for settings that do not fit the autoencoder, before anything is written."""
        self.quotas()
        _ = self.encoder

    def quotas(self) -> Int64[np.ndarray, " group"] | None:
        """Returns the number of entries to keep of each group of features; None if rows are independent."""
        sparsity = self.settings.sparsity
        if sparsity is None or isinstance(sparsity, TopK):
            return None
        return sparsity.quotas(len(self.array), self.sae.d_sae)

    def spans(self) -> list[Span]:
        """Returns all rows, divided into segments; the division is the same in every process."""
        spans, first = [], 0
        while first < len(self.array):
            spans.append((first, self._end(first, SEGMENT_ROWS)))
            first = spans[-1][1]
        return spans

    def encode(self, folder: SegmentFolder, workers: Workers) -> None:
        """Encodes the rows that have no committed segment, of the share of them that this process has."""
        spans = workers.share_of(self.spans())
        unwritten = folder.missing_spans(spans)
        rows, rows_left = (sum(stop - first for first, stop in listed) for listed in (spans, unwritten))
        unsettled = 0
        with (
            progress("extracting features", rows, "rows", show=self.show_progress, initial=rows - rows_left) as advance,
            closing(self._start(workers, folder, unwritten, advance)) as answers,
        ):
            for encoded, count in answers:
                unsettled += count
                if workers.remote:
                    advance(sum(stop - first for first, stop in encoded))
        if unsettled:
            _LOG.info(f"{unsettled:,} of {rows:,} rows used the exact float32 path")

    def write_segments(self, folder: SegmentFolder, spans: Sequence[Span], advance: Callable[[int], None]) -> int:
        """Encodes the rows of `spans` that have no committed segment; writes a segment while it encodes the next.

        Returns:
            Number of rows that took the exact float32 path because their bounds did not decide.
        """
        bound, unsettled = None, 0
        if self.quotas() is not None:
            for span in folder.spans():
                bound = self._raised(bound, folder.read(span, feature_type(self.sae.d_sae)))
        with ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for first, stop in folder.missing_spans(spans):
                while first < stop:
                    end, segment, count = self._encode_segment(first, stop, bound, advance)
                    unsettled += count
                    bound = self._raised(bound, segment)
                    if writing:
                        writing.result()
                    writing = writer.submit(folder.write, (first, end), segment)
                    first = end
            if writing:
                writing.result()
        return unsettled

    def encode_rows(
        self, span: Span, read: Callable[[slice], Float[Tensor, "row ..."]], lengths: Sequence[int]
    ) -> SparseSegment:
        """Returns the features of rows in memory.

        Args:
            span: The rows in the store.
            read: Returns some of them; the first is 0.
            lengths: Lengths of the sequences that they are.

        Raises:
            DataError: A row or its features are not finite; the message has the row.
        """
        first, stop = span
        step = stop - first if self.sae.sequential else _BLOCKS * self.encoder.block_rows
        current = self.encoder.inexperienced()
        parts = [
            self._encode_block(
                current,
                first + at,
                read(slice(at, min(at + step, stop - first))),
                lengths if self.sae.sequential else None,
            )
            for at in range(0, stop - first, step)
        ]
        return concatenate([self._to_segment(part) for part in parts])

    def _start(
        self, workers: Workers, folder: SegmentFolder, spans: Sequence[Span], advance: Callable[[int], None]
    ) -> Generator[tuple[Sequence[Span], int], None, None]:
        """Starts the writing of these spans: one span per task of remote workers, all in one task of this process."""

        def on_lost(lost: Sequence[Span] | None, error: Exception) -> int:
            description = f"rows {lost[0][0]} to {lost[-1][1] - 1}" if lost else "first rows"
            raise lost_task(f"{description} of {folder.path.parent}", error)

        def begin_here(_device: str | None) -> Callable[[Sequence[Span]], int]:
            return lambda chosen: self.write_segments(folder, chosen, advance)

        if workers.remote and spans:
            saved = save_sae(self.sae, folder.path.parent)
            arguments = pack(self.array), saved, self.settings, folder
            return workers.map(begin_spans, arguments, [(span,) for span in spans], on_lost)
        begin: Begin[Sequence[Span], int] = begin_here
        return workers.map(begin, (), [tuple(spans)] if spans else [], on_lost)

    def _encode_segment(
        self, first: int, stop: int, bound: Bound | None, advance: Callable[[int], None]
    ) -> tuple[int, SparseSegment, int]:
        """Rows from `first` to `stop`, or to the block that reaches `ENTRIES`: their end, features, unsettled rows."""
        # without the experience of other segments: rounding is the same after a kill
        current = (self.encoder if bound is None else _above(self.encoder, bound)).inexperienced()
        end, parts, entries, unsettled = first, [], 0, 0
        for block in self._blocks(first, stop):
            rows = self._encode_block(current, end, block, self._lengths(end, end + len(block)))
            parts.append(self._to_segment(rows))
            end += len(block)
            entries += len(rows.feature)
            unsettled += rows.unsettled
            advance(len(block))
            if entries >= ENTRIES:
                break
        return end, concatenate(parts), unsettled

    def _encode_block(
        self,
        current: Encoder | LayeredEncoder,
        first: int,
        rows: Float[Tensor, "row ..."],
        lengths: Sequence[int] | None,
    ) -> SparseRows:
        try:
            return current(rows, lengths)
        except NotFinite as error:
            raise not_finite(self.array, self.sae, first + error.row, error.features) from None

    def _to_segment(self, rows: SparseRows) -> SparseSegment:
        indptr, feature, value = (part.cpu().numpy() for part in (rows.indptr, rows.feature, rows.value))
        return SparseSegment(indptr, feature.astype(feature_type(self.sae.d_sae)), value)

    def _raised(self, bound: Bound | None, segment: SparseSegment) -> Bound | None:
        """The bound after a segment. It depends on committed segments alone, so it is the same after a kill."""
        if (quotas := self.quotas()) is None:
            return None
        entries = segment.feature, segment.value
        bound = bound or Bound(quotas, self.sae.d_sae, entries)
        bound.add(entries)
        return bound

    def _blocks(self, start: int, stop: int) -> Iterator[Float[Tensor, "row ..."]]:
        """Rows on the encoder's device; the next block is read and copied while the caller encodes this one."""
        step = self.settings.batch_rows or _BLOCKS * self.encoder.block_rows
        device = self.sae.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None

        def read(first: int) -> Tensor:
            rows = self.array[first : min(self._end(first, step), stop)]
            if stream is None:
                return rows
            with torch.cuda.stream(stream):
                rows = rows.pin_memory().to(device, non_blocking=True)
            stream.synchronize()  # in this thread: the pinned rows are free again, and the copy is complete
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

    def _end(self, first: int, rows: int) -> int:
        """End of about `rows` rows from `first` on: the end of a sequence if whole sequences are needed."""
        stop = min(first + rows, len(self.array))
        if self.ends is None:
            return stop
        before, within = np.searchsorted(self.ends, [first, stop], side="right")
        return int(self.ends[max(before, within - 1)])

    def _lengths(self, first: int, stop: int) -> list[int] | None:
        """Lengths of the sequences in these rows."""
        if self.ends is None:
            return None
        inside = self.ends[(self.ends > first) & (self.ends <= stop)]
        return np.diff(inside, prepend=first).tolist()


def begin_spans(
    device: str, array: PackedArray, sae: SavedSae, settings: EncodingSettings, folder: SegmentFolder
) -> Callable[[Sequence[Span]], int]:
    """Returns the function that encodes and writes spans in another process; its result is that of `write_segments`.

    Raises:
        RequestError: The folder in which the features are made is not visible from here.
    """
    if not folder.path.is_dir():
        raise RequestError(
            f"a worker on {socket.gethostname()} does not see {folder.path.parent}; features must be on a disk that "
            "all machines share"
        )
    encoding = StoreEncoder(array.open(), sae.load(device), settings, show_progress=False)
    return lambda spans: encoding.write_segments(folder, spans, lambda _rows: None)


def _sequence_ends(store: Store) -> Int64[np.ndarray, " sequence"]:
    store.require_whole_sequences("an SAE that reads sequences in order")
    sequence = store.tokens["sequence"].to_numpy()
    return np.flatnonzero(np.append(sequence[1:] != sequence[:-1], True)[: len(sequence)]) + 1


def _above(current: Encoder | LayeredEncoder, bound: Bound) -> Encoder | LayeredEncoder:
    threshold = torch.from_numpy(np.array(bound.threshold())).to(current.sae.device)
    return current.above(threshold)
