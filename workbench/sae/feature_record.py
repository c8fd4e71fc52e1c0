"""Intervention on one SAE feature: ablate it, clamp it to a value or add to it, while the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf, prod
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.checks import check, check_kind
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.row_changes import Change, ChosenRows, Place, RowIntervention
from workbench.model.token_choice import At
from workbench.sae.autoencoder import Sae, check_autoencoder
from workbench.sae.decoder import decoder_directions, row_scale
from workbench.sae.site import block_rows, check_trained_on
from workbench.sae.training import check_training

OPERATIONS = ("ablate", "clamp", "add")


@dataclass(frozen=True, eq=False)
class Feature(RowIntervention):
    """Changes the activation f of one SAE feature to f' at the chosen rows: x <- x + (f' - f) d, d its direction.

    What the SAE does not reconstruct stays in x. "ablate": f' = 0; "clamp": f' = value; "add": f' = f + value, which
    steers along the feature whether or not it is active.
    """

    sae: Sae
    id: int
    op: Literal["ablate", "clamp", "add"] = "ablate"
    value: float | int | Tensor | None = None
    """Unit: the feature's activation, whose largest value is `features.max[id]`. None for "ablate"."""
    site: str | None = None
    """None: the site that the SAE was trained on."""
    at: At = "all"
    force: bool = False
    """Allow another site or model than the SAE's."""

    @property
    def place(self) -> str:
        """Name of the site. RequestError if neither the record nor the SAE's files have it."""
        check_autoencoder(self.sae)
        if self.site is None and self.sae.site is None:
            raise RequestError(f"site: the files of SAE {self.sae.name!r} do not record its site; give site=")
        return self.site or str(self.sae.site)

    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of rows; see `RowIntervention.change`."""
        check("op", self.op, one_of=OPERATIONS)
        check("id", self.id, at_least=0, at_most=self.sae.d_sae - 1, whole=True)
        if (self.op == "ablate") != (self.value is None):
            raise RequestError(f"value: {self.op} {'takes none' if self.op == 'ablate' else 'needs one'}")
        if self.value is not None:
            check("value", _number(self.value), above=-inf, below=inf)
        self._check_site(model, place)
        direction = decoder_directions(self.sae, [self.id])[0]
        return partial(_change, self, direction)

    def target(self, activation: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Returns f' for the activations f of rows."""
        if self.value is None:
            return torch.zeros_like(activation)
        value = torch.as_tensor(self.value).to(activation)
        return activation + value if self.op == "add" else value.expand_as(activation)

    def _check_site(self, model: Model, place: Place) -> None:
        sae, site = self.sae, place.site
        check_changeable(sae)
        check_training(sae, site.name, model.architecture)
        if (width := prod(place.shape)) != sae.d_in:
            raise RequestError(
                f"SAE {sae.name!r} reads rows of width {sae.d_in}, but {site.short or site.name} of model "
                f"{model.name!r} has {width}"
            )
        if not self.force:
            check_trained_on(sae, sae.site, site.name, model.name)

    def __str__(self) -> str:
        value = "" if self.value is None else f" {'to' if self.op == 'clamp' else 'by'} {_number(self.value):g}"
        return f"{self.op} feature {self.id}{value}"


def check_changeable(sae: Sae) -> None:
    """Raises RequestError for an SAE whose features cannot be changed in a row of one site."""
    if sae.sequential:
        kind, reason = "temporal", "its features depend on earlier tokens"
    elif not sae.reconstructs:
        kind, reason = "a transcoder", "it reads one site, writes another"
    elif sae.n_sites > 1:
        kind, reason = "a crosscoder", "it reads and writes several sites"
    else:
        return
    raise RequestError(f"SAE {sae.name!r} is {kind}: {reason}, so its features cannot be changed at one row")


def _number(value: float | int | Tensor) -> float:
    check_kind("value", value, (int, float, np.number, Tensor), "a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise RequestError(f"value is a tensor of shape {tuple(value.shape)}; give one number")
    return float(torch.as_tensor(value).detach())


def _change(
    record: Feature, direction: Tensor, rows: Float[Tensor, "row ..."], _chosen: ChosenRows
) -> Float[Tensor, "row ..."]:
    """Rows with the feature changed; one whose activation stays is returned bit by bit."""
    sae, gradients = record.sae, torch.is_grad_enabled() and rows.requires_grad
    parts = []
    for block in rows.split(block_rows(sae)):
        activation = sae.encode(block, gradients=gradients)[:, record.id]
        target = record.target(activation)
        step = (target - activation)[:, None] * row_scale(sae, block) * direction
        step = step.to(block).reshape(block.shape)
        is_unchanged = (target == activation).to(block.device).reshape(-1, *[1] * (block.ndim - 1))
        parts.append(torch.where(is_unchanged, block, block + step))
    return torch.cat(parts)
