"""Prints the structure of this checkout, or of another one: `python -m workbench.experiments.structure [FOLDER]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from workbench.experiments.structure.source import ORDER, Function, Import, Tree, depth


def describe(tree: Tree) -> str:
    """Returns the measures as lines of text."""
    lines = {
        tree.path(module): len(path.read_text(encoding="utf-8").splitlines()) for module, path in tree.files.items()
    }
    arrows = tree.arrows()
    rooms = {name for pair in arrows for name in pair}
    counts = {
        kind: sum(statement.kind == kind for statement in tree.imports) for kind in ("direct", "deferred", "type")
    }
    upward = tree.upward() if rooms <= set(ORDER) else None  # an older tree has other rooms
    rows = {
        "files": f"{len(lines)}, {sum(lines.values()):,} lines; {_in_root(tree)} files in the root of workbench/",
        "rooms": f"{len(rooms)}, longest chain {depth(arrows)}",
        "arrows": f"{len(arrows)} between rooms, from {counts['direct'] + counts['deferred']} imports "
        f"({counts['deferred']} deferred); {counts['type']} more imports for type checkers alone",
        "upward": "not defined: the tree has other rooms"
        if upward is None
        else _join([_place(statement) for statement in upward]),
        "circles of rooms": _join([" <-> ".join(group) for group in tree.room_circles()]),
        "circles of files": _join([" <-> ".join(group) for group in tree.file_circles()]),
        "largest files": _join([f"{file} {n}" for file, n in sorted(lines.items(), key=lambda pair: -pair[1])[:5]]),
        "largest functions": _join([f"{_name(function)} {function.lines}" for function in _most(tree, "lines")]),
        "most parameters": _join(
            [
                f"{_name(function)} {function.parameters} and {function.keywords} keyword-only"
                for function in _most(tree, "parameters")
            ]
        ),
    }
    return "\n".join(f"{name:<18} {text}" for name, text in rows.items())


def _in_root(tree: Tree) -> int:
    return len(list((tree.root / "workbench").glob("*.py")))


def _most(tree: Tree, measure: str) -> list[Function]:
    """Five functions; parameters are counted in public ones."""
    chosen = [function for function in tree.functions if function.public or measure == "lines"]
    size = (
        (lambda function: -function.lines)
        if measure == "lines"
        else (lambda function: -function.parameters - function.keywords)
    )
    return sorted(chosen, key=size)[:5]


def _name(function: Function) -> str:
    return f"{function.file}:{function.name}"


def _place(statement: Import) -> str:
    return f"{statement.file}:{statement.line} -> {statement.target}"


def _join(texts: list[str]) -> str:
    return "; ".join(texts) or "none"


def main() -> None:
    """Prints the structure of a checkout."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.structure", description=__doc__)
    checkout = Path(__file__).resolve().parents[2]
    parser.add_argument("folder", nargs="?", type=Path, default=checkout, help="root of a checkout; default: this one")
    print(describe(Tree(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
