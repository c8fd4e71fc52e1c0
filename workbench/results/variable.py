"""Variables: each measured quantity declared once, as the source of xarray's attributes and of a report's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.io.errors import RequestError, nearest

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Variable:
    """One measured quantity of a probe, as it stands in the `data` of a result."""

    name: str
    """Name of the variable in `data`."""
    dims: tuple[str, ...]
    """Names of its axes, in order; () for one number."""
    units: str
    """Units, as an axis title shows them: nats, share of tokens, L2 norm, 1 for a pure number."""
    meaning: str
    """Definition in a phrase or two: over what it is a mean, what counts, its range."""
    null: str = ""
    """Value under the null: what a uniform guess, random weights or a baseline gives; "" where there is none."""

    @property
    def attrs(self) -> dict[str, str]:
        """Attributes of the xarray variable."""
        attrs = {"units": self.units, "long_name": self.meaning}
        return {**attrs, "value_under_null": self.null} if self.null else attrs


def with_interval(variable: Variable) -> tuple[Variable, Variable, Variable]:
    """Returns a variable and the two ends, `_low` and `_high`, of its 95 % interval over documents."""
    low, high = (
        Variable(f"{variable.name}_{end}", variable.dims, variable.units, f"{word} end of its 95 % interval")
        for end, word in (("low", "lower"), ("high", "upper"))
    )
    return variable, low, high


def dataset(
    variables: Iterable[Variable], arrays: Mapping[str, Any], coords: Mapping[str, Sequence[Any] | Any] | None = None
) -> xr.Dataset:
    """Returns `arrays` as a dataset with the axes and attributes that their variables declare.

    Args:
        variables: The declared variables; those without an array are left out.
        arrays: Variable name to its values, in the order in which the dataset shall have them.
        coords: Axis name to its coordinates.

    Raises:
        RequestError: An array has no variable, or another number of axes than its variable.
    """
    import numpy as np
    import xarray as xr  # seconds, which listing the probes does not pay

    declared = {variable.name: variable for variable in variables}
    parts = {}
    for name, array in arrays.items():
        if name not in declared:
            raise RequestError(f"no Variable declares {name!r}{nearest(name, declared)}; declare it or leave it out")
        variable = declared[name]
        if (axes := np.ndim(array)) != len(variable.dims):
            dims = ", ".join(variable.dims) or "none"
            raise RequestError(f"{name!r} has {axes} axes and its Variable declares {dims}; make them agree")
        parts[name] = (variable.dims, array, variable.attrs)
    return xr.Dataset(parts, coords=dict(coords or {}))


def markdown(variables: Iterable[Variable]) -> str:
    """Returns the table of a documentation page: a line for each variable with axes, units, meaning, null value."""
    lines = ["| variable | axes | units | meaning | value under the null |", "|---|---|---|---|---|"]
    for variable in variables:
        cells = (f"`{variable.name}`", ", ".join(variable.dims), variable.units, variable.meaning, variable.null)
        lines.append("| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
