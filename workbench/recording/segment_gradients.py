"""Gradients while a model is recorded: the metric checked when it is planned, its tokens found segment by segment."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.analysis.frozen_norm import ids_of_values, single_tokens
from workbench.corpus.tokenizer import token_texts
from workbench.io.errors import DataError, RequestError, first_line, nearest, shown
from workbench.io.parse import read_json
from workbench.model.load import Model
from workbench.model.logit_metrics import METRIC_KINDS, Metric, NextTokenLoss
from workbench.model.token_choice import Tokens
from workbench.recording.change_files import choice_of
from workbench.recording.segment_changes import chosen_by_table
from workbench.sites.grammar import Site, gradient_name
from workbench.store.manifest import SiteRecord

_LOG = logging.getLogger(__name__)


def check_metric(model: Model, metric: Metric | None, sites: Sequence[Site]) -> None:
    """Refuses a metric that a model cannot give, or for which no site is stored.

    Raises:
        RequestError: A token that is none of the model's, or no tokenizer for a text.
    """
    if metric is None:
        return
    if not isinstance(metric, Metric):
        raise RequestError(f"gradient_of must be a metric such as wb.LogitDifference(' a', ' b'), not {shown(metric)}")
    if not sites:
        raise RequestError("gradient_of: no site is stored; name sites, whose gradients are stored beside them")
    _Ids(model).of(metric)


def check_next_tokens(metric: Metric | None, lengths: Int[np.ndarray, " sequence"]) -> None:
    """Warns of sequences of one token under a loss of the next one: they have none, and gradients of exactly 0.

    Raises:
        RequestError: No sequence has a next token.
    """
    alone = int((lengths == 1).sum())
    if not isinstance(metric, NextTokenLoss) or not alone:
        return
    if alone == len(lengths):
        raise RequestError(
            "gradient_of: every text has one token, so none has a next one; give longer texts, or a metric of a token "
            "that you name, such as wb.LogProbability"
        )
    _LOG.warning(
        f"gradient_of: {alone:,} of {len(lengths):,} sequences have one token and no next one; their gradients are 0"
    )


def gradient_record(site: SiteRecord) -> SiteRecord:
    """Returns the record of the gradient with respect to a site: float32, since gradients underflow in float16."""
    short, synonyms = site.short and gradient_name(site.short), tuple(map(gradient_name, site.synonyms))
    return replace(site, name=gradient_name(site.name), short=short, synonyms=synonyms, dtype="float32")


@dataclass(frozen=True)
class _Ids:
    """Ids of the tokens of a vocabulary by their texts."""

    model: Model

    @cached_property
    def by_text(self) -> Mapping[str, int]:
        if self.model.tokenizer is None:
            raise RequestError("gradient_of: the model has no tokenizer; give tokens as ids")
        return single_tokens(token_texts(self.model.tokenizer, range(self.model.vocab)))

    def of(self, metric: Metric) -> dict[str, int | None]:
        """Returns the ids that a metric names; None where a column names them."""
        return {name: None if token is None else self._id(name, token) for name, (token, _) in metric.named.items()}

    def _id(self, name: str, token: str | int) -> int:
        if isinstance(token, str):
            if token not in self.by_text:
                raise RequestError(f"{name}: {token!r} is no single token{nearest(token, self.by_text)}; give an id")
            return self.by_text[token]
        if isinstance(token, bool) or not 0 <= token < self.model.vocab:
            raise RequestError(f"{name} must be a text or an id from 0 to {self.model.vocab - 1}, not {shown(token)}")
        return int(token)


class SegmentMetric:
    """A metric over one segment: the rows whose logits count, and the ids that it names at each."""

    def __init__(
        self, model: Model, metric: Metric, first_sequence: int, lengths: Int[np.ndarray, " sequence"], table: pa.Table
    ) -> None:
        self.metric, self._first, self._lengths = metric, first_sequence, lengths
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        self._ids = table["token_id"].to_numpy().astype(np.int64)
        self._position = np.arange(len(self._ids)) - np.repeat(self._starts, lengths)
        self._rows = self._chosen(table)
        ids = _Ids(model)
        self._tokens = {"next": np.append(self._ids[1:], 0)} | {
            name: np.full(len(self._ids), token) if token is not None else self._column(name, table, ids.by_text)
            for name, token in ids.of(metric).items()
        }

    def _chosen(self, table: pa.Table) -> Bool[np.ndarray, " row"]:
        choice, length = self.metric.choice, np.repeat(self._lengths, self._lengths)
        rows = _at_index(choice, self._position, self._lengths) & chosen_by_table(choice, table)
        if choice.ids is not None:
            rows &= np.isin(self._ids, list(choice.ids))
        if isinstance(self.metric, NextTokenLoss):
            rows &= self._position < length - 1
            if choice.described() == {"index": "all"}:
                return rows
        empty = np.flatnonzero(np.add.reduceat(rows, self._starts) == 0)
        if len(empty):
            raise DataError(
                f"gradient_of: {self.metric} chooses no token of sequence {empty[0] + self._first}, which has "
                f"{self._lengths[empty[0]]} tokens; choose others by at=, or leave the text out"
            )
        return rows

    def _column(self, name: str, table: pa.Table, by_text: Mapping[str, int]) -> Int[np.ndarray, " row"]:
        column = self.metric.named[name][1]
        if column not in table.column_names:
            raise RequestError(f"gradient_of: the texts have no column {column!r}; columns: {_columns(table)}")
        ids = ids_of_values(table[column].to_pylist(), by_text)
        if (missing := self._rows & (ids < 0)).any():
            row = int(np.flatnonzero(missing)[0])
            sequence = int(np.searchsorted(self._starts, row, side="right")) - 1 + self._first
            text = table[column][row].as_py()
            raise DataError(f"gradient_of: {column} of sequence {sequence} is {text!r}, which is no single token")
        return ids

    def of(self, batch: Int[np.ndarray, " batch"]) -> Callable[[Tensor], Float[Tensor, ""]]:
        """Returns the metric of a right-padded batch of these sequences, as a function of its logits."""
        parts = [self._starts[sequence] + np.arange(int(self._lengths[sequence])) for sequence in batch]
        rows = [part[self._rows[part]] for part in parts]
        line = torch.from_numpy(np.repeat(np.arange(len(batch)), [len(part) for part in rows]))
        flat = np.concatenate(rows)
        position = torch.from_numpy(self._position[flat])
        tokens = {name: torch.from_numpy(ids[flat]) for name, ids in self._tokens.items()}

        def metric(logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, ""]:
            chosen = logits[line.to(logits.device), position.to(logits.device)]
            chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
            return self.metric.values(chosen, tokens).sum()

        return metric


def _at_index(
    choice: Tokens, position: Int[np.ndarray, " row"], lengths: Int[np.ndarray, " sequence"]
) -> Bool[np.ndarray, " row"]:
    """Rows at the positions of a choice; negative ones count from the end of their sequence."""
    if isinstance(choice.index, str):
        return np.ones(len(position), bool)
    if isinstance(choice.index, slice):
        inside = [np.isin(np.arange(n), np.arange(n)[choice.index]) for n in lengths]
        return np.concatenate(inside)
    targets = [np.where(index < 0, np.repeat(lengths, lengths) + index, index) for index in choice.positions]
    return np.any([position == target for target in targets], axis=0)


def _columns(table: pa.Table) -> str:
    return ", ".join(name for name in table.column_names if pa.types.is_dictionary(table.schema.field(name).type))


def read_metric(text: str) -> Metric:
    """Reads a metric as the command line takes it: a JSON object, or the path of a file with one.

    `{"kind": "logit_difference", "token": " Mary", "against": " John", "at": -1}`; kinds are log_probability,
    logit_difference and next_token_loss.

    Raises:
        RequestError: Another structure, or an unknown kind or field.
        DataError: The file is missing or no JSON.
    """
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise RequestError(f"gradient_of is no JSON object: {first_line(error)}") from None
    else:
        value = read_json(Path(text), "give a JSON object, or a file with one")
    return parse_metric(value)


def parse_metric(value: Mapping[str, Any]) -> Metric:
    """Returns the metric that a JSON object describes; see `read_metric`."""
    kind = METRIC_KINDS.get(str(value.get("kind")))
    if kind is None:
        raise RequestError(f"gradient_of: kind is {shown(value.get('kind'))}; kinds: {', '.join(METRIC_KINDS)}")
    known = [field.name for field in fields(kind)]
    if unknown := sorted(value.keys() - {"kind", *known}):
        raise RequestError(f"gradient_of: {value['kind']} has no field {unknown[0]!r}; it has {', '.join(known)}")
    entries = {name: setting for name, setting in value.items() if name != "kind"}
    if isinstance(entries.get("at"), dict):
        entries["at"] = choice_of(entries["at"])
    try:
        return kind(**entries)
    except (TypeError, ValueError) as error:
        raise RequestError(f"gradient_of: {error}") from None
