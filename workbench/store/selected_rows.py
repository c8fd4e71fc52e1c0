"""Selections of rows of a store, and indices of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.io.checks import check, whole_number
from workbench.io.errors import RequestError, shown
from workbench.store.query import rows_of_tokens
from workbench.store.unchanged import same_rows, unchanged

if TYPE_CHECKING:
    from workbench.store.reader import Store

_ROWS_SHOWN, _COLUMNS_SHOWN = 10, 16  # of a selection, in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class Rows:
    """A selection of a store's rows. `&`, `|` and `-` combine two, `~rows` are all others; `rows[:10]` are the first
    ten, `rows[[0, 5]]` two of them, `rows.sample(100)` a hundred at random."""

    store: Store
    ids: Int64[np.ndarray, " row"]
    """Row ids, ascending, each once. May be given in any order."""

    __iter__ = None

    def __post_init__(self) -> None:
        ids = np.unique(self.ids).astype(np.int64, casting="same_kind")
        if len(ids) and not 0 <= ids[0] <= ids[-1] < self.store.rows:
            raise RequestError(f"rows {ids[0]} to {ids[-1]} are not within the {self.store.rows} of {self.store.path}")
        ids.flags.writeable = False
        object.__setattr__(self, "ids", ids)

    def __repr__(self) -> str:
        return f"{len(self):,} of {self.store.rows:,} rows of {self.store.path}"

    def _repr_html_(self) -> str:
        from workbench.figures.markup import card, frame

        tokens = self[:_ROWS_SHOWN].tokens
        more = f"<p>{len(self) - _ROWS_SHOWN:,} more</p>" if len(self) > _ROWS_SHOWN else ""
        below = frame(tokens.select(tokens.column_names[:_COLUMNS_SHOWN]).to_pandas(), _ROWS_SHOWN) + more
        lines = {"selected": f"{len(self):,} of {self.store.rows:,}", "store": self.store.path}
        return card("Rows", lines, below if len(self) else "")

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, site: slice | Sequence[int] | np.ndarray) -> Rows: ...

    @overload
    def __getitem__(self, site: str | tuple[str, int | slice | Sequence[int]]) -> Float[Tensor, "row ..."]: ...

    def __getitem__(
        self, site: str | tuple[str, int | slice | Sequence[int]] | slice | Sequence[int] | np.ndarray
    ) -> Rows | Float[Tensor, "row ..."]:
        """Returns a site's activations (n_selected, ...) for `rows["resid_post", 3]`; fewer rows for an index.

        `rows["resid_post", 0:8]` has the axes (n_selected, layer, ...).

        An index is a slice, a list or array of places among the selected rows, or a mask over them. The result is in
        row order, each row once, whatever the order of the places.
        """
        if isinstance(site, str):
            return self.store[site][self]
        if isinstance(site, tuple) and site and isinstance(site[0], str):
            return self.store[site][self]  # pyright: ignore[reportCallIssue, reportArgumentType]  # (site, layers)
        places = site if isinstance(site, slice) else _places(site, len(self))  # pyright: ignore[reportArgumentType]
        return Rows(self.store, self.ids[places])

    def __invert__(self) -> Rows:
        return Rows(self.store, np.setdiff1d(np.arange(self.store.rows), self.ids, assume_unique=True))

    def sample(self, n: int, seed: int = 0) -> Rows:
        """Returns `n` of the rows, drawn without replacement; all of them if there are not more.

        The same seed draws the same rows of the same selection.
        """
        n = whole_number("n", n, at_least=0)
        check("seed", seed, at_least=0, whole=True)
        drawn = np.random.default_rng(seed).permutation(len(self))[:n]
        return Rows(self.store, self.ids[drawn])

    def to_pandas(self) -> pd.DataFrame:
        """Returns the token table of these rows as a frame, with their ids as index."""
        return self.tokens.to_pandas().set_index("row", drop=False).rename_axis(None)

    def text(self, context: int = 0) -> list[str]:
        """Returns the text of each row's token, with `context` tokens of its sequence before and after it.

        The token stands between ⟦ and ⟧ where there is a context: "Once upon⟦ a⟧ time". Texts of tokens are joined as
        they are. A store of chosen rows has no context.
        """
        context = whole_number("context", context, at_least=0)
        if not context:
            return [text or "" for text in self.tokens["token"].to_pylist()]
        self.store.require_whole_sequences("text with a context")
        shifts = np.arange(-context, context + 1)
        around = np.clip(self.ids[:, None] + shifts, 0, max(self.store.rows - 1, 0))
        needed, where = np.unique(around, return_inverse=True)
        tokens = Rows(self.store, needed).tokens
        texts, sequences = tokens["token"].to_pylist(), tokens["sequence"].to_numpy()
        lines = []
        columns: Any = where.reshape(around.shape).tolist()
        for row, places in zip(self.ids.tolist(), columns, strict=True):
            sequence = sequences[places[context]]
            inside = [
                (shift, texts[place] or "")
                for shift, place in zip(shifts.tolist(), places, strict=True)
                if needed[place] == row + shift and sequences[place] == sequence
            ]
            lines.append("".join(f"⟦{text}⟧" if shift == 0 else text for shift, text in inside))
        return lines

    def __and__(self, other: Rows) -> Rows:
        return Rows(self.store, np.intersect1d(self.ids, self._ids_of(other), assume_unique=True))

    def __or__(self, other: Rows) -> Rows:
        return Rows(self.store, np.union1d(self.ids, self._ids_of(other)))

    def __sub__(self, other: Rows) -> Rows:
        return Rows(self.store, np.setdiff1d(self.ids, self._ids_of(other), assume_unique=True))

    def _ids_of(self, other: object) -> Int64[np.ndarray, " row"]:
        if not isinstance(other, Rows):
            raise RequestError(f"rows combine with rows, such as store.where('position > 0'), not {shown(other)}")
        return other.ids_in(self.store)

    @property
    def tokens(self) -> pa.Table:
        """Token table of these rows, in row order. Reads the tables of their segments."""
        with unchanged(self.store.path, self.store.manifest):
            return rows_of_tokens(self.store.path, self.store.manifest, self.ids)

    def ids_in(self, store: Store) -> Int64[np.ndarray, " row"]:
        """Returns the ids, if they are of this store: rows of another store are other tokens."""
        if self.store.path != store.path:
            raise RequestError(f"these rows are of {self.store.path}, not of {store.path}; select them there")
        if not same_rows(self.store.manifest, store.manifest):
            raise RequestError(f"these rows were selected before {store.path} was recorded anew; select them again")
        return self.ids


def _places(index: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Places among `count` selected rows, from 0, of integers or a mask."""
    places = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    if places.dtype == bool and places.shape == (count,):
        return np.flatnonzero(places)
    if not places.size:
        return np.empty(0, np.int64)
    if places.dtype.kind not in "iu" or places.ndim != 1:
        raise IndexError(
            f"{count} rows are indexed by a site, a slice, whole numbers such as [0], or a mask of {count}, not by "
            f"{places.dtype} values of shape {places.shape}"
        )
    if not -count <= places.min() <= places.max() < count:
        raise IndexError(f"places {places.min()} to {places.max()} are not within the {count} selected rows")
    return places


def row_ids(index: Any, store: Store, label: str) -> Int64[np.ndarray, "*shape"]:
    """Returns an index of rows as their ids: a slice, integers of any shape, a mask, or `Rows`.

    Args:
        index: The index.
        store: The store.
        label: Name of the array that is indexed.

    Raises:
        IndexError: Anything else, or a row beyond the end.
        RequestError: Rows of another store.
    """
    rows = store.rows
    if isinstance(index, Rows):
        return index.ids_in(store)
    if isinstance(index, slice):
        return np.arange(*index.indices(rows))
    if isinstance(index, tuple):
        raise IndexError(f"{label} is indexed by rows alone: write array[rows][:, ...] for the other axes")
    ids = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    if ids.dtype == bool:
        if ids.shape != (rows,):
            raise IndexError(f"a mask of shape {ids.shape} does not select among the {rows} rows of {label}")
        return np.flatnonzero(ids)
    if not ids.size:
        return ids.astype(np.int64)
    if ids.dtype.kind not in "iu":
        raise IndexError(f"rows of {label} are selected by integers, slices, masks or Rows, not {ids.dtype} values")
    low, high = ids.min(), ids.max()
    if not -rows <= low <= high < rows:
        raise IndexError(f"row {low if low < -rows else high} is out of range: {label} has {rows} rows")
    ids = ids.astype(np.int64, copy=False)
    return ids if low >= 0 else np.where(ids < 0, ids + rows, ids)
