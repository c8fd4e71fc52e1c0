"""The `workbench` command run inside the test process."""

import contextlib
import io
import warnings

import pytest

from workbench.cli import main as cli


def run(*arguments, encoding: str = "utf-8") -> tuple[int, str, str]:
    """What `workbench ARGUMENTS` gives: exit code, stdout, stderr."""
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
    """What a wrong request is told: one line, exit code 2, nothing on stdout."""
    code, out, err = run(*arguments, **options)
    assert (code, out) == (2, "")
    assert err.startswith("workbench: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("workbench: ").rstrip("\n")
