"""The store that a method of a probe is given, opened where it is a path."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from os import PathLike
from types import FunctionType
from typing import Any

from workbench.io.errors import RequestError
from workbench.store.reader import Store, opened

_STORE = "store"


def open_paths(probe: type, models: bool = False) -> None:
    """Lets `run`, and each public method of a probe with an argument `store`, take the path of a store.

    Args:
        probe: Class whose methods are replaced.
        models: True for a probe that takes a model in place of a store, and refuses the rest itself.
    """
    for name, method in list(vars(probe).items()):
        if isinstance(method, FunctionType) and not name.startswith("_"):
            parameters = list(inspect.signature(method).parameters)
            if _STORE in parameters or name == "run":
                place = parameters.index(_STORE) if _STORE in parameters else 1
                setattr(probe, name, _taking_paths(method, place, models))


def _taking_paths(method: Callable[..., Any], place: int, models: bool) -> Callable[..., Any]:
    """The method of a probe whose argument at `place` is a store."""

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if _STORE in options:
            options[_STORE] = _opened(options[_STORE], models)
        elif len(arguments) > place:
            arguments = (*arguments[:place], _opened(arguments[place], models), *arguments[place + 1 :])
        return method(*arguments, **options)

    return call


def _opened(store: Any, models: bool) -> Any:
    if models and not isinstance(store, Store | str | PathLike):
        return store
    try:
        return opened(store)
    except RequestError as error:
        raise RequestError(f"{error}; a model is given by wb.load_model({store!r})") if models else error from None
