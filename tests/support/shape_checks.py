"""Checks of annotations while the tests run: of types everywhere, of shapes in the modules that state shapes.

jaxtyping's wrapper keeps a memo of axes for every call, which is most of the time of a small function. A module that
imports nothing of jaxtyping needs no memo: there beartype alone checks the same annotations. Importing this module
replaces the decorator that jaxtyping's import hook adds.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping

_WITH_SHAPES = jaxtyping.jaxtyped


def _checked(*arguments: Any, typechecker: Callable[..., Any] | None = None, **options: Any) -> Any:
    if arguments or typechecker is None:
        return _WITH_SHAPES(*arguments, **options)
    return lambda thing: _decorated(thing, typechecker)


def _decorated(thing: Any, typechecker: Callable[..., Any]) -> Any:
    if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        thing.__init__ = _decorated(thing.__init__, typechecker)
        return thing
    if not inspect.isfunction(thing) or _states_shapes(thing.__globals__):
        return _WITH_SHAPES(thing, typechecker=typechecker)
    written = thing.__annotations__
    thing.__annotations__ = {name: _resolved(hint, thing.__globals__) for name, hint in written.items()}
    try:
        return typechecker(thing)
    finally:
        thing.__annotations__ = written


def _states_shapes(names: dict[str, Any]) -> bool:
    """True for the names of a module that imports a shape, or an alias of one, from jaxtyping."""
    values = [value for name, value in names.items() if name not in ("jaxtyping", "__builtins__")]
    return any(
        _module(value).startswith("jaxtyping") or _module(type(value)).startswith("jaxtyping") for value in values
    )


def _module(thing: Any) -> str:
    return str(getattr(thing, "__module__", ""))


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """A hint in the form that beartype takes; one that is imported for type checkers alone checks nothing."""
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except Exception:
        return Any


jaxtyping.jaxtyped = _checked
