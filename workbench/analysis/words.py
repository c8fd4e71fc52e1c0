"""Words of a store's texts: labelled spans, or tokens grouped by leading spaces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from workbench.store.reader import Store


@dataclass(frozen=True)
class Words:
    """Words of a store's texts, for each row: number of the word (-1: none), its first row, its length in tokens."""

    number: Int[np.ndarray, " row"]
    first: Int[np.ndarray, " row"]
    length: Int[np.ndarray, " row"]

    def is_word(self, first: int, length: int) -> bool:
        """Returns True if a word of this length begins at this row."""
        return bool(self.number[first] >= 0 and self.first[first] == first and self.length[first] == length)

    def groups(
        self, rows: Int[np.ndarray, " selected"], offsets: tuple[int, ...]
    ) -> Bool[np.ndarray, "group offset selected"]:
        """Returns masks of the last tokens of words of several tokens, by offset, and of tokens of no such word."""
        several = self.length[rows] > 1
        index = rows - self.first[rows]
        last = several & (index == self.length[rows] - 1)
        inside = np.stack([last & (index + offset >= 0) for offset in offsets])
        return np.stack([inside, np.repeat(~several[None], len(offsets), 0)])


def find_words(store: Store, name: str) -> tuple[Words, str]:
    """Returns the spans of label `name`, or words split by spaces, and a description of which."""
    tokens = store.tokens
    column = f"{name}_span"
    document, sequence = tokens["document"].to_numpy(), tokens["sequence"].to_numpy()
    if column in tokens.column_names:
        number = tokens[column].to_pandas().to_numpy(dtype=float, na_value=-1).astype(np.int64)
        source = f"labelled spans of {name!r}"
    else:
        number, source = _split_by_spaces(tokens), "words split by spaces"
    same = (number[1:] == number[:-1]) & (document[1:] == document[:-1]) & (sequence[1:] == sequence[:-1])
    starts = np.flatnonzero(np.append(True, ~same | (number[1:] < 0)))
    lengths = np.diff(starts, append=len(number))
    word_lengths = np.where(number[starts] < 0, 1, lengths)
    return Words(number, np.repeat(starts, lengths), np.repeat(word_lengths, lengths)), source


def _split_by_spaces(tokens: pa.Table) -> Int[np.ndarray, " row"]:
    """Numbers of words: one begins at a token with a leading space or after a token without letters; -1: no word."""
    texts = tokens["token"].to_pandas().astype(str)
    letters = texts.str.strip().str.fullmatch(r"[^\W\d_]+").to_numpy(dtype=bool)
    begins = texts.str.startswith((" ", "\n", "\t")).to_numpy(dtype=bool) | ~np.append(False, letters[:-1])
    return np.where(letters, np.cumsum(begins & letters), -1)
