"""A document: one text, chat or list of token ids, with its metadata, spans and turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from workbench.corpus.spans import Span
from workbench.corpus.values import Plain


class Turn(NamedTuple):
    """Characters of a text, or tokens of a list of token ids, that are the content of one message of a chat."""

    start: int
    end: int
    """Exclusive."""
    role: str
    number: int
    """Index of the message in its chat, from 0."""


@dataclass(frozen=True)
class Document:
    """One text, one chat, or one list of token ids, with its metadata and spans.

    The text is as read: it still contains lone surrogates, which also stand for invalid UTF-8 bytes of a file;
    `plan_sequences` replaces and counts them.
    """

    index: int
    """Index in the source, from 0."""
    text: str | None
    """The text, or None where the document is given as token ids or as a chat that is not rendered yet."""
    token_ids: Sequence[int] | None
    """The token ids, or None where the document is given otherwise."""
    metadata: Mapping[str, Plain] = field(default_factory=dict)
    """Column name to value, in one of the forms of `Plain` (nested values as compact JSON)."""
    spans: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    """Label to spans of the text, in order of their start and without overlap."""
    messages: Sequence[Mapping[str, Any]] | None = None
    """The messages of a chat; `render_chats` makes a text of them."""
    turns: Sequence[Turn] | None = None
    """Contents of the messages in the text of a chat, or in its token ids; None: not a chat."""
    pair: int | None = None
    """Number of the pair that the document is a side of."""
    prompt_tokens: int | None = None
    """Number of token ids before the generated ones; None: nothing is generated."""
    generation: Mapping[str, Any] | None = None
    """Settings with which the tokens after the prompt were generated."""

    @property
    def with_added_tokens(self) -> bool:
        """True if BOS and EOS are added: not to token ids, and not to a chat, whose template writes its own."""
        return self.text is not None and self.turns is None

    @property
    def token_columns(self) -> tuple[str, ...]:
        """Columns of the token table that documents of this kind add."""
        return ("role", "turn") * (self.turns is not None) + ("generated", "step") * (self.prompt_tokens is not None)


def is_chat(value: Any, text_column: str = "") -> bool:
    """Returns True for a list of messages, `[{"role": "user", "content": "Hello"}, ...]`, without a text column."""
    if not isinstance(value, list | tuple) or not value:
        return False
    messages = all(isinstance(item, Mapping) and "role" in item and text_column not in item for item in value)
    return messages and any("content" in item for item in value)
