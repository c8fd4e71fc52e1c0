"""Saved results, exported figures and sweeps for crash points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import toy_experiment
from crash_points import Operation
from feature_operations import without_scratch

PROVENANCE = {
    "model": "demo",
    "model_fingerprint": "a" * 64,
    "store": "x.acts",
    "store_fingerprint": "b" * 64,
    "rows": 3,
    "workbench": "0.1.0",
}


def toy_result(version: int = 0) -> Any:
    """Returns a result of the toy experiment with arrays of several types; results of all versions may replace each
    other."""
    import numpy as np
    import pandas as pd
    import xarray as xr

    from workbench.results.result import Result

    data = xr.Dataset({"x": ("row", np.arange(3.0) + version), "word": ("row", ["a", "ü", ""])})
    table = pd.DataFrame({"x": [0, 1, 2], "y": [float(version)] * 3})
    return Result("toy", data, table, {**PROVENANCE, "settings": {}})


def _register_toy() -> None:
    import workbench.results.registry as registry

    toy = toy_experiment
    registry.installed_experiments = lambda: {"toy": _Entry(toy)}


class _Entry:
    def __init__(self, module: Any) -> None:
        self._module = module

    def load(self) -> Any:
        return self._module


def version_in(folder: Path) -> int | None:
    """Returns the version of the saved result, after reading all of it; None where there is none."""
    from workbench.results.result import load_result

    if not folder.exists():
        return None
    result = load_result(folder)
    version = int(result.data["x"][0])
    assert result.table["y"].tolist() == [version] * 3
    assert (folder / "figures" / "lines.html").is_file()
    return version


def saving(over: bool) -> Operation:
    """A result that is saved, `over`: in place of another version, beside a file of the user."""
    _register_toy()
    first, two = toy_result(1), toy_result(2)
    first.figures()

    def begin(folder: Path) -> None:
        if over:
            first.save(folder / "result")
            (folder / "result" / "notes.txt").write_text("mine")

    def work(folder: Path) -> None:
        two.save(folder / "result")

    def check(folder: Path) -> None:
        assert version_in(folder / "result") in ((1, 2) if over else (None, 2))
        assert not over or (folder / "result" / "notes.txt").read_text() == "mine"

    return Operation(work, begin=begin, check=check, contents=without_scratch)


def lens_saving() -> Operation:
    """A trained lens that is saved; what has its name can be loaded whole."""
    import torch

    from workbench.analysis.trained_lens import TrainedLens, load_lens

    weight, bias = torch.arange(32.0).reshape(2, 4, 4), torch.arange(8.0).reshape(2, 4)
    lens = TrainedLens("resid_post", (0, 1), weight, bias, "tiny", "a" * 64, 3, {"seed": 0})

    def check(folder: Path) -> None:
        if (folder / "lens").exists():
            again = load_lens(folder / "lens")
            assert isinstance(again, TrainedLens)
            assert torch.equal(again.weight, weight)

    def work(folder: Path) -> None:
        if not (folder / "lens").exists():
            lens.save(folder / "lens")
        check(folder)

    return Operation(work, check=check, contents=without_scratch)


def exporting() -> Operation:
    """Figures and their data that are exported, twice the same."""
    _register_toy()
    from workbench.pages.figure_export import export

    result = toy_result(1)
    result.figures()

    def work(folder: Path) -> None:
        export(result, folder / "out", formats=("html",), data="csv")

    return Operation(work, contents=without_scratch)


def sweeping() -> Operation:
    """A sweep of two runs, one of which is refused, with its summary."""
    _register_toy()
    import pandas as pd

    from workbench.runs.sweep import sweep

    configs = [toy_experiment.Config(model=model) for model in ("a", "refused")]
    toy_result().figures()

    def work(folder: Path) -> None:
        swept = sweep("toy", configs, folder / "out", report=lambda _line: None)
        assert [outcome.state for outcome in swept.outcomes][1] == "failed"

    def check(folder: Path) -> None:
        if (folder / "out" / "summary").exists():
            record = json.loads((folder / "out" / "summary" / "sweep.json").read_text())
            if any(cell["state"] == "complete" for cell in record["cells"]):
                pd.read_parquet(folder / "out" / "summary" / "table.parquet")

    def contents(folder: Path) -> dict[str, bytes]:
        """All but the times, the log of the failed run, and whether a run was complete before."""
        volatile = ("environment.json", "log.txt")
        files = {name: data for name, data in without_scratch(folder).items() if not name.endswith(volatile)}
        return files

    return Operation(work, check=check, contents=contents)
