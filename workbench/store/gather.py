"""Rows out of several memory maps, in any order, in one pass.

Grouping the rows by map, copying each group and putting them back in order touches every row twice and costs half the
speed of one map. NumPy can do it in one pass: seen as one array of the process's memory, with rows that begin at every
byte, the maps are a single gather. This is the only place that computes addresses, and it checks every one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped


def gather(
    maps: Sequence[Shaped[np.ndarray, "row ..."]],
    which: Int64[np.ndarray, " selected"],
    local: Int64[np.ndarray, " selected"],
) -> Shaped[np.ndarray, "selected ..."]:
    """Row `local[i]` of `maps[which[i]]`, for every i, copied into a new array.

    The maps are contiguous, at least one, and equal in type and in the shape of a row; their lengths may differ.

    Raises:
        IndexError: A row beyond its map.
    """
    first = maps[0]
    if any(m.shape[1:] != first.shape[1:] or m.dtype != first.dtype or not m.flags.c_contiguous for m in maps):
        raise ValueError("maps must be contiguous and equal in type and in the shape of a row")
    lengths = np.array([len(m) for m in maps])
    if len(local) and (local.min() < 0 or which.min() < 0 or (local >= lengths[which]).any()):
        raise IndexError(f"rows {local.min()} to {local.max()} of maps of {lengths.min()} to {lengths.max()} rows")
    row_bytes = first[:1].nbytes
    begins = np.array([m.__array_interface__["data"][0] for m in maps])
    lowest, end = int(begins.min()), int((begins + lengths * row_bytes).max())
    memory = np.asarray(_Memory(lowest, end, row_bytes))
    return memory[begins[which] - lowest + local * row_bytes].view(first.dtype).reshape(-1, *first.shape[1:])


class _Memory:
    """The bytes from `lowest` to `end` of this process's memory, as overlapping rows: row i begins at byte i."""

    def __init__(self, lowest: int, end: int, row_bytes: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (end - lowest - row_bytes + 1,),
            "strides": (1,),
            "typestr": f"|V{row_bytes}",
            "data": (lowest, True),
        }
