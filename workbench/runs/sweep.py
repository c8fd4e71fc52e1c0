"""Sweeps: one experiment over a grid of settings, a run folder each, and one table and its figures in the end.

runs/sinks/
  demo-0b1f6c2e/ ...         a run folder each (see `workbench.runs.folders`)
  summary/                   the runs that are complete, together
    table.parquet table.csv  config columns first, then the experiment's own
    figures/NAME.html        of all runs
    sweep.json               the cells, and which of them failed with what
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.io.errors import RequestError, nearest
from workbench.io.files import PARTIAL, locked
from workbench.io.progress import duration
from workbench.io.tasks import ThisProcess, Workers, lost_task
from workbench.results.experiment import identity
from workbench.results.registry import find_experiment
from workbench.runs.folders import CONFIG, RESULTS, Cell, Outcome, attempt, cell_of, is_complete, share_script

if TYPE_CHECKING:
    from workbench.results.result import Result

SUMMARY, TABLE, CELLS = "summary", "table.csv", "sweep.json"


@dataclass(frozen=True)
class Swept:
    """How a sweep ended."""

    outcomes: tuple[Outcome, ...]
    """One a cell, in the order of the grid; where the work is shared, of those that are not left to others."""
    left: tuple[Cell, ...]
    """Cells of other processes that share the work, and are not complete yet."""
    result: Result | None
    """All complete runs together, as written to `folder`; None where no run is complete."""
    folder: Path

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.state == "failed")


def grid(config: type, choices: Mapping[str, Sequence[Any]]) -> list[Any]:
    """A config for each combination of `choices`, field to values, the last field changing fastest; equal ones once.

    Raises RequestError for a field there is not, one without values, or a value the config refuses.
    """
    known = {field.name for field in fields(config)}
    for name, values in choices.items():
        if name not in known:
            raise RequestError(f"{name!r} is no setting of this experiment{nearest(name, known)}")
        if not values:
            raise RequestError(f"{name} has no value to sweep over; give one or more")
    order = [field.name for field in fields(config) if field.name in choices]
    found = (config(**dict(zip(order, values, strict=True))) for values in itertools.product(*map(choices.get, order)))
    return list(dict.fromkeys(found))


def sweep(
    experiment: str,
    configs: Sequence[Any],
    out: str | Path,
    *,
    workers: Workers | None = None,
    say: Callable[[str], None] = print,
) -> Swept:
    """Runs `experiment` with each config, in a folder under `out`, and puts the complete runs together.

    What is complete is not run again; a cell that fails is told and the others go on. `say` is told how each cell
    ended, a line at a time. Interrupted, the same call resumes. `workers`: processes that run cells side by side,
    `wb.RayWorkers` or a `wb.Share`; None: this one. Of those that share a sweep each puts together
    what is complete when it ends, so the last one has all of it.

    Raises RequestError where `out` cannot hold it.
    """
    find_experiment(experiment)
    out = Path(out)
    _refuse_other(out)
    cells = [cell_of(experiment, config, out) for config in configs]
    titles = dict(zip(cells, _titles(configs), strict=True))
    workers = workers or ThisProcess()
    own = workers.share_of(cells)
    ended: dict[Cell, Outcome] = {}
    began = time.monotonic()
    for outcome in _outcomes(workers, own):
        ended[outcome.cell] = outcome
        worked = sum(one.state != "there" for one in ended.values())
        left = (time.monotonic() - began) / worked * (len(own) - len(ended)) if worked else 0.0
        say(f"[{len(ended):>{len(str(len(own)))}} of {len(own)}{_left(left)}] {_line(outcome, titles[outcome.cell])}")
    with locked(out, wait=lambda: None):
        outcomes = {cell: ended.get(cell) or _of_others(cell) for cell in cells}
        known = tuple(filter(None, outcomes.values()))
        result = _summarise(experiment, outcomes, out)
    return Swept(known, tuple(cell for cell in cells if not outcomes[cell]), result, out / SUMMARY)


def _outcomes(workers: Workers, cells: Sequence[Cell]) -> Iterator[Outcome]:
    """Runs the cells and yields how each ended; workers of other processes are started only for what is not there."""

    def on_lost(cell: Cell | None, error: Exception) -> Outcome:
        failed = lost_task(cell.folder.name if cell else "a first cell", error)
        if cell is None:
            raise failed
        return Outcome(cell, "failed", 0.0, str(failed))

    if workers.remote:
        there = {cell: (cell.folder / CONFIG).exists() for cell in cells}  # to be read, or refused
        yield from (attempt(cell) for cell in cells if there[cell])
        cells = [cell for cell in cells if not there[cell]]
    on_gpu = any(str(getattr(cell.config, "device", "cpu")).startswith("cuda") for cell in cells)
    with closing(workers.map(begin_runs, (), cells, on_lost, "cuda" if on_gpu else "cpu")) as answers:
        for _, outcome in answers:
            yield outcome


def begin_runs(device: str) -> Callable[[Cell], Outcome]:
    """Returns `attempt`, after choosing the GPU that "cuda" in a config stands for, where `device` names one."""
    if ":" in device:
        import torch  # takes seconds

        torch.cuda.set_device(device)
    return attempt


def _of_others(cell: Cell) -> Outcome | None:
    """A cell that another process was to run."""
    return Outcome(cell, "there", 0.0, "run by another process") if is_complete(cell) else None


def _titles(configs: Sequence[Any]) -> list[str]:
    """What tells each config from the others: "model=demo epsilon=0.2"; all settings that differ among them."""
    settings = [identity(config) for config in configs]
    differ = [name for name in settings[0] if len({json.dumps(one[name]) for one in settings}) > 1] if settings else []
    return [" ".join(f"{name}={_short(one[name])}" for name in differ) or "one cell" for one in settings]


def _short(value: Any) -> str:
    """A path by its last part."""
    return Path(value).name or value if isinstance(value, str) else str(value)


def _left(seconds: float) -> str:
    return f"; {duration(seconds)} left" if seconds else ""


def _line(outcome: Outcome, title: str) -> str:
    state = {"done": f"{outcome.seconds:.1f} s", "there": "there already", "failed": "FAILED"}[outcome.state]
    return f"{title}: {state}: {outcome.told}"


def _summarise(experiment: str, outcomes: Mapping[Cell, Outcome | None], out: Path) -> Result | None:
    """Writes what the complete runs found, in the order of the grid, over what an earlier sweep wrote there."""
    from workbench.results.result import load_result

    complete = [cell for cell, outcome in outcomes.items() if outcome and outcome.state != "failed"]
    result = together(experiment, [load_result(cell.folder / RESULTS) for cell in complete]) if complete else None
    fresh, folder = out / (SUMMARY + PARTIAL), out / SUMMARY
    shutil.rmtree(fresh, ignore_errors=True)
    if result is None:
        fresh.mkdir(parents=True)
    else:
        result.save(fresh)
        share_script(fresh, out)
        result.table.to_csv(fresh / TABLE, index=False)
    cells = [
        {
            "folder": cell.folder.name,
            "config": identity(cell.config),
            "state": "left" if outcome is None else "failed" if outcome.state == "failed" else "complete",
            **({"error": outcome.told} if outcome and outcome.state == "failed" else {}),
        }
        for cell, outcome in outcomes.items()
    ]
    (fresh / CELLS).write_text(json.dumps({"experiment": experiment, "cells": cells}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return result


def _refuse_other(out: Path) -> None:
    """The summary is written anew by every sweep; what is not one must not be lost by it."""
    folder = out / SUMMARY
    if folder.exists() and not (folder / CELLS).exists():
        raise RequestError(f"out {str(out)!r} holds a {SUMMARY} that no sweep wrote; choose another folder")


def together(experiment: str, results: Sequence[Result]) -> Result:
    """Results of several runs of one experiment as one: their tables one under another, and where each came from."""
    import pandas as pd
    import xarray as xr

    from workbench.results.result import Result

    known = [result.provenance for result in results]
    with_values = [result.table.dropna(axis=1, how="all") for result in results]  # an empty column has no type to agree
    columns = list(dict.fromkeys(name for result in results for name in result.table.columns))
    table = pd.concat(with_values, ignore_index=True).reindex(columns=columns)
    provenance = {
        "model": ", ".join(dict.fromkeys(one["model"] for one in known)),
        "model_fingerprint": " ".join(dict.fromkeys(one["model_fingerprint"] for one in known)),
        "store": ", ".join(dict.fromkeys(one["store"] for one in known)),
        "store_fingerprint": " ".join(dict.fromkeys(one["store_fingerprint"] for one in known)),
        "rows": sum(one["rows"] for one in known),
        "settings": {"runs": [one["settings"] for one in known]},
        "workbench": version("interp-workbench"),
    }
    return Result(experiment, xr.Dataset(), table, provenance)
