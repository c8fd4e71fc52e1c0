"""Choices of tokens: by position, by id, by labelled span, by SQL over the token table of a recording.

A position is an index into the tokens of a sequence, not into the padded tensor: the first real token has 0, padding
has none. So left-padded, right-padded and cached passes mean the same tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.io.errors import RequestError, shown

Index = int | Sequence[int] | slice | str
"""A position or several (-1 is the last token of the prompt), a slice of positions (which includes generated tokens
where it has no end), "all" tokens, or the "new" ones after the prompt."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Choice of tokens; conditions that are given together must all hold.

    `Tokens(ids={198})` are the tokens with these ids, `Tokens("new", ids={198})` the generated ones among them.
    """

    index: Index = "all"
    """Positions: an index or several (-1 is the last token of the prompt), a slice, "all" or "new"."""
    ids: Collection[int] | None = None
    """Token ids."""
    span: str | None = None
    """Label of spans of the texts: tokens inside of one. Only while recording."""
    sql: str | None = None
    """Condition over the token table of the store that is being recorded, as in `Store.where`. Only while recording."""

    def __post_init__(self) -> None:
        check_index(self.index)
        if self.ids is not None and (isinstance(self.ids, str) or not all(map(whole, self.ids)) or not len(self.ids)):
            raise RequestError(f"ids must be token ids, at least one, not {shown(self.ids)}")
        for name, text in (("span", self.span), ("sql", self.sql)):
            if text is not None and (not isinstance(text, str) or not text.strip()):
                raise RequestError(f"{name} must be a text that is not empty, not {shown(text)}")

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions that are named one by one; none for slices and words."""
        if isinstance(self.index, str | slice):
            return ()
        return tuple(int(position) for position in (self.index if isinstance(self.index, Sequence) else (self.index,)))

    @property
    def needs_table(self) -> bool:
        """True if a token table decides, which only a recording has."""
        return self.span is not None or self.sql is not None

    @property
    def needs_prompt(self) -> bool:
        """True if the end of the prompt decides."""
        if isinstance(self.index, slice):
            return (self.index.start or 0) < 0 or (self.index.stop or 0) < 0
        return self.index == "new" if isinstance(self.index, str) else min(self.positions) < 0

    def described(self) -> dict[str, Any]:
        """Returns the choice as JSON holds it; conditions that are not given are left out."""
        index = self.index
        if isinstance(index, slice):
            index = {"start": index.start, "stop": index.stop, "step": index.step or 1}
        elif not isinstance(index, str):
            index = list(self.positions)
        ids = None if self.ids is None else sorted(int(id) for id in self.ids)
        entries = {"ids": ids, "span": self.span, "sql": self.sql}
        return {"index": index} | {name: value for name, value in entries.items() if value is not None}

    def __str__(self) -> str:
        index = self.index
        if isinstance(index, slice):
            parts = [":".join("" if bound is None else str(bound) for bound in (index.start, index.stop))]
        else:
            parts = [str(index)] if isinstance(index, str) else [", ".join(map(str, self.positions))]
        if self.ids is not None:
            parts.append(f"ids {', '.join(map(str, sorted(self.ids)))}")
        if self.span is not None:
            parts.append(f"span {self.span}")
        if self.sql is not None:
            parts.append(f"sql {self.sql}")
        return "; ".join(parts if len(parts) == 1 else [part for part in parts if part != "all"])


At = Index | Tokens | Bool[Tensor, "batch position"]
"""Choice of the tokens of a pass: positions, `Tokens`, or a mask of the batch, true at the chosen entries."""


def tokens_at(at: At) -> Tokens | Tensor:
    """Returns a choice in its one form: `Tokens`, or a mask.

    Raises:
        RequestError: The choice is none of `At`.
    """
    if isinstance(at, Tokens):
        return at
    if not isinstance(at, Tensor):
        return Tokens(at)
    if at.dtype != torch.bool or at.ndim != 2:
        check_index(at)
    return at


def check_index(index: Any) -> None:
    """Raises RequestError for positions that are none of `Index`."""
    if isinstance(index, str) and index in ("all", "new"):
        return
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        if all(bound is None or whole(bound) for bound in bounds) and (index.step is None or index.step > 0):
            return
        raise RequestError(f"at: {index} needs whole numbers and a step above 0")
    is_list = isinstance(index, Sequence) and not isinstance(index, str) and len(index) and all(map(whole, index))
    if not (whole(index) or is_list):
        raise RequestError(
            f'at must be a position, a list of positions, a slice, "all", "new", wb.Tokens(...) or a mask (batch, '
            f"position), not {shown(index)}"
        )


def whole(value: object) -> bool:
    """Returns True for an integer that is no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
