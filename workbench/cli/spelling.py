"""Spelling of arguments in messages: `max_rows` in Python is `--max-rows` in a shell.

The library names an argument at the beginning of a message ("max_rows must be ..."), as `max_rows=`, or as
`max_rows=10`. Names of several words are recognised anywhere outside of quotes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from workbench.cli.options import Option
from workbench.io.errors import WorkbenchError

_QUOTED = re.compile(r"""(?<![\w])('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)""")
_VALUE = r"""(?P<value>'[^']*'|"[^"]*"|\[[^\[\]]*\]|\([^()]*\)|[^\s;,()'"]*[^\s;,.:()'"]|)"""


def shell_spelling(message: str, options: Iterable[Option]) -> str:
    """Returns a message of the library in which the arguments have the spelling of these options."""
    flags = {option.name: option for option in options if not option.positional}
    if not flags:
        return message
    names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))
    message = re.sub(
        rf"(?<![\w.'\"-])(?P<name>{names})={_VALUE}", lambda m: _option(flags[m["name"]], m["value"]), message
    )
    message = re.sub(rf"^(?P<name>{names})(?=[ ,:])", lambda m: flags[m["name"]].flag, message)
    message = re.sub(rf"(?<=another )(?P<name>{names})\b", lambda m: flags[m["name"]].flag, message)
    return "".join(
        part if n % 2 else re.sub(rf"(?<![\w./-])({names})(?![\w./=-])", lambda m: _long(flags[m[0]]), part)
        for n, part in enumerate(_QUOTED.split(message))
    )


def _long(option: Option) -> str:
    """A name of several words is an argument wherever it stands; one of one word may be a word of English."""
    return option.flag if "_" in option.name else option.name


def _option(option: Option, value: str) -> str:
    if option.reader.flag and value in ("True", "False"):
        return option.flag if value == "True" else f"--no-{option.flag[2:]}"
    if value[:1] in ("[", "("):
        words = [word.strip(" '\"") for word in value[1:-1].split(",")]
    else:
        words = [value[1:-1] if value[:1] in ("'", '"') else value]
    return " ".join([option.flag, *(shlex.quote(word) for word in words if word)])


@contextmanager
def spelled_for_the_shell(options: Iterable[Option], end: str = "") -> Iterator[None]:
    """Inside, errors of the library name arguments as the command line does; `end` is added to their text."""
    try:
        yield
    except WorkbenchError as error:
        error.args = (shell_spelling(str(error), options) + end, *error.args[1:])
        raise
