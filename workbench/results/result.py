"""Results of probes and experiments: arrays with axes and units, a table, and provenance. Figures use nothing else."""

from __future__ import annotations

import contextlib
import filecmp
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.io.checks import as_path
from workbench.io.counted import counted
from workbench.io.errors import DataError, RequestError, first_line
from workbench.io.files import PARTIAL, explain_full_disk, replace_folder, sha256_bytes, write_file
from workbench.io.findings import FileRecord
from workbench.io.parse import check_checksum, parse, read_json, to_checked_json
from workbench.io.reading import read_file
from workbench.io.torch_state import usable_device
from workbench.results.arrays import json_value, read_dataset, write_dataset
from workbench.results.registry import find_maker, reference
from workbench.results.tables import read_table, write_table

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from plotly.graph_objects import Figure

    from workbench.model.load import Model
    from workbench.results.experiment import Experiment
    from workbench.results.probe import Probe
    from workbench.store.reader import Store

_RECORD, _DATA, _TABLE = "result.json", "data.nc", "table.parquet"
_FORMAT, _VERSION = "workbench.result", 2
SCRIPT = "figures/plotly.min.js"
"""Name of plotly's script, 5 MB, in the folder of a result."""
RESULT_FILES = (_RECORD, _DATA, _TABLE, "figures/*.html", SCRIPT)
"""Names of the files in the folder of a result; `*` matches within one name."""

_PROVENANCE = {
    "model": str,
    "model_fingerprint": str,
    "store": str,
    "store_fingerprint": str,
    "rows": int,
    "settings": dict,
    "workbench": str,
}
"""Keys of every provenance, and their types."""

WEIGHTS = "weights alone"
"""Name in place of a store's in the provenance of a probe that read a model; its rows are those of the embedding."""

_AGAIN = "run the probe again"

_CONTEXT = 256  # longest sequence of a recording that names none

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

    def maker(self) -> type[Probe] | Experiment:
        """Returns the probe or the experiment that made this result. RequestError where it is not here."""
        return find_maker(self.probe, self.provenance.get("probe_class"))

    def figures(self) -> dict[str, Figure]:
        """Returns every figure of this result by name, the one for a paper first.

        Each carries `source()` as plotly text in `layout.meta["provenance"]`.
        """
        from workbench.figures.legend_room import with_legend_room  # plotly
        from workbench.figures.safe_text import sentence
        from workbench.figures.themed import themed

        plain_figures, source = self.maker().figures(self), sentence(self.source())
        figures: dict[str, Figure] = {name: with_legend_room(themed(figure)) for name, figure in plain_figures.items()}
        for figure in figures.values():
            figure.layout.meta = {**(figure.layout.meta or {}), "provenance": source}
        return figures

    def source(self) -> str:
        """Returns the provenance in one line of plain text: model, store, probe, settings, version."""
        known = self.provenance
        settings = ", ".join(f"{name} {json.dumps(value)}" for name, value in sorted(known["settings"].items()))
        return (
            f"model {known['model']} ({known['model_fingerprint'][:12]}), store {known['store']} "
            f"({known['store_fingerprint'][:12]}), {counted(known['rows'], 'row')}; probe {self.probe}"
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
        headline = getattr(self.maker(), "headline", None)
        return repr(self) if headline is None else headline(self)

    def save(self, path: str | Path) -> Path:
        """Writes data (netCDF), table (Parquet), provenance (JSON) and figures (HTML) into a folder.

        The folder appears as a whole or not at all. One that holds the same result is replaced; files in it that are
        not a result's are kept. plotly's script, 5 MB, is on the disk once for all results of the parent folder.

        Args:
            path: The folder to write.

        Returns:
            `path`.

        Raises:
            RequestError: The folder holds another result or something else; or an array, an attribute, a column or a
                setting would not be read back as it is, which the message names; nothing is written then.
            DataError: The disk is full.
        """
        requested = as_path("path", path)
        path = requested.resolve()  # a link, or ".", cannot be replaced by name
        refuse_other(requested, self.probe, self.provenance)
        with (
            explain_full_disk(f"result {str(requested)!r}", "save it again"),
            replace_folder(path, RESULT_FILES) as folder,
        ):
            self.write_files(folder)
            share_script(folder, path.parent.glob(f"*/{SCRIPT}"))
        return requested

    def write_files(self, folder: Path) -> None:
        """Writes the files of the result into an existing empty folder."""
        known = json_value("provenance", self.provenance)
        if problem := _problem(known):
            raise RequestError(f"provenance of the result {problem}; make it by `provenance(store, settings)`")
        arrays, data = write_dataset(self.data)
        table, pages = write_table(self.table), _pages(self.figures())
        record = {"format": _FORMAT, "version": _VERSION, "probe": self.probe, "provenance": known}
        record["data"] = asdict(data)
        (folder / "figures").mkdir()
        contents = {f"figures/{name}": text.encode("utf-8", "replace") for name, text in pages.items()}
        contents |= {_DATA: arrays, _TABLE: table}
        for name, text in contents.items():
            write_file(folder / name, text)
        record["files"] = {name: FileRecord(len(text), sha256_bytes(text)) for name, text in contents.items()}
        write_file(folder / _RECORD, to_checked_json(record, finite=False).encode())

    def __repr__(self) -> str:
        axes = ", ".join(f"{name} {size}" for name, size in sorted(self.data.sizes.items()))
        return f"Result({self.probe!r} of {self.provenance['model']}, {axes}; {counted(len(self.table), 'table row')})"

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
            "store": f"{self.provenance['store']}, {counted(self.provenance['rows'], 'row')}",
            "data": f"{counted(len(self.data.data_vars), 'variable')} over {axes or 'no axis'}",
            "table": f"{counted(len(self.table), 'row')}, {counted(len(self.table.columns), 'column')}",
        }
        excerpt = self.table.iloc[:, :_COLUMNS_SHOWN]
        return card(f"Result of {self.probe}", facts, frame(excerpt, _ROWS_SHOWN) if len(excerpt) else "")


def share_script(result: Path, scripts: Iterable[Path]) -> None:
    """Makes plotly's script of a saved result a hard link to an equal file among `scripts`, where links are possible.

    Any of the folders may be moved or removed alone; a copy of one has a script of its own.
    """
    script = result / SCRIPT
    with contextlib.suppress(OSError):  # no figure, or no hard links there
        copies = (path for path in scripts if not path.samefile(script))
        twin = next((path for path in copies if filecmp.cmp(script, path, shallow=False)), None)
        if twin is not None:
            link = script.with_name(script.name + PARTIAL)
            os.link(twin, link)
            os.replace(link, script)


def load_result(path: str | Path, *, probe: type[Probe] | None = None) -> Result:
    """Reads the folder that `Result.save` wrote.

    Args:
        path: The folder.
        probe: Class of the probe that made it, which draws its figures and writes its headline. None: the class that
            the result names, where it is registered or imported, or the installed probe of that name.

    Raises:
        RequestError: The folder has no result, one of a later format, or one of another probe than `probe`.
        DataError: The result is damaged.
    """
    path = as_path("path", path)
    if not (path / _RECORD).is_file():
        raise RequestError(
            f"result {str(path)!r}: no {_RECORD} there; give a folder that `workbench probe --out` wrote"
        )
    try:
        record = _read_record(path)
        if record["version"] > _VERSION:
            raise RequestError(f"result {str(path)!r} has format version {record['version']}; upgrade the workbench")
        arrays, table = (_read_listed(path, record, name) for name in (_DATA, _TABLE))
        read = _read_first_version if record["version"] == 1 else _read_files
        result = Result(record["probe"], *read(record, arrays, table), record["provenance"])
    except RequestError:
        raise
    except Exception as error:  # netCDF, Parquet and JSON readers each raise their own kinds
        if isinstance(error, DataError) and str(path) in str(error):
            raise
        raise DataError(f"result {str(path)!r} is damaged: {first_line(error)}; {_AGAIN}") from error
    if probe is None:
        return result
    if probe.name != result.probe:
        raise RequestError(f"result {str(path)!r} is of the probe {result.probe!r}, not of {probe.name!r}")
    return replace(result, provenance={**result.provenance, "probe_class": reference(probe)})


def provenance(store: Store | Model, settings: Any) -> dict[str, Any]:
    """Returns the provenance of a probe's result.

    Args:
        store: The store that was read; or the model, by a probe of weights, whose fingerprint then stands in place of a
            store's. Costs a checksum of its weights, about 1 s a gigabyte.
        settings: The probe, a dataclass of settings.
    """
    values = with_device(asdict(settings))
    return {
        **(_of_store(store) if hasattr(store, "manifest") else _of_model(store)),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in values.items()},
        "probe_class": reference(type(settings)),
        "workbench": version("interp-workbench"),
    }


def _of_store(store: Any) -> dict[str, Any]:
    manifest = store.manifest
    model, changes, parts = manifest.model, manifest.interventions, manifest.parts
    documents, sequences = (sum(getattr(part, name) for part in parts) for name in ("documents", "sequences"))
    longest = manifest.recording.get("context") or _CONTEXT
    texts = f"{counted(documents, 'document')}, {counted(sequences, 'sequence')} of at most {longest:,} tokens"
    return {
        "model": f"{model.name}, changed ({', '.join(changes.names)})" if changes else model.name,
        "model_fingerprint": model.fingerprint,
        "store": Path(store.path).name,
        "store_fingerprint": store.manifest.fingerprint,
        "rows": store.rows,
        "texts": f"{texts}; rows chosen by {manifest.choice}" if manifest.chosen else texts,
        "sites": ", ".join(dict.fromkeys(site.label.partition(".")[0] for site in store.sites)),
    }


def _of_model(model: Any) -> dict[str, Any]:
    fingerprint = model.fingerprint()
    names = {"model": model.name, "model_fingerprint": fingerprint, "store": WEIGHTS}
    return {**names, "store_fingerprint": fingerprint, "rows": model.vocab}


def with_device(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings whose `device` None is replaced by the type of device that it stands for here."""
    if settings.get("device", "cpu") is not None:
        return settings
    return {**settings, "device": usable_device().type}


def refuse_other(path: str | Path, probe: str, provenance: Mapping[str, Any]) -> None:
    """Raises RequestError if `path` holds anything but the same probe's result of the same store and settings."""
    path = as_path("path", path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        known = _read_record(path)
    except (DataError, OSError, ValueError) as error:
        raise RequestError(f"out {str(path)!r} exists and is not a result; choose another folder") from error
    keys, requested = ("model_fingerprint", "store_fingerprint", "settings"), json_value("provenance", provenance)
    if known["probe"] != probe or any(known["provenance"].get(k) != requested.get(k) for k in keys):
        raise RequestError(
            f"out {str(path)!r} holds another result of {known['probe']}; choose another folder or remove it"
        )


def _pages(figures: Mapping[str, Figure]) -> dict[str, str]:
    """The figures as HTML pages by file name, with the script that they share."""
    from plotly.offline import get_plotlyjs

    pages = {
        f"{name}.html": figure.to_html(include_plotlyjs="directory", include_mathjax=False, div_id=name)
        for name, figure in figures.items()
    }
    return {**pages, Path(SCRIPT).name: get_plotlyjs()} if pages else {}


def _read_files(record: Mapping[str, Any], arrays: bytes, table: bytes) -> tuple[xr.Dataset, pd.DataFrame]:
    return read_dataset(arrays, record.get("data"), _RECORD), read_table(table)


def _read_first_version(record: Mapping[str, Any], arrays: bytes, table: bytes) -> tuple[xr.Dataset, pd.DataFrame]:
    """Files of format version 1: types and attributes are those that netCDF 3 has, as xarray reads them."""
    import numpy as np  # these take seconds, which `workbench --help` does not pay
    import pandas as pd
    import xarray as xr

    if not isinstance(record.get("empty"), dict):
        raise ValueError(f"{_RECORD} lacks empty")
    empty = {  # netCDF 3 has no axes of length 0
        name: xr.Variable(part["dims"], np.empty(part["shape"], part["dtype"]), part["attrs"])
        for name, part in record["empty"].items()
    }
    data = xr.load_dataset(io.BytesIO(arrays), engine="scipy").assign(empty)
    return data, pd.read_parquet(io.BytesIO(table))


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path / _RECORD, _AGAIN, finite=False)
    kinds = {"format": str, "version": int, "probe": str, "provenance": dict}
    if not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{_RECORD} lacks one of {', '.join(kinds)}")
    if record["format"] != _FORMAT:
        raise ValueError(f"format is {record['format']!r}, expected {_FORMAT!r}")
    if problem := _problem(record["provenance"]):
        raise ValueError(f"provenance in {_RECORD} {problem}")
    if "checksum" in record and record["version"] <= _VERSION:
        check_checksum(record, path / _RECORD, _AGAIN)
    return record


def listed_files(path: str | Path) -> dict[str, FileRecord] | None:
    """Returns size and SHA-256 of the files of the result in a folder; None for one saved before they were recorded.

    Raises:
        ValueError: The record is damaged.
    """
    record = _read_record(as_path("path", path))
    return parse(dict[str, FileRecord], record["files"], _RECORD) if "files" in record else None


def _read_listed(path: Path, record: Mapping[str, Any], name: str) -> bytes:
    """The bytes of a file, after a comparison with their recorded checksum, where there is one."""
    data = read_file(path / name, _AGAIN)
    if "files" in record:
        known: FileRecord = parse(FileRecord, record["files"].get(name), f"{_RECORD}: files: {name}")
        if sha256_bytes(data) != known.sha256:
            raise ValueError(f"the checksum of {name} differs")
    return data


def _problem(provenance: Mapping[str, Any]) -> str:
    """What is missing from a provenance, or of the wrong type; "" where it is whole."""
    for key, kind in _PROVENANCE.items():
        if not isinstance(provenance.get(key), kind):
            return f"has no {key}" if key not in provenance else f"has a {key} that is not {kind.__name__}"
    address = provenance.get("probe_class")
    return "" if address is None or isinstance(address, str) else "has a probe_class that is not str"
