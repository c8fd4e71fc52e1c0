"""Decomposition of logits at the rows of a store into terms of the last stream: parts of the model, heads, neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from workbench.analysis.frozen_norm import norm_bias, read_directions
from workbench.analysis.logit_targets import LogitTargets
from workbench.analysis.stream_terms import StreamTerm, check_sum
from workbench.figures.head_grid import head_name
from workbench.io.errors import RequestError
from workbench.model.frozen_output import FrozenOutput
from workbench.model.unembed import Unembed
from workbench.store.reader import Store

_BLOCK = 512  # rows whose terms are in memory at a time
_ROUNDED = 0.05
"""Part of a term's size by which its heads or neurons may miss it, in types of 16 bits."""
_NOTES = ("bias of the final norm", "bias of the unembedding")


@dataclass(frozen=True)
class SplitTerm:
    """A sublayer whose term is split into heads or neurons."""

    layer: int
    site: str
    output: FrozenOutput
    heads: bool

    def contributions(self, store: Store, rows: np.ndarray, u: Tensor) -> tuple[Tensor, Tensor]:
        """Contributions of heads or neurons, and that of the biases."""
        inputs = store[self.site][rows].double().cpu().flatten(1)
        terms, bias = self.output.contributions(inputs, u)
        return (terms.reshape(len(u), self.output.output.heads, -1).sum(-1) if self.heads else terms), bias


@dataclass(frozen=True)
class TermName:
    """Name of a term, and its place in the model."""

    name: str
    kind: str
    layer: int | None = None
    index: int | None = None


@dataclass
class TermSums:
    """Sums over the rows of each document."""

    values: Float[np.ndarray, "document term"]
    absolute: Float[np.ndarray, "document term"]
    control: Float[np.ndarray, "document term"]
    rows: Float[np.ndarray, " document"]


@dataclass
class SumChecks:
    """Mean of the logit, and by how much the terms may miss it."""

    logit: float = 0.0
    error: float = 0.0
    rounding: float = 0.0


@dataclass(frozen=True)
class Decomposition:
    """A logit, or a difference of two, at some rows of a store, and the terms of the last stream that add up to it."""

    store: Store
    unembed: Unembed
    terms: Sequence[StreamTerm]
    split: Mapping[str, SplitTerm]
    rows: Int[np.ndarray, " row"]
    targets: LogitTargets
    kept: dict[str, np.ndarray] = field(default_factory=dict)
    """Neurons of each split MLP that have their own terms."""

    def decompose(
        self, neurons: int | None, detail: int, seed: int
    ) -> tuple[list[TermName], TermSums, Float64[Tensor, "row term"], SumChecks]:
        """Returns the terms' names, their sums over documents, the first rows one by one, and the checks.

        Args:
            neurons: Neurons of each split MLP that get terms of their own. None: no MLP is split.
            detail: Number of rows whose terms are returned one by one.
            seed: Random seed of the tokens of the control.
        """
        if self.split and neurons is not None:
            self.kept.update(self._strongest(neurons))
        names = list(self._names())
        documents, number = np.unique(self.store.tokens["document"].take(self.rows).to_numpy(), return_inverse=True)
        shape = (len(documents), len(names))
        totals = TermSums(np.zeros(shape), np.zeros(shape), np.zeros(shape), np.bincount(number).astype(float))
        random, checks, details = self.targets.random(self.unembed.vocab, seed), SumChecks(), []
        eps = torch.finfo(getattr(torch, self.store[self.terms[-1].plus[0]].site.dtype)).eps
        for part in self._blocks():
            stream, values = self._read(part)
            check_sum(self.store, values, stream, self.rows[part])
            terms, logit = self._terms(part, stream, values, self.targets)
            control, _ = self._terms(part, stream, values, random)
            for target, source in ((totals.values, terms), (totals.absolute, terms.abs()), (totals.control, control)):
                np.add.at(target, number[part], source.numpy())
            checks.logit += float(logit.sum()) / len(self.rows)
            checks.error = max(checks.error, float((terms.sum(1) - logit).abs().max()))
            checks.rounding = max(checks.rounding, eps / 4 * float(terms.abs().sum(1).max()))
            if part.start < detail:
                details.append(terms[: detail - part.start])
        none = torch.zeros(0, len(names), dtype=torch.float64)
        return names, totals, torch.cat([none, *details]), checks

    def _blocks(self) -> Iterator[slice]:
        return (slice(first, min(first + _BLOCK, len(self.rows))) for first in range(0, len(self.rows), _BLOCK))

    def _read(self, part: slice) -> tuple[Tensor, dict[StreamTerm, Tensor]]:
        rows = self.rows[part]
        stream = self.store[f"resid_post.{self.store.manifest.model.n_layers - 1}"][rows].double().cpu()
        return stream, {term: term.read(self.store, rows) for term in self.terms}

    def _terms(
        self, part: slice, stream: Tensor, values: Mapping[StreamTerm, Tensor], targets: LogitTargets
    ) -> tuple[Float64[Tensor, "row term"], Float64[Tensor, " row"]]:
        """Contribution of each term at some rows, in the order of `_names`, and the logit itself."""
        w, bias = targets.read(self.unembed, part)
        u, columns = read_directions(self.unembed, stream, w), []
        for term, value in values.items():
            if term.name not in self.split:
                columns.append((value * u).sum(-1, keepdim=True))
                continue
            terms, constant = self.split[term.name].contributions(self.store, self.rows[part], u)
            _check_split(term, value, u, terms.sum(1) + constant)
            if (neurons := self.kept.get(term.name)) is not None:
                rest = terms.sum(1, keepdim=True) - terms[:, neurons].sum(1, keepdim=True)
                terms = torch.cat([terms[:, neurons], rest], dim=1)
            columns += [terms, constant[:, None]]
        columns += [norm_bias(self.unembed, w)[:, None], bias[:, None]]
        return torch.cat(columns, dim=1), (stream * u).sum(-1) + columns[-2][:, 0] + bias

    def each(self, part: slice) -> tuple[Float64[Tensor, "row term"], Float64[Tensor, " row"]]:
        """Returns the contribution of each term at some rows, and the quantity itself."""
        return self._terms(part, *self._read(part), self.targets)

    def mean(self, site: str) -> Float64[Tensor, "*row"]:
        """Returns the mean of a site over the rows."""
        total = torch.zeros(self.store[site].shape[1:], dtype=torch.float64)
        for part in self._blocks():
            total += self.store[site][self.rows[part]].double().cpu().sum(0)
        return total / len(self.rows)

    def _names(self) -> Iterator[TermName]:
        """Names of the columns of `_terms`."""
        for term in self.terms:
            part = self.split.get(term.name)
            if part is None:
                yield TermName(term.name, "stream" if term.layer is None else term.kind, term.layer)
                continue
            if part.heads:
                for head in range(part.output.output.heads):
                    yield TermName(head_name(part.layer, head), "head", part.layer, head)
            else:
                for neuron in self.kept[term.name].tolist():
                    yield TermName(f"L{part.layer}N{neuron}", "neuron", part.layer, neuron)
                yield TermName(f"other neurons of {term.name}", "neurons", part.layer)
            yield TermName(f"bias of {term.name}", "bias", part.layer)
        yield from (TermName(name, "bias") for name in _NOTES)

    def _strongest(self, number: int) -> dict[str, np.ndarray]:
        """Neurons of each layer with the largest absolute mean contribution, in ascending order."""
        sums: dict[str, Tensor] = {}
        for part in self._blocks():
            stream = self.store[f"resid_post.{self.store.manifest.model.n_layers - 1}"][self.rows[part]].double().cpu()
            u = read_directions(self.unembed, stream, self.targets.read(self.unembed, part)[0])
            for name, split in self.split.items():
                terms, _ = split.contributions(self.store, self.rows[part], u)
                sums[name] = sums.get(name, torch.zeros(())) + terms.sum(0)
        return {name: np.sort(np.argsort(-total.abs().numpy(), kind="stable")[:number]) for name, total in sums.items()}


def _check_split(
    term: StreamTerm,
    value: Float64[Tensor, "row d_model"],
    u: Float64[Tensor, "row d_model"],
    total: Float64[Tensor, " row"],
) -> None:
    """Refuses heads or neurons that are not all that a part adds, as in a block that norms the stream itself."""
    error = (total - (value * u).sum(-1)).abs()
    if not bool((error <= _ROUNDED * value.norm(dim=-1) * u.norm(dim=-1)).all()):
        raise RequestError(
            f"the heads or neurons of {term.name} do not add up to it: they miss {float(error.max()):.2g} logits; "
            "choose parts='sublayers'"
        )
