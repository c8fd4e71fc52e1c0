"""Ends of a colour scale by the range of the data."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def colour_limits(*values: Float[np.ndarray, ...], signed: bool = False) -> tuple[float, float]:
    """Returns the ends of a colour scale that all arrays share: 0 and their largest value.

    Args:
        values: Arrays that are drawn on one scale; values that are NaN or infinite do not count.
        signed: Return ends at equal distances from 0, for a scale whose middle is 0.

    Returns:
        0 and 1 (-1 and 1) where no value is above 0.
    """
    parts = [np.abs(array)[np.isfinite(array)].ravel() if signed else array[np.isfinite(array)] for array in values]
    largest = float(max((part.max() for part in parts if part.size), default=0.0))
    largest = largest if largest > 0 else 1.0
    return (-largest if signed else 0.0), largest
