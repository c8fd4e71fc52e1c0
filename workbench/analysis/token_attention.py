"""Attention to keys that the tokens determine: earlier occurrences of the query's token, and what followed them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.model.token_keys import earlier_occurrences, next_keys
from workbench.store.reader import Store

Occurrences = Literal["all", "last"]

TOKEN_MEASURES = ("induction", "duplicate", "previous", "current", "first")
"""Measures of attention; each is also a derived site, `attn_induction`, ..."""

_BLOCK_BYTES = 64 << 20
_BLOCK_ROWS = 1 << 18


@dataclass(frozen=True)
class RaggedSequences:
    """Whole sequences of a store, of any lengths, with token ids and the document of each."""

    starts: Int[np.ndarray, " sequence"]
    """Id of the first row."""
    lengths: Int[np.ndarray, " sequence"]
    document: Int[np.ndarray, " sequence"]
    """Document of the first token."""
    ids: Int[np.ndarray, " row"]
    """Token ids of all rows of the store; -1 for special tokens."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def rows(self) -> Int[np.ndarray, " row"]:
        """Ids of all rows, ascending."""
        parts = [start + np.arange(n) for start, n in zip(self.starts, self.lengths, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def without(self, rows: Int[np.ndarray, " row"]) -> RaggedSequences:
        """Returns the sequences that have none of these rows."""
        without_rows = np.searchsorted(rows, self.starts) == np.searchsorted(rows, self.starts + self.lengths)
        return RaggedSequences(
            self.starts[without_rows], self.lengths[without_rows], self.document[without_rows], self.ids
        )

    def blocks(self, row_values: int) -> Iterator[slice]:
        """Yields some sequences at a time, so that values of `row_values` numbers a row take 64 MiB in float32."""
        step = max(1, _BLOCK_BYTES // (4 * row_values * int(self.lengths.max(initial=1))))
        return (slice(first, min(first + step, len(self))) for first in range(0, len(self), step))


@dataclass(frozen=True)
class TokenKeys:
    """Keys of a block of sequences that are determined by the tokens, for the queries that count.

    A query counts if its token, not a special one, stands earlier in its sequence with another token between them.
    """

    rows: Int[np.ndarray, "sequence query"]
    """Ids of the rows; the last row of a sequence again where it is shorter than others."""
    counts: Bool[Tensor, "sequence query"]
    duplicate: Float[Tensor, "sequence query key"]
    """1 at earlier occurrences of the query's token, for queries that count; else 0."""
    induction: Float[Tensor, "sequence query key"]
    """1 at the tokens after those occurrences."""


def whole_sequences(store: Store, where: str | None = None) -> RaggedSequences:
    """Returns the sequences of a store for whose first token an SQL condition holds; all for None."""
    store.require_whole_sequences("an analysis of tokens and their contexts")
    tokens = store.tokens
    starts = np.flatnonzero(np.diff(tokens["sequence"].to_numpy(), prepend=-1))
    lengths = np.diff(starts, append=store.rows)
    ids = np.where(tokens["is_special"].to_numpy(), -1, tokens["token_id"].to_numpy().astype(np.int64))
    matches = np.ones(len(starts), bool) if where is None else np.isin(starts, store.where(where).ids)
    return RaggedSequences(starts[matches], lengths[matches], tokens["document"].to_numpy()[starts[matches]], ids)


def token_keys(sequences: RaggedSequences, part: slice, occurrences: Occurrences = "all") -> TokenKeys:
    """Returns the keys of some sequences. Memory: a few sequences x query x key arrays.

    Args:
        sequences: The sequences.
        part: Which of them.
        occurrences: "all": every earlier occurrence of the query's token. "last": the latest alone.
    """
    starts, lengths = sequences.starts[part], sequences.lengths[part]
    at = np.arange(int(lengths.max(initial=0)))
    rows = starts[:, None] + np.minimum(at, lengths[:, None] - 1)
    ids = torch.from_numpy(np.where(at < lengths[:, None], sequences.ids[rows], -1))
    matches = earlier_occurrences(ids) & (ids >= 0)[:, :, None]
    if occurrences == "last":
        matches &= matches.flip(-1).cumsum(-1).flip(-1) == 1
    duplicate = matches.float()
    return TokenKeys(rows, matches.any(-1), duplicate, next_keys(duplicate))


@dataclass(frozen=True)
class Queries:
    """The queries that count, of all sequences, and what their tokens alone say."""

    rows: Int[np.ndarray, " query"]
    """Ids of their rows, ascending."""
    sequence: Int[np.ndarray, " query"]
    """Index of the sequence of each."""
    uniform: float
    """Mean induction of a head that attends to all visible keys equally."""
    offset_bound: float
    """Share of the queries with a target at the most frequent offset: the most that one fixed offset can collect."""


def counted_queries(sequences: RaggedSequences, occurrences: Occurrences = "all") -> Queries:
    """Returns the queries that count; see `TokenKeys`. `uniform` and `offset_bound` are NaN without any.

    Args:
        sequences: The sequences.
        occurrences: "all": every earlier occurrence of the query's token. "last": the latest alone.
    """
    rows, index, uniform = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0.0
    offsets = np.zeros(int(sequences.lengths.max(initial=1)), np.int64)
    for part in sequences.blocks(int(sequences.lengths.max(initial=1))):
        keys = token_keys(sequences, part, occurrences)
        visible = 1 + torch.arange(keys.rows.shape[1], dtype=torch.float64)
        uniform += (keys.induction.sum(-1) / visible).sum().item()
        _, query, key = (axis.numpy() for axis in keys.induction.nonzero(as_tuple=True))
        offsets += np.bincount(query - key, minlength=len(offsets))
        inside, at = np.nonzero(keys.counts.numpy())
        rows.append(keys.rows[inside, at])
        index.append(part.start + inside)
    query_rows = np.concatenate(rows)
    shares = np.array([uniform, offsets.max()]) / len(query_rows) if len(query_rows) else np.full(2, np.nan)
    return Queries(query_rows, np.concatenate(index), *shares.tolist())


def recorded_sums(
    store: Store, layer: int, queries: Queries, sequences: int
) -> dict[str, Float[np.ndarray, "sequence head"]]:
    """Returns sums over the queries of a layer's measures, as far as their derived sites were recorded.

    They are the `TokenAttention.by_sequence` of the pattern, for all earlier occurrences, without the pattern.
    """
    labels = {site.label for site in store.sites}
    sums = {}
    for name in TOKEN_MEASURES:
        if f"attn_{name}.{layer}" not in labels:
            continue
        array = store[f"attn_{name}", layer]
        sums[name] = np.zeros((sequences, array.shape[1]))
        for first in range(0, len(queries.rows), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            np.add.at(sums[name], queries.sequence[block], array[queries.rows[block]].double().numpy())
    return sums


class TokenAttention:
    """Sums of attention over the queries that count, of one layer, by head and by sequence."""

    def __init__(self, heads: int, sequences: int, longest: int) -> None:
        self.by_sequence = {name: np.zeros((sequences, heads)) for name in TOKEN_MEASURES}
        self.queries = np.zeros(sequences)
        """Queries that count, by sequence."""
        self._attention = torch.zeros(longest, heads, longest, dtype=torch.float64)
        self._targets = torch.zeros(longest, longest, dtype=torch.float64)
        self._both = torch.zeros(longest, heads, dtype=torch.float64)
        self._counts = torch.zeros(longest, dtype=torch.float64)

    def add(self, part: slice, keys: TokenKeys, pattern: Float[Tensor, "sequence query head key"]) -> None:
        """Adds the attention of some sequences; keys beyond the longest of them are left out."""
        n = keys.rows.shape[1]
        pattern, counts = pattern[..., :n].float(), keys.counts.float()
        on_target = torch.einsum("sqhk,sqk->sqh", pattern, keys.induction)
        position = torch.arange(n)
        single = {
            "previous": pattern[:, position, :, (position - 1).clamp(min=0)],
            "current": pattern[:, position, :, position],
            "first": pattern[:, :, :, 0].transpose(0, 1),
        }
        sums = {name: torch.einsum("qsh,sq->sh", values, counts) for name, values in single.items()}
        sums |= {"induction": on_target.sum(1), "duplicate": torch.einsum("sqhk,sqk->sh", pattern, keys.duplicate)}
        for name, values in sums.items():
            self.by_sequence[name][part] = values.double().numpy()
        self.queries[part] = counts.sum(1).double().numpy()
        self._attention[:n, :, :n] += torch.einsum("sqhk,sq->qhk", pattern, counts).double()
        self._targets[:n, :n] += keys.induction.sum(0).double()
        self._both[:n] += on_target.sum(0).double()
        self._counts[:n] += counts.sum(0).double()

    def shuffled(self) -> Float[np.ndarray, " head"]:
        """Returns the mean attention to the induction targets of *other* sequences at the same query positions.

        It is what a head gets that attends by position alone. NaN where no two sequences have a query at one position.
        """
        pairs = self._counts * (self._counts - 1)
        other_attention = torch.einsum("qhk,qk->qh", self._attention, self._targets) - self._both
        mean_by_query = torch.where(pairs[:, None] > 0, other_attention / pairs.clamp(min=1)[:, None], 0)
        weight = self._counts * (pairs > 0)
        return ((mean_by_query * weight[:, None]).sum(0) / weight.sum()).numpy()

    def by_offset(self) -> Float[np.ndarray, "offset head"]:
        """Returns the mean attention to the key `offset` tokens before the query, over all queries that count."""
        n = len(self._counts)
        offsets = [self._attention.diagonal(-offset, 0, 2).sum(-1) for offset in range(n)]
        return (torch.stack(offsets) / self._counts.sum()).numpy()
