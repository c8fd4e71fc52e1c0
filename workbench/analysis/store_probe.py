"""Bases of the probes that read activations: rows whose values are lost, layers to read, and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Int

from workbench.analysis.opened_store import open_paths
from workbench.analysis.read_layers import layers_of
from workbench.analysis.rows import recorded_layers
from workbench.figures.safe_text import label
from workbench.io.checks import check_settings
from workbench.results.result import Result, provenance
from workbench.results.variable import Variable, dataset
from workbench.store.lost_values import FiniteRows, finite_rows
from workbench.store.reader import Store

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

LOST_VARIABLES = (
    Variable("clipped", ("layer",), "values", "values read at this layer that the stored type clipped", "0"),
    Variable("nonfinite_rows", (), "tokens", "tokens left out because of a NaN or infinite value", "0"),
)
"""Variables that `StoreProbe.result` adds to the data of a probe with an axis `layer`; the probe declares them."""


@dataclass(frozen=True)
class StoreProbe:
    """Settings and checks of every probe that reads activations; a probe is a frozen dataclass that inherits them."""

    name: ClassVar[str]
    variables: ClassVar[tuple[Variable, ...]] = LOST_VARIABLES
    """Variables of `result`; a probe declares its own before them: `(NORM, *StoreProbe.variables)`."""

    allow_nonfinite: bool = field(default=False, kw_only=True)
    """True leaves out tokens with a NaN or infinite value at a site that is read, and counts them; False refuses such a
    store."""

    def __init_subclass__(cls, **options: object) -> None:
        """Lets methods take the path of a store, and refuse what is none."""
        super().__init_subclass__(**options)
        open_paths(cls)

    def __post_init__(self) -> None:
        """Refuses settings of other types than declared; a probe with checks of its own begins them with this one."""
        check_settings(self)

    def finite_rows(
        self, store: Store, sites: Sequence[str], rows: Int[np.ndarray, "*shape"] | None = None
    ) -> FiniteRows:
        """Returns the rows among `rows` that are finite at every site that the probe reads.

        Args:
            store: The recorded activations.
            sites: Names or labels of all sites that are read.
            rows: Ids of the rows that are read. None: all.

        Raises:
            RequestError: A site has NaN or infinite values in these rows and `allow_nonfinite` is False, or no row is
                left.
        """
        return finite_rows(store, sites, rows, allow_nonfinite=self.allow_nonfinite)

    def result(
        self, store: Store, data: xr.Dataset, table: pd.DataFrame, rows: FiniteRows, notes: Iterable[str] = ()
    ) -> Result:
        """Returns the result, with the numbers of lost values in data and table, and all notes in `attrs["note"]`.

        Args:
            store: The store that was read.
            data: Arrays of the probe.
            table: Their tidy form; one with a column `layer` gets a column `clipped`.
            rows: The rows that were read.
            notes: Notes of the probe; "" is left out.
        """
        if "layer" in data.coords:
            layers = data["layer"].to_numpy().tolist()
            clipped = {layer: rows.clipped([site for site in rows.lost if _layer(site) == layer]) for layer in layers}
            arrays = {"clipped": np.array(list(clipped.values())), "nonfinite_rows": len(rows.left_out)}
            data = data.assign(dataset(LOST_VARIABLES, arrays, {"layer": layers}).data_vars)
            if "layer" in table:
                table = table.assign(clipped=[clipped[layer] for layer in table["layer"]])
        data.attrs["note"] = "; ".join(filter(None, [*rows.notes, *notes]))
        return Result(self.name, data, table, provenance(store, self))


@dataclass(frozen=True)
class LayerProbe(StoreProbe):
    """A probe that reads layer by layer: all layers that were recorded, or those of `layers`."""

    layers: tuple[int, ...] | None = field(default=None, kw_only=True)
    """Layers to read; negative ones count from the last block. None: all that were recorded."""

    def recorded(self, store: Store, kind: str) -> tuple[list[int], list[str]]:
        """Returns the layers that are read, ascending, and the labels of their sites; see `recorded_layers`."""
        return recorded_layers(store, kind, self.layers)

    def layers_with(self, store: Store, *kinds: str) -> list[int]:
        """Returns the layers that are read and have a site of any of these kinds, ascending; there may be none."""
        site_layers = layers_of(store, *kinds)
        if self.layers is None:
            return site_layers
        chosen_layers = {layer % store.manifest.model.n_layers for layer in self.layers}
        return [layer for layer in site_layers if layer in chosen_layers]

    def note_layers(self, store: Store) -> str:
        """Returns a note that shares are those of the heads of `layers` alone; "" where `layers` is None."""
        if self.layers is None:
            return ""
        n_layers = store.manifest.model.n_layers
        layer_text = ", ".join(map(str, sorted({layer % n_layers for layer in self.layers})))
        return f"heads of layers {layer_text} alone, of {n_layers} layers"


def model_label(result: Result, limit: int = 60) -> str:
    """Returns the name of the result's model for a title, escaped, and cut to `limit` characters."""
    return label(str(result.provenance["model"]), limit)


def with_note(headline: str, result: Result) -> str:
    """Returns the headline with the notes of the result behind it, as a sentence of their own."""
    note = result.data.attrs.get("note", "")
    return f"{headline} Note: {note}." if note else headline


def _layer(site: str) -> int:
    """Layer of `resid_post.3`; -1 for a site without one."""
    last = site.rsplit(".", 1)[-1]
    return int(last) if last.isdecimal() else -1
