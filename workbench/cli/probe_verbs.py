"""Verbs of probes: probes, probe NAME."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from workbench.cli.arguments import Command, docstring, parse
from workbench.cli.options import Meaning, Positional
from workbench.cli.terminal import print_items, print_plain
from workbench.io.files import check_writable
from workbench.results.probe import Probe

if TYPE_CHECKING:
    from workbench.model.load import Model
    from workbench.results.result import Result
    from workbench.store.reader import Store

HELP_ATTRIBUTE = (
    "Decompose logits of a store into parts of the model: workbench attribute STORE --out DIR; "
    "or estimate patching for a task from gradients: workbench attribute MODEL TASK --out DIR"
)
HELP_STEER = (
    "Steer continuations of a store's texts by a direction: "
    "workbench steer STORE --direction FILE --tokens ' Monday' --out DIR"
)
HELP_PATCH = "Patch activations between prompts of a task: workbench patch MODEL TASK --out DIR"
HELP = "Run a probe on a store (of weights: on a model) and save the result: workbench probe NAME STORE --out DIR"


@dataclass(frozen=True)
class Probes:
    """List the installed probes."""

    def run(self) -> int:
        """Prints the installed probes, one line each."""
        from workbench.results.registry import installed_probes, summary

        print_items({name: summary(entry) for name, entry in installed_probes().items()})
        return 0


def probe_command(arguments: list[str]) -> Command:
    """Returns the command of `workbench probe ARGUMENTS`. Imports only the requested probe."""
    from workbench.results.registry import find_probe, installed_probes, runs_on_models

    if not arguments or arguments[0] in ("-h", "--help"):
        print_plain(HELP + "\n")
        return Probes()
    name, *rest = arguments
    entry = installed_probes().get(name)
    if entry is None:
        find_probe(name)  # raises RequestError with the nearest name
    elif rest and not rest[0].startswith("-") and not runs_on_models(entry):
        from workbench.store.manifest import read_manifest

        read_manifest(rest[0])  # a wrong path is refused before the probe, and torch, are loaded
    probe = find_probe(name)
    return parse(probe_options(name, probe), f"workbench probe {name}", rest, docstring(probe))


NAMED_AFTER_VERBS = {"attribute": "direct-logit-attribution", "steer": "steering"}
"""Verbs that run one probe each."""


def attribute_command(arguments: list[str]) -> Command:
    """Returns the command of `workbench attribute ARGUMENTS`.

    One word before the options is a store, for direct-logit-attribution; two are a model and a task, for
    attribution-patching.
    """
    if len(arguments) > 1 and not any(word.startswith("-") for word in arguments[:2]):
        return parse(task_options("attribution-patching"), "workbench attribute", arguments, HELP_ATTRIBUTE)
    return _of_probe("attribute", arguments)


def steer_command(arguments: list[str]) -> Command:
    """Returns the command of `workbench steer ARGUMENTS`: the probe steering."""
    return _of_probe("steer", arguments)


def _of_probe(verb: str, arguments: list[str]) -> Command:
    from workbench.results.registry import find_probe
    from workbench.store.manifest import read_manifest

    if arguments and not arguments[0].startswith("-"):
        read_manifest(arguments[0])
    probe = find_probe(NAMED_AFTER_VERBS[verb])
    return parse(probe_options(probe.name, probe), f"workbench {verb}", arguments, docstring(probe))


def patch_command(arguments: list[str]) -> Command:
    """Returns the command of `workbench patch ARGUMENTS`."""
    return parse(task_options("activation-patching"), "workbench patch", arguments, HELP_PATCH)


def task_options(name: str) -> type[Command]:
    """Returns the class that the arguments of a probe of a task's pairs are parsed into."""
    from workbench.results.registry import find_probe

    probe = find_probe(name)
    return make_dataclass(
        name,
        [
            ("source", Annotated[Positional[str], Meaning("Model: a directory, a hub id, or demo.")]),
            ("task", Annotated[Positional[str], Meaning("Task of the prompts, such as ioi or facts.")]),
            ("out", Annotated[Path, Meaning("Folder for data, table and figures.")]),
            ("pairs", Annotated[int, Meaning("Number of pairs of prompts.")], field(default=32)),
            ("settings", probe, field(default_factory=probe)),
        ],
        bases=(_RunTask,),
        frozen=True,
    )


def probe_options(name: str, probe: type) -> type[Command]:
    """Returns the class that the arguments of one probe are parsed into."""
    needs_store = getattr(probe, "needs_store", True)
    source = ("store", Annotated[Positional[str], Meaning("Store to analyse.")])
    if not needs_store:
        meaning = "Model: a directory, a hub id, or demo; or a store."
        source = ("model", Annotated[Positional[str], Meaning(meaning)])
    return make_dataclass(
        name,
        [
            source,
            ("out", Annotated[Path, Meaning("Folder for data, table and figures.")]),
            ("settings", probe, field(default_factory=probe)),
        ],
        bases=(_RunProbe if needs_store else _RunWeightsProbe,),
        frozen=True,
    )


class _RunTask:
    source: str
    task: str
    out: Path
    pairs: int
    settings: Any

    def run(self) -> int:
        from workbench.corpus.task_suites import TASKS, prompt_pairs
        from workbench.io.checks import MOST, check

        check("task", self.task, one_of=tuple(TASKS))
        check("pairs", self.pairs, at_least=1, at_most=MOST)
        check_writable(self.out)
        from workbench.model.load import load_model  # seconds: torch

        model = load_model(self.source, device=self.settings.device)
        pairs = prompt_pairs(self.task, model, self.pairs, seed=self.settings.seed)
        print_plain(repr(pairs))
        return _save(self.settings.run_pairs(model, pairs), self.out)


class _RunProbe:
    store: str
    out: Path
    settings: Probe

    def run(self) -> int:
        from workbench.store.reader import open_store

        return _run(self.settings, open_store(self.store), self.out)


class _RunWeightsProbe:
    model: str
    out: Path
    settings: Probe

    def run(self) -> int:
        from workbench.model.load import load_model  # seconds: torch
        from workbench.store.manifest import MANIFEST
        from workbench.store.reader import open_store

        if (Path(self.model) / MANIFEST).is_file():
            return _run(self.settings, open_store(self.model), self.out)
        return _run(self.settings, load_model(self.model, device=getattr(self.settings, "device", "cpu")), self.out)


def _run(probe: Any, source: Store | Model, out: Path) -> int:
    from workbench.results.result import provenance, refuse_other

    refuse_other(out, probe.name, provenance(source, probe))
    check_writable(out)
    return _save(probe.run(source), out)


def _save(result: Result, out: Path) -> int:
    """Saves a result, and prints its headline, its note and its figures."""
    path = result.save(out)
    print_plain(result.headline())
    note = result.data.attrs.get("note", "")
    if note and note not in result.headline():
        print_plain(f"Note: {note}")
    for figure in sorted((path / "figures").glob("*.html")):
        print_plain(f"figure  {figure}")
    return 0
