"""The contract of an experiment, and the result that one run makes.

An experiment is a module, a script to be read from top to bottom, that has

    Config             a frozen dataclass of all settings that decide its numbers, each with a default
    run(config)        -> Result, made by `make_result`
    figures(result)    figures by name, the one for a paper first, of the result of one run or of a whole sweep
    headline(result)   optional: the finding with its numbers, in one line of plain text

It is installed by an entry point in the group `workbench.experiments` (see `workbench.results.registry`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from workbench.io.errors import RequestError
from workbench.results.result import Result, with_device

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from plotly.graph_objects import Figure

    from workbench.store.reader import Store


class Experiment(Protocol):
    """The contract, which a module fulfils; the module may also have `headline(result) -> str`."""

    __name__: str
    __file__: str
    Config: type[Any]

    def run(self, config: Any) -> Result:
        """Does all the work of one run. The same config gives the same result."""
        ...

    def figures(self, result: Result) -> dict[str, Figure]:
        """Returns figures of one run or of many, made of the table alone; its first columns are the config's fields."""
        ...


def identity(config: Any) -> dict[str, Any]:
    """Returns the settings that identify a run: the compared fields of its config, as JSON represents them.

    A field made with `field(compare=False)`, such as the folder of the recordings, changes no number and is left out.
    """
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config) if field.compare}


def make_result(name: str, config: Any, table: pd.DataFrame, *stores: Store, data: xr.Dataset | None = None) -> Result:
    """Returns the result of one run of an experiment.

    Args:
        name: Name of the experiment.
        config: Its settings; each compared one becomes a column before those of `table`.
        table: One observation a row.
        stores: The stores that were read.
        data: Arrays to keep as well.

    Raises:
        RequestError: A setting and a column have the same name.
    """
    import xarray as xr  # seconds, which `workbench sweep --help` does not pay

    settings = with_device(identity(config))
    if clashes := [column for column in table.columns if column in settings]:
        raise RequestError(f"table of {name} has a column {clashes[0]!r}, and so has its config; rename one")
    columns = {key: [_cell(value)] * len(table) for key, value in settings.items()}
    table = table.reset_index(drop=True)
    for place, (key, values) in enumerate(columns.items()):
        table.insert(place, key, values)
    manifests = [store.manifest for store in stores]
    provenance = {
        "model": ", ".join(dict.fromkeys(manifest.model.name for manifest in manifests)),
        "model_fingerprint": " ".join(dict.fromkeys(manifest.model.fingerprint for manifest in manifests)),
        "store": ", ".join(dict.fromkeys(f"{store.path.parent.name}/{store.path.name}" for store in stores)),
        "store_fingerprint": " ".join(manifest.fingerprint for manifest in manifests),
        "rows": sum(store.rows for store in stores),
        "settings": settings,
        "workbench": version("interp-workbench"),
    }
    return Result(name, xr.Dataset() if data is None else data, table, provenance)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
