"""Where an axis has its ticks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def integer_step(values: Iterable[Any]) -> int | None:
    """Distance of ticks for layers, offsets, horizons: whole, and a dozen at most.

    None, where plotly chooses as well: among fractions, words, and numbers that span more than a hundred.
    """
    found = np.array(list(values))
    if not found.size or found.dtype.kind not in "iuf" or (found != found.round()).any():
        return None
    span = int(found.max() - found.min())
    return max(1, (span + 1) // 12) if span <= 100 else None
