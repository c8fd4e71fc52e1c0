"""The command line: one verb each, settings read from the same dataclasses as the API.

Exit codes: 0 done; 1 the data is not as it should be; 2 the request was wrong. What goes wrong is said in one
line on stderr; `--debug` shows the traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from workbench.io.errors import DataError, RequestError, WorkbenchError, nearest
from workbench.sites.settings import Recording


@dataclass(frozen=True)
class Parallel:
    """Who does the work, besides this process alone."""

    workers: int | None = None
    """Processes that work side by side, one GPU or share of the cores each. Needs Ray."""
    ray_address: str | None = None
    """A Ray cluster for them: auto, or ray://HOST:PORT. Default: this machine."""
    threads: int | None = None
    """CPU threads of each worker. Default: this machine's cores by their number; on a cluster 1."""
    share: bool = False
    """This process is one of a torchrun or srun job: do its share, by RANK and WORLD_SIZE or SLURM_PROCID and
    SLURM_NTASKS."""

    def who(self, device: str | None) -> Any:
        """What `record`, `extract_features` and `sweep` take as `workers`."""
        if self.workers is None and (self.ray_address or self.threads):
            raise RequestError("--ray-address and --threads are about workers; say how many with --workers")
        if self.share and self.workers is not None:
            raise RequestError("--share and --workers are two ways to divide the work; give one of them")
        from workbench.parallel.workers import RayWorkers, Share

        if self.share:
            return Share.from_environment()
        return None if self.workers is None else RayWorkers(self.workers, self.ray_address, self.threads, device)


@dataclass(frozen=True)
class Record:
    """Run a model over texts once and store the activations of chosen sites."""

    model: Positional[str]
    """A local directory, or a hub id such as gpt2."""
    text: Positional[tuple[str, ...]]
    """Files (.txt, .jsonl, .parquet), hf:NAME of a dataset, or a quoted text."""
    out: Path
    """The store to write; an unfinished one of the same request is resumed."""
    recording: OmitArgPrefixes[Recording] = dataclasses.field(default_factory=Recording)
    parallel: OmitArgPrefixes[Parallel] = dataclasses.field(default_factory=Parallel)
    sae: str | None = None
    """Extract the features of this SAE, and store its site's activations only if sites says so: a directory that
    SAELens, sparsify or dictionary_learning wrote, a release of SAELens' list, or demo."""
    sae_id: str | None = None
    """Which SAE of a release, or of a directory of several."""
    sae_site: str | None = None
    """The site it reads. Default: the one that it was trained on."""
    sae_dtype: Literal["float32", "float16"] = "float32"
    """Stored type of its features' activations."""
    sae_force: bool = False
    """Use an SAE of another site or model."""
    append: bool = False
    """Add the texts to what the store holds."""
    tokenizer: str | None = None
    """Directory or hub id of another tokenizer than the model's."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; auto spreads over all. Default: the GPU if there is one."""
    model_dtype: str = "auto"
    """Type the model computes in: float32, bfloat16, float16; auto: the checkpoint's."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    allow_pickle: bool = False
    """Read pickled weights, which can run code."""

    def run(self) -> int:
        from workbench.corpus import check_source
        from workbench.model.load import load_model, locate

        if not self.text:
            raise RequestError("no text given; name a file (.txt, .jsonl, .parquet), hf:NAME, or quote a text")
        if self.sae is None and (self.sae_id or self.sae_site or self.sae_force):
            raise RequestError("--sae-id, --sae-site and --sae-force are for --sae; give it too")
        texts = _texts(self.text)
        check_source(texts)
        locate(self.model, self.revision)
        if self.tokenizer is not None:
            locate(self.tokenizer, kind="tokenizer")
        workers = self.parallel.who(self.device)
        own_device = (workers and workers.own_device) or self.device
        features = self._features(own_device)
        model = load_model(
            self.model,
            tokenizer=self.tokenizer,
            device=own_device,
            dtype=self.model_dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )
        from workbench.recording.record import record_with

        record_with(self.recording, model, texts, out=self.out, features=features, append=self.append, workers=workers)
        return Info(self.out).run()

    def _features(self, device: str | None) -> Any:
        if self.sae is None:
            return None
        from workbench.features.while_recording import RecordedFeatures
        from workbench.sae.load import load_sae

        sae = load_sae(self.sae, self.sae_id, device=None if device == "auto" else device)
        return RecordedFeatures(sae, self.sae_site, self.sae_dtype, self.sae_force)


@dataclass(frozen=True)
class Plan:
    """Say what a recording will take on disk, in memory and of time, from a short measured sample."""

    model: Positional[str]
    """A local directory, or a hub id such as gpt2."""
    text: Positional[tuple[str, ...]] = ()
    """Texts to sample, as for `record`. Default: random tokens, every sequence as long as the context."""
    rows: float | None = None
    """Tokens to be recorded: 1e8. Default: the recording's max-rows."""
    workers: int = 1
    """Workers, each like the process that measures."""
    seconds: float = 10.0
    """About how long to measure."""
    recording: OmitArgPrefixes[Recording] = dataclasses.field(default_factory=Recording)
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: the GPU if there is one."""
    model_dtype: str = "auto"
    """Type the model computes in: float32, bfloat16, float16; auto: the checkpoint's."""

    def run(self) -> int:
        from workbench.corpus import check_source
        from workbench.model.load import load_model, locate
        from workbench.recording.estimate import plan_with

        texts = _texts(self.text) if self.text else None
        if texts is not None:
            check_source(texts)
        locate(self.model)
        rows = self.recording.max_rows if self.rows is None else self.rows
        if rows is None:
            raise RequestError("rows: how many tokens are to be recorded? for example --rows 1e8")
        model = load_model(self.model, device=self.device, dtype=self.model_dtype)
        print(
            _plain(str(plan_with(self.recording, model, texts, rows=rows, workers=self.workers, seconds=self.seconds)))
        )
        return 0


@dataclass(frozen=True)
class Info:
    """What a store holds."""

    store: Positional[Path]

    def run(self) -> int:
        from workbench.store.manifest import describe, read_manifest

        print(_plain(describe(self.store, read_manifest(self.store))))
        return 0


@dataclass(frozen=True)
class Verify:
    """Check every file of a store: checksums, shapes, finite values, one model throughout."""

    store: Positional[Path]

    def run(self) -> int:
        from workbench.store.verify import verify

        findings = verify(self.store)
        for finding in findings.itertuples():
            place = "/".join(part for part in (finding.segment, finding.file) if part)
            print(_plain(f"{finding.severity:5}  {place}: {finding.finding}: {finding.detail}"))
        errors = int((findings["severity"] == "error").sum())
        print(f"{errors} errors, {len(findings) - errors} notes")
        return 1 if errors else 0


@dataclass(frozen=True)
class Query:
    """List the tokens that an SQL predicate selects."""

    store: Positional[Path]
    predicate: Positional[str]
    """For example "token = ' Monday' AND position > 0"; columns: see the heading of the answer."""
    limit: int = 20
    """Rows listed at most; all are counted."""

    def run(self) -> int:
        from workbench.store.manifest import read_manifest
        from workbench.store.query import query_tokens, select_rows

        if self.limit < 0:
            raise RequestError(f"limit must be at least 0, not {self.limit}")
        manifest = read_manifest(self.store)
        total = len(select_rows(self.store, manifest, self.predicate))
        shown = query_tokens(self.store, manifest, self.predicate, self.limit)
        if shown.num_rows:
            _print_table(shown.column_names, [list(row.values()) for row in shown.to_pylist()])
        print(f"{total:,} of {manifest.rows:,} rows" + (f", {shown.num_rows} shown" if total > shown.num_rows else ""))
        return 0


@dataclass(frozen=True)
class Features:
    """Extract the sparse features of a store with an SAE."""

    store: Positional[Path]
    sae: str
    """A directory that SAELens, sparsify or dictionary_learning wrote, a release of SAELens' list, or demo."""
    sae_id: str | None = None
    """Which SAE of a release, or of a directory of several."""
    site: str | None = None
    """The site to read. Default: the one that the SAE was trained on."""
    name: str | None = None
    """Folder under the store's features/. Default: the site and the SAE's name."""
    out: Path | None = None
    """Another folder instead."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored type of the activations."""
    allocation: Literal["own", "topk", "mutual-choice", "feature-choice"] = "own"
    """Which pre-activations stay: those of the SAE's own activation function, the k largest of each row, or of all rows
    together, or of each feature."""
    k: int | None = None
    """Features a row, on average, of an allocation that is not the SAE's own."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: the GPU if there is one."""
    force: bool = False
    """Use an SAE of another site or model."""
    parallel: OmitArgPrefixes[Parallel] = dataclasses.field(default_factory=Parallel)

    def run(self) -> int:
        from workbench.store.manifest import read_manifest

        read_manifest(self.store)  # a wrong path answers before torch and SAELens are loaded
        if (self.allocation == "own") != (self.k is None):
            raise RequestError(f"--allocation {self.allocation} {'needs a' if self.k is None else 'takes no'} --k")
        from workbench.features.extract import extract_features
        from workbench.sae.load import load_sae
        from workbench.sae.sparsity import CHOICES
        from workbench.store.reader import open_store

        allocation = None if self.k is None else CHOICES[self.allocation](self.k)
        workers = self.parallel.who(self.device)
        sae = load_sae(self.sae, self.sae_id, device=(workers and workers.own_device) or self.device)
        found = extract_features(
            open_store(self.store),
            sae,
            self.site,
            name=self.name,
            out=self.out,
            dtype=self.dtype,
            allocation=allocation,
            force=self.force,
            workers=workers,
        )
        if found is None:
            print("this share of the rows is encoded; the last process to finish has the features")
            return 0
        never = int((found.counts == 0).sum())
        print(_plain(f"{found}, {never:,} never active\nfeatures  {found.path}"))
        return 0


@dataclass(frozen=True)
class Top:
    """List the tokens where a feature is strongest, or put all about it on an HTML page."""

    features: Positional[Path]
    """The folder that `workbench features` named, or a store with one."""
    feature: Positional[int]
    k: int = 20
    """Tokens listed at most."""
    context: int | None = None
    """Tokens shown on either side. Default: 5, on a page 20."""
    where: str | None = None
    """Only tokens that this SQL predicate selects, such as "NOT is_special"."""
    page: Path | None = None
    """Write a page instead: contexts, histogram, features active together."""
    sae: str | None = None
    """For the page, the SAE that made the features: tokens promoted, nearest features."""
    sae_id: str | None = None
    """Which SAE of a release, or of a directory of several."""

    def run(self) -> int:
        if self.page is None and (self.sae or self.sae_id):
            raise RequestError("sae is for the page; give page too, or leave sae out")
        if self.page is not None and self.where is not None:
            raise RequestError("where chooses among the tokens that are listed; give where or page, not both")
        if self.sae is None and self.sae_id is not None:
            raise RequestError("sae_id chooses one of several; give sae too")
        from workbench.features.feature_store import open_features

        features = open_features(self.features)
        return self._list(features) if self.page is None else self._write_page(features)

    def _list(self, features: Any) -> int:
        table = features.top(self.feature, self.k, 5 if self.context is None else self.context, self.where)
        if len(table):
            _print_table(list(table.columns), table.to_numpy().tolist(), limit=80)
        active = int(features.counts[self.feature])
        print(
            f"active on {active:,} of {len(features):,} rows" + (f", {len(table)} shown" if len(table) < active else "")
        )
        return 0

    def _write_page(self, features: Any) -> int:
        from workbench.pages.feature_page import feature_page
        from workbench.sae.load import load_sae

        features.rows_of(self.feature)  # one that is not there is refused before SAELens is loaded
        sae = None if self.sae is None else load_sae(self.sae, self.sae_id, device="cpu")
        context = 20 if self.context is None else self.context
        print(f"page  {feature_page(features, self.feature, self.page, sae=sae, k=self.k, context=context)}")
        return 0


@dataclass(frozen=True)
class Probes:
    """List the installed probes."""

    def run(self) -> int:
        from workbench.results.registry import installed_probes, summary

        for name, entry in installed_probes().items():
            print(_plain(f"  {name:<16} {summary(entry)}"))
        return 0


@dataclass(frozen=True)
class Demo:
    """Show everything on the embedded model: record, features, every probe, report.html."""

    out: Path = Path("runs/demo")
    """Folder for store, results and report."""

    def run(self) -> int:
        from workbench.demo.run import demo

        demo(self.out, say=lambda line: print(_plain(line), flush=True))
        return 0


@dataclass(frozen=True)
class Report:
    """Put results of probes on one HTML page that needs no network."""

    result: Positional[tuple[Path, ...]]
    """Folders that `workbench probe --out` wrote."""
    out: Path
    """The page to write."""
    title: str = "Report"
    """Its heading."""

    def run(self) -> int:
        from workbench.pages.report import section, write_report
        from workbench.results.result import load_result

        page = write_report([section(load_result(path)) for path in self.result], self.out, title=self.title)
        print(f"report  {page}")
        return 0


@dataclass(frozen=True)
class Export:
    """Write the figures of a result as files: HTML, PDF, SVG, PNG, their data, captions and provenance."""

    result: Positional[Path]
    """Folder that `workbench probe --out` wrote."""
    out: Path
    """Folder for the files."""
    figures: tuple[str, ...] = ()
    """Names of those wanted. Default: all."""
    formats: tuple[Literal["html", "pdf", "svg", "png"], ...] = ("html", "pdf", "svg", "png")
    """All but html need a Chrome."""
    columns: Literal[1, 2] = 1
    """Columns of a paper that a printed figure is wide: 1, 3.25 in; 2, 6.75 in."""
    theme: Literal["light", "dark"] = "light"
    """Of the HTML pages."""
    data: Literal["parquet", "csv"] = "parquet"
    """What is drawn is written as this."""
    plotlyjs: Literal["shared", "inside"] = "shared"
    """One plotly script for the folder's pages, or one inside each, 5 MB."""

    def run(self) -> int:
        from workbench.pages.figure_export import export
        from workbench.results.result import load_result

        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[3:]}
        for path in export(load_result(self.result), self.out, figures=self.figures or None, **chosen):
            print(_plain(f"wrote  {path}"))
        return 0


@dataclass(frozen=True)
class Compare:
    """Put two stores of the same tokens side by side: two models, checkpoints or dtypes."""

    store_a: Positional[Path]
    store_b: Positional[Path]
    sites: tuple[str, ...] | None = None
    """Sites or kinds to compare, such as resid_post. Default: all, which then must be the same in both."""
    probes: tuple[str, ...] | None = None
    """Probes to run on both. Default: every installed one that the sites permit; none: --probes with no name."""
    out: Path | None = None
    """Folder for the tables (CSV) and the figure."""

    def run(self) -> int:
        from workbench.store.manifest import read_manifest

        for store in (self.store_a, self.store_b):
            read_manifest(store)  # a wrong path answers before torch is loaded
        from workbench.analysis.comparison import compare, refuse_full
        from workbench.store.reader import open_store

        if self.out is not None:
            refuse_full(self.out)
        found = compare(open_store(self.store_a), open_store(self.store_b), sites=self.sites, probes=self.probes)
        _print_table(list(found.sites.columns), found.sites.to_numpy().tolist())
        if len(found.probes):
            print()
            _print_table(list(found.probes.columns), found.probes.to_numpy().tolist())
        for probe, reason in found.not_run.items():
            print(_plain(f"not run  {probe}: {reason}"))
        if self.out is not None:
            print(f"tables  {found.save(self.out)}")
        return 0


VERBS: dict[str, type] = {
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
}
_SWEEP_HELP = "Run an experiment over a grid of settings: workbench sweep EXPERIMENT --model a b --seed 0 1 2 --out DIR"
_PROBE_HELP = "Ask one probe of a store and save its result with figures: workbench probe NAME STORE --out DIR"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `workbench` command."""
    _exit(_command, arguments)


def run_experiment(name: str, arguments: Sequence[str] | None = None) -> None:
    """Entry point of an experiment's own script: one run, its settings from the command line, in a run folder."""
    _exit(lambda rest: _experiment_command(name, rest), arguments)


def _exit(command: Callable[[list[str]], Any], arguments: Sequence[str] | None) -> None:
    """Runs the command that the arguments spell and ends with its exit code, or with one line of what is wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    warnings.showwarning = _show_warning
    logging.getLogger("workbench").addHandler(handler := _OnStderr())
    try:
        status = command(arguments).run()
        print(end="", flush=True)
    except WorkbenchError as error:
        if debug:
            raise
        print(f"workbench: {_plain(str(error))}", file=sys.stderr)
        status = 1 if isinstance(error, DataError) else 2
    except KeyboardInterrupt:
        print("workbench: interrupted; what is committed stays, and the same command resumes", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit complains
        status = 0
    except Exception as error:
        if debug:
            raise
        told = " ".join(str(error).split()) or "no message"
        print(f"workbench: unexpected {type(error).__name__}: {_plain(told)}; --debug shows where", file=sys.stderr)
        status = 1
    finally:
        logging.getLogger("workbench").removeHandler(handler)
    sys.exit(status)


class _OnStderr(logging.Handler):
    """Prints the package's warnings and progress on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "workbench: warning: " if record.levelno >= logging.WARNING else ""
        print(f"{kind}{_plain(record.getMessage())}", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_where: Any, **_how: Any) -> None:
    print(f"workbench: warning: {_plain(str(message))}", file=sys.stderr)


def _command(arguments: list[str]) -> Any:
    """The command that the arguments spell. Only the probe asked for is imported."""
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help", "help"):
        return _Help()
    if verb == "probe":
        return _probe_command(rest)
    if verb == "sweep":
        return _sweep_command(rest)
    if verb not in VERBS:
        known = [*VERBS, "probe", "sweep"]
        raise RequestError(f"there is no command {verb!r}{nearest(verb, known)}; see workbench --help")
    return _parse(VERBS[verb], f"workbench {verb}", rest)


def _probe_command(arguments: list[str]) -> Any:
    from workbench.results.registry import find_probe, installed_probes

    if not arguments or arguments[0] in ("-h", "--help"):
        print(_PROBE_HELP + "\n")
        return Probes()
    name, *rest = arguments
    if name not in installed_probes():
        find_probe(name)  # refuses it by name
    if rest and not rest[0].startswith("-"):
        from workbench.store.manifest import read_manifest

        read_manifest(rest[0])  # a wrong path answers before the probe, and torch, are loaded
    settings = find_probe(name)
    command = dataclasses.make_dataclass(
        name,
        [
            ("store", Annotated[Positional[Path], arg(help="The store to ask.")]),
            ("out", Annotated[Path, arg(help="Folder for data, table and figures.")]),
            ("settings", OmitArgPrefixes[settings], dataclasses.field(default_factory=settings)),
        ],
        bases=(_RunProbe,),
        frozen=True,
    )
    return _parse(command, f"workbench probe {name}", rest, (settings.__doc__ or "").strip())


class _RunProbe:
    def run(self) -> int:
        from workbench.results.result import provenance, refuse_other
        from workbench.store.reader import open_store

        store = open_store(self.store)
        refuse_other(self.out, self.settings.name, provenance(store, self.settings))
        result = self.settings.run(store)
        path = result.save(self.out)
        print(_plain(repr(result)))
        for figure in sorted((path / "figures").glob("*.html")):
            print(f"figure  {figure}")
        return 0


def _experiment_command(name: str, arguments: list[str]) -> Any:
    """One run of an experiment."""
    from workbench.results.registry import find_experiment

    experiment = find_experiment(name)
    command = dataclasses.make_dataclass(
        name,
        [
            ("config", OmitArgPrefixes[experiment.Config], dataclasses.field(default_factory=experiment.Config)),
            (
                "out",
                Annotated[Path | None, arg(help=f"The run folder. Default: named by the config, under runs/{name}.")],
                None,
            ),
        ],
        bases=(_RunExperiment,),
        namespace={"experiment": name},
        frozen=True,
    )
    return _parse(command, f"python -m {experiment.__name__}", arguments, (experiment.__doc__ or "").strip())


class _RunExperiment:
    def run(self) -> int:
        from workbench.runs.folders import RESULTS, Cell, cell_of, is_complete, run_cell

        cell = cell_of(self.experiment, self.config, Path("runs") / self.experiment)
        if self.out is not None:
            cell = Cell(self.experiment, self.config, self.out)
        if is_complete(cell):
            print(f"complete already: {cell.folder}")
        print(_plain(run_cell(cell).headline()))
        for figure in sorted((cell.folder / RESULTS / "figures").glob("*.html")):
            print(f"figure  {figure}")
        return 0


def _sweep_command(arguments: list[str]) -> Any:
    from workbench.results.registry import find_experiment, installed_experiments, summary

    if not arguments or arguments[0] in ("-h", "--help"):
        print(_SWEEP_HELP + "\n")
        return _Listed({name: summary(entry) for name, entry in installed_experiments().items()})
    name, *rest = arguments
    experiment = find_experiment(name)
    command = dataclasses.make_dataclass(
        name,
        [
            *_choices(experiment.Config),
            ("out", Annotated[Path | None, arg(help=f"Folder of the sweep. Default: runs/{name}.")], None),
            ("parallel", OmitArgPrefixes[Parallel], dataclasses.field(default_factory=Parallel)),
        ],
        bases=(_RunSweep,),
        namespace={"experiment": name},
        frozen=True,
    )
    what = f"{(experiment.__doc__ or '').strip()}\n\nEach setting takes one value or several; every combination is run."
    return _parse(command, f"workbench sweep {name}", rest, what)


def _choices(config: type) -> list[tuple[str, Any, Any]]:
    """A field for each setting of a config, that takes several values where the setting takes one.

    A setting that is itself several values, or that is not compared, is one for the whole sweep.
    """
    from workbench.results.probe import setting_meanings

    hints, told = get_type_hints(config), setting_meanings(config)
    found = []
    for field in dataclasses.fields(config):
        kind, default = hints[field.name], field.default
        if _is_choice(config, field):
            kind, default = tuple[kind, ...], (default,)
        found.append((field.name, Annotated[kind, arg(help=told.get(field.name, ""))], default))
    return found


def _is_choice(config: type, field: dataclasses.Field) -> bool:
    return field.compare and get_origin(get_type_hints(config)[field.name]) is not tuple


class _RunSweep:
    def run(self) -> int:
        from workbench.results.registry import find_experiment
        from workbench.runs.sweep import TABLE, grid, sweep

        config = find_experiment(self.experiment).Config
        names = [field.name for field in dataclasses.fields(config) if _is_choice(config, field)]
        fixed = [field.name for field in dataclasses.fields(config) if field.name not in names]
        choices = {name: getattr(self, name) for name in names} | {name: (getattr(self, name),) for name in fixed}
        out = self.out or Path("runs") / self.experiment
        configs = grid(config, choices)
        workers = self.parallel.who(None)
        swept = sweep(self.experiment, configs, out, workers=workers, say=lambda line: print(_plain(line), flush=True))
        for outcome in swept.failed:
            print(_plain(f"failed  {outcome.cell.folder.name}: {outcome.told}"))
        counted = {state: sum(one.state == state for one in swept.outcomes) for state in ("done", "there", "failed")}
        counted |= {"left to other processes": len(swept.left)} if swept.left else {}
        print(", ".join(f"{number} {state}" for state, number in counted.items()))
        if swept.result is not None:
            print(f"table   {swept.folder / TABLE}")
            for figure in sorted((swept.folder / "figures").glob("*.html")):
                print(f"figure  {figure}")
        return 1 if swept.failed else 0


class _Listed:
    def __init__(self, lines: dict[str, str]) -> None:
        self.lines = lines

    def run(self) -> int:
        for name, line in self.lines.items():
            print(_plain(f"  {name:<18} {line}"))
        return 0


class _Help:
    def run(self) -> int:
        print("usage: workbench COMMAND ...    (workbench COMMAND --help tells more; --debug shows tracebacks)\n")
        lines = {name: (kind.__doc__ or "").strip() for name, kind in VERBS.items()}
        lines |= {"probe": _PROBE_HELP, "sweep": _SWEEP_HELP}
        for name, line in lines.items():
            print(f"  {name:<8} {line}")
        return 0


def _parse(kind: type, program: str, arguments: list[str], description: str | None = None) -> Any:
    """The arguments as an instance of `kind`; what tyro has to say about wrong ones becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, description=description, args=arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        problem, *rest = _sections(said.getvalue())
        meant = [name for part in rest if part.startswith("Perhaps") for name in re.findall(r"--[\w-]+", part)]
        hint = f"; nearest: {', '.join(dict.fromkeys(meant))}" if meant else ""
        raise RequestError(f"{problem.rstrip('.')}{hint}; see {program} --help") from None


def _sections(framed: str) -> list[str]:
    """What stands between the rules of tyro's frame, which is drawn with other characters where output is not UTF-8."""
    lines = [line.strip("│ ") for line in framed.splitlines()]
    rules = [i for i, line in enumerate(lines) if line[:1] in tuple("╭╰") or (len(line) > 9 and set(line) <= set("─-"))]
    return [" ".join(filter(None, lines[first + 1 : last])) for first, last in itertools.pairwise([*rules, len(lines)])]


def _texts(named: Sequence[str]) -> str | list[str | Path]:
    return named[0] if len(named) == 1 else [_source(text) for text in named]


def _source(text: str) -> str | Path:
    """In a list of texts a string is a document, so a file must be told apart."""
    if text.startswith("hf:"):
        raise RequestError(f"{text} cannot be mixed with other texts; record it alone and add the others with --append")
    return text if any(map(str.isspace, text)) and not os.path.isfile(text) else Path(text)


def _print_table(heading: Sequence[str], lines: Sequence[Sequence[Any]], limit: int = 40) -> None:
    cells = [[str(name) for name in heading], *([_cell(value, limit) for value in line] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any, limit: int) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    text = _plain(repr(value) if isinstance(value, str) else text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _plain(text: str) -> str:
    """Text for a terminal: nothing that came from a model or a file can move the cursor or change colours."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
