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
    cut: Bool[np.ndarray, " row"]
    """True in a word of which the border of a sequence leaves only a part here."""

    def is_word(self, first: int, length: int) -> bool:
        """Returns True if a whole word of this length begins at this row."""
        begins = self.number[first] >= 0 and self.first[first] == first and self.length[first] == length
        return bool(begins and not self.cut[first])

    def groups(self, rows: Int[np.ndarray, " row"], offsets: tuple[int, ...]) -> Bool[np.ndarray, "group offset row"]:
        """Returns masks of the last tokens of words of several tokens, by offset, and of tokens of no such word.

        Tokens of words that are cut are in neither.
        """
        in_long_word, cut = self.length[rows] > 1, self.cut[rows]
        index = rows - self.first[rows]
        last = in_long_word & (index == self.length[rows] - 1) & ~cut
        inside = np.stack([last & (index + offset >= 0) for offset in offsets])
        return np.stack([inside, np.repeat((~in_long_word & ~cut)[None], len(offsets), 0)])


def find_words(store: Store, name: str) -> tuple[Words, str]:
    """Returns the spans of label `name`, or words split by spaces, and a description of which."""
    store.require_whole_sequences("a search for words of several tokens")
    return words_of(store.tokens, name)


def words_of(tokens: pa.Table, name: str) -> tuple[Words, str]:
    """Returns what `find_words` does, of a token table."""
    column = f"{name}_span"
    document, sequence = tokens["document"].to_numpy(), tokens["sequence"].to_numpy()
    text = np.flatnonzero(~tokens["is_special"].to_numpy())
    before, after = text[:-1], text[1:]
    border = (document[before] == document[after]) & (sequence[before] != sequence[after])
    before, after = before[border], after[border]
    if column in tokens.column_names:
        number = tokens[column].to_pandas().to_numpy(dtype=float, na_value=-1).astype(np.int64)
        joined, source = number[before] == number[after], f"labelled spans of {name!r}"
    else:
        letters, spaced = _letters(tokens)
        begins = spaced | ~np.append(False, letters[:-1])
        number = np.where(letters, np.cumsum(begins & letters), -1)
        joined, source = letters[before] & letters[after] & ~spaced[after], "words split by spaces"
    same_word = (number[1:] == number[:-1]) & (document[1:] == document[:-1]) & (sequence[1:] == sequence[:-1])
    starts = np.flatnonzero(np.append(True, ~same_word | (number[1:] < 0)))
    lengths = np.diff(starts, append=len(number))
    word_lengths = np.where(number[starts] < 0, 1, lengths)
    first = np.repeat(starts, lengths)
    cut = np.isin(first, first[np.concatenate([before[joined], after[joined]])]) & (number >= 0)
    if f"{name}_cut" in tokens.column_names:  # it knows of the rest of a document that was not recorded, too
        cut |= tokens[f"{name}_cut"].to_pandas().to_numpy(dtype=bool, na_value=False)
    return Words(number, first, np.repeat(word_lengths, lengths), cut), source


def _letters(tokens: pa.Table) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """Tokens of letters alone, and tokens that begin with a space; a word begins at the latter or after none."""
    texts = tokens["token"].to_pandas().astype(str)
    letters = texts.str.strip().str.fullmatch(r"[^\W\d_]+").to_numpy(dtype=bool)
    return letters, texts.str.startswith((" ", "\n", "\t")).to_numpy(dtype=bool)
