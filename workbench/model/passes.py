"""Binding of hooks to one forward pass, so that no other pass of the same model sees them or is seen by them.

Hooks of torch belong to a module, and the table of attention functions to the process: a user's thread that runs the
model while it is recorded, a second recording, or a pass that a user's own hook starts would run through our hooks. So
a hook is bound to the thread that registers it and to the next pass that this thread starts through `forward.run`, or
to passes outside of any `run`. Passes of one model through `run` wait for each other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


class _Thread(threading.local):
    """Passes of this thread, the innermost last; each counts how deep it is inside of each of the model's trunks."""

    def __init__(self) -> None:
        self.passes: list[dict[nn.Module, int]] = []


_THREAD = _Thread()
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()  # pyright: ignore[reportInvalidTypeForm]
_LOCKS_LOCK = threading.Lock()


def bound() -> Callable[[], bool]:
    """Returns a function that is true in the pass that hooks registered now are for, and in no other."""
    thread, level = threading.get_ident(), len(_THREAD.passes)

    def in_pass() -> bool:
        if threading.get_ident() != thread:
            return False
        passes = _THREAD.passes
        if len(passes) == level:  # a call of the model that is not through `run`
            return True
        return len(passes) == level + 1 and all(depth <= 1 for depth in passes[-1].values())

    return in_pass


@contextmanager
def one_pass(module: nn.Module) -> Iterator[None]:
    """Runs the block as one pass of `module` in this thread, after those of other threads have ended."""
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(module, threading.RLock())
    depths: dict[nn.Module, int] = {}
    thread = threading.get_ident()

    def step(change: int) -> Callable[..., None]:
        def hook(part: nn.Module, *_arguments: object) -> None:
            if threading.get_ident() == thread:
                depths[part] = depths.get(part, 0) + change

        return hook

    with lock, ExitStack() as stack:
        for trunk in _trunks(module):
            stack.callback(trunk.register_forward_pre_hook(step(1), prepend=True).remove)
            stack.callback(trunk.register_forward_hook(step(-1), always_call=True).remove)
        _THREAD.passes.append(depths)
        try:
            yield
        finally:
            _THREAD.passes.pop()


@contextmanager
def unseen_pass(module: nn.Module) -> Iterator[None]:
    """Runs passes of `module` in the block one level deeper than those that hooks of this thread may be bound to."""
    with one_pass(module), one_pass(module):
        yield


def _trunks(module: nn.Module) -> Iterator[nn.Module]:
    """The model and the modules inside it that hold its lists of blocks: another pass enters one of them again."""
    yield module
    for child in module.children():
        if not isinstance(child, nn.ModuleList) and any(isinstance(part, nn.ModuleList) for part in child.modules()):
            yield from _trunks(child)
