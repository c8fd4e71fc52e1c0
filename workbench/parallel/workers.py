"""The same work by several processes: Ray workers of one driver, or shares of a torchrun or srun job.

A recording divides by segments, an extraction of features by rows, a sweep by cells. Each worker holds the model or the
autoencoder and writes into the store, the features or the run folders, which lie where all of them can reach them; what
travels is which segment, rows or cell. What belongs together is planned beforehand, so the result does not depend on
who did what.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.io.errors import DataError, RequestError, WorkbenchError
from workbench.io.files import remove
from workbench.model.load import Loading, Model
from workbench.recording.record import SegmentRecorder, ThisProcess, Work, environment
from workbench.runs.folders import CONFIG, Cell, Outcome, attempt
from workbench.store.staging import PlannedSegment

if TYPE_CHECKING:
    from workbench.features.extract import Extraction
    from workbench.features.feature_segments import Span
    from workbench.sae.load import Sae
    from workbench.store.manifest import SiteRecord

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

_DEATHS = 3
"""Times that workers may die over the same task before it is given up."""
_OBJECT_STORE = 128 << 20  # bytes; what travels is small


@dataclass(frozen=True)
class RayWorkers:
    """Processes that work side by side, started and watched through Ray: what `record`, `extract_features` and `sweep`
    take as `workers`.

    A worker that dies is replaced, and what it was at is done again. The bytes are those of one process with as many
    threads on the same kind of processor; with other numbers of threads the last bits may differ.
    """

    count: int
    address: str | None = None
    """A Ray cluster's, as `ray.init` takes it ("auto", "ray://host:10001"). None: this machine alone."""
    threads: int | None = None
    """CPU threads of each. None: on this machine its cores by `count`, on a cluster 1."""
    kind: str | None = None
    """cpu or cuda, one GPU each. None: cuda where this machine has one; in a sweep, where its cells ask for it."""

    own_device = "cpu"
    shared = False
    name = ""

    def __post_init__(self) -> None:
        for name, value in (("workers", self.count), ("threads", self.threads)):
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, not {value}")
        if self.kind not in (None, "cpu", "cuda"):
            raise RequestError(f"device of workers must be cpu or cuda, each has one of its own, not {self.kind!r}")

    def device(self, _model: Model | None = None) -> str:
        import torch

        return self.kind or ("cuda" if torch.cuda.is_available() else "cpu")

    def own(self, tasks: Sequence[T]) -> Sequence[T]:
        return tasks

    def write(
        self, recorder: SegmentRecorder, left: Sequence[PlannedSegment], tick: Callable[[int], None]
    ) -> Generator[None, None, None]:
        """Segments of a recording."""
        if not left:
            return
        work, passing = recorder.work, recorder.passing

        def lost(segment: PlannedSegment | None, error: Exception) -> None:
            what = f"segment {segment.name}" if segment else "a first segment"
            raise _gave_up(f"{what} of {work.store}", error)

        features = None
        if passing:
            sae = _saved(passing.features.sae, passing.folder(work.store))
            asked = {name: getattr(passing.features, name) for name in ("dtype", "force")}
            features = sae, passing.site, asked
        for segment, _ in self._each(_segments, (work, _carried(recorder.model), features), left, self.device(), lost):
            tick(segment.rows)
            yield

    def encode(self, made: Extraction, folder: Path, spans: Sequence[Span], advance: Callable[[int], None]) -> int:
        """Rows of an extraction; each worker loads the autoencoder from the folder where the features are made."""
        from workbench.features.feature_segments import missing

        def lost(span: Span | None, error: Exception) -> None:
            what = f"rows {span[0]} to {span[1] - 1}" if span else "first rows"
            raise _gave_up(f"{what} of {folder.parent}", error)

        left = missing(folder, spans)
        if not left:
            return 0
        given = made.array.store.path, made.array.site, _saved(made.sae, folder.parent), made.how, folder
        unsettled = 0
        for (first, stop), count in self._each(_rows, given, left, self.device(), lost):
            advance(stop - first)
            unsettled += count
        return unsettled

    def attempt(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """Cells of a sweep, in the order in which they end."""

        def lost(cell: Cell | None, error: Exception) -> Outcome:
            failed = _gave_up(cell.folder.name if cell else "a first cell", error)
            if cell is None:
                raise failed
            return Outcome(cell, "failed", 0.0, str(failed))

        there = {cell: (cell.folder / CONFIG).exists() for cell in cells}  # to be read, or refused
        yield from (attempt(cell) for cell in cells if there[cell])
        left = [cell for cell in cells if not there[cell]]
        wanted = any(str(getattr(cell.config, "device", "cpu")).startswith("cuda") for cell in left)
        kind = self.kind or ("cuda" if wanted else "cpu")
        for _, outcome in self._each(_cells, (), left, kind, lost):
            yield outcome

    def _each(
        self,
        begin: Callable[..., Callable[[T], Any]],
        given: tuple[Any, ...],
        tasks: Sequence[T],
        device: str,
        lost: Callable[[T | None, Exception], Any],
    ) -> Generator[tuple[T, Any], None, None]:
        """Tasks with their answers, as they end.

        `begin(device, *given)` runs once in each worker, and what it gives is called with one task after another.
        `lost` is told over which task workers died too often, None: before the first, and raises or answers for it.
        """
        if not tasks:
            return
        threads = self.threads or (1 if self.address else max(1, (os.cpu_count() or 1) // self.count))
        count = min(self.count, len(tasks))
        resources = {"num_cpus": threads, "num_gpus": int(device == "cuda")}
        with _ray(self.address, count * threads) as ray:
            _refuse_more_than_there_is(ray, count, resources)
            travelling = ray.put((begin, given))
            make = ray.remote(_Worker).options(**resources).remote
            waiting, deaths = deque(tasks), Counter()
            busy: dict[Any, tuple[Any, T | None]] = {}  # what is awaited: of which worker, over which task
            told: set[str] = set()

            def start() -> None:
                worker = make()
                busy[worker.start.remote(os.getcwd(), device, threads, travelling)] = worker, None

            try:
                for _ in range(count):
                    start()
                while busy:
                    (done,), _ = ray.wait(list(busy), num_returns=1)
                    worker, task = busy.pop(done)
                    try:
                        answer = ray.get(done)
                    except ray.exceptions.RayTaskError as error:
                        raise _as_raised(error) from None
                    except ray.exceptions.RayError as error:  # the worker, its machine or its memory is gone
                        ray.kill(worker)
                        deaths[task] += 1
                        if deaths[task] == _DEATHS:
                            answer = lost(task, error)
                            yield task, answer
                        else:
                            _LOG.warning(f"a worker died ({_first_line(error)}) and is replaced")
                            waiting.extendleft([] if task is None else [task])
                        if waiting:
                            start()
                        continue
                    if task is None:
                        deaths[None] = 0
                        _warn_of_other_versions(answer, told)
                    else:
                        yield task, answer
                    if waiting:
                        task = waiting.popleft()
                        busy[worker.do.remote(task)] = worker, task
            finally:
                for worker, _ in busy.values():
                    ray.kill(worker)


@dataclass(frozen=True)
class Share:
    """This process's share of a job's segments, rows or cells: every `size`-th, from the `rank`-th on.

    The processes of a job need not run at the same time, nor know of each other: the last one to finish completes the
    store, the features or the summary. A job that is started again, of any size, does what is left.
    """

    rank: int
    size: int
    local_rank: int = 0
    """Which of the processes on its machine: it takes the GPU of that number, where it sees several."""

    shared = True

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise RequestError(f"share: rank {self.rank} of {self.size} processes; ranks count from 0")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """The share that torchrun (RANK, WORLD_SIZE, LOCAL_RANK) or srun (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID)
        gives this process. RequestError where neither does."""
        for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
            if names[0] in environment and names[1] in environment:
                values = [environment.get(name, "0") for name in names]
                if not all(value.isdecimal() for value in values):
                    found = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
                    raise RequestError(f"share: {found} are no numbers; start the command with torchrun or srun")
                return cls(*map(int, values))
        raise RequestError(
            "share: neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS are set; start the command with "
            "torchrun or srun, or leave --share out"
        )

    @property
    def name(self) -> str:
        return f".{self.rank}"

    @property
    def own_device(self) -> str | None:
        import torch

        gpus = torch.cuda.device_count()
        return f"cuda:{self.local_rank % gpus}" if gpus > 1 else None

    def device(self, model: Model) -> str:
        return model.device.type

    def own(self, tasks: Sequence[T]) -> Sequence[T]:
        return tasks[self.rank :: self.size]

    def write(
        self, recorder: SegmentRecorder, left: Sequence[PlannedSegment], tick: Callable[[int], None]
    ) -> Generator[None, None, None]:
        return ThisProcess().write(recorder, left, tick)

    def encode(self, made: Extraction, folder: Path, spans: Sequence[Span], advance: Callable[[int], None]) -> int:
        return made.write_segments(folder, spans, advance)

    def attempt(self, cells: Sequence[Cell]) -> Iterable[Outcome]:
        if own := self.own_device:
            import torch

            torch.cuda.set_device(own)  # what cells call cuda
        return map(attempt, cells)


# ---- in a worker ----------------------------------------------------------------------------------------


class _Worker:
    """A Ray actor: does one task after another."""

    def start(
        self, place: str, device: str, threads: int, given: tuple[Callable[..., Callable[[Any], Any]], tuple[Any, ...]]
    ) -> dict[str, str]:
        """Make ready for the tasks, in the driver's directory; gives the versions it runs with."""
        import torch

        torch.set_num_threads(threads)
        try:
            os.chdir(place)  # relative paths mean the same here
        except OSError:
            raise RequestError(
                f"a worker on {socket.gethostname()} finds no {place}; work in a folder that all machines share"
            ) from None
        begin, rest = given
        self._do = begin(device, *rest)
        return environment()

    def do(self, task: Any) -> Any:
        return self._do(task)


def _segments(
    device: str,
    work: Work,
    carried: Loading | bytes,
    features: tuple[SavedSae, SiteRecord, Mapping[str, Any]] | None,
) -> Callable[[PlannedSegment], None]:
    if not work.plan.is_dir():
        raise RequestError(
            f"a worker on {socket.gethostname()} finds no {work.store}; out must be on a disk that all machines share"
        )
    model = _arrived(carried, device)
    if model.fingerprint() != work.manifest.model.fingerprint:
        raise RequestError(
            f"model {model.name!r} has other weights here than where it is loaded anew; it was changed after "
            "load_model: save it and name the directory, or pass the module itself"
        )
    passing = None
    if features:
        from workbench.features.while_recording import EncodedSite, RecordedFeatures

        saved, site, asked = features
        wanted = RecordedFeatures(saved.load(device), site.name, **asked)
        passing = EncodedSite(wanted, wanted.tap(model.site_map), site)
    recorder = SegmentRecorder(work, model, passing)
    return lambda segment: recorder.write(segment, lambda _rows: None)


def _rows(
    device: str, store: Path, site: SiteRecord, saved: SavedSae, how: Mapping[str, Any], folder: Path
) -> Callable[[Span], int]:
    from workbench.features.extract import Extraction
    from workbench.store.reader import ActivationArray, open_store

    if not folder.is_dir():
        raise RequestError(
            f"a worker on {socket.gethostname()} finds no {folder.parent}; features must be on a disk that all "
            "machines share"
        )
    made = Extraction(ActivationArray(open_store(store), site), saved.load(device), **how, show_progress=False)
    return lambda span: made.write_segments(folder, [span], lambda _rows: None)


def _cells(_device: str) -> Callable[[Cell], Outcome]:
    return attempt


@dataclass(frozen=True)
class SavedSae:
    """An autoencoder on its way to workers: as files, since it may be larger than what Ray likes to carry."""

    folder: Path
    name: str
    fingerprint: str

    def load(self, device: str) -> Sae:
        from workbench.sae.load import load_sae

        loaded = replace(load_sae(self.folder, device=device), name=self.name)
        if loaded.fingerprint() != self.fingerprint:
            raise RequestError(
                "sae: what SAELens saves of it and loads again has other weights or settings, so workers cannot use "
                "it; extract with one process"
            )
        return loaded


def _saved(sae: Sae, place: Path) -> SavedSae:
    from workbench.features.extract import SAVED

    folder = place / SAVED
    remove(folder)
    sae.module.save_model(folder)
    return SavedSae(folder, sae.name, sae.fingerprint())


def _carried(model: Model) -> Loading | bytes:
    """How a worker comes by the model: loads it too, or is given the module."""
    if model.loading is not None:
        return model.loading
    if model.device.type != "cpu":
        raise RequestError(
            f"a module on {model.device} cannot be sent to workers; move it to the CPU, or name its directory"
        )
    cloudpickle = _imported().cloudpickle
    try:
        return cloudpickle.dumps(replace(model))  # without what it has cached
    except Exception as error:  # whatever its parts and hooks raise; those of output_hidden_states cannot travel
        raise RequestError(
            f"module {model.name!r} cannot be sent to workers ({_first_line(error)}); save it with save_pretrained and "
            "name the directory"
        ) from None


def _arrived(carried: Loading | bytes, device: str) -> Model:
    if isinstance(carried, Loading):
        return carried.load(device)
    model = _imported().cloudpickle.loads(carried)
    model.module.to(device)
    return model


# ---- Ray ------------------------------------------------------------------------------------------------


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise RequestError(
            "workers need Ray, which is not installed: pip install 'interp-workbench[distributed]'"
        ) from None
    return ray


@contextmanager
def _ray(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray, connected: to the session that the caller has, to a cluster, or to workers of this machine that go with us.

    Quiet, and reports nothing to anybody. What it starts listens on this machine's address to who has Ray's token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")  # of its agents; a busy machine needs a minute
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by itself: all else on the machine would come first
    ray = _imported()
    if ray.is_initialized():
        yield ray
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    own = {
        "address": "local",
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE,
    }
    for tries_left in (0,) if address else (1, 0):  # Ray gives itself 30 s to start, which a busy machine may exceed
        try:
            ray.init(log_to_driver=False, configure_logging=False, **({"address": address} if address else own))
            break
        except Exception as error:  # each step of connecting raises its own kind
            ray.shutdown()
            if not tries_left:
                hint = "; it asks for a token: set RAY_AUTH_MODE=token" if _asks_for_a_token(error) else ""
                raise RequestError(f"ray address {address or 'local'}: {_first_line(error)}{hint}") from error
    worker = ray._private.worker  # what Ray prints of a worker's death, a screenful, we say in a line
    before, worker._worker_logs_enabled = getattr(worker, "_worker_logs_enabled", True), False
    try:
        yield ray
    finally:
        worker._worker_logs_enabled = before
        ray.shutdown()


def _asks_for_a_token(error: BaseException | None) -> bool:
    """Ray sends the token that lies at home to a cluster it found by itself, not to one whose address it was given."""
    while error is not None:
        if type(error).__name__ == "AuthenticationError":
            return True
        error = error.__cause__ or error.__context__
    return False


def _refuse_more_than_there_is(ray: Any, count: int, resources: Mapping[str, int]) -> None:
    """Ray would wait for what may never come."""
    there = ray.cluster_resources()
    for name, unit, hint in (("CPU", "num_cpus", "fewer workers or threads"), ("GPU", "num_gpus", "fewer workers")):
        needed = count * resources[unit]
        if needed > there.get(name, 0):
            raise RequestError(
                f"{count} workers need {needed} {name}s and Ray has {there.get(name, 0):g}; ask for {hint}"
            )


def _warn_of_other_versions(found: Mapping[str, str], told: set[str]) -> None:
    own = environment()
    differing = [
        f"{name} {value} (here {own[name]})" for name, value in found.items() if own.get(name) not in (None, value)
    ]
    if differing and not told.issuperset(differing):
        told.update(differing)
        _LOG.warning(f"a worker runs {', '.join(differing)}: its rows may differ in the last bits")


def _gave_up(what: str, error: Exception) -> DataError:
    return DataError(
        f"workers died {_DEATHS} times before {what} was finished ({_first_line(error)}); what is committed stays: try "
        "fewer workers if memory ran out, and run the same command to resume"
    )


def _as_raised(error: Any) -> Exception:
    """What the worker raised, as if it had been raised here."""
    cause = error.cause
    return cause if isinstance(cause, WorkbenchError) else error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
