"""Error bars of points."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float


def error_bars(
    values: Float[np.ndarray, " point"], low: Float[np.ndarray, " point"], high: Float[np.ndarray, " point"]
) -> dict[str, Any]:
    """Returns plotly's `error_x` or `error_y` of points from the two ends of their intervals."""
    return {"type": "data", "array": high - values, "arrayminus": values - low, "thickness": 1}
