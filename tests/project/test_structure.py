"""Folders are layers, arrows point one way, and no file, function or signature grows too large."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

from workbench.experiments.structure.__main__ import main
from workbench.experiments.structure.source import Import, Tree, circles, depth, functions_of

ROOT = Path(__file__).parents[2]
TREE = Tree(ROOT)

UPWARD_TYPES: set[tuple[str, str]] = set()
"""Imports for type checkers alone that point to a later folder: file and module."""

# What is larger than allowed today. Entries may only shrink and go; none is added.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
MANY_PARAMETERS: dict[str, int] = {}


def place(found: Import) -> str:
    return f"{found.file}:{found.line} -> {found.target}"


def test_imports_point_to_earlier_folders():
    assert [place(found) for found in TREE.upward()] == []


def test_upward_imports_of_types_are_listed():
    upward = {(found.file, found.target) for found in TREE.upward(["type"]) if found.arrow[0] != "(root)"}
    assert upward <= UPWARD_TYPES


def test_probes_use_the_declared_surface():
    """Probes import `workbench`, `workbench.probing` and each other, as those of other packages do."""
    surface = ("workbench", "workbench.probing")
    probes = [found for found in TREE.imports if found.file.startswith("probes/") and "__init__" not in found.file]
    assert probes
    others = [found for found in probes if found.target.startswith("workbench") and found.target not in surface]
    assert [place(found) for found in others if not found.target.startswith("workbench.probes")] == []


def test_no_circles():
    assert TREE.room_circles() == []
    assert TREE.file_circles() == []


def test_imports_use_full_names():
    for module, source in TREE.sources.items():
        relative = [node.lineno for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and node.level]
        assert relative == [], TREE.path(module)
    top = [found for found in TREE.imports if not found.target.startswith("workbench")]
    assert top == []


def test_the_package_has_at_most_three_files_in_its_root():
    assert len(list((ROOT / "workbench").glob("*.py"))) <= 3


def test_file_names_are_unique():
    installed = [Path(TREE.path(module)) for module in TREE.files]
    names = Counter(path.name for path in installed if path.parts[0] != "experiments" or len(path.parts) == 2)
    shared = {name for name, count in names.items() if count > 1} - {"__init__.py", "__main__.py"}
    assert shared == {"load.py"}  # of a model and of an SAE


def test_no_file_is_longer_than_500_lines():
    paths = [*TREE.files.values(), *(ROOT / "tests").rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert_only_listed({name: count for name, count in lines.items() if count > 500}, LONG_FILES)


def test_no_function_is_longer_than_60_lines():
    tests = {str(path.relative_to(ROOT)): path for path in (ROOT / "tests").rglob("*.py")}
    functions = [*TREE.functions]
    for name, path in tests.items():
        functions += functions_of(name, ast.parse(path.read_text(encoding="utf-8")))
    long = {f"{one.file}:{one.name}": one.lines for one in functions if one.lines > 60}
    assert_only_listed(long, LONG_FUNCTIONS)


def test_no_public_function_takes_more_than_8_parameters():
    many = {
        f"{one.file}:{one.name}": one.parameters
        for one in TREE.functions
        if one.public and one.parameters > 8 and one.name != "record"
    }
    assert_only_listed(many, MANY_PARAMETERS)


def assert_only_listed(sizes: dict[str, int], allowed: dict[str, int]) -> None:
    """Compares what is too large with what may be for now."""
    assert {name: size for name, size in sizes.items() if size > allowed.get(name, 0)} == {}


def write_tree(root: Path, files: dict[str, str]) -> Tree:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Tree(root)


def test_the_measure_finds_every_kind_of_import(tmp_path):
    tree = write_tree(
        tmp_path,
        {
            "workbench/__init__.py": "",
            "workbench/io/a.py": "def f():\n    from workbench.store import b\n",
            "workbench/store/b.py": "import workbench.io.a\nif TYPE_CHECKING:\n    from workbench.cli.main import M\n",
            "workbench/cli/main.py": "from workbench.probes.lens import Lens\nM = 1\n",
            "probes/lens.py": "import workbench as wb\nfrom workbench.store.b import x, y\n",
        },
    )
    assert {(one.file, one.target, one.kind) for one in tree.imports} == {
        ("workbench/io/a.py", "workbench.store.b", "deferred"),
        ("workbench/store/b.py", "workbench.cli.main", "type"),
        ("workbench/store/b.py", "workbench.io.a", "direct"),
        ("workbench/cli/main.py", "workbench.probes.lens", "direct"),
        ("probes/lens.py", "workbench", "direct"),
        ("probes/lens.py", "workbench.store.b", "direct"),
    }
    assert {place(one) for one in tree.upward()} == {
        "workbench/io/a.py:2 -> workbench.store.b",
        "workbench/cli/main.py:1 -> workbench.probes.lens",
    }
    assert tree.room_circles() == [("io", "store")]
    assert tree.file_circles() == [("workbench.io.a", "workbench.store.b")]


def test_circles_and_depth():
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == [("a", "b", "c")]
    assert circles({("a", "b"), ("a", "c"), ("b", "c")}) == []
    assert depth({("a", "b"), ("a", "c"), ("b", "c")}) == 3


@pytest.mark.parametrize("arguments", [(), (str(ROOT),)])
def test_the_command_prints_the_structure(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["structure", *arguments])
    monkeypatch.chdir(tmp_path)
    main()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["files"].startswith(f"{len(TREE.files)}, ")
    assert lines["upward"] == "none"
