"""Runs benchmarks by name, all of them without one, and writes the page that shows them."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import Comparison, table

NAMES = (
    "recording_speed",
    "long_context",
    "saelens",
    "reading",
    "encoding",
    "features",
    "memory",
    "probes",
    "import_time",
)
_LIBRARIES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets", "numpy", "pyarrow")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}; all when none is named")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that they run, the numbers say nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables as Markdown to this file")
    parser.add_argument("--date", help="when this was measured, as the page shall say it")
    parser.add_argument("--scratch", type=Path, default=Path("build"), help="folder on the disk to be measured")
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    sections = [_section(name, asked.quick, asked.scratch) for name in asked.names or NAMES]
    if asked.write:
        asked.write.write_text("\n".join([_introduction(asked.date), *sections]))


def _section(name: str, quick: bool, scratch: Path) -> str:
    """Runs one benchmark; what the page says of it."""
    module = import_module(f"experiments.benchmarks.{name}")
    settings = module.QUICK if quick else module.FULL
    scratch.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=scratch) as folder:
        found: list[Comparison] = settings.run(Path(folder).absolute())
    sizes = ", ".join(f"{field.name} {_plain(getattr(settings, field.name))}" for field in fields(settings))
    text = f"## {name}\n\n{module.__doc__}\n\n{cleandoc(settings.__doc__)}\n{sizes}.\n\n{table(found)}\n"
    print(text, f"({name} took {time.monotonic() - began:.0f} s)\n", sep="\n", flush=True)
    return text


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _introduction(date: str | None) -> str:
    versions = ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    command = " ".join(map(shlex.quote, sys.argv[1:]))
    return f"""\
# Benchmarks

Both sides of a line run in turn, in the same process and on the same input; memory is taken in a process of its own.
Shown are the medians of the repeats, and the lowest and highest of a single one. Speed is that of the recording itself,
from the first forward pass to the committed store; "the whole call" is all that `wb.record` does, the fingerprint of
the weights and the stored unembedding included. MB are 10^6 bytes.

- Written by `python -m experiments.benchmarks {command}`{f", {date}" if date else ""}.
- Device: {_device()}.
- Versions: Python {platform.python_version()}, {versions}.
"""


def _device() -> str:
    """Processor, cores and memory, as Linux tells them."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = models[0] if models else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB of memory; no GPU used"


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    main()
