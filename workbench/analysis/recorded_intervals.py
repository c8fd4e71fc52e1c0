"""Intervals of a result's variables, for its figures; results of earlier versions have none of some variables."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from workbench.figures.error_bars import error_bars


def recorded_ends(values: Any, name: str) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, ...]] | None:
    """Returns the lower and upper ends of a variable's interval; None where there are none.

    Args:
        values: Data or table of a result, or a selection of it.
        name: The variable, whose ends are `NAME_low` and `NAME_high`.
    """
    if f"{name}_low" not in values or f"{name}_high" not in values:
        return None
    low, high = (np.asarray(values[f"{name}_{end}"], dtype=float) for end in ("low", "high"))
    return None if np.isnan(low).all() else (low, high)


def error_bars_of(values: Any, name: str) -> dict[str, Any] | None:
    """Returns plotly's `error_x` or `error_y` of a variable; None where it has no interval."""
    ends = recorded_ends(values, name)
    return None if ends is None else error_bars(np.asarray(values[name], dtype=float), *ends)
