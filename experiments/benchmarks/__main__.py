"""Run benchmarks by name, or all of them, and write their sections of a page.

Every size of a benchmark is a flag: `reading --rows 4096 --repeats 2`. A flag applies to each named benchmark that has
that size. `--quick` starts from tiny sizes, which show that the benchmarks run. Each section states
the seconds it took.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib import import_module
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path
from typing import Any

import torch

from workbench.experiments.benchmarks.measure import Comparison, processor, table
from workbench.io.errors import RequestError

NAMES = (
    "recording_speed",
    "long_context",
    "saelens",
    "reading",
    "interventions",
    "encoding",
    "features",
    "memory",
    "probes",
    "pages",
    "scale",
    "import_time",
    "gpu",
)
INTRODUCTION = """\
# Benchmarks

Both sides of a comparison run alternately, in the same process and on the same input; memory is measured in a process
of its own. The tables show medians over the repeats, and the lowest and highest single repeat. The speed of a recording
is measured from the first forward pass to the committed store; "the whole call" is all of `wb.record`, including the
fingerprint of the weights and the stored unembedding. MB are 10^6 bytes. The line below each section gives the command
that wrote it, the date, the machine and the duration; `--write docs/benchmarks.md` replaces a section, and with
`--beside` adds one of this processor to it. Each size is also a flag of the command."""
_LIBRARIES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets", "numpy", "pyarrow")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the named benchmarks and writes their sections of the page."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench.experiments.benchmarks",
        description=__doc__,
        epilog="sizes:\n" + "\n".join(f"  {name}: {_sizes(_settings(name, False))}" for name in NAMES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}; default: all, gpu where there is one"
    )
    parser.add_argument(
        "--quick", "--dry-run", action="store_true", help="tiny sizes on the CPU, without meaningful numbers"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the sections of this Markdown page")
    parser.add_argument(
        "--beside", action="store_true", help="give the sections this processor's name, to stand beside another's"
    )
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="date of the measurement; default: today")
    parser.add_argument("--scratch", type=Path, default=Path("build"), help="folder on the disk to be measured")
    request, flags = parser.parse_known_args(arguments)
    unknown = [name for name in request.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; available: {', '.join(NAMES)}")
    names = request.names or [name for name in NAMES if name != "gpu" or torch.cuda.is_available()]
    settings = {name: _settings(name, request.quick) for name in names}
    settings = _with_sizes(parser, settings, flags)
    for number, name in enumerate(names, 1):
        print(f"benchmark {number} of {len(names)}: {name}", flush=True)
        try:
            heading = f"{name}, {processor()}" if request.beside else name
            section = _section(name, settings[name], request.scratch, request.date, heading)
        except RequestError as error:
            parser.error(str(error))
        if request.write:
            existing = request.write.read_text(encoding="utf-8") if request.write.exists() else ""
            request.write.write_text(page(existing, {heading: section}), encoding="utf-8")


def _settings(name: str, quick: bool) -> Any:
    module = import_module(f"workbench.experiments.benchmarks.{name}")
    return module.QUICK if quick else module.FULL


def _with_sizes(parser: argparse.ArgumentParser, settings: dict[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """Returns the settings with the sizes that the flags give; ends with an error for a flag that is no size."""
    sizes = argparse.ArgumentParser(prog=parser.prog, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    defaults = {
        field.name: getattr(benchmark, field.name) for benchmark in settings.values() for field in fields(benchmark)
    }
    for name, default in defaults.items():
        several = isinstance(default, tuple)
        kind = type(default[0] if several else default)
        sizes.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if several else None)
    values = vars(sizes.parse_args(flags))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {
        name: replace(benchmark, **{key: value for key, value in values.items() if hasattr(benchmark, key)})
        for name, benchmark in settings.items()
    }


def page(existing: str, sections: Mapping[str, str]) -> str:
    """Returns the page `existing` with these sections in place of those of the same headings, in the order of `NAMES`.

    A heading is the name of a benchmark, or the name, a comma and a processor.
    """
    older = {
        text.split("\n", 1)[0].removeprefix("## "): text for text in re.split(r"^(?=## )", existing, flags=re.M)[1:]
    }
    texts = sorted({**older, **sections}.items())
    ordered = [text.strip() for name in NAMES for heading, text in texts if heading.partition(", ")[0] == name]
    return "\n\n".join([INTRODUCTION, *ordered]) + "\n"


def _section(name: str, settings: Any, scratch: Path, date: str, heading: str) -> str:
    """Runs one benchmark, prints and returns its section of the page; described under its plain name alone."""
    module = import_module(f"workbench.experiments.benchmarks.{name}")
    scratch.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=scratch) as folder:
        comparisons: list[Comparison] = settings.run(Path(folder).absolute())
    seconds = time.monotonic() - start
    description = f"{module.__doc__}\n\n{cleandoc(settings.__doc__)}\n" if heading == name else ""
    text = f"## {heading}\n\n{description}{_sizes(settings)}.\n\n{table(comparisons)}\n\n"
    on_gpu = getattr(settings, "device", "cpu") != "cpu"
    text += f"`{_command(name, settings)}`, {date}, {seconds:,.0f} s, {_device(on_gpu)}.\n"
    print(text, flush=True)
    return text


def _command(name: str, settings: Any) -> str:
    """Returns the command that runs a benchmark with these sizes."""
    full = _settings(name, False)
    words = ["python -m workbench.experiments.benchmarks", name]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(full, field.name):
            words.append(f"--{field.name.replace('_', '-')}")
            words += map(str, value) if isinstance(value, tuple) else [str(value)]
    return " ".join(words)


def _sizes(settings: Any) -> str:
    return ", ".join(f"{field.name} {_plain(getattr(settings, field.name))}" for field in fields(settings))


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _device(on_gpu: bool) -> str:
    """Returns processor, cores and memory, as Linux reports them, the GPU if used, and the versions that matter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f"one {torch.cuda.get_device_name()}" if on_gpu else "no GPU used"
    versions = ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    return (
        f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {gpu}; "
        f"Python {platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    main()
