"""Reads a checkout's source files and measures them. Imports nothing of the package, so any checkout can be read."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGES = ("workbench", "probes", "experiments")
INSIDE = ("probes", "experiments")  # folders of the repository that are installed inside the package
ORDER = (
    *(
        "io",
        "embedded",
        "sites",
        "figures",
        "corpus",
        "store",
        "model",
        "results",
        "runs",
        "sae",
        "features",
        "analysis",
    ),
    *("recording", "pages", "parallel", "demo", "(root)", "testing", "cli", "probes", "experiments"),
)
"""Rooms; each imports only earlier ones. (root) is the public surface: workbench/*.py."""


@dataclass(frozen=True)
class Function:
    """One function: its place, lines, and positional-or-keyword parameters and keyword-only ones, without `self`."""

    file: str
    name: str
    lines: int
    parameters: int
    keywords: int
    public: bool


@dataclass(frozen=True)
class Import:
    """One imported module of the project. `kind`: direct, deferred (inside a function) or type (type checkers only)."""

    file: str
    line: int
    source: str
    target: str
    kind: str

    @property
    def arrow(self) -> tuple[str, str]:
        """Returns the rooms of the importing and of the imported module."""
        return room(self.source), room(self.target)


def room(module: str) -> str:
    """Returns the room of a module: its folder, or the module itself where it lies flat in the package.

    The public modules of the package's root are (root); `workbench.__main__` is the command line.
    """
    first = module.split(".")[1:2]
    return {(): "(root)", ("probing",): "(root)", ("__main__",): "cli"}.get(tuple(first), "".join(first))


class Tree:
    """The packages of a checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        item = [path for name in PACKAGES for path in sorted((root / name).rglob("*.py"))]
        self.files: dict[str, Path] = {_module(path.relative_to(root)): path for path in item}
        self.sources: dict[str, ast.Module] = {
            name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()
        }

    def path(self, module: str) -> str:
        """Returns the path of a module's file, relative to the root."""
        return str(self.files[module].relative_to(self.root))

    @cached_property
    def imports(self) -> list[Import]:
        """Returns all imports between modules of the tree."""
        return [item for module in self.files for item in self._imports_of(module)]

    @cached_property
    def functions(self) -> list[Function]:
        """Returns all functions of the tree."""
        return [item for module in self.files for item in functions_of(self.path(module), self.sources[module])]

    def _imports_of(self, module: str) -> Iterator[Import]:
        for node, kind in _with_kind(self.sources[module], "direct"):
            for name in _names(node):
                target = self._resolve(name)
                if target is not None and target != module:
                    yield Import(self.path(module), node.lineno, module, target, kind)

    def _resolve(self, name: str) -> str | None:
        """The module of this tree that a dotted name is, or is a name of."""
        parts = name.split(".")
        if parts[0] in INSIDE:  # the spelling of trees in which these were packages of their own
            parts = ["workbench", *parts]
        while parts and ".".join(parts) not in self.files:
            parts = parts[:-1]
        return ".".join(parts) or None

    def arrows(self, kinds: Collection[str] = ("direct", "deferred")) -> dict[tuple[str, str], list[Import]]:
        """Pairs of rooms, the importing one first, with the imports that make each."""
        arrows: dict[tuple[str, str], list[Import]] = {}
        for item in self.imports:
            if item.kind in kinds and item.arrow[0] != item.arrow[1]:
                arrows.setdefault(item.arrow, []).append(item)
        return arrows

    def upward(self, kinds: Collection[str] = ("direct", "deferred")) -> list[Import]:
        """Imports of a room that comes later in ORDER; a room that ORDER lacks is an upward arrow, too."""
        place = {name: number for number, name in enumerate(ORDER)}
        return [
            item
            for arrow, imports in self.arrows(kinds).items()
            for item in imports
            if place.get(arrow[1], len(ORDER)) > place.get(arrow[0], -1)
        ]

    def room_circles(self) -> list[tuple[str, ...]]:
        """Returns the circles of imports between rooms."""
        return circles(self.arrows())

    def file_circles(self) -> list[tuple[str, ...]]:
        """Circles of files, wherever the files lie."""
        return circles({(statement.source, statement.target) for statement in self.imports if statement.kind != "type"})


def functions_of(file: str, tree: ast.Module) -> Iterator[Function]:
    """The functions of a module and its classes, nested ones counted as lines of the outer one."""
    for holder in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        of = "" if isinstance(holder, ast.Module) else f"{holder.name}."
        for node in holder.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                public = not any(part.startswith("_") for part in (*of.split("."), node.name) if part != "__init__")
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                yield Function(
                    file,
                    of + node.name,
                    (node.end_lineno or 0) - node.lineno + 1,
                    count,
                    len(node.args.kwonlyargs),
                    public,
                )


def circles(arrows: Collection[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Groups of nodes that reach each other."""
    reach: dict[str, set[str]] = {}
    for source, target in arrows:
        reach.setdefault(source, set()).add(target)
    reachable = {node: _reachable(reach, node) for node in reach}
    groups = {
        tuple(sorted({node, *(neighbour for neighbour in reachable[node] if node in reachable.get(neighbour, ()))}))
        for node in reachable
        if node in reachable[node]
    }
    return sorted(groups)


def _reachable(arrows: Mapping[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = arrows.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def depth(arrows: Collection[tuple[str, str]]) -> int:
    """Rooms on the longest chain of arrows; arrows that belong to a circle are left out."""
    bad = {frozenset(pair) for group in circles(arrows) for pair in _pairs(group)}
    good = [pair for pair in arrows if frozenset(pair) not in bad]
    below: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in below:
            below[node] = 1 + max((height(target) for source, target in good if source == node), default=0)
        return below[node]

    return max((height(source) for source, _ in good), default=0)


def _pairs(group: Collection[str]) -> Iterator[tuple[str, str]]:
    return ((source, target) for source in group for target in group)


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("workbench", *parts) if parts[0] in INSIDE else parts)


def _with_kind(node: ast.AST, kind: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, kind
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _with_kind(child, "type")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _with_kind(child, "type" if kind == "type" else "deferred")
        else:
            yield from _with_kind(child, kind)


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]
