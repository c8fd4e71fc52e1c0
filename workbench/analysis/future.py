"""What the model says some tokens further on: which rows can be asked, what is said there, and what one token tells.

T is the token whose state is asked, N = 0 the ordinary next token, T+1; the target at N is what the model itself says
at T+N, its top token there. Shared by the probes that read the future of a state (Pal et al., arXiv 2311.04897).
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
"""Beyond the document or sequence: the index that torch's cross-entropy leaves out."""


@dataclass(frozen=True)
class FutureRows:
    """Rows by what they are for; for every row of the store, how many horizons it reaches, and its document."""

    training: Int[np.ndarray, " training_row"]
    validation: Int[np.ndarray, " validation_row"]
    tested: Int[np.ndarray, " tested_row"]
    reach: Int[np.ndarray, " row"]
    document: Int[np.ndarray, " row"]

    def at(self, part: str, horizon: int) -> Int[np.ndarray, " row"]:
        """Those whose T+N lies in their own document and sequence."""
        rows = getattr(self, part)
        return rows[self.reach[rows] > horizon]

    def targets(self, rows: np.ndarray, said: np.ndarray, horizons: int) -> Int[np.ndarray, "row horizon"]:
        """What the model says at T+N; where T does not reach, `NO_TARGET`."""
        ahead = np.arange(horizons)
        inside = ahead < self.reach[rows][:, None]
        return np.where(inside, said[np.where(inside, rows[:, None] + ahead, 0)], NO_TARGET)


def future_rows(
    store: Store, horizons: int, where: str | None, *, held_out: float, validation: float, seed: int
) -> FutureRows:
    """Rows to fit on, to choose by and to test, by document, and how far each reaches.

    Special tokens and the first of a sequence are never read. Raises RequestError where `where` selects nothing, there
    are fewer than three documents, or no document of a part is long enough for the last horizon.
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
        uses="to fit on, to choose by and to test",
        seed=seed,
    )
    rows = FutureRows(*(chosen[part] for part in parts), reach, document)
    for part in ("training", "validation", "tested"):
        if not len(rows.at(part, horizons - 1)):
            longest = int(reach[getattr(rows, part)].max())
            raise RequestError(
                f"horizons is {horizons} and no {part} token has {horizons - 1} more after it in its "
                f"document and sequence; give at most {longest}"
            )
    return rows


def said_tokens(final: ActivationArray, unembed: Unembed, rows: FutureRows) -> Int[np.ndarray, " row"]:
    """The model's top token at every row that is some T+N; -1 elsewhere."""
    said = np.full(len(rows.reach), -1, dtype=np.int64)
    chosen = np.concatenate([rows.training, rows.validation, rows.tested])
    needed = np.unique(np.concatenate([chosen[rows.reach[chosen] > n] + n for n in range(int(rows.reach.max()))]))
    for block in blocks(len(needed), unembed.vocab):
        said[needed[block]] = log_probabilities(unembed, final[needed[block]]).argmax(1).cpu().numpy()
    return said


def bigrams(
    token: Int[np.ndarray, " training_row"], said: Int[np.ndarray, " training_row"], asked: Int[np.ndarray, " row"]
) -> tuple[Int[np.ndarray, " row"], int]:
    """What was most often said with each `asked` token, and what was said most often of all.

    The latter stands in for a token that was never seen. Of equal counts the more frequent of all, then the smaller id.
    """
    overall = np.bincount(said)
    pairs, counts = np.unique(np.stack([token, said]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -overall[pairs[1]], -counts, pairs[0]))
    seen, first = np.unique(pairs[0][order], return_index=True)
    most = pairs[1][order][first]
    place = np.minimum(np.searchsorted(seen, asked), len(seen) - 1)
    mode = int(overall.argmax())
    return np.where(seen[place] == asked, most[place], mode), mode
