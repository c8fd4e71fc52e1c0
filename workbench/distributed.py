"""The same recording by several processes: Ray workers of one driver, or shares of a torchrun or srun job.

Each worker holds the model and writes whole segments into the store, which lies where all of them can reach it; what
travels is the plan's place and the name of a segment. Only one process at a time lists finished segments in the
manifest. Which sequences share a forward pass is planned by segment, so the store does not depend on who wrote it.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from workbench.errors import DataError, RequestError, WorkbenchError
from workbench.models import Loading, Model
from workbench.recorder import SegmentRecorder, ThisProcess, Work, environment
from workbench.store.staging import PlannedSegment

_DEATHS = 3
"""Times that the worker of one segment may die before the recording gives up."""
_OBJECT_STORE = 128 << 20  # bytes; what travels is small


@dataclass(frozen=True)
class RayWorkers:
    """Processes that write segments side by side, started and watched through Ray.

    A worker that dies is replaced, and its segment written again. The bytes are those of one process with as many
    threads on the same kind of processor; with other numbers of threads the last bits may differ.
    """

    count: int
    address: str | None = None
    """A Ray cluster's, as `ray.init` takes it ("auto", "ray://host:10001"). None: this machine alone."""
    threads: int | None = None
    """CPU threads of each. None: on this machine its cores by `count`, on a cluster 1."""
    kind: str | None = None
    """cpu or cuda, one GPU each. None: cuda where this machine has one."""

    own_device = "cpu"
    shared = False
    name = ""

    def __post_init__(self) -> None:
        for name, value in (("workers", self.count), ("threads", self.threads)):
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, not {value}")
        if self.kind not in (None, "cpu", "cuda"):
            raise RequestError(f"device of workers must be cpu or cuda, each has one of its own, not {self.kind!r}")

    def device(self, model: Model) -> str:
        import torch

        return self.kind or ("cuda" if torch.cuda.is_available() else "cpu")

    def own(self, planned: Sequence[PlannedSegment]) -> Sequence[PlannedSegment]:
        return planned

    def write(
        self, work: Work, model: Model, left: Sequence[PlannedSegment], tick: Callable[[int], None]
    ) -> Generator[None, None, None]:
        if not left:
            return
        threads = self.threads or (1 if self.address else max(1, (os.cpu_count() or 1) // self.count))
        count, device = min(self.count, len(left)), self.device(model)
        resources = {"num_cpus": threads, "num_gpus": int(device == "cuda")}
        with _ray(self.address, count * threads) as ray:
            _refuse_more_than_there_is(ray, count, resources)
            carried = ray.put(_carried(model))
            make = ray.remote(_Worker).options(**resources).remote
            waiting, deaths = deque(left), Counter()
            busy: dict[Any, tuple[Any, PlannedSegment | None]] = {}  # what is awaited: of which worker, which segment
            told: set[str] = set()
            try:
                for _ in range(count):
                    worker = make()
                    busy[worker.start.remote(work, carried, device, threads)] = worker, None
                while busy:
                    (done,), _ = ray.wait(list(busy), num_returns=1)
                    worker, segment = busy.pop(done)
                    try:
                        answer = ray.get(done)
                    except ray.exceptions.RayTaskError as error:
                        raise _as_raised(error) from None
                    except ray.exceptions.RayError as error:  # the worker, its machine or its memory is gone
                        ray.kill(worker)
                        deaths[segment] += 1
                        if deaths[segment] == _DEATHS:
                            raise _gives_up(work, segment, error) from None
                        if segment is not None:
                            waiting.appendleft(segment)
                        worker = make()
                        busy[worker.start.remote(work, carried, device, threads)] = worker, None
                        continue
                    if segment is None:
                        deaths[None] = 0
                        _warn_of_other_versions(work, answer, told)
                    else:
                        tick(segment.rows)
                        yield
                    if waiting:
                        segment = waiting.popleft()
                        busy[worker.write.remote(segment)] = worker, segment
            finally:
                for worker, _ in busy.values():
                    ray.kill(worker)


@dataclass(frozen=True)
class Share:
    """This process's share of a job's segments: every `size`-th, from the `rank`-th on.

    The processes of a job need not run at the same time, nor know of each other: who finishes a segment lists it, and
    the last one completes the store. A job that is started again, of any size, does what is left.
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

    def own(self, planned: Sequence[PlannedSegment]) -> Sequence[PlannedSegment]:
        return [segment for segment in planned if int(segment.name) % self.size == self.rank]

    def write(
        self, work: Work, model: Model, left: Sequence[PlannedSegment], tick: Callable[[int], None]
    ) -> Generator[None, None, None]:
        return ThisProcess().write(work, model, left, tick)


class _Worker:
    """What a Ray worker holds."""

    def start(self, work: Work, carried: Loading | Model, device: str, threads: int) -> dict[str, str]:
        """Load the model; gives the versions it runs with."""
        import torch

        torch.set_num_threads(threads)
        if not work.plan.is_dir():
            raise RequestError(
                f"a worker on {socket.gethostname()} finds no {work.store}; out must be on a disk that all machines "
                "share"
            )
        model = carried.load(device) if isinstance(carried, Loading) else carried
        if not isinstance(carried, Loading):
            model.module.to(device)
        if model.fingerprint() != work.manifest.model.fingerprint:
            raise RequestError(
                f"model {model.name!r} has other weights here than where it is loaded anew; it was changed after "
                "load_model: save it and name the directory, or pass the module itself"
            )
        self.recorder = SegmentRecorder(work, model)
        return environment()

    def write(self, planned: PlannedSegment) -> None:
        self.recorder.write(planned, lambda _rows: None)


def _carried(model: Model) -> Loading | Model:
    """How a worker comes by the model: loads it too, or is given the module."""
    if model.loading is not None:
        return model.loading
    if model.device.type != "cpu":
        raise RequestError(
            f"a module on {model.device} cannot be sent to workers; move it to the CPU, or name its directory"
        )
    return replace(model)  # without what it has cached


@contextmanager
def _ray(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray, connected: to the session that the caller has, to a cluster, or to workers of this machine that go with us.

    Quiet, and reports nothing to anybody. What it starts listens on this machine's address to who has Ray's token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")  # of its agents; a busy machine needs a minute
    try:
        import ray
    except ImportError:
        raise RequestError(
            "workers need Ray, which is not installed: pip install 'interp-workbench[distributed]'"
        ) from None
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
                raise RequestError(f"ray address {address or 'local'}: {_first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _refuse_more_than_there_is(ray: Any, count: int, resources: Mapping[str, int]) -> None:
    """Ray would wait for what may never come."""
    there = ray.cluster_resources()
    for name, unit, hint in (("CPU", "num_cpus", "fewer workers or threads"), ("GPU", "num_gpus", "fewer workers")):
        needed = count * resources[unit]
        if needed > there.get(name, 0):
            raise RequestError(
                f"{count} workers need {needed} {name}s and Ray has {there.get(name, 0):g}; ask for {hint}"
            )


def _warn_of_other_versions(work: Work, found: Mapping[str, str], told: set[str]) -> None:
    own = work.manifest.environment
    differing = [
        f"{name} {value} (here {own[name]})" for name, value in found.items() if own.get(name) not in (None, value)
    ]
    if differing and not told.issuperset(differing):
        told.update(differing)
        warnings.warn(f"a worker runs {', '.join(differing)}: its rows may differ in the last bits", stacklevel=2)


def _gives_up(work: Work, segment: PlannedSegment | None, error: Exception) -> DataError:
    what = f"segment {segment.name}" if segment else "a first segment"
    return DataError(
        f"workers died {_DEATHS} times before {what} of {work.store} was finished ({_first_line(error)}); what is "
        "committed stays: try fewer workers if memory ran out, and run the same command to resume"
    )


def _as_raised(error: Any) -> Exception:
    """What the worker raised, as if it had been raised here."""
    cause = error.cause
    return cause if isinstance(cause, WorkbenchError) else error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
