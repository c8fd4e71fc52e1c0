"""Successors in the recorded text, and how much each head raises them (Gould et al., arXiv 2312.09230)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from workbench.analysis.frozen_norm import read_directions
from workbench.analysis.rows import next_tokens
from workbench.analysis.successor_tasks import Chain
from workbench.model.circuits import HeadOutput
from workbench.model.frozen_output import FrozenOutput
from workbench.model.unembed import Unembed
from workbench.results.bootstrap import clustered_means, intervals
from workbench.store.reader import Store

_WINDOW = 8  # tokens back in which the text may contain the member that its next token succeeds
_BLOCK = 256  # places in one block of writes of all heads


@dataclass(frozen=True)
class Places:
    """Places in the text where the next token is the successor of a class member."""

    rows: Int[np.ndarray, " place"]
    chain: Int[np.ndarray, " place"]
    """Index of the chain."""
    member: Int[np.ndarray, " place"]
    """Index of the next token among the chain's members."""
    total: int
    """Number of such places in the store, before the limit."""

    def at(self, rows: Int[np.ndarray, " row"]) -> Places:
        """Returns the places at some of the rows."""
        at_rows = np.isin(self.rows, rows)
        return Places(self.rows[at_rows], self.chain[at_rows], self.member[at_rows], self.total)


def successions(
    token_ids: Int[np.ndarray, " row"],
    following: Int[np.ndarray, " row"],
    start: Int[np.ndarray, " row"],
    chain: Chain,
) -> tuple[Int[np.ndarray, " place"], Int[np.ndarray, " place"]]:
    """Returns (rows, following members) where the next token succeeds the nearest member up to 8 tokens back.

    Args:
        token_ids: Token of each row.
        following: Next token of each row; -1: none.
        start: First row of the text that each row belongs to.
        chain: Class of tokens.
    """
    size = int(max(token_ids.max(initial=0), chain.ids.max())) + 2
    member_of, successor = np.full(size, -1), np.full(len(chain.ids) + 1, -2)  # the last entry: no member
    member_of[chain.ids] = np.arange(len(chain.ids))
    successor[chain.source] = chain.ids[chain.target]
    rows = np.arange(len(token_ids))
    nearest_member = np.full(len(rows), -1)
    for back in range(_WINDOW):
        earlier = rows - back
        member = np.where(earlier >= start, member_of[token_ids[np.maximum(earlier, 0)]], -1)
        nearest_member = np.where(nearest_member < 0, member, nearest_member)
    places = np.flatnonzero(successor[nearest_member] == following)
    return places, member_of[following[places]]


def find_places(store: Store, chains: Sequence[Chain], limit: int) -> Places:
    """Returns the first `limit` places of all chains."""
    store.require_whole_sequences("a search for successions")
    tokens = store.tokens
    ids, sequence, document = (tokens[name].to_numpy() for name in ("token_id", "sequence", "document"))
    fresh = np.ones(len(ids), bool)
    fresh[1:] = (sequence[1:] != sequence[:-1]) | (document[1:] != document[:-1])
    start = np.maximum.accumulate(np.where(fresh, np.arange(len(ids)), 0))
    following = next_tokens(store)
    by_chain = [successions(ids.astype(np.int64), following, start, chain) for chain in chains]
    rows, member = (np.concatenate(part) for part in zip(*by_chain, strict=True))
    chain = np.repeat(np.arange(len(chains)), [len(part) for part, _ in by_chain])
    _, first = np.unique(rows, return_index=True)  # " May" is a month and its prefix: one place
    index = first[:limit]
    return Places(rows[index], chain[index], member[index], len(first))


def direct_effects(
    store: Store, outputs: Mapping[int, HeadOutput], chains: Sequence[Chain], unembed: Unembed, places: Places
) -> Float[np.ndarray, "place layer head"]:
    """Returns the logit that each head's recorded output gives the successor minus its mean over the class, in float64.

    The norms behind the heads and before the unembedding keep the scales that they have at the place.
    """
    unembed = unembed.to("cpu")
    of_chain = [unembed.weight[torch.from_numpy(chain.ids)].double() for chain in chains]
    read = torch.stack(
        [
            of_chain[chain][member] - of_chain[chain].mean(0)
            for chain, member in zip(places.chain, places.member, strict=True)
        ]
    )
    final = store["resid_post", store.manifest.model.n_layers - 1]
    effects = np.zeros((len(places.rows), len(outputs), next(iter(outputs.values())).heads))
    for number, (layer, output) in enumerate(outputs.items()):
        frozen, z = FrozenOutput(output), store["z", layer]
        for first in range(0, len(places.rows), _BLOCK):
            part = slice(first, first + _BLOCK)
            rows = places.rows[part]
            directions = read_directions(unembed, final[rows].cpu(), read[part])
            contributions, _bias = frozen.contributions(z[rows].cpu().flatten(1), directions)
            effects[part, number] = contributions.reshape(len(rows), output.heads, -1).sum(-1).numpy()
    return effects


def shares_of_wins(
    effects: Float[np.ndarray, "place layer head"], documents: Int[np.ndarray, " place"], seed: int
) -> dict[str, Float[np.ndarray, "layer head"]]:
    """Returns how often each head raises the successor most, with its interval over documents; ties do not count."""
    flat = effects.reshape(len(effects), -1)
    top = np.sort(flat, axis=1)[:, -2:]
    wins = (flat == top[:, 1:]) & (top[:, 1:] > top[:, :1]) if flat.shape[1] > 1 else np.ones_like(flat, bool)
    share, resampled = clustered_means(wins.astype(float), documents, seed=seed)
    low, high = intervals(resampled)
    arrays = {"wins": share, "wins_low": low, "wins_high": high, "direct_effect": flat.mean(0)}
    return {name: values.reshape(effects.shape[1:]) for name, values in arrays.items()}
