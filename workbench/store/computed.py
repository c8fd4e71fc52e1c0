"""Arrays over the rows of a store whose values are computed from recorded sites where they are indexed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.store.row_array import RowArray
from workbench.store.selected_rows import row_ids


@dataclass(frozen=True, eq=False, repr=False)
class ComputedArray(RowArray):
    """One activation over all rows that is computed where it is indexed, from recorded sites.

    Nothing is stored; memory and time are those of the rows that are read.
    """

    compute: Callable[[Int64[np.ndarray, " row"]], Float[Tensor, "row ..."]]
    """Returns the values of rows, in their order, in the type that `site` names."""

    def __repr__(self) -> str:
        return f"{super().__repr__()}, computed when read"

    def __getitem__(self, index: Any) -> Float[Tensor, "*shape"]:
        """Returns values of a row, a slice, integers of any shape, a mask, or `Rows`. IndexError beyond the end."""
        ids = row_ids(index, self.store, self.site.label)
        return self.compute(ids.reshape(-1)).reshape(*ids.shape, *self.site.shape)
