"""Public names of a module that are imported when they are first used."""

import ast
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path


def lazy_names(module: str, public: Mapping[str, str]) -> Callable[[str], object]:
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


def declared_names(file: str) -> dict[str, str]:
    """Returns the names that a module imports for type checkers alone, below `if TYPE_CHECKING:`, with their modules.

    Costs some milliseconds: the source is parsed, and nothing imported.

    Args:
        file: The module's `__file__`.
    """
    blocks = [node for node in ast.parse(Path(file).read_bytes()).body if isinstance(node, ast.If)]
    guarded = [block for block in blocks if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"]
    imports = [node for block in guarded for node in block.body if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module) for node in imports for name in node.names}
