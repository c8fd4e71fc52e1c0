"""Chats as texts: rendered by the tokenizer's own chat template, with the place of each message's content.

The text is what `apply_chat_template` gives, and its tokens are those of that text alone: BOS, headers and separators
come from the template, and nothing is added. To find the contents in any template, each is replaced by a marker and the
chat is rendered again: what surrounds the marker is the template's, and what stands in its place is the content, as
given, trimmed, or rewritten. Text of the template itself belongs to no message.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.corpus.document import Document, Turn
from workbench.io.errors import RequestError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

_MARKER = "Qx{}x{}xQ"  # letters alone: no template trims or escapes them
_Place = tuple[int, int | None]  # of a content: its message, and its part where it has several


@dataclass
class _Changes:
    """What templates did to contents, counted for one warning."""

    trimmed: int = 0
    rewritten: int = 0
    lost: int = 0
    first: str = ""

    def note(self, kind: str, document: Document, message: int) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.first = self.first or f"message {message} of document {document.index}"

    def report(self) -> None:
        if not self.first:
            return
        counts = {
            "trims {} messages": self.trimmed,
            "rewrites {} messages, whose role and turn mark what it makes of them": self.rewritten,
            "changes {} messages beyond recognition, whose tokens have no role and turn": self.lost,
        }
        changes = "; ".join(text.format(f"{n:,}") for text, n in counts.items() if n)
        _LOG.warning(f"the chat template {changes}; the first is {self.first}")


def render_chats(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, generation_prompt: bool = False
) -> Iterator[Document]:
    """Yields the documents with chats as texts, and the places of their contents as turns; others as they are.

    Args:
        documents: Documents of any kind.
        tokenizer: The tokenizer with the chat template.
        generation_prompt: End each chat with the header of the assistant's next message.

    Raises:
        RequestError: No tokenizer or chat template, or a chat that the template refuses or leaves parts out of.
    """
    changes = _Changes()
    for document in documents:
        if document.messages is None:
            yield document
        else:
            yield _rendered(document, tokenizer, generation_prompt, changes)
    changes.report()


def only_chats(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields the documents, which are chats; RequestError for another one, which has no header to end with."""
    for document in documents:
        if document.messages is None:
            raise RequestError(
                f"document {document.index} is no chat, and generation_prompt=True ends chats with the header of the "
                "next message; leave generation_prompt out"
            )
        yield document


def _rendered(
    document: Document, tokenizer: PreTrainedTokenizerBase | None, generation_prompt: bool, changes: _Changes
) -> Document:
    messages, place = document.messages or (), f"document {document.index}"
    if tokenizer is None or not hasattr(tokenizer, "apply_chat_template"):
        raise RequestError(f"{place} is a chat and the model has no tokenizer; pass tokenizer= or lists of token ids")
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            f"{place} is a chat and the tokenizer has no chat template; set tokenizer.chat_template, or give the text "
            "as the model was trained to read it"
        )
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or ("content" not in message and len(message) < 2):
            raise RequestError(
                f"{place}: message {number} has the keys {', '.join(message)}; a message is "
                "{'role': 'user', 'content': 'Hello'}"
            )

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # of Jinja, and of the template's own raise_exception
            raise RequestError(f"{place}: the chat template refuses the chat ({first_line(error)})") from error
        return str(text)

    text = render(messages)
    turns = _locate(document, messages, text, render, changes)
    return replace(document, text=text, messages=None, turns=turns)


def _locate(
    document: Document,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    render: Callable[[Sequence[Mapping[str, Any]]], str],
    changes: _Changes,
) -> tuple[Turn, ...]:
    """The contents of the messages in the rendered text, in order of their start."""
    contents = dict(_contents(messages))
    marker = _unused(text)
    markers = {place: marker.format(n) for n, place in enumerate(contents)}
    skeleton = render(_with_contents(messages, markers))
    turns, rebuilt, trimmed = _filled(skeleton, markers, contents, messages, text)
    if rebuilt == text:
        for number in trimmed:
            changes.note("trimmed", document, number)
    else:  # the template depends on the contents, or changes them: one at a time
        turns = []
        for place, content in contents.items():
            around = render(_with_contents(messages, {**contents, place: markers[place]}))
            before, separator, after = around.partition(markers[place])
            end = len(text) - len(after)
            if separator and len(before) <= end and text.startswith(before) and text.endswith(after):
                turns.append(Turn(len(before), end, str(messages[place[0]]["role"]), place[0]))
                if (inside := text[len(before) : end]) != content:
                    kind = "trimmed" if inside == content.strip() else "rewritten"
                    changes.note(kind, document, place[0])
            else:
                changes.note("lost", document, place[0])
    present = {mark for mark in markers.values() if mark in skeleton}
    for place, mark in markers.items():
        if mark not in present and contents[place].strip() not in text:
            raise RequestError(
                f"document {document.index}: the chat template leaves out message {place[0]} (role "
                f"{messages[place[0]]['role']!r}); leave it out of the chat, or give the rendered text"
            )
    return tuple(sorted(turn for turn in turns if turn.end > turn.start))


def _contents(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[_Place, str]]:
    """Texts of the messages that are not empty; a content may be a list of parts, `{"type": "text", "text": ...}`."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            yield (number, None), content
        for index, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part["text"].strip():
                yield (number, index), part["text"]


def _with_contents(messages: Sequence[Mapping[str, Any]], texts: Mapping[_Place, str]) -> list[dict[str, Any]]:
    changed = [dict(message) for message in messages]
    for (number, index), text in texts.items():
        if index is None:
            changed[number]["content"] = text
        else:
            parts = list(changed[number]["content"])
            parts[index] = {**parts[index], "text": text}
            changed[number]["content"] = parts
    return changed


def _filled(
    skeleton: str,
    markers: Mapping[_Place, str],
    contents: Mapping[_Place, str],
    messages: Sequence[Mapping[str, Any]],
    text: str,
) -> tuple[list[Turn], str, list[int]]:
    """The turns in a skeleton whose markers are replaced by the contents, that text, and the messages it trims.

    A content goes in as it is where that is how `text` goes on, else trimmed.
    """
    by_marker = {mark: place for place, mark in markers.items()}
    turns, trimmed, rebuilt = [], [], ""
    pieces = re.split("(" + "|".join(map(re.escape, by_marker)) + ")", skeleton) if by_marker else [skeleton]
    for index, piece in enumerate(pieces):
        if piece not in by_marker:
            rebuilt += piece
            continue
        place = by_marker[piece]
        content, following = contents[place], pieces[index + 1]
        start = len(rebuilt)
        if not text.startswith(content + following, start):
            content = content.strip()
            trimmed.append(place[0])
        rebuilt += content
        turns.append(Turn(start, start + len(content), str(messages[place[0]]["role"]), place[0]))
    return turns, rebuilt, trimmed


def _unused(text: str) -> str:
    """A pattern of markers, none of which is in the text."""
    number = 0
    while f"Qx{number}x" in text:
        number += 1
    return _MARKER.format(number, "{}")
