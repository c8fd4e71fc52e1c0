"""Interventions while a model is recorded: checked when it is planned, applied segment by segment, counted."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Int

from workbench.io.errors import DataError, RequestError
from workbench.model.block_records import SkipBlock
from workbench.model.intervene import Intervened, Intervention
from workbench.model.load import Model
from workbench.model.positions import PassLabels, table_key
from workbench.model.record_json import stored_changes
from workbench.model.token_choice import Tokens
from workbench.sites.grammar import Site
from workbench.store.manifest import TOKENS, Manifest
from workbench.store.query import select_planned
from workbench.store.stored_changes import Arrays, Ran, StoredChanges
from workbench.store.token_table import encode_tokens

_STREAM = ("resid_pre", "resid_post", "resid_norm")


@dataclass(frozen=True)
class RecordedChanges:
    """Interventions of a recording, in the form that runs and the form that is kept."""

    records: tuple[Intervention, ...]
    stored: StoredChanges
    arrays: Arrays


def plan_changes(model: Model, records: Sequence[Intervention], sites: Sequence[Site]) -> RecordedChanges | None:
    """Returns the interventions of a recording, checked against the model and the sites; None if there are none.

    Raises:
        RequestError: A record that does not fit the model or cannot be kept, or a site inside of a skipped block.
    """
    if not records:
        return None
    for record in records:
        if not isinstance(record, Intervention):
            raise RequestError(f"interventions must be records such as wb.Zero('z.3', head=0), not {record!r:.60}")
        if isinstance(record, SkipBlock):
            inside = [site for site in sites if site.layer == record.layer and site.kind not in _STREAM]
            if inside:
                raise RequestError(
                    f"sites: {inside[0].short or inside[0].name} is inside of block {record.layer}, which is skipped, "
                    "so it has no effect; record resid_pre and resid_post of that layer, or other layers"
                )
    intervened = Intervened(model, tuple(records), numbered=True)
    intervened.warn_of_kernels()
    stored, arrays = stored_changes(records)
    kernels = ({} if kernel is None else {"kernel": kernel} for kernel in intervened.kernels)
    full_records = tuple(record | kernel for record, kernel in zip(stored.records, kernels, strict=True))
    return RecordedChanges(tuple(records), replace(stored, records=full_records), arrays)


class SegmentChanges:
    """Interventions applied to the passes over one segment."""

    def __init__(
        self,
        model: Model,
        records: Sequence[Intervention],
        first_sequence: int,
        lengths: Int[np.ndarray, " sequence"],
        table: pa.Table,
    ) -> None:
        self.run = Intervened(model, tuple(records), proof=False)
        self._first, self._lengths = first_sequence, lengths
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        generated = "generated" in table.column_names
        self._generated = table["generated"].fill_null(False).to_numpy() if generated else None
        self._chosen = {}
        for number, (record, choices) in enumerate(zip(records, self.run.choices, strict=True)):
            for choice in choices:
                if choice.needs_table:
                    self._chosen[table_key(choice)] = chosen_by_table(choice, table, f"record {number} ({record})")

    def batch(self, sequences: Int[np.ndarray, " batch"]) -> AbstractContextManager[None]:
        """Gives the next pass, over these sequences of the segment, what the token table knows of them."""
        number = torch.as_tensor(np.asarray(sequences, np.int64) + self._first, device="cpu")
        shape = len(sequences), int(self._lengths[sequences].max())
        chosen = {key: self._padded(rows, sequences, shape) for key, rows in self._chosen.items()}
        generated = None if self._generated is None else self._padded(self._generated, sequences, shape)
        return self.run.labelled(PassLabels(number, chosen, generated))

    def _padded(self, rows: np.ndarray, sequences: np.ndarray, shape: tuple[int, int]) -> Bool[torch.Tensor, ...]:
        mask = np.zeros(shape, bool)
        for line, sequence in enumerate(sequences):
            start, length = self._starts[sequence], self._lengths[sequence]
            mask[line, :length] = rows[start : start + length]
        return torch.from_numpy(mask)

    def counts(self) -> tuple[Ran, ...]:
        """Returns what each record did.

        Raises:
            DataError: A record was not reached, or gave values that are not finite.
        """
        counted = []
        for number, (record, count) in enumerate(zip(self.run.records, self.run.counts, strict=True)):
            name = f"record {number} ({record})"
            if not count.passes:
                raise DataError(f"{name}: it comes after every recorded site, so none shows it; record a later site")
            if not count.finite:
                raise DataError(f"{name}: its new values are not finite; look for NaN in the model or a huge value")
            relative = None if math.isnan(count.relative_change) else count.relative_change
            counted.append(Ran(count.passes, count.rows, count.changed, count.exempt, relative))
        return tuple(counted)


def chosen_by_table(choice: Tokens, table: pa.Table, name: str = "at") -> Bool[np.ndarray, " row"]:
    """Returns the rows of a segment that a choice's conditions on the token table select.

    Args:
        choice: The choice.
        table: Token table of the segment.
        name: Name of the choice in errors.

    Raises:
        RequestError: A label that no text has, or a condition that DuckDB refuses.
    """
    rows = np.ones(table.num_rows, bool)
    if choice.span is not None:
        if f"{choice.span}_span" not in table.column_names:
            labels = [name.removesuffix("_span") for name in table.column_names if name.endswith("_span")]
            raise RequestError(f"{name}: no text has a span {choice.span!r}; labels: {', '.join(labels) or 'none'}")
        rows &= table[f"{choice.span}_span"].is_valid().to_numpy()
    if choice.sql is not None:
        try:
            rows &= _matching(table, choice.sql)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None
    return rows


def _matching(table: pa.Table, predicate: str) -> Bool[np.ndarray, " row"]:
    """Rows of a token table for which an SQL condition is true."""
    matching = np.zeros(table.num_rows, bool)
    with tempfile.TemporaryDirectory(prefix="workbench-tokens-") as folder:
        file = Path(folder) / TOKENS
        file.write_bytes(encode_tokens(table))
        matching[select_planned(file, predicate) - int(table["row"][0].as_py())] = True
    return matching


@contextmanager
def applied(changes: SegmentChanges | None) -> Iterator[None]:
    """Changes the model inside the block, if there is something to change."""
    with nullcontext() if changes is None else changes.run:
        yield


def check_changed(manifest: Manifest) -> None:
    """Raises DataError for a record that chose no token of a complete recording: the store is as without it."""
    changes = manifest.interventions
    if changes is None or not manifest.complete:
        return
    for number, (name, counts) in enumerate(zip(changes.names, changes.ran, strict=True)):
        if not counts.rows:
            raise DataError(
                f"interventions: record {number} ({name}) chose no token of the {manifest.rows:,} that were recorded, "
                "so the store is as without it; choose other tokens and another out"
            )
