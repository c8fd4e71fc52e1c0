"""Enumerated crash points: an operation meets a fault before each of its calls that change the disk, one call a trial.

After every fault the same call must end as it does undisturbed, with the same bytes. A process of its own, the stage,
prepares the operation once and forks for each trial, so that a point costs milliseconds and not the imports.

Seen are Python's own calls: open to write, write, pwrite, rename, replace, remove, mkdir, rmdir, link. Files that
pyarrow and safetensors write in native code lie between such calls; the fault `limit` reaches into them.
"""

from __future__ import annotations

import _thread
import builtins
import errno
import io
import itertools
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forks import fork_context
from store_example import contents as bytes_of
from trial_log import note

from workbench.io.errors import WorkbenchError

Fault = Literal["kill", "interrupt", "full", "error", "limit"]
"""kill: the process ends at once, as by SIGKILL. interrupt: Ctrl-C. full: from this call on nothing can be created or
written (ENOSPC). error: this one call fails (EIO). limit: no file can grow to its size (EFBIG), for every size that
occurs, in native code, too."""

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_GROWS = {"open", "write", "pwrite", "os.mkdir", "os.link", "os.symlink"}
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_KILLED = 137


def _no_step(_folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Operation:
    """What is tried. Functions take the folder to work in; each runs in a process of its own."""

    work: Callable[[Path], object]
    begin: Callable[[Path], object] = _no_step
    """Makes the state before it."""
    check: Callable[[Path], object] = _no_step
    """Raises where a reader finds anything wrong after a fault."""
    contents: Callable[[Path], Any] = bytes_of
    """What must equal that of an undisturbed run, once the same call has ended."""


@dataclass(frozen=True)
class Trials:
    """Outcome of all trials."""

    calls: int
    """Calls of an undisturbed run that change the disk."""
    faults: Counter[str]
    """Trials by fault."""
    problems: list[str]
    """One line for each trial that lost, doubled or left something, or raised another exception than ours."""


def try_crash_points(
    prepare: Callable[..., Operation],
    *arguments: Any,
    faults: Sequence[Fault] = ("kill", "interrupt", "full", "error", "limit"),
    sample: int | None = None,
    seed: int = 0,
) -> Trials:
    """Runs an operation with each fault before each of its calls that change the disk, then the same call again.

    Args:
        prepare: A function of a module, called in the stage with `arguments`: imports, models, texts.
        arguments: Its arguments.
        faults: The faults.
        sample: Trials of each fault, drawn by `seed`, the first and the last call among them. None: all.
        seed: Seed of the draw.
    """
    context = fork_context()
    answers = context.SimpleQueue()
    stage = context.Process(target=_stage, args=(answers, prepare, arguments, faults, sample, seed))
    stage.start()
    answer = answers.get()
    stage.join()
    if isinstance(answer, str):
        raise AssertionError(answer)
    note("crash points", prepare.__name__, answer.faults, len(answer.problems))
    return answer


# ---- the stage --------------------------------------------------------------------------------------------


def _stage(answers: Any, prepare: Callable[..., Operation], arguments: tuple, *settings: Any) -> None:
    try:
        import torch

        torch.set_num_threads(1)  # a fork has none of the threads of its parent
        with tempfile.TemporaryDirectory(prefix="crash-points-") as folder:
            answers.put(_all_trials(prepare(*arguments), Path(folder), *settings))
    except BaseException:
        answers.put(traceback.format_exc())


def _all_trials(operation: Operation, place: Path, faults: Sequence[Fault], sample: int | None, seed: int) -> Trials:
    start = place / "start"
    start.mkdir()
    _succeed(operation.begin, start)
    whole = _copied(start, place / "whole")
    calls: list[str] = _succeed(lambda folder: _counted(operation.work, folder), whole)
    expected = operation.contents(whole)
    trials, problems = Counter(), []
    for fault in faults:
        for point in _drawn(_points(fault, calls, whole), sample, random.Random(seed)):
            trials[fault] += 1
            trial = _trial(operation, _copied(start, place / "trial"), fault, point, expected)
            problems += [f"{fault} at {_name(fault, point, calls)}: {text}" for text in trial]
    return Trials(len(calls), trials, problems)


def _trial(operation: Operation, folder: Path, fault: Fault, point: int, expected: Any) -> Iterator[str]:
    """One fault and the same call again; yields what went wrong."""
    ending = _forked(lambda: _disturbed(operation.work, folder, fault, point))
    if ending is not None:
        yield f"it raised {ending}"
    for call, function in (("a reader", operation.check), ("the same call", operation.work)):
        after = _forked(lambda function=function: (function(folder), None)[1])
        if after is not None:
            yield f"{call} then raised {after}"
            return
    if (after := operation.contents(folder)) != expected:
        yield f"the same call then left {_difference(after, expected)}"


def _points(fault: Fault, calls: list[str], whole: Path) -> list[int]:
    """Numbers of calls, or sizes of files, at which the fault makes a difference."""
    if fault == "limit":
        return sorted({path.stat().st_size - 1 for path in whole.rglob("*") if path.is_file() and path.stat().st_size})
    kinds = [call.split()[0] for call in calls]
    if fault == "full":
        return [number for number, kind in enumerate(kinds) if kind in _GROWS]
    return [number for number, kind in enumerate(kinds) if kind != "fsync" or fault == "error"]


def _drawn(points: list[int], sample: int | None, draw: random.Random) -> list[int]:
    if sample is None or len(points) <= sample:
        return points
    return sorted({points[0], points[-1], *draw.sample(points, sample - 2)})


def _name(fault: Fault, point: int, calls: list[str]) -> str:
    return f"{point} bytes" if fault == "limit" else f"call {point} of {len(calls)}, {calls[point]}"


def _difference(after: Any, expected: Any) -> str:
    if not isinstance(after, dict) or not isinstance(expected, dict):
        return f"{str(after)[:300]} in place of {str(expected)[:300]}"
    missing, extra = expected.keys() - after.keys(), after.keys() - expected.keys()
    changed = [name for name in expected.keys() & after.keys() if after[name] != expected[name]]
    kinds = {"without": missing, "with": extra, "with other bytes in": changed}
    return ", ".join(f"{kind} {' and '.join(sorted(names)[:3])}" for kind, names in kinds.items() if names)


def _copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


# ---- forks ------------------------------------------------------------------------------------------------


def _succeed(function: Callable[[Path], Any], folder: Path) -> Any:
    result = _forked(lambda: (True, function(folder)))
    if not isinstance(result, tuple):
        raise AssertionError(f"undisturbed, it raised {result}")
    return result[1]


def _forked(function: Callable[[], Any]) -> Any:
    """Returns what a function returns in a fork, the text of its exception, or None if the fork was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                answer = function()
            except BaseException as error:
                answer = _described(error)
            with builtins.open(writer, "wb") as pipe:
                pipe.write(pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if data:
        return pickle.loads(data)
    if os.waitstatus_to_exitcode(status) == _KILLED:
        return None
    return f"nothing: its process ended with status {status}"


def _counted(work: Callable[[Path], object], folder: Path) -> list[str]:
    calls: list[str] = []
    with _watched(calls.append):
        work(folder)
    return calls


def _disturbed(work: Callable[[Path], object], folder: Path, fault: Fault, point: int) -> str | None:
    """Runs the work with a fault; returns the exception if it is neither ours, in one line, nor the interrupt."""
    numbers = itertools.count()

    def meet(call: str) -> None:
        number = next(numbers)
        if fault == "kill" and number == point:
            os._exit(_KILLED)
        if fault == "interrupt" and number == point:
            _thread.interrupt_main()
        if fault == "error" and number == point:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "full" and number >= point and call.split()[0] in _GROWS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fault == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (point, resource.RLIM_INFINITY))
    try:
        with _watched(meet):
            work(folder)
    except KeyboardInterrupt:
        return None if fault == "interrupt" else "KeyboardInterrupt"
    except WorkbenchError as error:
        return None if fault != "interrupt" and "\n" not in str(error) else _described(error)
    except BaseException as error:
        return _described(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return None


def _described(error: BaseException) -> str:
    """Type and text of an exception, and the last line of the package that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


# ---- calls that change the disk ---------------------------------------------------------------------------


class _watched:
    """Inside, every call that changes the disk is announced by a line before it is made. Once in a process."""

    def __init__(self, meet: Callable[[str], None]) -> None:
        self._meet, self._on = meet, False

    def __enter__(self) -> None:
        sys.addaudithook(self._audit)  # cannot be taken away again, hence the fork
        builtins.open = io.open = self._open
        write, pwrite = os.write, os.pwrite
        os.write = lambda *args: (self._tell("write", args[0]), write(*args))[1]
        os.pwrite = lambda *args: (self._tell("pwrite", args[0]), pwrite(*args))[1]
        os.fsync = lambda descriptor: self._tell("fsync", descriptor)  # these disks lose no power
        self._on = True

    def __exit__(self, *_: object) -> None:
        self._on = False

    def _tell(self, event: str, target: object) -> None:
        if self._on:
            self._meet(f"{event} {target}")

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":  # not that of a descriptor, which was opened before
            changes = isinstance(arguments[0], str | os.PathLike) and arguments[2] & _TO_WRITE
        else:
            changes = event in _CHANGES
        if changes and not str(arguments[0]).startswith("/dev/"):
            self._tell(event, arguments[0])

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        """`open` with a raw file whose writes are announced, too."""
        if not set("wxa+") & set(mode):
            return _OPEN(file, mode, buffering, *args, **kwargs)
        names = ("encoding", "errors", "newline", "closefd", "opener")
        options = dict(zip(names, args, strict=False)) | kwargs
        closes, opener = options.pop("closefd", True), options.pop("opener", None)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""), closes, opener)
        raw.tell_write = self._tell
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **options)


_OPEN = builtins.open


class _Raw(io.FileIO):
    tell_write: Callable[[str, object], None] = staticmethod(lambda _event, _name: None)

    def write(self, data: Any) -> int:
        self.tell_write("write", self.name)
        return super().write(data)
