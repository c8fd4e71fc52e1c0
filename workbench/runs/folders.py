"""Run folders: one experiment with one config, as a whole or not at all.

    runs/sinks/demo,epsilon=0.2-5d0e31c2/
      config.json         experiment and config; the seed is one of its fields
      environment.json    versions, git commit, device, start, duration, digests of the files that settings name
      log.txt             printed lines and warnings with their time
      results/            the result, as `Result.save` writes it, with its figures

A run is written under another name, `....partial`, and renamed when it is complete: a folder that has its name is
complete. A failed run stays under the other name, with the traceback in its log, until the run is tried again.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from workbench.io.checks import as_path
from workbench.io.errors import DataError, RequestError, WorkbenchError
from workbench.io.files import PARTIAL, commit_folder, explain_full_disk, fsync_tree, locked, remove, sha256_bytes
from workbench.io.log import PROGRESS
from workbench.io.parse import read_json
from workbench.results.experiment import identity
from workbench.results.registry import find_experiment
from workbench.results.result import SCRIPT, Result, load_result, share_script
from workbench.runs.environment import environment, file_digests
from workbench.runs.run_log import logged

CONFIG, ENVIRONMENT, LOG, RESULTS = "config.json", "environment.json", "log.txt", "results"
_FORMAT, _VERSION = "workbench.run", 1
_LONGEST = 100
_REMOVE = "remove it and run it again"


@dataclass(frozen=True)
class Run:
    """An experiment with one config, and its folder. Pickles by module name, so that another process can execute it."""

    experiment: str
    config: Any
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """State, duration and message of a finished run."""

    run: Run
    state: Literal["done", "skipped", "failed"]
    """skipped: the run was complete already."""
    seconds: float
    message: str
    """Headline of the result, or the error, in one line."""


def run_in(out: str | Path, experiment: str, config: Any) -> Run:
    """Returns the run of a config, in the folder under `out` that is named after the config."""
    return Run(experiment, config, as_path("out", out) / run_name(config))


def run_name(config: Any) -> str:
    """Returns a name made of the config alone: its model, the settings that are not the defaults, and a checksum."""
    parts = []
    for field in fields(config):
        value = getattr(config, field.name)
        if not field.compare or (value == field.default and field.name != "model"):
            continue
        texts = [Path(str(part)).name or str(part) for part in (value if isinstance(value, tuple) else (value,))]
        parts.append("+".join(texts) if field.name == "model" else f"{field.name}={'+'.join(texts)}")
    readable = re.sub(r"[^\w.,+=@-]+", "_", ",".join(parts), flags=re.ASCII).lstrip(".-")[:_LONGEST]
    return f"{readable or 'default'}-{sha256_bytes(json.dumps(identity(config), sort_keys=True).encode())[:8]}"


def attempt(run: Run) -> Outcome:
    """Executes a run and returns its outcome; an exception becomes a failed outcome, so that other runs can go on."""
    start = time.monotonic()
    state: Literal["done", "skipped", "failed"]
    try:
        state = "skipped" if is_complete(run) else "done"
        message = execute(run).headline()
    except WorkbenchError as error:
        state, message = "failed", str(error)
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        state, message = "failed", f"unexpected {type(error).__name__}: {text}; see {_partial(run.folder) / LOG}"
    return Outcome(run, state, time.monotonic() - start, message)


def execute(run: Run) -> Result:
    """Returns the result of a run: read if its folder is complete, else computed and written.

    If another process executes the same run, waits for its end.

    Raises:
        RequestError: The folder holds another run.
        Exception: Any exception that the experiment raises; the log is then in the folder with the suffix `.partial`.
    """
    if is_complete(run):
        return load_result(run.folder / RESULTS)
    partial, advice = _partial(run.folder), "run it again"
    with (
        explain_full_disk(f"run {str(run.folder)!r}", advice),
        locked(partial, wait=lambda: PROGRESS.info(f"waiting for another process that runs {run.folder}")),
    ):
        if is_complete(run):
            remove(partial)
            return load_result(run.folder / RESULTS)
        for path in partial.iterdir():
            remove(path)
        result = _execute_in(run, partial)
        fsync_tree(partial)
        commit_folder(partial, run.folder)
    return result


def is_complete(run: Run) -> bool:
    """Returns whether the run's folder holds it. Raises RequestError if the folder holds anything else."""
    folder = run.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        known = read_json(folder / CONFIG, _REMOVE, finite=False)
        experiment, config = known["experiment"], _object(known["config"])
    except (DataError, KeyError, TypeError):
        raise RequestError(f"out {str(folder)!r} exists and is not a run; choose another folder") from None
    if experiment != run.experiment:
        raise RequestError(
            f"out {str(folder)!r} holds a run of {experiment}, not of {run.experiment}; choose another folder"
        )
    requested = identity(run.config)
    for name in dict.fromkeys([*requested, *config]):
        left_open = name == "device" and requested.get(name) is None  # the numbers of any device will do
        if requested.get(name) != config.get(name) and not left_open:
            raise RequestError(
                f"out {str(folder)!r} holds a run with {name} {config.get(name)!r}, not {requested.get(name)!r}; "
                "choose another folder or remove it"
            )
    if name := _changed_setting(run):
        raise RequestError(
            f"out {str(folder)!r} holds a run of {name} {requested[name]!r} from before its files changed; remove it "
            "to run again, or choose another folder"
        )
    return True


def load_run(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any], Result]:
    """Returns config, environment and result of a complete run.

    Raises:
        RequestError: The folder has no run.
        DataError: The run is damaged.
    """
    folder = as_path("folder", folder)
    if not (folder / CONFIG).is_file():
        raise RequestError(f"run {str(folder)!r}: no {CONFIG} there; give a folder that an experiment wrote")
    try:
        config, around = (read_json(folder / name, _REMOVE, finite=False) for name in (CONFIG, ENVIRONMENT))
        return _object(config["config"]), around, load_result(folder / RESULTS)
    except (KeyError, TypeError) as error:
        raise DataError(f"run {str(folder)!r} is damaged ({CONFIG}: {error}); {_REMOVE}") from error


# ---- inside a run ---------------------------------------------------------------------------------------


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _execute_in(run: Run, folder: Path) -> Result:
    experiment = find_experiment(run.experiment)
    config = {"format": _FORMAT, "version": _VERSION, "experiment": run.experiment, "config": identity(run.config)}
    _write(folder / CONFIG, config)
    around = environment(Path(experiment.__file__), getattr(run.config, "device", "cpu"))
    around["files"] = file_digests(run.config)
    start = time.monotonic()
    with logged(folder / LOG, f"{run.experiment} {run.config}") as log:
        result = experiment.run(run.config)
        result.save(folder / RESULTS)
        share_script(folder / RESULTS, run.folder.parent.glob(f"*/{RESULTS}/{SCRIPT}"))
        log(result.headline())
    _write(folder / ENVIRONMENT, {**around, "seconds": round(time.monotonic() - start, 3)})
    return result


def _changed_setting(run: Run) -> str | None:
    """A setting whose files differ from those that the run in the folder read; removed files do not count."""
    try:
        before = _object(read_json(run.folder / ENVIRONMENT, _REMOVE, finite=False).get("files", {}))
    except (DataError, TypeError):  # damaged: `load_run` reports it
        return None
    return next((name for name, digest in file_digests(run.config).items() if before.get(name, digest) != digest), None)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {json.dumps(value)[:60]}")
    return value


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
