"""What an experiment is, and which are installed.

An experiment is a module, a script to be read from top to bottom, that has

    Config             a frozen dataclass of all that decides its numbers, each field with a default
    run(config)        -> Result, made by `found`
    figures(result)    figures by name, the one for a paper first, of the result of one run or of a whole sweep
    headline(result)   what was found, in one line of plain text; may be missing

It becomes known by an entry point in the group "workbench.experiments"; ours and anybody else's plug in the same way.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from workbench.io.errors import RequestError
from workbench.results.plugins import load_named, no_module, parsed

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from plotly.graph_objects import Figure

    from workbench.results.result import Result
    from workbench.store.reader import Store

GROUP = "workbench.experiments"


class Experiment(Protocol):
    """The contract, which a module fulfils; it may also have `headline(result) -> str`."""

    Config: type

    def run(self, config: Any) -> Result:
        """Does all the work of one run. What is the same for the same config must be the same result."""

    def figures(self, result: Result) -> dict[str, Figure]:
        """Figures made of the table alone, whose first columns are the config's: one run's, or many runs' in turn."""


def installed_experiments() -> dict[str, EntryPoint]:
    """Every registered experiment by name, not yet imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def summary(entry: EntryPoint) -> str:
    """First line of an experiment's docstring, read from its source."""
    if (module := parsed(entry)) is None:
        return no_module(entry)
    return (ast.get_docstring(module) or "").partition("\n")[0]


def find_experiment(name: str) -> Any:
    """The module registered as `name`. Raises RequestError with the nearest names."""
    return load_named("experiment", name, installed_experiments())


def identity(config: Any) -> dict[str, Any]:
    """What a run is known by: the fields of its config that count when configs are compared, as JSON has them.

    A field made with `field(compare=False)`, such as where recordings are kept, changes no number and is left out.
    """
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config) if field.compare}


def found(name: str, config: Any, table: pd.DataFrame, *stores: Store, data: xr.Dataset | None = None) -> Result:
    """What a run of experiment `name` found in `stores`: `table`, with a column for each setting before its own.

    Raises RequestError where a setting and a column have one name.
    """
    import xarray as xr

    from workbench.results.result import Result

    settings = identity(config)
    if taken := [column for column in table.columns if column in settings]:
        raise RequestError(f"table of {name} has a column {taken[0]!r}, and so has its config; rename one")
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
