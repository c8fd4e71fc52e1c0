"""Pairs of runs, clean and corrupt, for patching: of a store with columns pair and side, or of checked prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from workbench.analysis.causal import require_causal
from workbench.analysis.frozen_norm import ids_of_values, single_tokens
from workbench.corpus.prompt_pairs import PromptPairs
from workbench.corpus.tokenizer import token_texts
from workbench.io.checks import check_kind
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.model.reload import recorded_model

if TYPE_CHECKING:
    from workbench.model.load import Model
    from workbench.store.reader import Store

OTHER = "other"
"""Place of the positions without a label."""


@dataclass(frozen=True)
class PatchPair:
    """One pair as token ids, both sides of one length, with the ids of its answers and labelled positions."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: tuple[int, ...]
    """Ids of tokens that are right after the clean side; () where none is known."""
    wrong: tuple[int, ...]
    """Ids of tokens that are right after the corrupt side."""
    places: Mapping[str, tuple[int, ...]]
    """Label to positions, in the order of the prompt."""


def pairs_of(pairs: PromptPairs) -> list[PatchPair]:
    """Returns the pairs of a task."""
    check_kind("pairs", pairs, PromptPairs, "checked pairs, such as wb.prompt_pairs('ioi', model)")
    return [
        PatchPair(
            pair.clean, pair.corrupt, pair.answer, pair.wrong, {name: tuple(at) for name, at in pair.spans.items()}
        )
        for pair in pairs.pairs
    ]


def of_usual_length(pairs: Sequence[PatchPair]) -> tuple[list[PatchPair], list[str]]:
    """Returns the pairs of the most frequent number of tokens, whose positions correspond, and a note on the others."""
    lengths = [len(pair.clean) for pair in pairs]
    usual = max(sorted(set(lengths)), key=lengths.count)
    usual_pairs = [pair for pair in pairs if len(pair.clean) == usual]
    dropped_count = len(pairs) - len(usual_pairs)
    return usual_pairs, [f"{counted(dropped_count, 'pair')} left out: not of {usual} tokens"] if dropped_count else []


def recorded_pairs(
    store: Store, name: str, model: Model | str | None, where: str | None, device: str | None
) -> tuple[Model, list[PatchPair], list[str]]:
    """Returns the model that a store names, the pairs that it holds, and a note for each reason to leave some out.

    Args:
        store: The store.
        name: Name of the probe that asks, for messages.
        model: The recorded model, or where it lies. None: by the store's name for it.
        where: SQL over the token table: the pairs to use. None: all.
        device: Device of a model that is loaded here.

    Raises:
        RequestError: The store has no pairs or is of a model that is not causal, or the model cannot be loaded.
    """
    require_causal(store, name)
    loaded = recorded_model(store, model, device)
    pairs, dropped_pairs = pairs_from_store(store, loaded, where)
    return loaded, pairs, [f"{counted(count, 'pair')} left out: {reason}" for reason, count in dropped_pairs.items()]


def pairs_from_store(store: Store, model: Model, where: str | None = None) -> tuple[list[PatchPair], Counter[str]]:
    """Returns the pairs that a store holds, and the number of others by reason.

    A store has pairs in the columns pair and side ("clean", "corrupt"); answer and wrong hold the text of the right
    token after this side, and after the other. Each label of its spans is a place. `where` selects a pair by any token
    of it.

    Raises:
        RequestError: The store has no pairs, or holds chosen rows.
    """
    columns = set(store.tokens.column_names)
    if missing := {"pair", "side"} - columns:
        raise RequestError(
            f"store {store.path.name} has no column {min(missing)!r}, so it holds no pairs; record "
            "wb.prompt_pairs(...).texts(), or texts with columns pair and side"
        )
    store.require_whole_sequences("patching between the prompts of a pair")
    table = store.tokens.to_pandas()
    if where is not None:  # the prompts of a pair are run whole, whichever of their tokens are selected
        table = table[table["pair"].isin(store.where(where).tokens["pair"].to_pylist())]
    labels = sorted(name for name in columns if f"{name}_span" in columns)
    texts = token_texts(model.tokenizer, range(model.vocab)) if {"answer", "wrong"} <= columns else []
    ids = single_tokens(texts)
    pairs, dropped_pairs = [], Counter()
    for _, pair_rows in table.dropna(subset=["pair", "side"]).groupby("pair", sort=True):
        sides = {str(side): part for side, part in pair_rows.groupby("side")}
        if set(sides) != {"clean", "corrupt"} or any(part["sequence"].nunique() != 1 for part in sides.values()):
            dropped_pairs["not one clean and one corrupt sequence"] += 1
            continue
        clean, corrupt = sides["clean"], sides["corrupt"]
        clean_places = {name: tuple(np.flatnonzero(clean[name].notna()).tolist()) for name in labels}
        corrupt_places = {name: tuple(np.flatnonzero(corrupt[name].notna()).tolist()) for name in labels}
        answers = ids_of_values([clean[name].iloc[0] for name in ("answer", "wrong")], ids) if ids else []
        if len(clean) != len(corrupt):
            dropped_pairs["different numbers of tokens"] += 1
        elif clean_places != corrupt_places:
            dropped_pairs["a label has other positions on the two sides"] += 1
        elif any(answer < 0 for answer in answers):
            dropped_pairs["an answer is not one token"] += 1
        else:
            places = {name: at for name, at in sorted(clean_places.items(), key=lambda place: place[1]) if at}
            places["end"] = (len(clean) - 1,)
            right, wrong = ((int(answer),) for answer in answers) if ids else ((), ())
            first, second = (tuple(map(int, part["token_id"])) for part in (clean, corrupt))
            pairs.append(PatchPair(first, second, right, wrong, places))
    if not pairs:
        raise RequestError(
            f"store {store.path.name} holds no usable pair: {dict(dropped_pairs) or 'no row has a pair'}"
        )
    return pairs, dropped_pairs


@dataclass(frozen=True)
class PairTensors:
    """Pairs as right-padded tensors, on the CPU."""

    clean: Int64[Tensor, "pair position"]
    corrupt: Int64[Tensor, "pair position"]
    mask: Int64[Tensor, "pair position"]
    end: Int64[Tensor, " pair"]
    """Position of the last token."""
    places: Mapping[str, Bool[Tensor, "pair position"]]
    """Label to the positions that it covers, in the order of the prompts."""

    @classmethod
    def of(cls, pairs: Sequence[PatchPair], by_index: bool) -> PairTensors:
        """Returns the tensors of pairs.

        Args:
            pairs: The pairs.
            by_index: A place is a position, not a label; all pairs have one length.
        """
        shape = (len(pairs), max(len(pair.clean) for pair in pairs))
        clean, corrupt, mask = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(3))
        names = dict.fromkeys(name for pair in pairs for name in pair.places)
        where = {name: np.mean([pair.places[name][0] for pair in pairs if pair.places.get(name)]) for name in names}
        ordered = [name for name in sorted(names, key=lambda name: where[name]) if name != "end"]
        ordered = [str(index) for index in range(shape[1])] if by_index else [OTHER, *ordered, "end"]
        places = {name: torch.zeros(shape, dtype=torch.bool, device="cpu") for name in ordered}
        for number, pair in enumerate(pairs):
            length = len(pair.clean)
            clean[number, :length] = torch.tensor(pair.clean)
            corrupt[number, :length] = torch.tensor(pair.corrupt)
            mask[number, :length] = 1
            if by_index:
                for index in range(length):
                    places[str(index)][number, index] = True
                continue
            covered = {position for name in pair.places for position in pair.places[name]}
            rest = [index for index in range(length) if index not in covered]
            for name, positions in {**pair.places, OTHER: rest}.items():
                places[name][number, list(positions)] = True
        end = torch.tensor([len(pair.clean) - 1 for pair in pairs])
        return cls(clean, corrupt, mask, end, {name: at for name, at in places.items() if bool(at.any())})

    def __len__(self) -> int:
        return len(self.clean)
