"""Workers that Ray starts and watches, on this machine or on a cluster.

Each worker loads what its tasks need and writes its results where all processes can reach them; only tasks and their
answers travel. All tasks are planned beforehand, so the result does not depend on which worker ran which task.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from workbench.io.checks import check
from workbench.io.errors import RequestError, WorkbenchError, first_line
from workbench.io.tasks import DEATHS, Answer, Begin, OnLost, Task, import_ray
from workbench.io.versions import library_versions

_LOG = logging.getLogger(__name__)

_OBJECT_STORE = 128 << 20  # bytes; what travels is small


@dataclass(frozen=True)
class RayWorkers:
    """Processes that work side by side: what `record`, `extract_features` and `sweep` take as `workers`.

    A worker that dies is replaced and its task is repeated. The bytes are those of one process with as many threads on
    the same kind of processor; with another number of threads the last bits may differ.
    """

    count: int
    address: str | None = None
    """Address of a Ray cluster, as `ray.init` takes it ("auto", "ray://host:10001"). None: this machine alone."""
    threads: int | None = None
    """CPU threads of each worker. None: on this machine its cores divided by `count`, on a cluster 1."""
    kind: str | None = None
    """Type of device of each worker, cpu or cuda (one GPU each). None: cuda if this machine has one; in a sweep,
    unless its settings name the CPU."""

    planning_device = "cpu"
    remote = True
    shared = False
    suffix = ""

    def __post_init__(self) -> None:
        check("workers", self.count, at_least=1, optional=True)
        check("threads", self.threads, at_least=1, at_most=1024, optional=True)
        if self.kind not in (None, "cpu", "cuda"):
            raise RequestError(f"device of workers must be cpu or cuda, each has one of its own, not {self.kind!r}")

    def device_type(self, planning: str) -> str:
        """Returns the workers' type of device, whatever that of the planning process."""
        import torch  # takes seconds

        return self.kind or ("cuda" if torch.cuda.is_available() else "cpu")

    def share_of(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Returns all tasks: this process has its workers do them."""
        return tasks

    def map(
        self,
        begin: Begin[Task, Answer],
        arguments: tuple[Any, ...],
        tasks: Sequence[Task],
        on_lost: OnLost[Task, Answer],
        device: str | None = None,
    ) -> Generator[tuple[Task, Answer], None, None]:
        """Runs the tasks in the workers and yields each with its answer, in the order in which they end.

        Args:
            begin: Called once in each worker as `begin(device, *arguments)`; returns the function that does a task.
            arguments: Arguments of `begin`, which are pickled.
            tasks: Tasks to run. No worker is started if it is empty.
            on_lost: Called with a task over which workers died too often, or with None if they died at the start.
            device: Type of device of each worker unless `kind` names one. None: cuda if this machine has one.

        Raises:
            RequestError: Ray is not installed, cannot be reached, or has fewer processors than asked for.
        """
        if not tasks:
            return
        device = self.kind or device or self.device_type("cpu")
        threads = self.threads or (1 if self.address else max(1, (os.cpu_count() or 1) // self.count))
        count = min(self.count, len(tasks))
        resources = {"num_cpus": threads, "num_gpus": int(device == "cuda")}
        with _ray(self.address, count * threads) as ray:
            _check_resources(ray, count, resources)
            settings = (os.getcwd(), device, threads, ray.put((begin, arguments)))
            pool = _Pool(ray, ray.remote(_Worker).options(**resources).remote, settings, tasks)
            try:
                for _ in range(count):
                    pool.start()
                while pool.busy:
                    yield from pool.next_answer(on_lost)
            finally:
                pool.kill()


class _Pool:
    """The workers of one `map`, and the tasks that wait for them."""

    def __init__(self, ray: Any, make: Callable[[], Any], arguments: tuple[Any, ...], tasks: Sequence[Any]) -> None:
        self.ray, self.make, self.arguments = ray, make, arguments
        self.waiting = deque(tasks)
        self.deaths: Counter[Any] = Counter()
        self.busy: dict[Any, tuple[Any, Any]] = {}
        """Awaited reference to its worker and its task; task None: the worker starts."""
        self.reported: set[str] = set()
        """Differing versions that were warned of."""

    def start(self) -> None:
        worker = self.make()
        self.busy[worker.start.remote(*self.arguments)] = worker, None

    def next_answer(self, on_lost: OnLost[Any, Any]) -> Iterator[tuple[Any, Any]]:
        """Awaits one worker, and gives it or its successor the next task."""
        (ready,), _ = self.ray.wait(list(self.busy), num_returns=1)
        worker, task = self.busy.pop(ready)
        try:
            answer = self.ray.get(ready)
        except self.ray.exceptions.RayTaskError as error:
            raise _as_raised(error) from None
        except self.ray.exceptions.RayError as error:  # the worker, its machine or its memory is gone
            self.ray.kill(worker)
            yield from self._lose(task, error, on_lost)
            if self.waiting:
                self.start()
            return
        if task is None:
            self.deaths[None] = 0
            _warn_of_other_versions(answer, self.reported)
        else:
            yield task, answer
        if self.waiting:
            task = self.waiting.popleft()
            self.busy[worker.do.remote(task)] = worker, task

    def _lose(self, task: Any, error: Exception, on_lost: OnLost[Any, Any]) -> Iterator[tuple[Any, Any]]:
        self.deaths[task] += 1
        if self.deaths[task] == DEATHS:
            yield task, on_lost(task, error)
        else:
            _LOG.warning(f"a worker died ({first_line(error)}) and is replaced")
            self.waiting.extendleft([] if task is None else [task])

    def kill(self) -> None:
        for worker, _ in self.busy.values():
            self.ray.kill(worker)


class _Worker:
    """A Ray actor: does one task after another."""

    def start(
        self, place: str, device: str, threads: int, packed: tuple[Callable[..., Callable[[Any], Any]], tuple[Any, ...]]
    ) -> dict[str, str]:
        """Prepares for the tasks, in the driver's directory; returns the library versions of the worker."""
        import torch  # takes seconds

        torch.set_num_threads(threads)
        try:
            os.chdir(place)  # relative paths mean the same here
        except OSError:
            raise RequestError(
                f"a worker on {socket.gethostname()} finds no {place}; work in a folder that all machines share"
            ) from None
        begin, arguments = packed
        self._do = begin(device, *arguments)
        return library_versions()

    def do(self, task: Any) -> Any:
        return self._do(task)


# ---- the connection ---------------------------------------------------------------------------------------


@contextmanager
def _ray(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray, connected: to the caller's session, to a cluster, or to a session of this machine that ends with us.

    Ray prints nothing and sends no usage statistics. A session that is started here listens on this machine's address
    and admits processes that have Ray's token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")  # of its agents; a busy machine needs a minute
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by itself: all else on the machine would come first
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    local = {
        "address": "local",
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE,
    }
    for tries_left in (0,) if address else (1, 0):  # Ray gives itself 30 s to start, which a busy machine may exceed
        try:
            ray.init(log_to_driver=False, configure_logging=False, **({"address": address} if address else local))
            break
        except Exception as error:  # each step of connecting raises its own kind
            ray.shutdown()
            if not tries_left:
                hint = "; it asks for a token: set RAY_AUTH_MODE=token" if _asks_for_a_token(error) else ""
                raise RequestError(f"ray address {address or 'local'}: {first_line(error)}{hint}") from error
    worker = ray._private.worker  # Ray prints a screenful of a worker's death; ours is one line
    before, worker._worker_logs_enabled = getattr(worker, "_worker_logs_enabled", True), False
    try:
        yield ray
    finally:
        worker._worker_logs_enabled = before
        ray.shutdown()


def _asks_for_a_token(error: BaseException | None) -> bool:
    """Ray sends the user's token to a cluster that it found by itself, not to one whose address it was given."""
    while error is not None:
        if type(error).__name__ == "AuthenticationError":
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_resources(ray: Any, count: int, resources: Mapping[str, int]) -> None:
    """Ray would wait for processors that it may never have."""
    resources_of_ray = ray.cluster_resources()
    for name, unit, hint in (("CPU", "num_cpus", "fewer workers or threads"), ("GPU", "num_gpus", "fewer workers")):
        needed = count * resources[unit]
        if needed > resources_of_ray.get(name, 0):
            raise RequestError(
                f"{count} workers need {needed} {name}s and Ray has {resources_of_ray.get(name, 0):g}; ask for {hint}"
            )


def _warn_of_other_versions(versions: Mapping[str, str], reported: set[str]) -> None:
    driver = library_versions()
    differing = [
        f"{name} {value} (here {driver[name]})"
        for name, value in versions.items()
        if driver.get(name) not in (None, value)
    ]
    if differing and not reported.issuperset(differing):
        reported.update(differing)
        _LOG.warning(f"a worker runs {', '.join(differing)}: its rows may differ in the last bits")


def _as_raised(error: Any) -> Exception:
    """The worker's error, as if it had been raised here."""
    cause = error.cause
    return cause if isinstance(cause, WorkbenchError) else error
