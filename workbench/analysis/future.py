"""Predictions of the model some tokens ahead: the rows to read, the model's tokens there, and a bigram baseline.

T is the token whose state is read, N = 0 the ordinary next token, T+1. The target at N is the model's top-1 prediction
at T+N. Shared by the probes that read the future of a state (Pal et al., arXiv 2311.04897).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from workbench.analysis.lens import log_probabilities
from workbench.analysis.rows import blocks, selected_rows, split_by_document
from workbench.io.errors import RequestError
from workbench.model.unembed import Unembed
from workbench.store.reader import ActivationArray, Store

NO_TARGET = -100
"""Target beyond the document or sequence: the index that torch's cross-entropy ignores."""


@dataclass(frozen=True)
class FutureRows:
    """Rows to train on, to validate on and to test on."""

    training: Int[np.ndarray, " training_row"]
    validation: Int[np.ndarray, " validation_row"]
    test: Int[np.ndarray, " test_row"]
    reach: Int[np.ndarray, " row"]
    """Number of horizons that each row of the store reaches in its document and sequence."""
    document: Int[np.ndarray, " row"]
    """Document of each row of the store."""

    def at(self, part: str, horizon: int) -> Int[np.ndarray, " row"]:
        """Returns rows of a part (training, validation, test) whose T+N is in their document and sequence."""
        rows = getattr(self, part)
        return rows[self.reach[rows] > horizon]

    def targets(self, rows: np.ndarray, tokens: np.ndarray, horizons: int) -> Int[np.ndarray, "row horizon"]:
        """Returns the model's prediction at T+N; `NO_TARGET` where T does not reach."""
        ahead = np.arange(horizons)
        inside = ahead < self.reach[rows][:, None]
        return np.where(inside, tokens[np.where(inside, rows[:, None] + ahead, 0)], NO_TARGET)


def future_rows(
    store: Store, horizons: int, where: str | None, *, held_out: float, validation: float, seed: int
) -> FutureRows:
    """Returns rows to fit on, to validate on and to test on, split by document, and how far each reaches.

    Special tokens and the first of a sequence are never read.

    Args:
        store: The recorded activations.
        horizons: Number of horizons, from N = 0.
        where: SQL over the token table. None: all tokens.
        held_out: Share of the documents to test on.
        validation: Share of the documents to validate on.
        seed: Random seed of the split.

    Raises:
        RequestError: `where` selects nothing, there are fewer than three documents, or no document of a part is long
            enough for the last horizon.
    """
    tokens = store.tokens
    sequence, document = (tokens[name].to_numpy() for name in ("sequence", "document"))
    reach = np.ones(store.rows, dtype=np.int64)
    for ahead in range(1, horizons):
        reach[:-ahead] += (sequence[ahead:] == sequence[:-ahead]) & (document[ahead:] == document[:-ahead])
    chosen = selected_rows(store, where)
    plain = (tokens["position"].to_numpy() > 0) & ~tokens["is_special"].to_numpy()
    chosen = chosen[plain[chosen]]
    parts = split_by_document(
        document[chosen],
        held_out,
        validation,
        purpose="a future lens",
        uses="to fit on, to validate on and to test on",
        seed=seed,
    )
    training_rows, validation_rows, test_rows = (chosen[part] for part in parts)
    rows = FutureRows(training_rows, validation_rows, test_rows, reach, document)
    for part in ("training", "validation", "test"):
        if not len(rows.at(part, horizons - 1)):
            longest = int(reach[getattr(rows, part)].max())
            raise RequestError(
                f"horizons is {horizons} and no {part} token has {horizons - 1} more after it in its "
                f"document and sequence; give at most {longest}"
            )
    return rows


def model_tokens(final: ActivationArray, unembed: Unembed, rows: FutureRows) -> Int[np.ndarray, " row"]:
    """Returns the model's top-1 prediction at every row that is some T+N; -1 elsewhere."""
    top = np.full(len(rows.reach), -1, dtype=np.int64)
    chosen = np.concatenate([rows.training, rows.validation, rows.test])
    needed = np.unique(np.concatenate([chosen[rows.reach[chosen] > n] + n for n in range(int(rows.reach.max()))]))
    for block in blocks(len(needed), unembed.vocab):
        top[needed[block]] = log_probabilities(unembed, final[needed[block]]).argmax(1).cpu().numpy()
    return top


def bigrams(
    token: Int[np.ndarray, " training_row"], target: Int[np.ndarray, " training_row"], query: Int[np.ndarray, " row"]
) -> tuple[Int[np.ndarray, " row"], int]:
    """Returns the bigram prediction after each token, and the most frequent prediction of all.

    The latter stands in for a token that no training row has. Of equal counts, the prediction that is more frequent
    overall wins, then the smaller id.

    Args:
        token: Tokens of the training rows.
        target: The model's predictions at the training rows.
        query: Tokens to predict after.
    """
    overall = np.bincount(target)
    pairs, counts = np.unique(np.stack([token, target]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -overall[pairs[1]], -counts, pairs[0]))
    seen, first = np.unique(pairs[0][order], return_index=True)
    most = pairs[1][order][first]
    place = np.minimum(np.searchsorted(seen, query), len(seen) - 1)
    mode = int(overall.argmax())
    return np.where(seen[place] == query, most[place], mode), mode
