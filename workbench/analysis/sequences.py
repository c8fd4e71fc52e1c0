"""Sequences of one length: which of a store's sequences count, their documents, and the domain of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int

from workbench.io.counted import counted
from workbench.io.errors import RequestError, nearest
from workbench.store.reader import Store

_BLOCK_BYTES = 64 << 20  # of one block of values in float64; a few such live at a time


@dataclass(frozen=True)
class Sequences:
    """The first `length` rows of each sequence that is long enough, and what is known about each sequence."""

    starts: Int[np.ndarray, " sequence"]
    """Id of the first row."""
    document: Int[np.ndarray, " sequence"]
    domain: Int[np.ndarray, " sequence"]
    """Index into `domains`; -1 for a sequence with no domain or with several."""
    domains: tuple[str, ...]
    length: int
    short: int
    """Sequences left out because they are shorter."""
    longest: int
    """Tokens of the longest selected sequence."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def rows(self) -> Int[np.ndarray, "sequence position"]:
        """Ids of all rows."""
        return self.starts[:, None] + np.arange(self.length)

    def without(self, rows: Int[np.ndarray, " row"]) -> Sequences:
        """Returns the sequences that have none of these rows. RequestError if none is left."""
        without_rows = ~np.isin(self.rows, rows).any(1)
        if not without_rows.any():
            raise RequestError(
                f"every sequence has a NaN or infinite value in its first {counted(self.length, 'token')}; "
                "record again with the "
                "model in bfloat16 or float32"
            )
        return replace(self, **{name: getattr(self, name)[without_rows] for name in ("starts", "document", "domain")})

    def blocks(self, row_values: int) -> Iterator[Int[np.ndarray, "sequence position"]]:
        """Yields row ids of some sequences at a time, so that values of `row_values` numbers a row take 64 MiB."""
        step = max(1, _BLOCK_BYTES // (8 * row_values * self.length))
        for first in range(0, len(self), step):
            yield self.rows[first : first + step]


def select_sequences(
    store: Store,
    length: int,
    where: str | None = None,
    domain: str | None = None,
    *,
    summed: bool = False,
    least: int = 3,
) -> Sequences:
    """Returns the sequences of at least `length` tokens.

    Args:
        store: The recorded activations.
        length: Tokens of each sequence that count, from its first on.
        where: SQL over the token table; a sequence is selected if the condition holds for its first token. None: all.
        domain: Metadata column that gives each sequence its domain. None: no domains.
        summed: True for attention that was summed over whole sequences: `length` must be that of the longest one.
        least: Smallest length that the caller takes, for its advice.

    Raises:
        RequestError: No sequence is selected, none is long enough, one is longer than it may be, or `domain` has no
            usable value.
    """
    store.require_whole_sequences("a probe of sequences from their first token on")
    tokens = store.tokens
    starts = np.flatnonzero(np.diff(tokens["sequence"].to_numpy(), prepend=-1))
    lengths = np.diff(starts, append=store.rows)
    if where is not None:
        selected = np.isin(starts, store.where(where).ids)
        if not selected.any():
            raise RequestError(
                f"where {where!r} holds for the first token of none of {counted(len(starts), 'sequence')}, "
                "and the first token is what selects a sequence"
            )
        starts, lengths = starts[selected], lengths[selected]
    longest = int(lengths.max(initial=0))
    if longest < length:
        shorter = f"give length {longest}{'' if summed else ' or less'}, or " if longest >= least else ""
        raise RequestError(
            f"length {length}: no sequence has as many tokens, the longest of {len(starts):,} has {longest}; {shorter}"
            "record longer texts"
        )
    if summed and longest > length:
        raise RequestError(
            f"length {length}: attn_received was summed over whole sequences, of up to "
            f"{counted(longest, 'token')}; give length "
            f"{longest}, or record with context={length}, or record pattern"
        )
    long = lengths >= length
    starts, short = starts[long], int((~long).sum())
    indices, names = np.full(len(starts), -1), ()
    if domain is not None:
        indices, names = _domains(tokens, domain, starts[:, None] + np.arange(length))
    return Sequences(starts, tokens["document"].to_numpy()[starts], indices, names, length, short, longest)


def received_sequences(
    store: Store, source: str, length: int, where: str | None = None, domain: str | None = None
) -> Sequences:
    """Returns what `select_sequences` does, for attention received.

    Args:
        store: The recorded activations.
        source: "pattern" or "derived", as `attention_source` gives it.
        length: Tokens of each sequence that count, from its first on.
        where: SQL over the token table; see `select_sequences`.
        domain: Metadata column that gives each sequence its domain.

    Raises:
        RequestError: As `select_sequences`, or derived attention was summed over longer sequences than `length`.
    """
    return select_sequences(store, length, where, domain, summed=source == "derived")


def _domains(
    tokens: pa.Table, column: str, rows: Int[np.ndarray, "sequence position"]
) -> tuple[Int[np.ndarray, " sequence"], tuple[str, ...]]:
    """The domain that all tokens of a sequence share, else -1; and the names of the domains."""
    if column not in tokens.column_names:
        raise RequestError(
            f"domain {column!r} is not a column of the token table{nearest(column, tokens.column_names)}; "
            f"columns: {', '.join(tokens.column_names)}"
        )
    values = pd.Series(tokens[column].to_pylist(), dtype=object)
    codes, names = pd.factorize(values.map(str, na_action="ignore"), sort=True)
    inside = codes[rows]
    domain = np.where((inside == inside[:, :1]).all(1), inside[:, 0], -1)
    present = np.unique(domain[domain >= 0])
    if not len(present):
        raise RequestError(f"domain {column!r} has no value that all tokens of a sequence share")
    renumbered = np.full(len(names) + 1, -1)  # the last one is for -1
    renumbered[present] = np.arange(len(present))
    return renumbered[domain], tuple(names[present])
