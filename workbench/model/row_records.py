"""Records that set rows of a site, add a direction to them or remove one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.checks import check
from workbench.io.errors import DataError, RequestError, shown
from workbench.model.direction import Direction
from workbench.model.load import Model
from workbench.model.row_changes import Change, ChosenRows, Head, Place, SiteIntervention
from workbench.model.token_choice import At


@dataclass(frozen=True, eq=False)
class Set(SiteIntervention):
    """Sets the chosen rows of a site: x <- value."""

    site: str
    value: Float[Tensor, ...]
    """A row of the site; one row for each sequence, axes (sequence, *row); or one for each token, axes (sequence,
    position, *row). Sequence and position are those of the batch without padding. With `head`, rows of these heads."""
    at: At = field(kw_only=True)
    head: Head = field(default=None, kw_only=True)

    sets = True

    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of rows; see `RowIntervention.change`."""
        if isinstance(self.value, str):
            raise RequestError(f"value must be numbers, not {shown(self.value)}")
        value = torch.as_tensor(self.value)
        _check_finite("value", value)
        for shape in (place.shape, place.shape[1:]) if place.single_head else (place.shape,):
            extra_axes = value.ndim - len(shape)
            if 0 <= extra_axes <= 2 and tuple(value.shape[extra_axes:]) == shape:
                return partial(_set, value.reshape(*value.shape[:extra_axes], *place.shape), extra_axes)
        raise RequestError(
            f"value has the shape {tuple(value.shape)}, and a row of {place.label} {place.shape}; give a row, one for "
            "each sequence, or one for each token"
        )

    def __str__(self) -> str:
        return f"set {named(self.site, self.head)}"


def _set(value: Tensor, extra_axes: int, rows: Tensor, chosen_rows: ChosenRows) -> Tensor:
    value = value.to(rows)
    if extra_axes == 0:
        return value.expand_as(rows)
    sequence = chosen_rows.donors(len(value)).to(rows.device)
    if extra_axes == 1:
        return value[sequence]
    position = chosen_rows.position
    if len(position) and int(position.max()) >= value.shape[1]:
        raise DataError(f"value has {value.shape[1]} positions, and position {int(position.max())} is chosen")
    return value[sequence, position.to(rows.device)]


@dataclass(frozen=True, eq=False)
class Zero(SiteIntervention):
    """Sets the chosen rows of a site, or heads of them, to 0."""

    site: str
    at: At = field(default="all", kw_only=True)
    head: Head = field(default=None, kw_only=True)

    sets = True

    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of rows; see `RowIntervention.change`."""
        return _zero

    def __str__(self) -> str:
        return f"zero {named(self.site, self.head)}"


def _zero(rows: Tensor, _chosen: ChosenRows) -> Tensor:
    return torch.zeros_like(rows)


@dataclass(frozen=True, eq=False)
class Add(SiteIntervention):
    """Adds a direction to the chosen rows of a site: x <- x + scale · d."""

    site: str
    direction: Float[Tensor, "*row"] | Direction
    """d, of the shape of a row of the site, or of the heads that are named."""
    scale: float | int = 1.0
    unit: Literal["raw", "unit", "norm"] = "raw"
    """"raw": d as it is; "unit": d divided by its L2 norm; "norm": d / ‖d‖ times the L2 norm of the row."""
    at: At = field(default="all", kw_only=True)
    head: Head = field(default=None, kw_only=True)

    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of rows; see `RowIntervention.change`."""
        check("unit", self.unit, one_of=("raw", "unit", "norm"))
        check("scale", self.scale, above=-inf, below=inf)
        direction = _direction(self.direction, place)
        if self.unit != "raw":
            direction = _unit_vector(direction, f"; choose unit='raw', not {self.unit!r}")
        return partial(_add, self.scale * direction, self.unit == "norm")

    def __str__(self) -> str:
        return f"add {self.scale:g}{_called(self.direction)} at {named(self.site, self.head)}"


def _add(direction: Tensor, relative: bool, rows: Tensor, _chosen: ChosenRows) -> Tensor:
    step = direction.to(rows)
    if relative:
        norm = rows.flatten(1).norm(dim=1)
        step = norm.reshape(-1, *[1] * (rows.ndim - 1)) * step
    return torch.where(step == 0, rows, rows + step)


@dataclass(frozen=True, eq=False)
class Project(SiteIntervention):
    """Removes a direction from the chosen rows of a site: x <- x - (x · d) d / ‖d‖² (directional ablation)."""

    site: str
    direction: Float[Tensor, "*row"] | Direction
    """d, of the shape of a row of the site, or of the heads that are named."""
    at: At = field(default="all", kw_only=True)
    head: Head = field(default=None, kw_only=True)

    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of rows; see `RowIntervention.change`."""
        return partial(_project, _unit_vector(_direction(self.direction, place), ""))

    def __str__(self) -> str:
        return f"project out a direction{_called(self.direction)} at {named(self.site, self.head)}"


def _project(direction: Tensor, rows: Tensor, _chosen: ChosenRows) -> Tensor:
    unit = direction.to(rows).flatten()
    part = rows.flatten(1) @ unit
    return rows - (part[:, None] * unit).reshape(rows.shape)


def _direction(direction: Tensor | Direction, place: Place) -> Tensor:
    """The vector of a direction in float32, in the shape of a row."""
    if isinstance(direction, str | os.PathLike):
        raise RequestError(f"direction is {shown(direction)}; load its file: wb.load_direction(path)")
    vector = direction.vector if isinstance(direction, Direction) else torch.as_tensor(direction).float()
    vector = place.fit("direction", vector)
    _check_finite("direction", vector)
    return vector


def _unit_vector(vector: Tensor, advice: str) -> Tensor:
    if not (norm := vector.norm()):
        raise RequestError(f"direction is 0 and has no unit vector{advice}")
    return vector / norm


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.detach().isfinite().all()):
        raise RequestError(f"{name} has a value that is not finite")


def _called(direction: Tensor | Direction) -> str:
    return f" {direction.name!r}" if isinstance(direction, Direction) else ""


def named(site: str, head: Head) -> str:
    """Returns a site with its heads, as messages name them: `z.3 head 0`."""
    return site if head is None else f"{site} head {head}"
