"""Growth of the residual stream: `norm(l) = mean |h_l|` over tokens, after block l (Heimersheim and Turner 2023)."""

from dataclasses import dataclass
from typing import ClassVar

from workbench.probing import StoreProbe, Variable, dataset, layer_curves, recorded_layers, selected_rows

NORM = Variable("norm", ("layer",), "L2 norm", "mean over tokens, 0 and up")


@dataclass(frozen=True)
class NormGrowth(StoreProbe):
    """Measures the norm of the residual stream after each block."""

    name: ClassVar[str] = "norm-growth"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = (NORM, *StoreProbe.variables)
    controls: ClassVar[dict[str, str]] = {"random weights": "without training the norm grows as in a random walk"}

    site: str = "resid_post"
    """Kind of site to read, at every layer that was recorded."""
    where: str = "NOT is_special"
    """SQL over the token table: the tokens to average over."""

    def run(self, store, *, model=None):
        """Reads each site once. Raises RequestError for a site that was not recorded or has NaN or infinite values."""
        layers, labels = recorded_layers(store, self.site)
        rows = self.finite_rows(store, labels, selected_rows(store, self.where))
        norms = [float(store[label][rows.rows].double().norm(dim=1).mean()) for label in labels]
        data = dataset(self.variables, {"norm": norms}, {"layer": layers})
        return self.result(store, data, data.to_dataframe().reset_index(), rows)

    @staticmethod
    def headline(result):
        first, last = float(result.data.norm[0]), float(result.data.norm[-1])
        return f"Mean residual norm grows from {first:.1f} to {last:.1f}, a factor of {last / first:.1f}."

    @staticmethod
    def figures(result):
        curves, layers = {"mean norm": result.data.norm.to_numpy()}, result.table["layer"].tolist()
        return {"norm": layer_curves(curves, layers=layers, title="Residual norm", unit="L2 norm")}
