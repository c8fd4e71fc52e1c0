"""The process of a command: exit codes, one line for what goes wrong, interrupts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from workbench.cli.arguments import Command
    from workbench.cli.terminal import Output

_INTERRUPTED = 130


def run_command(command: Callable[[list[str]], Command], arguments: Sequence[str] | None) -> NoReturn:
    """Runs the command that the arguments are parsed into, and exits the process with its code.

    Args:
        command: Parses the arguments.
        arguments: The arguments. None: those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    with interrupts_end_imports():
        from workbench.cli.terminal import terminal_output

        with terminal_output() as output:
            status = _status(command, [word for word in words if word != "--debug"], debug, output)
    sys.exit(status)


def _status(command: Callable[[list[str]], Command], words: list[str], debug: bool, output: Output) -> int:
    """The exit code, after one line on stderr where something went wrong."""
    from workbench.cli.options import options_of
    from workbench.cli.spelling import spelled_for_the_shell
    from workbench.io.errors import DataError, WorkbenchError

    parsed = None
    try:
        parsed = command(words)
        output.options = tuple(options_of(type(parsed)))
        with spelled_for_the_shell(output.options):
            status = parsed.run()
        print(end="", flush=True)
        return status
    except WorkbenchError as error:
        if debug:
            raise
        output.error(str(error))
        return 1 if isinstance(error, DataError) else 2
    except KeyboardInterrupt:
        output.error(f"interrupted{getattr(parsed, 'after_interrupt', '')}")
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit complains
        return 0
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        output.error(f"{place}{error.strerror or error}; --debug shows the traceback")
        return 1
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or "no message"
        output.error(f"unexpected {type(error).__name__}: {message}; --debug shows the traceback")
        return 1


@contextmanager
def interrupts_end_imports() -> Iterator[None]:
    """Inside, an interrupt while a module is imported ends the process at once, in one line.

    Imports take most of the first seconds, nothing is written during them, and a KeyboardInterrupt inside of one comes
    out as another error, or not at all. Elsewhere it is raised as always.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored, or handled by the program that calls us
        return

    def interrupt(_number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib"):
                with suppress(Exception):
                    os.write(2, b"workbench: interrupted\n")
                os._exit(_INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
