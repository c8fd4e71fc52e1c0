"""Public names of a module that are imported when they are first used."""

import sys
from collections.abc import Callable
from importlib import import_module


def lazy_names(module: str, public: dict[str, str]) -> Callable[[str], object]:
    """Returns a function for the `__getattr__` of a module, which imports a name at its first use.

    Args:
        module: The module's `__name__`.
        public: The module that defines each name, by name.
    """

    def load(name: str) -> object:
        if name not in public:
            raise AttributeError(f"module {module!r} has no attribute {name!r}; it has {', '.join(sorted(public))}")
        value = getattr(import_module(public[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    return load
