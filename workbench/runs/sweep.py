"""Sweeps: one experiment over a grid of settings, with a folder for each run and one summary of all.

runs/sinks/
  demo-0b1f6c2e/ ...         a folder for each run (see `workbench.runs.folders`)
  summary/                   the complete runs together
    table.parquet table.csv  columns of the config first, then those of the experiment
    figures/NAME.html        of all runs
    sweep.json               the runs and their states, with the errors of failed ones
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workbench.io.checks import as_path
from workbench.io.errors import DataError, RequestError, nearest
from workbench.io.files import PARTIAL, explain_full_disk, locked, remove, replace_folder, write_file
from workbench.io.progress import duration
from workbench.io.spreadsheet import csv_text
from workbench.io.tasks import ThisProcess, Workers, lost_task
from workbench.results.experiment import identity
from workbench.results.registry import find_experiment
from workbench.results.result import RESULT_FILES, SCRIPT, Result, load_result, share_script
from workbench.runs.folders import CONFIG, RESULTS, Outcome, Run, attempt, is_complete, run_in
from workbench.store.owned_files import refuse_store

_LOG = logging.getLogger(__name__)

SUMMARY, TABLE, RUNS = "summary", "table.csv", "sweep.json"


@dataclass(frozen=True)
class SweepResult:
    """Outcomes of a sweep's runs, and their summary."""

    outcomes: tuple[Outcome, ...]
    """One for each run, in the order of the grid; without `pending` ones."""
    pending: tuple[Run, ...]
    """Runs of other processes that share the sweep, and are not complete yet."""
    result: Result | None
    """All complete runs combined, as written to `folder`; None if no run is complete."""
    folder: Path
    unwritten: str | None = None
    """Reason why the summary could not be written, such as a full disk; None: it is written."""

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Outcomes of the runs that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.state == "failed")


def grid(config: type[Any], choices: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Returns a config for each combination of values, without duplicates.

    Args:
        config: The experiment's `Config`.
        choices: Field to its values; the last field of the config changes fastest.

    Raises:
        RequestError: An unknown field, one without values, or a value that the config refuses.
    """
    known = {field.name for field in fields(config)}
    for name, values in choices.items():
        if name not in known:
            raise RequestError(f"{name!r} is not a setting of this experiment{nearest(name, known)}")
        if not values:
            raise RequestError(f"{name} has no value to sweep over; give one or more")
    order = [field.name for field in fields(config) if field.name in choices]
    combinations = itertools.product(*(choices[name] for name in order))
    return list(dict.fromkeys(config(**dict(zip(order, values, strict=True))) for values in combinations))


def sweep(
    experiment: str,
    configs: Sequence[Any],
    out: str | Path,
    *,
    workers: Workers | None = None,
    report: Callable[[str], None] = print,
) -> SweepResult:
    """Runs an experiment with each config, in a folder under `out`, and combines the complete runs.

    Complete runs are not run again, and a failed one does not stop the others. After an interruption the same call
    resumes. Processes that share a sweep each write the summary when they end, so that the last one has all runs.

    Args:
        experiment: Name of the experiment.
        configs: A config for each run.
        out: Folder of the sweep.
        workers: Processes that execute the runs: `wb.RayWorkers` or a `wb.Share`; None: this one.
        report: Receives a line for each run that ended.

    Raises:
        RequestError: `out` holds a summary that no sweep wrote, or the experiment is not installed.
    """
    find_experiment(experiment)
    out = as_path("out", out)
    _refuse_other(out)
    runs = [run_in(out, experiment, config) for config in configs]
    titles = dict(zip(runs, _titles(configs), strict=True))
    workers = workers or ThisProcess()
    share = workers.share_of(runs)
    ended: dict[Run, Outcome] = {}
    start = time.monotonic()
    for outcome in _outcomes(workers, share):
        ended[outcome.run] = outcome
        executed = sum(outcome.state != "skipped" for outcome in ended.values())
        remaining = (time.monotonic() - start) / executed * (len(share) - len(ended)) if executed else 0.0
        time_left = f"; {duration(remaining)} left" if remaining else ""
        place = f"{len(ended):>{len(str(len(share)))}} of {len(share)}"
        report(f"[{place}{time_left}] {_line(outcome, titles[outcome.run])}")
    advice = "run the same command again; complete runs are kept"
    with explain_full_disk(str(out), advice), locked(out, wait=lambda: None):
        outcomes = {run: ended.get(run) or _of_another_process(run) for run in runs}
        complete = [run for run, outcome in outcomes.items() if outcome and outcome.state != "failed"]
        result = combine(experiment, [load_result(run.folder / RESULTS) for run in complete]) if complete else None
        unwritten = None
        try:
            with explain_full_disk(str(out / SUMMARY), advice):
                _write_summary(experiment, outcomes, result, out)
        except DataError as error:  # the outcomes are not lost with it
            unwritten = str(error)
            _LOG.warning(unwritten)
    known = tuple(filter(None, outcomes.values()))
    return SweepResult(known, tuple(run for run in runs if not outcomes[run]), result, out / SUMMARY, unwritten)


def _outcomes(workers: Workers, runs: Sequence[Run]) -> Iterator[Outcome]:
    """Runs that are attempted one after another; workers of other processes start only for incomplete ones."""

    def on_lost(run: Run | None, error: Exception) -> Outcome:
        failed = lost_task(run.folder.name if run else "a first run", error)
        if run is None:
            raise failed
        return Outcome(run, "failed", 0.0, str(failed))

    if workers.remote:
        present = {run: (run.folder / CONFIG).exists() for run in runs}  # to be read, or refused
        yield from (attempt(run) for run in runs if present[run])
        runs = [run for run in runs if not present[run]]
    with closing(workers.map(begin_runs, (), runs, on_lost, _device_type(runs))) as answers:
        for _, outcome in answers:
            yield outcome


def _device_type(runs: Sequence[Run]) -> str | None:
    """Type of device of the workers: cuda if a run names it; None, their own choice, if a run leaves it open."""
    devices = [getattr(run.config, "device", "cpu") for run in runs]
    if any(str(device).startswith("cuda") for device in devices):
        return "cuda"
    return None if None in devices else "cpu"


def begin_runs(device: str | None) -> Callable[[Run], Outcome]:
    """Returns `attempt`, after choosing the GPU that "cuda" in a config stands for, where `device` names one."""
    if device and ":" in device:
        import torch  # takes seconds

        torch.cuda.set_device(device)
    return attempt


def _of_another_process(run: Run) -> Outcome | None:
    return Outcome(run, "skipped", 0.0, "run by another process") if is_complete(run) else None


def _titles(configs: Sequence[Any]) -> list[str]:
    """A title for each config: "model=demo epsilon=0.2", made of the settings that differ among them."""
    settings = [identity(config) for config in configs]
    differ = (
        [name for name in settings[0] if len({json.dumps(values[name]) for values in settings}) > 1] if settings else []
    )
    return [" ".join(f"{name}={_short(values[name])}" for name in differ) or "single run" for values in settings]


def _short(value: Any) -> str:
    """The last part of a path."""
    return Path(value).name or value if isinstance(value, str) else str(value)


def _line(outcome: Outcome, title: str) -> str:
    state = {"done": f"{outcome.seconds:.1f} s", "skipped": "already complete", "failed": "FAILED"}[outcome.state]
    return f"{title}: {state}: {outcome.message}"


def _write_summary(experiment: str, outcomes: Mapping[Run, Outcome | None], result: Result | None, out: Path) -> None:
    """Writes the combined result of the complete runs and the states of all in place of an earlier summary."""
    with replace_folder(out / SUMMARY, (*RESULT_FILES, TABLE, RUNS)) as folder:
        for leftover in set(out.glob(f".{SUMMARY}.*{PARTIAL}")) - {folder}:  # of a kill: the sweep is locked
            remove(leftover)
        if result is not None:
            result.write_files(folder)
            share_script(folder, out.glob(f"*/{RESULTS}/{SCRIPT}"))
            write_file(folder / TABLE, csv_text(result.table).encode("utf-8", "replace"))
        lines = [_run_record(run, outcome) for run, outcome in outcomes.items()]
        record = json.dumps({"experiment": experiment, "cells": lines}, indent=1) + "\n"
        write_file(folder / RUNS, record.encode())


def _run_record(run: Run, outcome: Outcome | None) -> dict[str, Any]:
    """One of the "cells" of sweep.json; "left" is a run of another process that is not complete yet."""
    failed = outcome is not None and outcome.state == "failed"
    return {
        "folder": run.folder.name,
        "config": identity(run.config),
        "state": "left" if outcome is None else "failed" if failed else "complete",
        **({"error": outcome.message} if outcome is not None and failed else {}),
    }


def _refuse_other(out: Path) -> None:
    """Every sweep replaces the summary; a folder of that name that no sweep wrote is refused, and so is a store."""
    refuse_store(out)
    folder = out / SUMMARY
    if folder.exists() and not (folder / RUNS).exists():
        raise RequestError(f"out {str(out)!r} holds a {SUMMARY} that no sweep wrote; choose another folder")


def combine(experiment: str, results: Sequence[Result]) -> Result:
    """Returns the results of several runs of one experiment as one: concatenated tables and joint provenance."""
    import pandas as pd  # these take seconds, which `workbench sweep --help` does not pay
    import xarray as xr

    known = [result.provenance for result in results]
    with_values = [result.table.dropna(axis=1, how="all") for result in results]  # an empty column has no type to agree
    columns = list(dict.fromkeys(name for result in results for name in result.table.columns))
    table = pd.concat(with_values, ignore_index=True).reindex(columns=columns)
    provenance = {
        "model": ", ".join(dict.fromkeys(source["model"] for source in known)),
        "model_fingerprint": " ".join(dict.fromkeys(source["model_fingerprint"] for source in known)),
        "store": ", ".join(dict.fromkeys(source["store"] for source in known)),
        "store_fingerprint": " ".join(dict.fromkeys(source["store_fingerprint"] for source in known)),
        "rows": sum(source["rows"] for source in known),
        "settings": {"runs": [source["settings"] for source in known]},
        "workbench": version("interp-workbench"),
    }
    return Result(experiment, xr.Dataset(), table, provenance)
