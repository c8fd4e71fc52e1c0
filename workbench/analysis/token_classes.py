"""Classes of tokens by their text: English closed classes from lists, punctuation, numbers, pieces of words."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from workbench.io.errors import RequestError
from workbench.store.reader import Store

_WORDS = {
    "determiner": "a an the this these those my your his her its our their some any each every no another both either "
    "neither such",
    "pronoun": "i you he she it we they me him them us who whom whose what which myself yourself himself herself "
    "itself ourselves themselves someone anyone everyone nobody something anything everything "
    "nothing mine yours hers ours",
    "preposition": "of in to for with on at by from about into over after under between against during without before "
    "around among through across behind beyond near toward towards upon within along inside outside onto off",
    "conjunction": "and or but nor so yet because although though while if unless until since when where whether than "
    "that as",
    "auxiliary": "be am is are was were been being do does did have has had having will would shall should can could "
    "may might must cannot",
}
_CLASS = {word: name for name, words in _WORDS.items() for word in words.split()}
TOKEN_CLASSES = (*_WORDS, "other word", "piece of a word", "number", "punctuation", "newline", "space", "special")
"""Classes of `token_classes`: closed classes of English, other words (nouns, verbs, adjectives, adverbs; names), first
pieces included; later pieces of words; numbers; punctuation and symbols; white space with a newline, and other; special
tokens."""


def token_classes(
    store: Store, rows: Int[np.ndarray, " row"], column: str | None = None
) -> tuple[tuple[str, ...], Int[np.ndarray, " row"]]:
    """Returns names of classes and the index of each row's class.

    Args:
        store: The store.
        rows: Ids of the rows.
        column: Column of the token table with the class of each token, such as tags of a tagger; -1 stands for its
            missing values. None: `TOKEN_CLASSES`, decided by the text of a token and of its neighbours.

    Raises:
        RequestError: There is no such column.
    """
    if column is None:
        return TOKEN_CLASSES, _by_text(store)[rows]
    if column not in store.tokens.column_names:
        raise RequestError(f"label={column!r} is no column; columns are {', '.join(store.tokens.column_names)}")
    values = store.tokens[column].take(rows).to_pandas()
    class_names = sorted(values.dropna().astype(str).unique())
    index = np.searchsorted(class_names, values.astype(str).to_numpy(str)).clip(max=max(0, len(class_names) - 1))
    return tuple(class_names), np.where(values.isna(), -1, index)


def _by_text(store: Store) -> Int[np.ndarray, " row"]:
    """Index of the class of every row."""
    tokens, sequence = store.tokens["token"].to_pylist(), store.tokens["sequence"].to_numpy()
    special = store.tokens["is_special"].to_numpy()
    continues = np.zeros(len(tokens) + 1, bool)
    for row in range(1, len(tokens)):
        before, text = tokens[row - 1], tokens[row]
        joined = bool(text) and text[0].isalpha() and bool(before) and before[-1].isalpha()
        continues[row] = joined and sequence[row] == sequence[row - 1] and not special[row - 1]
    places = {name: number for number, name in enumerate(TOKEN_CLASSES)}
    class_names = (
        "special" if special[row] else _class_of(text, bool(continues[row]), bool(continues[row + 1]))
        for row, text in enumerate(tokens)
    )
    return np.array([places[name] for name in class_names], dtype=np.int64)


def _class_of(text: str, continues: bool, goes_on: bool) -> str:
    word = text.strip()
    if not word:
        return "newline" if "\n" in text else "space"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    if not any(letter.isalpha() for letter in word):
        return "number"
    if continues:
        return "piece of a word"
    return "other word" if goes_on else _CLASS.get(word.lower(), "other word")
