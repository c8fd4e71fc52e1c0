"""Results of probes and experiments: arrays with axes and units, a table, and provenance. Figures use nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.io.errors import DataError, RequestError
from workbench.io.files import replace_folder
from workbench.results.registry import find_maker

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from plotly.graph_objects import Figure

    from workbench.store.reader import Store

_RECORD, _DATA, _TABLE = "result.json", "data.nc", "table.parquet"
_FORMAT, _VERSION = "workbench.result", 1
RESULT_FILES = (_RECORD, _DATA, _TABLE, "figures/*.html", "figures/plotly.min.js")
"""Names of the files in the folder of a result; `*` matches within one name."""

_ROWS_SHOWN, _COLUMNS_SHOWN = 5, 12  # of the table, in a notebook


@dataclass(frozen=True, eq=False)
class Result:
    """The result of one probe on one store, or of an experiment in one run or in many."""

    probe: str
    """Name of the probe or of the experiment."""
    data: xr.Dataset
    """Arrays with named axes; each variable has its units and meaning in `attrs["units"]` and `attrs["long_name"]`."""
    table: pd.DataFrame
    """The same in tidy form, one observation a row."""
    provenance: Mapping[str, Any]
    """Model, store, fingerprints, settings and version that made it."""

    def figures(self) -> dict[str, Figure]:
        """Returns every figure of this result by name, the one for a paper first.

        Each carries `source()` as plotly text in `layout.meta["provenance"]`.
        """
        from workbench.figures.safe_text import sentence

        figures = find_maker(self.probe).figures(self)
        for figure in figures.values():
            figure.update_layout(meta={"provenance": sentence(self.source())})
        return figures

    def source(self) -> str:
        """Returns the provenance in one line of plain text: model, store, probe, settings, version."""
        known = self.provenance
        settings = ", ".join(f"{name} {json.dumps(value)}" for name, value in sorted(known["settings"].items()))
        return (
            f"model {known['model']} ({known['model_fingerprint'][:12]}), store {known['store']} "
            f"({known['store_fingerprint'][:12]}), {known['rows']:,} rows; probe {self.probe}"
            f"{': ' if settings else ''}{settings}; workbench {known['workbench']}"
        )

    def figure(self, name: str | None = None) -> Figure:
        """Returns one figure; by default the first. Raises RequestError for an unknown name."""
        figures = self.figures()
        if name is not None and name not in figures:
            raise RequestError(f"figure {name!r} is none of {', '.join(figures)}")
        return figures[name or next(iter(figures))]

    def headline(self) -> str:
        """Returns the finding in one line of plain text; for a probe without a headline, the result's `repr`."""
        headline = getattr(find_maker(self.probe), "headline", None)
        return repr(self) if headline is None else headline(self)

    def save(self, path: str | Path) -> Path:
        """Writes data (netCDF), table (Parquet), provenance (JSON) and figures (HTML) into a folder.

        The folder appears as a whole or not at all. One that holds the same result is replaced; files in it that are
        not a result's are kept.

        Args:
            path: The folder to write.

        Returns:
            `path`.

        Raises:
            RequestError: The folder holds another result or something else.
        """
        requested, path = Path(path), Path(path).resolve()  # a link, or ".", cannot be replaced by name
        refuse_other(requested, self.probe, self.provenance)
        with replace_folder(path, RESULT_FILES) as folder:
            self.write_files(folder)
        return requested

    def write_files(self, folder: Path) -> None:
        """Writes the files of the result into an existing empty folder."""
        (folder / "figures").mkdir()
        empty = {name: part.to_dict(data=False) for name, part in self.data.variables.items() if not part.size}
        _ordered(self.data.drop_vars(empty)).to_netcdf(folder / _DATA, engine="scipy")
        self.table.to_parquet(folder / _TABLE)
        for name, figure in self.figures().items():
            html = folder / "figures" / f"{name}.html"
            figure.write_html(html, include_plotlyjs="directory", include_mathjax=False, div_id=name)
        record = {"format": _FORMAT, "version": _VERSION, "probe": self.probe, "provenance": dict(self.provenance)}
        record["empty"] = empty  # netCDF 3 has no axes of length 0
        (folder / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    def __repr__(self) -> str:
        axes = ", ".join(f"{name} {size}" for name, size in sorted(self.data.sizes.items()))
        return f"Result({self.probe!r} of {self.provenance['model']}, {axes}; {len(self.table):,} table rows)"

    def _repr_html_(self) -> str:
        from workbench.figures.markup import card, frame

        try:
            finding = self.headline()
        except RequestError as error:  # a result of a probe that is not installed can be shown all the same
            finding = str(error)
        axes = ", ".join(f"{name} {size:,}" for name, size in sorted(self.data.sizes.items()))
        facts = {
            "finding": finding,
            "model": self.provenance["model"],
            "store": f"{self.provenance['store']}, {self.provenance['rows']:,} rows",
            "data": f"{len(self.data.data_vars)} variables over {axes or 'no axis'}",
            "table": f"{len(self.table):,} rows, {len(self.table.columns)} columns",
        }
        shown = self.table.iloc[:, :_COLUMNS_SHOWN]
        return card(f"Result of {self.probe}", facts, frame(shown, _ROWS_SHOWN) if len(shown) else "")


def load_result(path: str | Path) -> Result:
    """Reads the folder that `Result.save` wrote.

    Raises:
        RequestError: The folder has no result, or one of a later format.
        DataError: The result is damaged.
    """
    import numpy as np  # these take seconds, which `workbench --help` does not pay
    import pandas as pd
    import xarray as xr

    path = Path(path)
    if not (path / _RECORD).is_file():
        raise RequestError(
            f"result {str(path)!r}: no {_RECORD} there; give a folder that `workbench probe --out` wrote"
        )
    try:
        record = _read_record(path)
        if record["version"] > _VERSION:
            raise RequestError(f"result {str(path)!r} has format version {record['version']}; upgrade the workbench")
        data = xr.load_dataset(io.BytesIO((path / _DATA).read_bytes()), engine="scipy")
        empty = {
            name: xr.Variable(part["dims"], np.empty(part["shape"], part["dtype"]), part["attrs"])
            for name, part in record["empty"].items()
        }
        data = data.assign(empty)
        return Result(record["probe"], data, pd.read_parquet(path / _TABLE), record["provenance"])
    except RequestError:
        raise
    except Exception as error:  # netCDF, Parquet and JSON readers each raise their own kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"result {str(path)!r} is damaged: {reason}; run the probe again") from error


def provenance(store: Store, settings: Any) -> dict[str, Any]:
    """Returns the provenance of a probe's result.

    Args:
        store: The store that was read.
        settings: The probe, a dataclass of settings.
    """
    from dataclasses import asdict

    model = store.manifest.model
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "store": Path(store.path).name,
        "store_fingerprint": store.manifest.fingerprint,
        "rows": store.rows,
        "settings": asdict(settings),
        "workbench": version("interp-workbench"),
    }


def refuse_other(path: str | Path, probe: str, provenance: Mapping[str, Any]) -> None:
    """Raises RequestError if `path` holds anything but the same probe's result of the same store and settings."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        known = _read_record(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"out {str(path)!r} exists and is not a result; choose another folder") from error
    same = ("model_fingerprint", "store_fingerprint", "settings")
    if known["probe"] != probe or any(known["provenance"].get(k) != _plain(provenance[k]) for k in same):
        raise RequestError(
            f"out {str(path)!r} holds another result of {known['probe']}; choose another folder or remove it"
        )


def _ordered(data: xr.Dataset) -> xr.Dataset:
    """Sorts variables by name: netCDF 3 has an order of its own, and the same result is written as the same bytes."""
    variables = {name: data.variables[name] for name in sorted(data.variables, key=str)}
    return type(data)(variables, attrs=data.attrs).set_coords([name for name in data.coords if name in variables])


def _read_record(path: Path) -> dict[str, Any]:
    record = json.loads((path / _RECORD).read_text())
    kinds = {"format": str, "version": int, "probe": str, "provenance": dict, "empty": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{_RECORD} lacks one of {', '.join(kinds)}")
    if record["format"] != _FORMAT:
        raise ValueError(f"format is {record['format']!r}, expected {_FORMAT!r}")
    return record


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
