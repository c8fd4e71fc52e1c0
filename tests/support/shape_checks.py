"""Checks of annotations while the tests run: of types everywhere, of shapes in the functions that state shapes.

jaxtyping's wrapper keeps a memo of axes for every call, which is most of the time of a small function. A function that
states no shape needs no memo: there beartype alone checks the same annotations. One that states shapes is checked in
its first calls in each test: a loop of training would check them thousands of times. A function inside another one is
defined again at each call of the outer one; its check is built the first time only. Importing this module replaces the
decorator that jaxtyping's import hook adds.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import jaxtyping

_WITH_SHAPES = jaxtyping.jaxtyped
_CHECKS: dict[tuple[CodeType, str], FunctionType | None] = {}
_CALLS: Counter[FunctionType] = Counter()
_CHECKED_CALLS = 30  # of a function that states shapes, in one test
_FUNCTION = "__beartype_func"  # the keyword by which a check of beartype knows the function that it calls


def start_test() -> None:
    """Checks the first calls of every function anew."""
    _CALLS.clear()


def _checked(*arguments: Any, typechecker: Callable[..., Any] | None = None, **options: Any) -> Any:
    if arguments or typechecker is None:
        return _WITH_SHAPES(*arguments, **options)
    return lambda target: _decorated(target, typechecker)


def _decorated(target: Any, typechecker: Callable[..., Any]) -> Any:
    if dataclasses.is_dataclass(target) and "__init__" in vars(target):
        target.__init__ = _decorated(target.__init__, typechecker)
        return target
    if not inspect.isfunction(target):
        return _WITH_SHAPES(target, typechecker=typechecker)
    if not target.__annotations__:
        return target
    key = (target.__code__, target.__module__)
    if key in _CHECKS:
        known = _CHECKS[key]
        return target if known is None else _check_of(known, target)
    written = target.__annotations__
    hints = {name: _resolved(hint, target.__globals__) for name, hint in written.items()}
    if "<locals>" not in target.__qualname__:
        return _at_the_first_call(target, hints, typechecker)
    check = _built(target, hints, typechecker)
    if check is target:
        _CHECKS[key] = None
    elif _FUNCTION in (check.__kwdefaults__ or {}):
        _CHECKS[key] = check
    return check


def _at_the_first_call(
    function: FunctionType, hints: dict[str, Any], typechecker: Callable[..., Any]
) -> Callable[..., Any]:
    """The function with a check that is built when it is first called: in one process most functions are not."""
    checks: list[Callable[..., Any]] = []
    shaped = _states_shapes(hints)

    @functools.wraps(function)
    def check(*arguments: Any, **options: Any) -> Any:
        if not checks:
            checks.append(_built(function, hints, typechecker))
        if shaped:
            _CALLS[function] += 1
            if _CALLS[function] > _CHECKED_CALLS:
                return function(*arguments, **options)
        return checks[0](*arguments, **options)

    return check


def _states_shapes(hints: dict[str, Any]) -> bool:
    return any("jaxtyping." in repr(hint) for hint in hints.values())


def _built(function: FunctionType, hints: dict[str, Any], typechecker: Callable[..., Any]) -> Callable[..., Any]:
    if _states_shapes(hints):
        return _WITH_SHAPES(function, typechecker=typechecker)
    written = function.__annotations__
    function.__annotations__ = hints
    try:
        return typechecker(function)
    finally:
        function.__annotations__ = written


def _check_of(known: FunctionType, function: FunctionType) -> FunctionType:
    """The check of an earlier function of the same code, calling this one."""
    check = FunctionType(known.__code__, known.__globals__, function.__name__, known.__defaults__, known.__closure__)
    check.__kwdefaults__ = {**(known.__kwdefaults__ or {}), _FUNCTION: function}
    check.__dict__.update(known.__dict__ | function.__dict__, __wrapped__=function)
    check.__qualname__, check.__module__, check.__doc__ = function.__qualname__, function.__module__, function.__doc__
    check.__annotations__ = function.__annotations__
    return check


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """A hint in the form that beartype takes; one that is imported for type checkers alone checks nothing."""
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except Exception:
        return Any


jaxtyping.jaxtyped = _checked
