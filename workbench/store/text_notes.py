"""Phrases about what a recording did to its texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.store.manifest import Part


def text_notes(parts: Sequence[Part]) -> list[str]:
    """Returns what the recording of these parts did to their texts, as phrases; none where all are as they came."""
    counts = {
        "{} without a token skipped": sum(part.skipped_documents for part in parts),
        "{} cut into several sequences": sum(part.cut_documents or 0 for part in parts),
        "{} with BOS or EOS in the text, not added again": sum(part.documents_with_added_tokens for part in parts),
    }
    notes = [text.format(f"{n:,} {'document' if n == 1 else 'documents'}") for text, n in counts.items() if n]
    if replaced := sum(part.replaced_characters for part in parts):
        characters = "1 character that is" if replaced == 1 else f"{replaced:,} characters that are"
        notes.append(f"{characters} not valid Unicode replaced by U+FFFD")
    return notes
