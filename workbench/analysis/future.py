"""Predictions of the model some tokens ahead: the rows to read, the model's tokens there, and a bigram baseline.

T is the token whose state is read, N = 0 the ordinary next token, T+1. The target at N is the model's top-1 prediction
at T+N. Shared by the probes that read the future of a state (Pal et al., arXiv 2311.04897).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from workbench.analysis.lens import log_probabilities
from workbench.analysis.rows import blocks, selected_rows, split_by_document
from workbench.io.errors import RequestError
from workbench.model.unembed import Unembed
from workbench.store.lost_values import FiniteRows
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
    store: Store,
    horizons: int,
    where: str | None,
    *,
    held_out: float,
    validation: float,
    seed: int,
    check: Callable[[Int[np.ndarray, " read_row"]], FiniteRows],
) -> tuple[FutureRows, FiniteRows]:
    """Returns rows to fit on, to validate on and to test on, split by document, and how far each reaches.

    Special tokens and the first of a sequence are never read; a row that is not finite ends the reach of those before.

    Args:
        store: The recorded activations.
        horizons: Number of horizons, from N = 0.
        where: SQL over the token table. None: all tokens.
        held_out: Share of the documents to test on.
        validation: Share of the documents to validate on.
        seed: Random seed of the split.
        check: Gate for the rows that are read.

    Raises:
        RequestError: `where` selects nothing, there are fewer than three documents, or no document of a part is long
            enough for the last horizon.
    """
    store.require_whole_sequences("prediction of tokens further on")
    tokens = store.tokens
    sequence, document = (tokens[name].to_numpy() for name in ("sequence", "document"))
    chosen_rows = selected_rows(store, where)
    plain = (tokens["position"].to_numpy() > 0) & ~tokens["is_special"].to_numpy()
    chosen_rows = chosen_rows[plain[chosen_rows]]
    continued = np.append(False, (sequence[1:] == sequence[:-1]) & (document[1:] == document[:-1]))
    reach = _reach(continued, horizons)
    checked = check(np.unique(np.concatenate([chosen_rows[reach[chosen_rows] > n] + n for n in range(horizons)])))
    if len(checked.left_out):
        chosen_rows = chosen_rows[~np.isin(chosen_rows, checked.left_out)]
        continued[checked.left_out] = False
        reach = _reach(continued, horizons)
    parts = split_by_document(
        document[chosen_rows],
        held_out,
        validation,
        purpose="a future lens",
        uses="to fit on, to validate on and to test on",
        seed=seed,
    )
    training_rows, validation_rows, test_rows = (chosen_rows[part] for part in parts)
    rows = FutureRows(training_rows, validation_rows, test_rows, reach, document)
    for part in ("training", "validation", "test"):
        if not len(rows.at(part, horizons - 1)):
            longest = int(reach[getattr(rows, part)].max())
            raise RequestError(
                f"horizons is {horizons} and no {part} token has {horizons - 1} more after it in its "
                f"document and sequence; give at most {longest}"
            )
    return rows, checked


def _reach(continued: Bool[np.ndarray, " row"], horizons: int) -> Int[np.ndarray, " row"]:
    """Number of horizons of each row: 1 and the rows after it that continue the one before, without a gap."""
    reach, still = np.ones(len(continued), dtype=np.int64), np.ones(len(continued), bool)
    for ahead in range(1, horizons):
        still &= np.append(continued[ahead:], np.zeros(min(ahead, len(continued)), bool))
        reach += still
    return reach


def model_tokens(final: ActivationArray, unembed: Unembed, rows: FutureRows) -> Int[np.ndarray, " row"]:
    """Returns the model's top-1 prediction at every row that is some T+N; -1 elsewhere."""
    top = np.full(len(rows.reach), -1, dtype=np.int64)
    chosen_rows = np.concatenate([rows.training, rows.validation, rows.test])
    target_rows = np.unique(
        np.concatenate([chosen_rows[rows.reach[chosen_rows] > n] + n for n in range(int(rows.reach.max()))])
    )
    for block in blocks(len(target_rows), unembed.vocab):
        top[target_rows[block]] = log_probabilities(unembed, final[target_rows[block]]).argmax(1).cpu().numpy()
    return top


@dataclass(frozen=True)
class Bigram:
    """Predictions from one token, counted on the training rows."""

    prediction: Int[np.ndarray, " row"]
    """The most frequent target after the token of each row; after a token that no training row has, that of all."""
    seen: Bool[np.ndarray, " row"]
    """True where some training row has the token."""
    most_frequent: int
    """The most frequent target of all."""


def bigrams(
    token: Int[np.ndarray, " training_row"], target: Int[np.ndarray, " training_row"], query: Int[np.ndarray, " row"]
) -> Bigram:
    """Returns the bigram prediction after each token.

    Of equal counts, the prediction that is more frequent overall wins, then the smaller id.

    Args:
        token: Tokens of the training rows.
        target: The model's predictions at the training rows.
        query: Tokens to predict after.
    """
    overall = np.bincount(target)
    pairs, counts = np.unique(np.stack([token, target]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -overall[pairs[1]], -counts, pairs[0]))
    known_tokens, first = np.unique(pairs[0][order], return_index=True)
    most = pairs[1][order][first]
    place = np.minimum(np.searchsorted(known_tokens, query), len(known_tokens) - 1)
    mode, in_training = int(overall.argmax()), known_tokens[place] == query
    return Bigram(np.where(in_training, most[place], mode), in_training, mode)
