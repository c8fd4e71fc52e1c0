"""How the residual stream grows: `norm(l) = mean |h_l|` over tokens, after block l (Heimersheim and Turner 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import xarray as xr

from workbench.analysis.lens import recorded_layers, selected_rows
from workbench.figures.layer_curves import layer_curves
from workbench.results.result import Result, provenance


@dataclass(frozen=True)
class NormGrowth:
    """How long the residual stream is after each block."""

    name: ClassVar[str] = "norm-growth"
    controls: ClassVar[dict[str, str]] = {"random weights": "without training the norm grows like a random walk's"}

    site: str = "resid_post"
    """Kind of site to read, at every layer that was recorded."""
    where: str = "NOT is_special"
    """SQL over the token table: which tokens count."""

    def run(self, store):
        """`data` has the mean norm over (layer), 0 up. Reads each site once. Refuses what was not recorded."""
        layers, labels = recorded_layers(store, self.site)
        rows = selected_rows(store, self.where)
        norms = [float(store[label][rows].double().norm(dim=1).mean()) for label in labels]
        data = xr.Dataset({"norm": ("layer", norms, {"units": "L2 norm"})}, {"layer": layers})
        return Result(self.name, data, data.to_dataframe().reset_index(), provenance(store, self))

    @staticmethod
    def headline(result):
        growth = float(result.data.norm[-1] / result.data.norm[0])
        return f"{growth:.1f} times as long at the end as after the first block"

    @staticmethod
    def figures(result):
        curves = {"mean norm": result.data.norm.to_numpy()}
        return {"norm": layer_curves(curves, layers=result.table["layer"], title="Residual norm", unit="L2 norm")}
