"""Verbs of experiments: sweep NAME, and one run of an experiment's own script."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

from workbench.cli.arguments import Command, Parallel, docstring, parse
from workbench.cli.options import Meaning
from workbench.cli.terminal import print_items, print_plain, print_problem
from workbench.io.files import check_writable

HELP = "Run an experiment over a grid of settings: workbench sweep EXPERIMENT --model a b --seed 0 1 2 --out DIR"


def experiment_command(name: str, arguments: list[str]) -> Command:
    """Returns the command of `python -m workbench.experiments.NAME ARGUMENTS`."""
    from workbench.results.registry import find_experiment

    experiment = find_experiment(name)
    out = Annotated[Path | None, Meaning(f"Folder of the run. Default: a name made of the settings, in runs/{name}.")]
    command = make_dataclass(
        name,
        [
            ("config", experiment.Config, field(default_factory=experiment.Config)),
            ("out", out, None),
        ],
        bases=(_RunExperiment,),
        namespace={"experiment": name},
        frozen=True,
    )
    return parse(command, f"python -m {experiment.__name__}", arguments, docstring(experiment))


class _RunExperiment:
    experiment: str
    config: Any
    out: Path | None

    def run(self) -> int:
        from workbench.runs.folders import RESULTS, Run, execute, is_complete, run_in

        run = run_in(Path("runs") / self.experiment, self.experiment, self.config)
        if self.out is not None:
            run = Run(self.experiment, self.config, self.out)
        if is_complete(run):
            print_plain(f"already complete: {run.folder}")
        print_plain(execute(run).headline())
        for figure in sorted((run.folder / RESULTS / "figures").glob("*.html")):
            print_plain(f"figure  {figure}")
        return 0


@dataclass(frozen=True)
class _ListExperiments:
    def run(self) -> int:
        from workbench.results.registry import installed_experiments, summary

        print_plain(HELP + "\n")
        print_items({name: summary(entry) for name, entry in installed_experiments().items()})
        return 0


def sweep_command(arguments: list[str]) -> Command:
    """Returns the command of `workbench sweep ARGUMENTS`. Imports only the requested experiment."""
    from workbench.results.registry import find_experiment

    if not arguments or arguments[0] in ("-h", "--help"):
        return _ListExperiments()
    name, *rest = arguments
    experiment = find_experiment(name)
    note = "Each setting takes one value or several; every combination is run."
    return parse(sweep_options(name, experiment), f"workbench sweep {name}", rest, f"{docstring(experiment)}\n\n{note}")


def sweep_options(name: str, experiment: Any) -> type[Command]:
    """Returns the class that the arguments of a sweep of one experiment are parsed into."""
    return make_dataclass(
        name,
        [
            *_choices(experiment.Config),
            ("out", Annotated[Path | None, Meaning(f"Folder of the sweep. Default: runs/{name}.")], None),
            ("parallel", Parallel, field(default_factory=Parallel)),
        ],
        bases=(_RunSweep,),
        namespace={"experiment": name},
        frozen=True,
    )


def _choices(config: type) -> list[tuple[str, Any, Any]]:
    """Fields that take several values where the setting of a config takes one.

    A setting that is itself several values, or that is not compared, has one value for the whole sweep.
    """
    from workbench.results.probe import setting_meanings

    hints, descriptions = get_type_hints(config), setting_meanings(config)
    choices = []
    for setting in fields(config):
        kind, default = hints[setting.name], setting.default
        if _is_choice(config, setting):
            kind, default = tuple[kind, ...], (default,)
        choices.append((setting.name, Annotated[kind, Meaning(descriptions.get(setting.name, ""))], default))
    return choices


def _is_choice(config: type, setting: Field) -> bool:
    return setting.compare and get_origin(get_type_hints(config)[setting.name]) is not tuple


class _RunSweep:
    after_interrupt = "; finished runs are kept, and the same command does the others"
    experiment: str
    out: Path | None
    parallel: Parallel

    def run(self) -> int:
        from workbench.results.registry import find_experiment
        from workbench.runs.sweep import TABLE, grid, sweep

        config = find_experiment(self.experiment).Config
        choices = {
            setting.name: value if _is_choice(config, setting) else (value,)
            for setting in fields(config)
            for value in [getattr(self, setting.name)]
        }
        out = self.out or Path("runs") / self.experiment
        check_writable(out)
        swept = sweep(
            self.experiment, grid(config, choices), out, workers=self.parallel.to_workers(None), report=print_plain
        )
        for outcome in swept.failed:
            print_problem(f"failed  {outcome.run.folder.name}: {outcome.message}")
        counts = {
            state: sum(outcome.state == state for outcome in swept.outcomes) for state in ("done", "skipped", "failed")
        }
        counts |= {"left to other processes": len(swept.pending)} if swept.pending else {}
        print_plain(", ".join(f"{number} {state}" for state, number in counts.items()))
        if swept.result is not None and swept.unwritten is None:
            print_plain(f"table   {swept.folder / TABLE}")
            for figure in sorted((swept.folder / "figures").glob("*.html")):
                print_plain(f"figure  {figure}")
        return 1 if swept.failed or swept.unwritten else 0
