"""Logarithmic axes whose ticks have their whole values."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

_DECADES = 3.0  # span of an axis with ticks at powers of 10 alone
_HALF = 0.7  # decades: of a smaller span, every digit has a tick
_SMALL = 1e-3  # values below are written with an exponent


def log_axis(*values: Float[np.ndarray, ...]) -> dict[str, Any]:
    """Returns type, ticks and their format of a logarithmic axis.

    Plotly's own ticks between powers of 10 are single digits, "2" for 20.

    Args:
        values: What is drawn along the axis; values that are not finite and above 0 do not count.
    """
    positive = np.concatenate([array[np.isfinite(array) & (array > 0)].ravel() for array in values])
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 10.0)
    span = np.log10(high / low)
    if span > _DECADES:
        return {"type": "log", "dtick": 1, "exponentformat": "power"}
    return {"type": "log", "dtick": "D2" if span > _HALF else "D1", "tickformat": "~r" if low >= _SMALL else ".0e"}
