"""The `workbench` command: finds the verb, runs it, and turns what goes wrong into one line.

Exit codes: 0 done; 1 the data are damaged or the work failed; 2 the request was wrong; 130 interrupted. Errors are one
line on stderr; `--debug` shows the traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from workbench.cli import experiment_verbs, probe_verbs
from workbench.cli.arguments import Command, docstring, parse
from workbench.cli.completion import SCRIPTS, Options, options
from workbench.cli.experiment_verbs import experiment_command, sweep_command, sweep_options
from workbench.cli.feature_verbs import Features, Top
from workbench.cli.page_verbs import Demo, Export, Report
from workbench.cli.probe_verbs import Probes, probe_command, probe_options
from workbench.cli.recording_verbs import Plan, Record
from workbench.cli.store_verbs import Compare, Info, Query, Verify
from workbench.cli.terminal import StderrHandler, plain, print_items, show_warning
from workbench.io.errors import DataError, RequestError, WorkbenchError, nearest


@dataclass(frozen=True)
class Completion:
    """Print a completion script for bash or zsh."""

    shell: Positional[Literal["bash", "zsh"]]
    """For bash, put `eval "$(workbench completion bash)"` into ~/.bashrc; for zsh, put
    `eval "$(workbench completion zsh)"` into ~/.zshrc, after compinit."""

    def run(self) -> int:
        """Prints the completion script of a shell."""
        print(SCRIPTS[self.shell](completed_commands()), end="")
        return 0


VERBS: dict[str, type[Command]] = {
    "demo": Demo,
    "record": Record,
    "plan": Plan,
    "info": Info,
    "verify": Verify,
    "query": Query,
    "features": Features,
    "top": Top,
    "probes": Probes,
    "report": Report,
    "export": Export,
    "compare": Compare,
    "completion": Completion,
}
NAMED_VERBS: dict[str, tuple[str, Callable[[list[str]], Command]]] = {
    "probe": (probe_verbs.HELP, probe_command),
    "sweep": (experiment_verbs.HELP, sweep_command),
}
"""Verbs that are followed by the name of a probe or an experiment: help and parser."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the `workbench` command and exits the process."""
    _exit(_command, arguments)


def run_experiment(name: str, arguments: Sequence[str] | None = None) -> None:
    """Runs one experiment with the settings of its own command line, in a run folder, and exits the process."""
    _exit(lambda rest: experiment_command(name, rest), arguments)


def _exit(command: Callable[[list[str]], Command], arguments: Sequence[str] | None) -> None:
    """Runs the command and exits with its code, after one line on stderr where something went wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    warnings.showwarning = show_warning
    logging.getLogger("workbench").addHandler(handler := StderrHandler())
    try:
        status = command(arguments).run()
        print(end="", flush=True)
    except WorkbenchError as error:
        if debug:
            raise
        _print_error(str(error))
        status = 1 if isinstance(error, DataError) else 2
    except KeyboardInterrupt:
        _print_error("interrupted; committed segments are kept, and the same command resumes")
        status = 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit complains
        status = 0
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or "no message"
        _print_error(f"unexpected {type(error).__name__}: {message}; --debug shows the traceback")
        status = 1
    finally:
        logging.getLogger("workbench").removeHandler(handler)
    sys.exit(status)


def _print_error(message: str) -> None:
    print(f"workbench: {plain(message)}", file=sys.stderr)


def _command(arguments: list[str]) -> Command:
    """Returns the command that the arguments name."""
    verb, *rest = arguments or ["--help"]
    if verb == "--version":
        return Version()
    if verb == "help" and rest:
        verb, rest = rest[0], [*rest[1:], "--help"]
    if verb in ("-h", "--help", "help"):
        return Help()
    if verb in NAMED_VERBS:
        return NAMED_VERBS[verb][1](rest)
    if verb not in VERBS:
        raise RequestError(f"unknown command {verb!r}{nearest(verb, [*VERBS, *NAMED_VERBS])}; see workbench --help")
    return parse(VERBS[verb], f"workbench {verb}", rest)


@dataclass(frozen=True)
class Help:
    """Print every verb with one line."""

    def run(self) -> int:
        """Prints all commands, one line each."""
        print("usage: workbench COMMAND ...\n")
        lines = {name: docstring(kind) for name, kind in VERBS.items()}
        print_items(lines | {name: text for name, (text, _) in NAMED_VERBS.items()})
        print("\nworkbench help COMMAND lists the options of a command; --debug shows tracebacks; --version")
        return 0


@dataclass(frozen=True)
class Version:
    """Print the version."""

    def run(self) -> int:
        """Prints the version."""
        import workbench

        print(f"workbench {workbench.__version__}")
        return 0


def completed_commands() -> dict[str, Options]:
    """Returns the options of every command: `record`, ..., `probe logit-lens`, ..., `sweep sinks`, ..."""
    from workbench.results.registry import find_experiment, find_probe, installed_experiments, installed_probes

    commands: dict[str, Options] = {name: dict(options(kind)) for name, kind in VERBS.items()}
    for name in installed_probes():
        commands[f"probe {name}"] = dict(options(probe_options(name, find_probe(name))))
    for name in installed_experiments():
        commands[f"sweep {name}"] = dict(options(sweep_options(name, find_experiment(name))))
    return commands
