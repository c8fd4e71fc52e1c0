"""The `workbench` command run inside the test process."""

import contextlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from workbench.cli import main as cli

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # output is buffered, as a user has it
MAIN = "from workbench.cli.main import main; main()"


def process(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


def run(*arguments, encoding: str = "utf-8") -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of `workbench ARGUMENTS`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main([str(argument) for argument in arguments])
    for stream in (out, err):
        stream.seek(0)
    return stopped.value.code or 0, out.read(), err.read()


def refused(*arguments, **options) -> str:
    """Returns the message of a wrong request: one line, exit code 2, nothing on stdout."""
    code, out, err = run(*arguments, **options)
    assert (code, out) == (2, "")
    assert err.startswith("workbench: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("workbench: ").rstrip("\n")
