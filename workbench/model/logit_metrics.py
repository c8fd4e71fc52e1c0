"""Numbers that a model's logits give for a sequence, as frozen records: what gradients are taken of.

The value of a sequence is a sum over its chosen tokens; that of a batch is the sum over its sequences, whose gradients
do not mix.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.model.token_choice import Index, Tokens, tokens_at

Named = tuple[str | int | None, str | None]
"""A token by its text or id, or the column of the token table that holds its text."""


@dataclass(frozen=True)
class Metric(ABC):
    """A frozen record of a number that logits give; it holds nothing of a model."""

    at: Index | Tokens = field(default=-1, kw_only=True)
    """Tokens whose logits count, that is, after which something is predicted; -1 is the last one of the sequence."""

    def __post_init__(self) -> None:
        if isinstance(self.at, Tensor) or self.choice.index == "new":
            raise RequestError(f"at: {self.at!r:.40} chooses no token of a text; give a position, a slice or wb.Tokens")
        for name, (token, column) in self.named.items():
            if (token is None) == (column is None):
                raise RequestError(f"give one of {name} (text or id) and {name}_column (column with its text)")

    @property
    def choice(self) -> Tokens:
        """The choice of tokens in its one form."""
        choice = tokens_at(self.at)
        assert isinstance(choice, Tokens)  # checked
        return choice

    @property
    def named(self) -> Mapping[str, Named]:
        """Tokens that the record names, by the names of its fields; {} where the text's next token is meant."""
        return {}

    @property
    def kind(self) -> str:
        """Name of the kind of metric in JSON: `logit_difference`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def values(
        self, logits: Float[Tensor, "row vocab"], tokens: Mapping[str, Int[Tensor, " row"]]
    ) -> Float[Tensor, " row"]:
        """Returns the value at each row, from its logits and the ids of the tokens that are named or come next."""

    def described(self) -> dict[str, Any]:
        """Returns the record as JSON holds it, defaults included."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind} | entries | {"at": self.choice.described()}

    def __str__(self) -> str:
        tokens = [repr(token) if token is not None else f"column {column}" for token, column in self.named.values()]
        return " ".join([self.kind.replace("_", " "), " against ".join(tokens), f"at {self.choice}"]).replace("  ", " ")


@dataclass(frozen=True)
class LogProbability(Metric):
    """ln P of a token after the chosen ones, in nats."""

    token: str | int | None = None
    """Text or id of the token."""
    token_column: str | None = None
    """Column of the token table with the token's text, such as the answer of a prompt."""

    @property
    def named(self) -> Mapping[str, Named]:
        """The token; see `Metric.named`."""
        return {"token": (self.token, self.token_column)}

    def values(
        self, logits: Float[Tensor, "row vocab"], tokens: Mapping[str, Int[Tensor, " row"]]
    ) -> Float[Tensor, " row"]:
        """Returns ln P at each row; see `Metric.values`."""
        return _pick(logits, tokens["token"]) - logits.logsumexp(-1)


@dataclass(frozen=True)
class LogitDifference(Metric):
    """Logit of a token minus that of another one after the chosen tokens."""

    token: str | int | None = None
    """Text or id of the token."""
    against: str | int | None = None
    """Text or id of the token whose logit is subtracted."""
    token_column: str | None = None
    """Column of the token table with the token's text, such as the answer of a prompt."""
    against_column: str | None = None
    """Column with the text of the token that is subtracted."""

    @property
    def named(self) -> Mapping[str, Named]:
        """Both tokens; see `Metric.named`."""
        return {"token": (self.token, self.token_column), "against": (self.against, self.against_column)}

    def values(
        self, logits: Float[Tensor, "row vocab"], tokens: Mapping[str, Int[Tensor, " row"]]
    ) -> Float[Tensor, " row"]:
        """Returns the difference at each row; see `Metric.values`."""
        return _pick(logits, tokens["token"]) - _pick(logits, tokens["against"])


@dataclass(frozen=True)
class NextTokenLoss(Metric):
    """Cross-entropy of the next token of the text, in nats, summed over the chosen tokens: by default over all."""

    at: Index | Tokens = field(default="all", kw_only=True)
    """Tokens after which the next one is predicted; the last one of a sequence has none."""

    def values(
        self, logits: Float[Tensor, "row vocab"], tokens: Mapping[str, Int[Tensor, " row"]]
    ) -> Float[Tensor, " row"]:
        """Returns -ln P of the next token at each row; see `Metric.values`."""
        return logits.logsumexp(-1) - _pick(logits, tokens["next"])


METRIC_KINDS: Mapping[str, type[Metric]] = {
    "log_probability": LogProbability,
    "logit_difference": LogitDifference,
    "next_token_loss": NextTokenLoss,
}
"""Kinds of metrics by their names in JSON."""


def _pick(logits: Float[Tensor, "row vocab"], ids: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    return logits.gather(-1, ids.to(logits.device, torch.long)[:, None])[:, 0]
