"""Long texts tokenized in pieces, so that memory does not grow with their length, with the tokens of the whole.

A tokenizer needs 150 to 300 bytes of memory for each character. Consecutive pieces overlap. Where their tokens agree
over a long stretch, neither depends on the text beyond its piece, and the tokens of the earlier one are continued by
those of the later one. Where they agree nowhere, as inside of a long run of one character, the text is cut at white
space and the cut is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from workbench.corpus.tokenizer import Encoding, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 17
"""Characters of a piece, without its overlaps."""
_OVERLAP = 1 << 12  # characters that two pieces share; they must agree on the tokens of the middle half
_STEPS_BACK = (0, 4, 16)  # overlaps before the end of a piece where the next one may begin


def encode_long(
    tokenizer: PreTrainedTokenizerBase, text: str, on_cut: Callable[[int], object], piece: int = PIECE
) -> Iterator[Encoding]:
    """Yields the tokens of a text, a piece at a time, without added tokens; offsets are those in the whole text.

    Args:
        tokenizer: The model's. Without character offsets (one not written in Rust) every border is a cut.
        text: The text, without lone surrogates.
        on_cut: Called with each place where the text was cut because no two pieces agreed: the tokens beside it may
            differ from those of the whole.
        piece: Characters of a piece.
    """
    overlap = min(_OVERLAP, piece // 4)
    if not getattr(tokenizer, "is_fast", False):
        yield from _cut_at_spaces(tokenizer, text, on_cut, piece)
        return
    first, end = 0, min(len(text), piece + overlap)
    current = _window(tokenizer, text, first, end)
    while end < len(text):
        for back in _STEPS_BACK:
            begin = end - (back + 1) * overlap
            after = min(len(text), begin + piece + 2 * overlap)
            if begin < first or after <= end:
                continue
            following = _window(tokenizer, text, begin, after)
            joint = _joint(current, following, begin + overlap // 4, begin + overlap - overlap // 4)
            if joint is not None:
                yield _part(current, None, joint[0])
                current, first, end = _part(following, joint[1], None), begin + overlap // 4, after
                break
        else:
            cut = _cut(current, text, end - overlap, end)
            on_cut(cut)
            yield _part(current, None, int(np.searchsorted(current.char_start, cut)))
            first, end = cut, min(len(text), cut + piece + overlap)
            current = _window(tokenizer, text, first, end)
    yield current


def _window(tokenizer: PreTrainedTokenizerBase, text: str, first: int, end: int) -> Encoding:
    """Tokens of a part of the text, with offsets in the whole."""
    (encoding,) = encode(tokenizer, [text[first:end]])
    shift = np.where(encoding.char_start < 0, 0, first).astype(np.int32)
    return Encoding(encoding.ids, encoding.char_start + shift, encoding.char_end + shift)


def _part(encoding: Encoding, first: int | None, last: int | None) -> Encoding:
    part = slice(first, last)
    return Encoding(encoding.ids[part], encoding.char_start[part], encoding.char_end[part])


def _joint(a: Encoding, b: Encoding, first: int, last: int) -> tuple[int, int] | None:
    """Index in each encoding of the first token from `first` on; None unless both agree from there to `last`."""
    places, zones = [], []
    for encoding in (a, b):
        begin, end = np.searchsorted(encoding.char_start, (first, last))
        zones.append(np.stack([part[begin:end] for part in (encoding.ids, encoding.char_start, encoding.char_end)]))
        places.append(int(begin))
        next_start = encoding.char_start[begin] if begin < end else first
        if begin and encoding.char_end[begin - 1] > next_start:  # a token lies across the border
            return None
    return (places[0], places[1]) if np.array_equal(*zones) and zones[0].size else None


def _cut(encoding: Encoding, text: str, first: int, last: int) -> int:
    """The last token border at white space between two places, else the last token border, else the second place."""
    starts = encoding.char_start
    borders = np.unique(starts[(starts > first) & (starts < last)]).tolist()
    at_space = [place for place in borders if text[place].isspace() != text[place - 1].isspace()]
    return (at_space or borders or [last])[-1]


def _cut_at_spaces(
    tokenizer: PreTrainedTokenizerBase, text: str, on_cut: Callable[[int], object], piece: int
) -> Iterator[Encoding]:
    first = 0
    while first < len(text):
        end = min(len(text), first + piece)
        if end < len(text):
            end = max((place for place in range(end - piece // 4, end) if text[place].isspace()), default=end)
            on_cut(end)
        yield _window(tokenizer, text, first, end)
        first = end
