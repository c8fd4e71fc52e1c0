"""Runs benchmarks by name, all of them without one, and writes their sections of a page."""

from __future__ import annotations

import argparse
import os
import platform
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path
from typing import Any

from workbench.experiments.benchmarks.measure import Comparison, table

NAMES = (
    "recording_speed",
    "long_context",
    "saelens",
    "reading",
    "encoding",
    "features",
    "memory",
    "probes",
    "scale",
    "import_time",
)
INTRODUCTION = """\
# Benchmarks

Both sides of a line run in turn, in the same process and on the same input; memory is taken in a process of its own.
Shown are the medians of the repeats, and the lowest and highest of a single one. Speed is that of the recording itself,
from the first forward pass to the committed store; "the whole call" is all that `wb.record` does, the fingerprint of
the weights and the stored unembedding included. MB are 10^6 bytes. Under each section: the command that wrote it, when,
and on what; `--write docs/benchmarks.md` replaces a section."""
_LIBRARIES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets", "numpy", "pyarrow")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}; all when none is named")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that they run, the numbers say nothing")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="write the tables to this Markdown page, in place of older ones"
    )
    parser.add_argument("--date", help="when this was measured, as the page shall say it")
    parser.add_argument("--scratch", type=Path, default=Path("build"), help="folder on the disk to be measured")
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    measured = f"{asked.date}, " if asked.date else ""
    sections = {name: _section(name, asked.quick, asked.scratch, measured) for name in asked.names or NAMES}
    if asked.write:
        known = asked.write.read_text(encoding="utf-8") if asked.write.exists() else ""
        asked.write.write_text(page(known, sections), encoding="utf-8")


def page(known: str, sections: Mapping[str, str]) -> str:
    """The page `known` with these sections in place of its own of the same names; in the order of `NAMES`."""
    older = {text.split("\n", 1)[0].removeprefix("## "): text for text in re.split(r"^(?=## )", known, flags=re.M)[1:]}
    found = {name: text.strip() for name, text in {**older, **sections}.items()}
    return "\n\n".join([INTRODUCTION, *(found[name] for name in NAMES if name in found)]) + "\n"


def _section(name: str, quick: bool, scratch: Path, measured: str) -> str:
    """Runs one benchmark; what the page says of it."""
    module = import_module(f"workbench.experiments.benchmarks.{name}")
    settings = module.QUICK if quick else module.FULL
    scratch.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=scratch) as folder:
        found: list[Comparison] = settings.run(Path(folder).absolute())
    sizes = ", ".join(f"{field.name} {_plain(getattr(settings, field.name))}" for field in fields(settings))
    text = f"## {name}\n\n{module.__doc__}\n\n{cleandoc(settings.__doc__)}\n{sizes}.\n\n{table(found)}\n\n"
    text += f"`python -m workbench.experiments.benchmarks {name}`, {measured}{_device()}.\n"
    print(text, f"({name} took {time.monotonic() - began:.0f} s)\n", sep="\n", flush=True)
    return text


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _device() -> str:
    """Processor, cores and memory, as Linux tells them, and the versions that matter."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = models[0] if models else platform.machine()
    versions = ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    return (
        f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, no GPU used; "
        f"Python {platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    main()
