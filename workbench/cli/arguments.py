"""Arguments as instances of settings: parsing, and options that several verbs share."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import tyro

from workbench.io.errors import RequestError
from workbench.io.tasks import Workers

_Settings = TypeVar("_Settings")


@runtime_checkable
class Command(Protocol):
    """A parsed command line."""

    def run(self) -> int:
        """Does the work and returns the exit code."""
        ...


@dataclass(frozen=True)
class Parallel:
    """Parallel workers."""

    workers: int | None = None
    """Number of worker processes; each takes one GPU or an equal share of the CPU cores. Needs Ray."""
    ray_address: str | None = None
    """Address of a Ray cluster for the workers: auto, or ray://HOST:PORT. Default: this machine."""
    threads: int | None = None
    """CPU threads of each worker. Default: this machine's cores divided by the number of workers; on a cluster 1."""
    share: bool = False
    """Do this process's share of a torchrun or srun job, given by RANK and WORLD_SIZE or SLURM_PROCID and
    SLURM_NTASKS."""

    def to_workers(self, device: str | None) -> Workers | None:
        """Returns the `workers` of `record`, `extract_features` and `sweep`; None: this process alone."""
        if self.workers is None and (self.ray_address or self.threads):
            raise RequestError("--ray-address and --threads configure workers; give their number with --workers")
        if self.share and self.workers is not None:
            raise RequestError("--share and --workers are two ways to divide the work; give one of them")
        from workbench.parallel.ray import RayWorkers
        from workbench.parallel.share import Share

        if self.share:
            return Share.from_environment()
        return None if self.workers is None else RayWorkers(self.workers, self.ray_address, self.threads, device)


def parse(kind: type[_Settings], program: str, arguments: list[str], description: str | None = None) -> _Settings:
    """Returns the arguments as an instance of `kind`. Raises RequestError, in one line, where they are wrong."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=program, description=description, args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        problem, *rest = _sections(errors.getvalue())
        near = [name for part in rest if part.startswith("Perhaps") for name in re.findall(r"--[\w-]+", part)]
        hint = f"; nearest: {', '.join(dict.fromkeys(near))}" if near else ""
        raise RequestError(f"{problem.rstrip('.')}{hint}; see {program} --help") from None


def _sections(framed: str) -> list[str]:
    """Sections between the rules of tyro's frame, which is drawn with other characters where output is not UTF-8."""
    lines = [line.strip("│ ") for line in framed.splitlines()]
    rules = [i for i, line in enumerate(lines) if line[:1] in tuple("╭╰") or (len(line) > 9 and set(line) <= set("─-"))]
    return [" ".join(filter(None, lines[first + 1 : last])) for first, last in itertools.pairwise([*rules, len(lines)])]


def texts_of(names: Sequence[str]) -> str | list[str | Path]:
    """Returns the texts of a recording: one source as it is, several as files and documents."""
    return names[0] if len(names) == 1 else [_source(text) for text in names]


def _source(text: str) -> str | Path:
    """In a list of texts a string is a document and a Path a file."""
    if text.startswith("hf:"):
        raise RequestError(f"{text} cannot be mixed with other texts; record it alone and add the others with --append")
    return text if any(map(str.isspace, text)) and not os.path.isfile(text) else Path(text)


def docstring(thing: Any) -> str:
    """Returns the docstring of a class or module, stripped."""
    return (thing.__doc__ or "").strip()
