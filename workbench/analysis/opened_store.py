"""The store that a probe is given, opened where it is a path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from os import PathLike
from typing import Any

from workbench.io.errors import RequestError, shown
from workbench.store.reader import Store, open_store


def taking_paths(run: Callable[..., Any], models: bool = False) -> Callable[..., Any]:
    """Returns the `run` of a probe for a store or its path, which refuses everything else.

    Args:
        run: The method of the probe.
        models: True for a probe that takes a model in place of a store, and refuses the rest itself.
    """

    @functools.wraps(run)
    def opened(probe: Any, store: Any, *arguments: Any, **options: Any) -> Any:
        return run(probe, _opened(store, models), *arguments, **options)

    return opened


def _opened(store: Any, models: bool) -> Any:
    if isinstance(store, Store):
        return store
    if isinstance(store, str | PathLike):
        try:
            return open_store(store)
        except RequestError as error:
            raise RequestError(f"{error}; a model is given by wb.load_model({store!r})") if models else error from None
    if not models:
        raise RequestError(f"store must be a store (wb.open_store) or its path, not {shown(store)}")
    return store
