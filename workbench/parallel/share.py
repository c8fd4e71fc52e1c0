"""The share of one process in a job that torchrun or srun started."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.io.errors import RequestError
from workbench.io.tasks import Answer, Begin, OnLost, Task, ThisProcess

_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Share:
    """This process's shard of a torchrun or srun job: every `size`-th segment, row range or run, from `rank` on.

    The processes of a job need not run at the same time: the last one to finish completes the store, the features or
    the summary. A job that is started again, with any number of processes, does what is left.
    """

    rank: int
    """Number of this process in the job, from 0."""
    size: int
    """Number of processes in the job."""
    local_rank: int = 0
    """Number of this process on its machine, from 0. It selects the GPU if there are several."""

    remote = False
    shared = True

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise RequestError(f"share: rank {self.rank} of {self.size} processes; ranks count from 0")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """Returns the share that torchrun or srun assigns to this process.

        Args:
            environment: Variables RANK, WORLD_SIZE and LOCAL_RANK of torchrun, or SLURM_PROCID, SLURM_NTASKS and
                SLURM_LOCALID of srun.

        Raises:
            RequestError: None of these variables are set, or they are not numbers.
        """
        for names in _VARIABLES:
            if names[0] in environment and names[1] in environment:
                values = [environment.get(name, "0") for name in names]
                if not all(value.isdecimal() for value in values):
                    settings = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
                    raise RequestError(f"share: {settings} are no numbers; start the command with torchrun or srun")
                return cls(*map(int, values))
        raise RequestError(
            "share: neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS are set; start the command with "
            "torchrun or srun, or leave --share out"
        )

    @property
    def suffix(self) -> str:
        """The rank, as ending of the names of this process's temporary files."""
        return f".{self.rank}"

    @property
    def planning_device(self) -> str | None:
        """The GPU with the number of the local rank, if this machine has several."""
        import torch  # takes seconds

        gpus = torch.cuda.device_count()
        return f"cuda:{self.local_rank % gpus}" if gpus > 1 else None

    def device_type(self, planning: str) -> str:
        """Returns the planning process's type of device: this process does its share itself."""
        return planning

    def share_of(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Returns every `size`-th task."""
        return tasks[self.rank :: self.size]

    def map(
        self,
        begin: Begin[Task, Answer],
        arguments: tuple[Any, ...],
        tasks: Sequence[Task],
        on_lost: OnLost[Task, Answer],
        device: str | None = None,
    ) -> Generator[tuple[Task, Answer], None, None]:
        """Runs the tasks in this process, on its own GPU if the machine has several."""
        return ThisProcess().map(begin, arguments, tasks, on_lost, self.planning_device or device)
