"""The quantity that is decomposed at each row: a logit, a difference of two, or the final stream along a direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from workbench.analysis.frozen_norm import ids_of_values, single_tokens, token_id, vocabulary_texts
from workbench.analysis.rows import blocks, next_tokens
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.model.direction import Direction
from workbench.model.unembed import Unembed
from workbench.store.reader import Store

Named = tuple[str | None, str | None]
"""Text of a token, and the column of the token table that has each row's text."""


@dataclass(frozen=True)
class LogitTargets:
    """Token whose logit is decomposed at each row, and the one that is subtracted; or one direction for all rows."""

    token: Int[np.ndarray, " row"]
    """-1: the row has no single token."""
    against: Int[np.ndarray, " row"] | None = None
    relative: bool = False
    """Subtract the mean over the vocabulary."""
    direction: Direction | None = None
    """Direction of the normed last stream, in place of tokens."""
    seed: int | None = None
    """Seed of the random directions that stand for `direction` in the control; None: the direction itself."""
    note: str = ""

    @classmethod
    def of_tokens(
        cls,
        store: Store,
        unembed: Unembed,
        rows: Int[np.ndarray, " row"],
        named: Mapping[str, Named],
        predicted: str,
        relative: bool,
    ) -> LogitTargets:
        """Returns the tokens of some rows.

        Args:
            store: The recorded activations.
            unembed: Unembedding, with the texts of the vocabulary.
            rows: Rows.
            named: "token" and "against" with their texts or columns.
            predicted: Token where none is named: top, the model's top token, or next, that of the text.
            relative: Subtract the mean over the vocabulary.

        Raises:
            RequestError: No row has a single token, or a token or column does not exist.
        """
        token = _named_ids(named["token"], "token", store, unembed, rows)
        if token is None and predicted == "next":
            token = next_tokens(store)[rows]
        if token is None:
            last = store[f"resid_post.{store.manifest.model.n_layers - 1}"]
            token = np.concatenate(
                [unembed(last[rows[part]].float()).argmax(-1).numpy() for part in blocks(len(rows), unembed.vocab)]
            )
        targets = cls(token, _named_ids(named["against"], "against", store, unembed, rows), relative)
        missing = int((~targets.known).sum())
        if missing == len(rows):
            raise RequestError("no selected row has a single token to decompose; name token, or other rows by where")
        note = f"{missing:,} of {counted(len(rows), 'row')} left out: no single token is named there" if missing else ""
        return replace(targets, note=note)

    @classmethod
    def of_direction(cls, unembed: Unembed, direction: Direction, rows: Int[np.ndarray, " row"]) -> LogitTargets:
        """Returns one direction for all rows.

        Raises:
            RequestError: Its width is not that of the stream.
        """
        if tuple(direction.vector.shape) != (unembed.weight.shape[1],):
            raise RequestError(
                f"direction {direction.name!r} has the shape {tuple(direction.vector.shape)}, and the last residual "
                f"stream {tuple(unembed.weight.shape[1:])}"
            )
        return cls(np.zeros(len(rows), np.int64), direction=direction)

    @property
    def known(self) -> Bool[np.ndarray, " row"]:
        """Mask of the rows that have their tokens."""
        return (self.token >= 0) & (True if self.against is None else self.against >= 0)

    def chosen(self, index: np.ndarray | slice) -> LogitTargets:
        """Returns the targets of some rows, by index or mask."""
        against = None if self.against is None else self.against[index]
        return replace(self, token=self.token[index], against=against, note="")

    def texts(self, unembed: Unembed) -> list[str]:
        """Returns the text of each row's token, or the name of the direction."""
        if self.direction is not None:
            return [self.direction.name] * len(self.token)
        return [unembed.token(int(token)) for token in self.token]

    def random(self, vocab: int, seed: int) -> LogitTargets:
        """Returns targets of the same kind, drawn uniformly; for a direction random ones of its norm, for each row."""
        if self.direction is not None:
            return replace(self, seed=seed)
        draw = np.random.default_rng(seed)
        against = None if self.against is None else draw.integers(vocab, size=len(self.token))
        return LogitTargets(draw.integers(vocab, size=len(self.token)), against, self.relative)

    def read(self, unembed: Unembed, part: slice) -> tuple[Float64[Tensor, "row d_model"], Float64[Tensor, " row"]]:
        """Returns the combination of rows of W_U for some rows, and the contribution of the unembedding's bias."""
        if self.direction is not None:
            w = self._directions(len(self.token[part]), part.start or 0) / unembed.scale
            return w, torch.zeros(len(w), dtype=torch.float64)

        def rows(table: Tensor) -> Tensor:
            values = table[self.token[part]].double()
            if self.relative and self.against is None:
                values = values - table.mean(0, dtype=torch.float64)
            return values if self.against is None else values - table[self.against[part]].double()

        w = rows(unembed.weight)
        bias = torch.zeros(len(w), dtype=torch.float64) if unembed.bias is None else rows(unembed.bias)
        return w, unembed.scale * bias

    def _directions(self, count: int, first: int) -> Float64[Tensor, "row d_model"]:
        assert self.direction is not None
        vector = self.direction.vector.double()
        if self.seed is None:
            return vector.expand(count, -1)
        draws = torch.from_numpy(np.random.default_rng((self.seed, first)).standard_normal((count, len(vector))))
        return draws / draws.norm(dim=1, keepdim=True) * vector.norm()


def _named_ids(
    named: Named, name: str, store: Store, unembed: Unembed, rows: Int[np.ndarray, " row"]
) -> Int[np.ndarray, " row"] | None:
    """Ids of the tokens that a setting or a column names for each row; -1 where it names no single token."""
    text, column = named
    if text is not None:
        return np.full(len(rows), token_id(unembed, text, name))
    if column is None:
        return None
    if column not in store.tokens.column_names:
        raise RequestError(f"{name}_column {column!r} is no column of {store.path.name}; see `workbench info`")
    ids = single_tokens(vocabulary_texts(unembed))
    return ids_of_values(store.tokens[column].take(rows).to_pylist(), ids)
