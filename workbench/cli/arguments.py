"""Arguments as instances of settings: parsing, and options that several verbs share."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from workbench.cli.help import help_text
from workbench.cli.options import Option, build, options_of
from workbench.cli.spelling import spelled_for_the_shell
from workbench.cli.terminal import print_plain
from workbench.io.errors import RequestError, nearest
from workbench.io.tasks import Workers

_Settings = TypeVar("_Settings")


@runtime_checkable
class Command(Protocol):
    """A parsed command line. It may have `after_interrupt`, the end of the line "interrupted"."""

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
        if self.workers is None and (self.ray_address or self.threads is not None):
            raise RequestError("--ray-address and --threads configure workers; give their number with --workers")
        if self.share and self.workers is not None:
            raise RequestError("--share and --workers are two ways to divide the work; give one of them")
        from workbench.parallel.ray import RayWorkers
        from workbench.parallel.share import Share

        if self.share:
            return Share.from_environment()
        return None if self.workers is None else RayWorkers(self.workers, self.ray_address, self.threads, device)

    def workers_and_device(self, device: str | None) -> tuple[Workers | None, str | None]:
        """Returns the workers, and the device of the model or SAE that this process loads to plan their work."""
        workers = self.to_workers(device)
        return workers, (None if workers is None else workers.planning_device) or device


def parse(
    kind: type[_Settings], program: str, arguments: list[str], description: str | None = None
) -> _Settings | Help:
    """Returns the arguments as an instance of `kind`, or the help of the command where they ask for it.

    Options may stand anywhere, as `--name value` or `--name=value`. An option of several values takes the words up to
    the next option, each split at commas; after `--` all words are positional.

    Raises:
        RequestError: Wrong arguments, in one line.
    """
    options = tuple(options_of(kind))
    if not {"-h", "--help"}.isdisjoint(itertools.takewhile(lambda word: word != "--", arguments)):
        return Help(help_text(program, options, docstring(kind) if description is None else description))
    end = f"; see {program} --help"
    try:
        placed = _divide(arguments, options)
        _check_missing(options, placed)
        values = {option.name: _value(option, words) for option, words in placed.items()}
    except RequestError as error:
        raise RequestError(f"{error}{end}") from None
    with spelled_for_the_shell(options, end):
        return build(kind, values)


@dataclass(frozen=True)
class Help:
    """Help of a command, to be printed."""

    text: str

    def run(self) -> int:
        """Prints the help."""
        print_plain(self.text.removesuffix("\n"))
        return 0


def _divide(arguments: Sequence[str], options: Sequence[Option]) -> dict[Option, list[str]]:
    """The words of each option and positional argument that was given."""
    flags = {option.flag: option for option in options if not option.positional}
    flags |= {f"--no-{flag[2:]}": option for flag, option in flags.items() if option.reader.flag}
    placed: dict[Option, list[str]] = {}
    free: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            free += waiting
            break
        if not _is_option(word):
            free.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in flags:
            raise RequestError(f"unknown option {name}{nearest(name, flags, n=1)}")
        option = flags[name]
        if option in placed and not option.reader.several:
            raise RequestError(f"{name} is given twice; give it once")
        if option.reader.flag:
            if not equals and waiting and waiting[0] in option.reader.choices:
                value = waiting.pop(0)
            if value not in ("", *option.reader.choices) or (equals and not value):
                raise RequestError(f"{name} takes no value, but has {value!r}; leave it out")
            placed[option] = ["" if name.startswith("--no-") and option.flag != name else value or name]
        elif option.reader.several:
            count = next((n for n, following in enumerate(waiting) if _is_option(following)), len(waiting))
            placed.setdefault(option, []).extend([value] if equals else waiting[:count])
            del waiting[: 0 if equals else count]
        elif equals or (waiting and not _is_option(waiting[0])):
            placed[option] = [value if equals else waiting.pop(0)]
        else:
            raise RequestError(f"{name} needs a value: {option.usage}")
    return placed | _placed(free, options)


def _is_option(word: str) -> bool:
    """True for --name and -x; a number below zero, and a word with white space, are values."""
    return bool(re.match(r"--?[^\W\d]|--$", word)) and not any(map(str.isspace, word.partition("=")[0]))


def _placed(words: list[str], options: Sequence[Option]) -> dict[Option, list[str]]:
    """The words of the positional arguments, which take them in order."""
    placed: dict[Option, list[str]] = {}
    for option in options:
        if option.positional and words:
            count = len(words) if option.reader.several else 1
            placed[option], words = words[:count], words[count:]
    if words:
        raise RequestError(f"unexpected argument {words[0]!r}")
    return placed


def _check_missing(options: Sequence[Option], placed: dict[Option, list[str]]) -> None:
    missing = [option for option in options if option.required and option not in placed]
    if not missing:
        return
    text = f"missing {', '.join(option.flag if option.positional else option.usage for option in missing)}"
    places = [option.flag for option in missing if option.positional]
    greedy = next((option for option, words in placed.items() if option.reader.several and len(words) > 1), None)
    if places and greedy is not None and not greedy.positional:
        words = placed[greedy]
        text += (
            f"; {greedy.flag} took all of {shlex.join(words)}: write {places[0]} before the options, "
            f"or {greedy.flag} {','.join(words[:-1])} -- {shlex.quote(words[-1])}"
        )
    raise RequestError(text)


def _value(option: Option, words: list[str]) -> Any:
    reader = option.reader
    if reader.flag:
        return reader.read(words[0]) if words[0] in reader.choices else bool(words[0])
    if reader.optional and words == ["None"]:
        return None
    if reader.several and not option.positional:
        words = [part for word in words for part in _parts(word)]
    values = []
    for word in words:
        try:
            values.append(reader.read(word))
        except ValueError as error:
            near = nearest(word, reader.choices) if len(reader.choices) > 3 else ""
            raise RequestError(f"{option.flag} must be {error}, not {word!r}{near}") from None
    return tuple(values) if reader.several else values[0]


def _parts(word: str) -> list[str]:
    """A list written as one word; text with white space is one value."""
    return [word] if any(map(str.isspace, word)) else [part for part in word.split(",") if part] or [word]


def texts_of(names: Sequence[str]) -> str | Path | list[str | Path]:
    """Returns the texts of a recording: one source as it is, several as files and documents."""
    (first, *other_names) = names
    if other_names:
        return [_source(text) for text in names]
    return first if not first or first.startswith("hf:") or any(map(str.isspace, first)) else Path(first)


def _source(text: str) -> str | Path:
    """In a list of texts a string is a document and a Path a file."""
    if text.startswith("hf:"):
        raise RequestError(f"{text} cannot be mixed with other texts; record it alone and add the others with --append")
    is_text = not text or any(map(str.isspace, text))
    return text if is_text and not os.path.isfile(text) else Path(text)


def docstring(owner: Any) -> str:
    """Returns the docstring of a class or module, stripped."""
    return (owner.__doc__ or "").strip()
