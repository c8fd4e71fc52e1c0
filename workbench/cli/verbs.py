"""The table of verbs, and the command that the arguments name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from workbench.cli import experiment_verbs, probe_verbs
from workbench.cli.arguments import Command, docstring, parse
from workbench.cli.completion import SCRIPTS, Options, completed_options
from workbench.cli.experiment_verbs import sweep_command, sweep_options
from workbench.cli.feature_verbs import Features, Labels, Metrics, Top
from workbench.cli.options import Positional
from workbench.cli.page_verbs import Atlas, Demo, Export, Index, Report, Serve
from workbench.cli.probe_verbs import Probes, probe_command, probe_options
from workbench.cli.question_verbs import Coactive, Contributions, Effect, Match, Patchscope, SparseProbe
from workbench.cli.recording_verbs import Add, Generate, Plan, Record
from workbench.cli.store_verbs import Compare, Info, Merge, Pack, Query, Remove, Verify
from workbench.cli.terminal import print_items, print_plain
from workbench.io.errors import RequestError, nearest


@dataclass(frozen=True)
class Completion:
    """Print a completion script for bash or zsh."""

    shell: Positional[Literal["bash", "zsh"]]
    """For bash, put `eval "$(workbench completion bash)"` into ~/.bashrc; for zsh, put
    `eval "$(workbench completion zsh)"` into ~/.zshrc, after compinit."""

    def run(self) -> int:
        """Prints the completion script of a shell."""
        print_plain(SCRIPTS[self.shell](completed_commands()).removesuffix("\n"))
        return 0


VERBS: dict[str, type[Command]] = {
    "demo": Demo,
    "record": Record,
    "add": Add,
    "generate": Generate,
    "plan": Plan,
    "info": Info,
    "verify": Verify,
    "rm": Remove,
    "pack": Pack,
    "merge": Merge,
    "query": Query,
    "features": Features,
    "metrics": Metrics,
    "labels": Labels,
    "top": Top,
    "index": Index,
    "serve": Serve,
    "coactive": Coactive,
    "contributions": Contributions,
    "effect": Effect,
    "match": Match,
    "patchscope": Patchscope,
    "sparse-probe": SparseProbe,
    "probes": Probes,
    "report": Report,
    "atlas": Atlas,
    "export": Export,
    "compare": Compare,
    "completion": Completion,
}
NAMED_VERBS: dict[str, tuple[str, Callable[[list[str]], Command]]] = {
    "probe": (probe_verbs.HELP, probe_command),
    "attribute": (probe_verbs.HELP_ATTRIBUTE, probe_verbs.attribute_command),
    "steer": (probe_verbs.HELP_STEER, probe_verbs.steer_command),
    "patch": (probe_verbs.HELP_PATCH, probe_verbs.patch_command),
    "sweep": (experiment_verbs.HELP, sweep_command),
}
"""Verbs that are followed by the name of a probe or an experiment: help and parser."""

GROUPS = {
    "record": ("demo", "plan", "record", "add", "generate"),
    "stores": ("info", "query", "verify", "compare", "merge", "pack", "rm"),
    "probes and experiments": ("probes", "probe", "attribute", "patch", "steer", "patchscope", "sweep"),
    "sparse features": (
        *("features", "metrics", "labels", "top", "index", "effect", "contributions"),
        *("coactive", "match", "sparse-probe"),
    ),
    "pages and figures": ("report", "export", "atlas", "serve"),
    "shell": ("completion",),
}
"""All verbs in the order of the overview."""


def find_command(arguments: list[str]) -> Command:
    """Returns the command that the arguments name."""
    verb, *rest = arguments or ["--help"]
    if verb == "--version":
        return Version()
    if verb == "help" and rest:
        verb, rest = rest[0], [*rest[1:], "--help"]
    if verb in ("-h", "--help", "help"):
        return Overview()
    if verb in NAMED_VERBS:
        return NAMED_VERBS[verb][1](rest)
    if verb not in VERBS:
        raise RequestError(f"unknown command {verb!r}{nearest(verb, [*VERBS, *NAMED_VERBS])}; see workbench --help")
    return parse(VERBS[verb], f"workbench {verb}", rest)


@dataclass(frozen=True)
class Overview:
    """Print every verb with a sentence."""

    def run(self) -> int:
        """Prints all commands by group, a sentence each."""
        print_plain("usage: workbench COMMAND ...")
        lines = {name: docstring(kind) for name, kind in VERBS.items()}
        lines |= {name: text for name, (text, _) in NAMED_VERBS.items()}
        for heading, names in GROUPS.items():
            print_plain(f"\n{heading}:")
            print_items({name: lines[name] for name in names}, max(map(len, lines)))
        print_plain("\nworkbench help COMMAND lists the options of a command; --debug shows tracebacks; --version")
        return 0


@dataclass(frozen=True)
class Version:
    """Print the version."""

    def run(self) -> int:
        """Prints the version."""
        import workbench

        print_plain(f"workbench {workbench.__version__}")
        return 0


def completed_commands() -> dict[str, Options]:
    """Returns the options of every command: `record`, ..., `probe logit-lens`, ..., `sweep sinks`, ..."""
    from workbench.results.registry import find_experiment, find_probe, installed_experiments, installed_probes

    commands: dict[str, Options] = {name: completed_options(kind) for name, kind in VERBS.items()}
    for name in installed_probes():
        commands[f"probe {name}"] = completed_options(probe_options(name, find_probe(name)))
    for verb, name in probe_verbs.NAMED_AFTER_VERBS.items():
        commands[verb] = completed_options(probe_options(name, find_probe(name)))
    commands["patch"] = completed_options(probe_verbs.task_options("activation-patching"))
    for name in installed_experiments():
        commands[f"sweep {name}"] = completed_options(sweep_options(name, find_experiment(name)))
    return commands
