"""Exact ablation beside a decomposition: what a logit loses when one part of the model writes 0, or its mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from workbench.analysis.frozen_norm import norm_bias, read_directions
from workbench.analysis.logit_targets import LogitTargets
from workbench.model.capture import capture
from workbench.model.intervene import intervene
from workbench.model.load import Model, batch_tokens
from workbench.model.row_changes import ChosenRows, RowFunction
from workbench.model.unembed import Unembed
from workbench.results.bootstrap import interval_suffix
from workbench.store.reader import Store

Replacement = Literal["zero", "mean"]


@dataclass(frozen=True)
class AblatedPart:
    """A part of the model that is ablated: a site, one head of it, or one value of its rows."""

    site: str
    head: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class AblatedRuns:
    """Runs of the texts up to some rows, in which one part is ablated at the row itself."""

    model: Model
    unembed: Unembed
    targets: LogitTargets
    """Of the rows."""
    ids: Int[Tensor, "row position"]
    """Tokens of each row's sequence up to the row, padded on the right."""
    mask: Int[Tensor, "row position"]

    @classmethod
    def make(
        cls,
        model: Model,
        unembed: Unembed,
        store: Store,
        rows: Int[np.ndarray, " row"],
        targets: LogitTargets,
    ) -> AblatedRuns:
        """Reads the texts of some rows.

        Raises:
            RequestError: A store of chosen rows, which lacks the tokens before them.
        """
        store.require_whole_sequences("ablation")
        ids, position = (store.tokens[name].to_numpy() for name in ("token_id", "position"))
        parts = [ids[row - position[row] : row + 1] for row in rows]
        padded = torch.zeros(len(parts), max(map(len, parts)), dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for line, part in enumerate(parts):
            padded[line, : len(part)] = torch.from_numpy(part.astype(np.int64))
            mask[line, : len(part)] = 1
        return cls(model, unembed, targets, padded, mask)

    @property
    def at(self) -> Bool[Tensor, "row position"]:
        """Mask of the rows themselves: the last token of each text."""
        return torch.arange(self.mask.shape[1]) == self.mask.sum(1, keepdim=True) - 1

    def quantity(
        self, part: AblatedPart | None = None, value: Float[Tensor, "*row"] | float = 0.0
    ) -> Float64[Tensor, " row"]:
        """Returns the logit, difference or projection at each row, with its own norm, under one ablation.

        Args:
            part: AblatedPart whose values at the row are replaced. None: the model as it is.
            value: What they are replaced by.
        """
        results = []
        step = max(1, batch_tokens(self.model) // self.ids.shape[1])
        (last,) = self.model.site_map.select((f"resid_post.{self.model.site_map.n_layers - 1}",))
        for first in range(0, len(self.ids), step):
            batch = slice(first, min(first + step, len(self.ids)))
            streams: list[Tensor] = []
            record = None if part is None else _replace(part, value, self.at[batch])
            with nullcontext() if record is None else intervene(self.model, record):
                capture(
                    self.model.module,
                    (last,),
                    self.ids[batch],
                    self.mask[batch],
                    lambda _site, tensor, _first, streams=streams: streams.append(tensor.detach().cpu().double()),
                )
            stream = streams[0][self.at[batch]]
            w, bias = self.targets.read(self.unembed, batch)
            u = read_directions(self.unembed, stream, w)
            results.append((stream * u).sum(-1) + norm_bias(self.unembed, w) + bias)
        return torch.cat(results)


def _replace(part: AblatedPart, value: Float[Tensor, "*row"] | float, at: Bool[Tensor, "row position"]) -> RowFunction:
    def change(rows: Float[Tensor, "row ..."], _chosen: ChosenRows) -> Float[Tensor, "row ..."]:
        new = torch.as_tensor(value, dtype=rows.dtype, device=rows.device)
        if part.head is None and part.index is None:
            return new.expand_as(rows)
        new_rows = rows.clone()
        new_rows[:, part.head if part.head is not None else part.index] = new
        return new_rows

    return RowFunction(part.site, change, "ablation", at=at)


def ablation_effects(
    runs: AblatedRuns,
    parts: Mapping[str, AblatedPart],
    replacement: Replacement,
    mean_of: Callable[[str], Float[Tensor, "*row"]],
    terms: Sequence[str],
    advance: Callable[[int], None],
) -> Float64[np.ndarray, "row term"]:
    """Returns what the quantity loses at each row when each part is ablated there; NaN for terms that are no part.

    Costs a pass over the texts for each part.

    Args:
        runs: Texts of the rows.
        parts: Parts by the names of their terms.
        replacement: zero, or the mean of the recorded rows.
        mean_of: Returns the mean row of a site.
        terms: Names of all terms.
        advance: Called with 1 after each part.
    """
    plain, effects = runs.quantity(), np.full((len(runs.ids), len(terms)), np.nan)
    for column, term in enumerate(terms):
        if (part := parts.get(term)) is None:
            continue
        value: Tensor | float = 0.0
        if replacement == "mean":
            value = mean_of(part.site)
            value = value[part.head] if part.head is not None else value
            value = value[part.index] if part.index is not None else value
        effects[:, column] = (plain - runs.quantity(part, value)).numpy()
        advance(1)
    return effects


def ablated_logit_text(data: Any, replacement: str) -> str:
    """Returns the term whose ablation changes the quantity most, as one phrase beside its direct contribution."""
    term = int(np.nan_to_num(np.abs(data["ablated"].to_numpy())).argmax())
    loss, low, high, direct = (
        float(data[name].to_numpy()[term]) for name in ("ablated", "ablated_low", "ablated_high", "direct")
    )
    interval = interval_suffix(low, high)
    value = "its mean" if replacement == "mean" else "0"
    name = data["term"].to_numpy()[term]
    return f"with {name} set to {value} it loses {loss:z.2f}{interval} (direct contribution there {direct:z.2f})"
