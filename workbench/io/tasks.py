"""The contract of workers, which run a list of tasks in one process or in several.

A recording is a list of segments, an extraction of features a list of row ranges, a sweep a list of runs. Each of them
hands its tasks to `Workers`, and knows nothing of how they are divided; the workers know nothing of the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

from workbench.io.errors import DataError, RequestError, first_line

Task = TypeVar("Task")
Answer = TypeVar("Answer")

Begin = Callable[..., Callable[[Task], Answer]]
"""Makes, from a device and its arguments, the function that does one task after another."""
OnLost = Callable[[Task | None, Exception], Answer]
"""Answers for a task over which workers died too often, or raises; None stands for the start, before a first task."""

DEATHS = 3
"""Number of workers that may die over one task before it is given up."""


@runtime_checkable  # for the shape checks of the tests
class Workers(Protocol):
    """Processes that run tasks: this one, several on a cluster, or this one as one of a job."""

    @property
    def planning_device(self) -> str | None:
        """Device on which the process that plans loads the model or the autoencoder. None: the GPU if there is one."""
        ...

    @property
    def remote(self) -> bool:
        """True if tasks run in other processes, which receive pickled arguments and load the weights themselves."""
        ...

    @property
    def shared(self) -> bool:
        """True if other processes write to the same place at the same time."""
        ...

    @property
    def suffix(self) -> str:
        """Ending of the names of this process's temporary files, unique among the processes that share a place."""
        ...

    def device_type(self, planning: str) -> str:
        """Returns the type of device that computes the tasks, cpu or cuda, given that of the planning process."""
        ...

    def share_of(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Returns the tasks that this process is responsible for."""
        ...

    def map(
        self,
        begin: Begin[Task, Answer],
        arguments: tuple[Any, ...],
        tasks: Sequence[Task],
        on_lost: OnLost[Task, Answer],
        device: str | None = None,
    ) -> Generator[tuple[Task, Answer], None, None]:
        """Runs the tasks and yields each with its answer, in the order in which they end.

        Args:
            begin: Called once in each worker as `begin(device, *arguments)`; returns the function that does a task.
            arguments: Arguments of `begin`, pickled if the workers are remote.
            tasks: Tasks to run. None are started if it is empty.
            on_lost: Called with a task over which workers died too often, and with the last error.
            device: Type of device that a worker needs, cpu or cuda. None: as `begin` chooses.
        """
        ...


def dtype_for(workers: Workers | None, dtype: str = "auto") -> str:
    """Returns the dtype in which to load a model here: "auto" depends on the device, and workers may have another."""
    elsewhere = workers is not None and workers.remote and workers.device_type("cpu") != "cpu"
    return "checkpoint" if dtype == "auto" and elsewhere else dtype


@dataclass(frozen=True)
class ThisProcess:
    """One task after another, in this process."""

    planning_device: str | None = None
    remote: bool = False
    shared: bool = False
    suffix: str = ""

    def device_type(self, planning: str) -> str:
        """Returns the planning process's type of device."""
        return planning

    def share_of(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Returns all tasks."""
        return tasks

    def map(
        self,
        begin: Begin[Task, Answer],
        arguments: tuple[Any, ...],
        tasks: Sequence[Task],
        on_lost: OnLost[Task, Answer],
        device: str | None = None,
    ) -> Generator[tuple[Task, Answer], None, None]:
        """Runs the tasks in their order; an exception of a task is raised as it is."""
        if tasks:
            run = begin(device, *arguments)
            for task in tasks:
                yield task, run(task)


def lost_task(description: str, error: Exception) -> DataError:
    """Returns the error of work that cannot be finished because workers died too often over one task.

    Args:
        description: The task, such as "segment 00003 of runs/gpt2.acts".
        error: The last worker's end.
    """
    return DataError(
        f"workers died {DEATHS} times before {description} was finished ({first_line(error)}); what is committed "
        "stays: try fewer workers if memory ran out, and run the same command to resume"
    )


def import_ray() -> ModuleType:
    """Returns Ray, an optional extra whose import takes seconds. Raises RequestError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise RequestError(
            "workers need Ray, which is not installed: pip install 'interp-workbench[distributed]'"
        ) from None
    return ray
