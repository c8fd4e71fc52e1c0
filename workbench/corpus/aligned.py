"""Pairs of texts whose positions correspond: both sides of a pair must have the same number of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from workbench.corpus.document import Document
from workbench.corpus.documents import SIDES
from workbench.corpus.tokenizer import encode, replace_surrogates
from workbench.io.errors import RequestError
from workbench.sites.settings import UnalignedPairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


def aligned_pairs(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, unaligned: UnalignedPairs
) -> Iterator[Document]:
    """Yields the documents, those of pairs after a comparison of their lengths in tokens; others as they are.

    Args:
        documents: Documents, the two sides of a pair one after the other, chats as texts.
        tokenizer: The model's.
        unaligned: What happens to a pair whose sides have different numbers of tokens: "refuse", "drop" (with a
            warning that counts them), or "keep".

    Raises:
        RequestError: A pair whose sides have different numbers of tokens.
    """
    stream, dropped, pairs, index, first = iter(documents), 0, 0, 0, ""
    for document in stream:
        if document.pair is None:
            yield document
            continue
        sides = (document, next(stream))
        pairs += 1
        lengths = [_length(side, tokenizer) for side in sides]
        if lengths[0] != lengths[1] and unaligned != "keep":
            counts = " and ".join(f"{name} {n}" for name, n in zip(SIDES, lengths, strict=True))
            if unaligned == "refuse":
                raise RequestError(
                    f"pair {document.pair} is not aligned: its sides have different numbers of tokens, {counts}; "
                    "change it, or pass unaligned_pairs='drop' or 'keep'"
                )
            dropped, first = dropped + 1, first or f"pair {document.pair}, {counts} tokens"
            continue
        for side in sides:
            yield replace(side, index=index)
            index += 1
    if dropped:
        _LOG.warning(f"{dropped:,} of {pairs:,} pairs are not aligned and were dropped; the first is {first}")


def _length(document: Document, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Number of tokens without added ones."""
    if document.text is None:
        return len(document.token_ids or ())
    if tokenizer is None:
        raise RequestError("the model has no tokenizer; pass tokenizer= or give lists of token ids")
    return encode(tokenizer, [replace_surrogates(document.text)[0]])[0].ids.size
