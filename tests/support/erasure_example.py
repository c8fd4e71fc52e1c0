"""A planted model whose states at the last token of a word forget the word from layer 2 on."""

from __future__ import annotations

import numpy as np

VOCAB, DOCUMENTS, LENGTH = 8, 24, 20
WORD = (5, 6, 7)
"""Three tokens that always come together, at positions 4 to 6 and 12 to 14: the only word of several tokens."""


def one_hot(ids: np.ndarray) -> np.ndarray:
    return np.eye(VOCAB)[ids]


def forgetful_words(seed: int = 0) -> dict:
    """Ids, sites, spans: a state says its token and the two before; from layer 2 on not those in the word with it."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 5, (DOCUMENTS, LENGTH))
    ends, span = np.zeros((DOCUMENTS, LENGTH), bool), np.full((DOCUMENTS, LENGTH), -1)
    for number, start in enumerate((4, 12)):
        ids[:, start : start + 3] = WORD
        ends[:, start + 2] = True
        span[:, start : start + 3] = number
    before = [np.concatenate([np.zeros((DOCUMENTS, n, VOCAB)), one_hot(ids[:, :-n])], 1) for n in (1, 2)]
    parts = [one_hot(ids), *before]
    early = np.concatenate(parts, 2).reshape(-1, 3 * VOCAB)
    inside = np.isin(ids, WORD)[..., None]
    masks = [inside & np.roll(inside, n, axis=1) for n in (0, 1, 2)]  # the word is never at the text's end
    forgotten = [np.where(where, 0, part) for where, part in zip(masks, parts, strict=True)]
    late = np.concatenate(forgotten, 2).reshape(-1, 3 * VOCAB)
    noise = 1e-3 * draw.normal(size=(4, *early.shape))
    span = [None if number < 0 else int(number) for number in span.ravel()]
    sites = {f"resid_post.{layer}": (early if layer < 2 else late) + noise[layer] for layer in range(4)}
    return {"ids": ids.tolist(), "sites": sites, "span": span}
