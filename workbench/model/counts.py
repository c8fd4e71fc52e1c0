"""Counts of what an intervention changed, for its proof and for the table of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

_KEPT = 64  # sums that wait on their device


@dataclass
class Count:
    """Counts of one record over the passes of a run."""

    passes: int = 0
    """Forward passes that reached it."""
    rows: int = 0
    """Distinct tokens chosen; for attention, queries."""
    exempt: int = 0
    """Chosen tokens that were left as they are, because the change is not defined there."""
    _compared: int = 0
    """Rows that were compared before and after; of attention and of exchanged blocks there are none."""
    _changed: int = 0
    _relative: float = 0.0
    _nonfinite: float = 0.0
    _sums: list[Tensor] = field(default_factory=list)
    """Per change: changed rows, relative changes, values that are not finite. On the device, so that nothing waits."""

    def add(self, old: Float[Tensor, "row ..."], new: Float[Tensor, "row ..."]) -> None:
        """Counts rows before and after a change."""
        self.rows += len(old)
        self._compared += len(old)
        if not len(old):
            return
        old, new = old.detach().flatten(1), new.detach().flatten(1)
        norm = old.norm(dim=1)
        relative = (new - old).norm(dim=1) / torch.where(norm > 0, norm, 1)
        changed_count = (new != old).any(1).sum()
        self._sums.append(torch.stack([changed_count.float(), relative.float().sum(), (~new.isfinite()).sum().float()]))
        if len(self._sums) > _KEPT:
            self._fold()

    def _fold(self) -> None:
        for sums in self._sums:
            changed_count, relative, nonfinite = sums.tolist()
            self._changed += int(changed_count)
            self._relative += relative
            self._nonfinite += nonfinite
        self._sums.clear()

    @property
    def changed(self) -> int | None:
        """Chosen tokens whose values differ afterwards; None where these are not compared, as in attention."""
        self._fold()
        return self._changed if self._compared == self.rows else None

    @property
    def relative_change(self) -> float:
        """Mean of ‖x' - x‖ / ‖x‖ over the chosen tokens; NaN without any, or where these are not compared."""
        self._fold()
        return self._relative / self.rows if self.rows and self._compared == self.rows else float("nan")

    @property
    def finite(self) -> bool:
        """False if a new value was NaN or infinite."""
        self._fold()
        return not self._nonfinite
