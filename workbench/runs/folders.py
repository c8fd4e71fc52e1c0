"""Run folders: one experiment with one config, whole or not there.

    runs/sinks/demo,epsilon=0.2-5d0e31c2/
      config.json         experiment and config; the seed is one of its fields
      environment.json    versions, git commit, device, when, how long; which files its settings named
      log.txt             what was printed and warned, with the time
      results/            the result, as `Result.save` writes it, with its figures

A run is written under another name, `....partial`, and renamed when it is complete: a folder that has its name is
complete. What failed stays under the other name, its log telling why, until the run is tried again.
"""

from __future__ import annotations

import contextlib
import filecmp
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.io.errors import DataError, RequestError, WorkbenchError
from workbench.io.files import PARTIAL, commit_folder, fsync_tree, locked, remove, sha256_bytes
from workbench.io.log import PROGRESS, copy_warnings
from workbench.results.experiment import identity
from workbench.results.registry import find_experiment

if TYPE_CHECKING:
    from workbench.results.result import Result

CONFIG, ENVIRONMENT, LOG, RESULTS = "config.json", "environment.json", "log.txt", "results"
_FORMAT, _VERSION = "workbench.run", 1
_LIBRARIES = ("interp-workbench", "torch", "transformers", "transformer-lens", "sae-lens", "tokenizers", "numpy")
_CONFIGS = ("config.json", "cfg.json")
"""What makes a folder a model, or a sparse autoencoder."""
_LONGEST = 100


@dataclass(frozen=True)
class Cell:
    """A run that is asked for. Pickles by the names of its modules, so that another process can run it."""

    experiment: str
    config: Any
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: Cell
    state: Literal["done", "there", "failed"]
    """there: it was complete, and nothing was done."""
    seconds: float
    told: str
    """What was found, or why it failed, in one line."""


def cell_of(experiment: str, config: Any, out: str | Path) -> Cell:
    """The cell of a config, in the folder under `out` that is named after it."""
    return Cell(experiment, config, Path(out) / run_name(config))


def run_name(config: Any) -> str:
    """A name that depends on the config alone: its model, the settings that are not the defaults, and a checksum."""
    parts = []
    for field in fields(config):
        value = getattr(config, field.name)
        if not field.compare or (value == field.default and field.name != "model"):
            continue
        texts = [Path(str(part)).name or str(part) for part in (value if isinstance(value, tuple) else (value,))]
        parts.append("+".join(texts) if field.name == "model" else f"{field.name}={'+'.join(texts)}")
    readable = re.sub(r"[^\w.,+=@-]+", "_", ",".join(parts), flags=re.ASCII).lstrip(".-")[:_LONGEST]
    return f"{readable or 'default'}-{sha256_bytes(json.dumps(identity(config), sort_keys=True).encode())[:8]}"


def attempt(cell: Cell) -> Outcome:
    """`run_cell`, with what goes wrong told in the outcome: one cell that fails is no reason to stop the others."""
    began = time.monotonic()
    try:
        there = is_complete(cell)
        state, told = ("there" if there else "done"), run_cell(cell).headline()
    except WorkbenchError as error:
        state, told = "failed", str(error)
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        state, told = "failed", f"unexpected {type(error).__name__}: {message}; see {_partial(cell.folder) / LOG}"
    return Outcome(cell, state, time.monotonic() - began, told)


def run_cell(cell: Cell) -> Result:
    """The result of a cell: read where its folder is complete, else made, and with it the folder.

    Where another process is at it, its end is waited for. Raises RequestError where the folder holds another run, and
    whatever the experiment raises; the log is then in the folder's partial twin.
    """
    from workbench.results.result import load_result

    if is_complete(cell):
        return load_result(cell.folder / RESULTS)
    partial = _partial(cell.folder)
    with locked(partial, wait=lambda: PROGRESS.info(f"waiting for another process that runs {cell.folder}")):
        if is_complete(cell):
            remove(partial)
            return load_result(cell.folder / RESULTS)
        for path in partial.iterdir():
            remove(path)
        result = _run(cell, partial)
        fsync_tree(partial)
        commit_folder(partial, cell.folder)
    return result


def is_complete(cell: Cell) -> bool:
    """Whether the cell's folder holds its run. Raises RequestError where it holds anything else."""
    if not cell.folder.exists() or (cell.folder.is_dir() and not any(cell.folder.iterdir())):
        return False
    try:
        known = json.loads((cell.folder / CONFIG).read_text())
        experiment, config = known["experiment"], known["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(f"out {str(cell.folder)!r} exists and is no run; choose another folder") from None
    if experiment != cell.experiment:
        raise RequestError(
            f"out {str(cell.folder)!r} holds a run of {experiment}, not of {cell.experiment}; choose another folder"
        )
    asked = identity(cell.config)
    for name in dict.fromkeys([*asked, *config]):
        if asked.get(name) != config.get(name):
            raise RequestError(
                f"out {str(cell.folder)!r} holds a run with {name} {config.get(name)!r}, not {asked.get(name)!r}; "
                "choose another folder or remove it"
            )
    if changed := _changed(cell):
        raise RequestError(
            f"out {str(cell.folder)!r} holds a run of {changed} {asked[changed]!r} as it was before its files were "
            "changed; remove it to run again, or choose another folder"
        )
    return True


def load_run(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any], Result]:
    """Config, environment and result of a complete run. Raises RequestError where there is none, DataError where one is
    damaged."""
    from workbench.results.result import load_result

    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RequestError(f"run {str(folder)!r}: no {CONFIG} there; give a folder that an experiment wrote")
    try:
        config, environment = (json.loads((folder / name).read_text()) for name in (CONFIG, ENVIRONMENT))
        return config["config"], environment, load_result(folder / RESULTS)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, WorkbenchError):
            raise
        raise DataError(f"run {str(folder)!r} is damaged ({error}); remove it and run it again") from error


# ---- inside a run ---------------------------------------------------------------------------------------


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _run(cell: Cell, folder: Path) -> Result:
    experiment = find_experiment(cell.experiment)
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "experiment": cell.experiment,
        "config": identity(cell.config),
    }
    _write(folder / CONFIG, config)
    around = environment(experiment, getattr(cell.config, "device", "cpu")) | {"files": _files(cell.config)}
    began = time.monotonic()
    with _logged(folder / LOG, f"{cell.experiment} {cell.config}") as log:
        result = experiment.run(cell.config)
        result.save(folder / RESULTS)
        share_script(folder / RESULTS, cell.folder.parent)
        log(result.headline())
    _write(folder / ENVIRONMENT, {**around, "seconds": round(time.monotonic() - began, 3)})
    return result


def _changed(cell: Cell) -> str | None:
    """A setting whose files are not those that the run in the cell's folder read; files that are gone are not told."""
    try:
        before = json.loads((cell.folder / ENVIRONMENT).read_text()).get("files", {})
    except (OSError, ValueError):  # damaged: told where the run is read
        return None
    return next((name for name, now in _files(cell.config).items() if before.get(name, now) != now), None)


def _files(config: Any) -> dict[str, str]:
    """Settings that name files or models on this disk, each with a digest of their names, sizes and times."""
    found = {}
    for name, value in identity(config).items():
        named = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str)]
        models = [part for part in named if any(os.path.isfile(os.path.join(part, one)) for one in _CONFIGS)]
        paths = [part for part in named if os.path.isfile(part)]
        paths += [entry.path for part in models for entry in os.scandir(part) if entry.is_file()]
        stats = sorted((os.path.basename(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths)
        if stats:
            found[name] = sha256_bytes(json.dumps(stats).encode())[:16]
    return found


def share_script(result: Path, runs: Path) -> None:
    """Makes plotly's script beside a saved result's figures, 5 MB, a hard link to that of another run in `runs`."""
    own = result / "figures" / "plotly.min.js"
    others = runs.glob(f"*/{RESULTS}/figures/{own.name}")
    with contextlib.suppress(OSError):  # no figure, or no hard links there
        others = (path for path in others if not path.samefile(own))
        other = next((path for path in others if filecmp.cmp(own, path, shallow=False)), None)
        if other is not None:
            link = own.with_name(own.name + PARTIAL)
            os.link(other, link)
            os.replace(link, own)


def environment(experiment: Any, device: str = "cpu") -> dict[str, Any]:
    """Where a run runs: Python, platform, device, threads, versions, the commit of the experiment's own code, now."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": gpu or f"{device}, {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": versions,
        **_commit(Path(experiment.__file__)),
        "started": _now(),
    }


def _commit(source: Path) -> dict[str, Any]:
    """The commit that `source` is of, and whether anything around it is changed since; None where git does not know."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # or a home folder under git would pass for its repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}


@contextlib.contextmanager
def _logged(path: Path, title: str) -> Iterator[Any]:
    """Inside, what is printed and warned is also written to `path`; so is what goes wrong, with its traceback."""
    with path.open("w", encoding="utf-8") as file:

        def log(text: str) -> None:
            print(f"{_now()}  {text.rstrip()}", file=file, flush=True)

        show = warnings.showwarning

        def warned(message: Any, category: Any, *where: Any, **how: Any) -> None:
            log(f"warning: {message}")
            show(message, category, *where, **how)

        log(title)
        warnings.showwarning = warned
        try:
            with contextlib.redirect_stdout(_Tee(sys.stdout, log)), copy_warnings(log):
                yield log
        except BaseException:
            log(traceback.format_exc())
            raise
        finally:
            warnings.showwarning = show


class _Tee(io.TextIOBase):
    """Text goes to the terminal, and line by line to the log."""

    def __init__(self, terminal: Any, log: Any) -> None:
        self.terminal, self.log, self.line = terminal, log, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.log(line)
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
