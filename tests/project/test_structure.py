"""Folders are layers, arrows point one way, and no file, function or signature grows too large."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

from workbench.experiments.structure import __main__ as command
from workbench.experiments.structure.source import Import, Tree, circles, depth, functions_of

ROOT = Path(__file__).parents[2]

UPWARD_TYPES: set[tuple[str, str]] = set()
"""Imports for type checkers alone that point to a later folder: file and module."""

# What is larger than allowed today. Entries may only shrink and go; none is added.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
MANY_PARAMETERS: dict[str, int] = {}


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(ROOT)


def place(item: Import) -> str:
    return f"{item.file}:{item.line} -> {item.target}"


def test_imports_point_to_earlier_folders(tree):
    assert [place(item) for item in tree.upward()] == []


def test_upward_imports_of_types_are_listed(tree):
    upward = {(item.file, item.target) for item in tree.upward(["type"]) if item.arrow[0] != "(root)"}
    assert upward <= UPWARD_TYPES


def test_probes_use_the_declared_surface(tree):
    """Probes import `workbench`, `workbench.probing` and each other, as those of other packages do."""
    surface = ("workbench", "workbench.probing")
    imports = [item for item in tree.imports if item.file.startswith("probes/") and "__init__" not in item.file]
    assert imports
    beyond = [item for item in imports if item.target.startswith("workbench") and item.target not in surface]
    assert [place(item) for item in beyond if not item.target.startswith("workbench.probes")] == []


def test_no_circles(tree):
    assert tree.room_circles() == []
    assert tree.file_circles() == []


def test_imports_use_full_names(tree):
    for module, source in tree.sources.items():
        relative = [node.lineno for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and node.level]
        assert relative == [], tree.path(module)
    top = [item for item in tree.imports if not item.target.startswith("workbench")]
    assert top == []


def test_the_package_has_at_most_three_files_in_its_root():
    assert len(list((ROOT / "workbench").glob("*.py"))) <= 3


def test_file_names_are_unique(tree):
    installed = [Path(tree.path(module)) for module in tree.files]
    names = Counter(path.name for path in installed if path.parts[0] != "experiments" or len(path.parts) == 2)
    shared = {name for name, count in names.items() if count > 1} - {"__init__.py", "__main__.py"}
    assert shared == {"load.py"}  # of a model and of an SAE


def test_no_file_is_longer_than_500_lines(tree):
    paths = [*tree.files.values(), *(ROOT / "tests").rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert_only_listed({name: count for name, count in lines.items() if count > 500}, LONG_FILES)


def test_no_function_is_longer_than_60_lines(tree):
    tests = {str(path.relative_to(ROOT)): path for path in (ROOT / "tests").rglob("*.py")}
    functions = [*tree.functions]
    for name, path in tests.items():
        functions += functions_of(name, ast.parse(path.read_text(encoding="utf-8")))
    long = {f"{function.file}:{function.name}": function.lines for function in functions if function.lines > 60}
    assert_only_listed(long, LONG_FUNCTIONS)


def test_no_public_function_takes_more_than_8_parameters(tree):
    many = {
        f"{function.file}:{function.name}": function.parameters
        for function in tree.functions
        if function.public and function.parameters > 8 and function.name != "record"
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
    assert {(item.file, item.target, item.kind) for item in tree.imports} == {
        ("workbench/io/a.py", "workbench.store.b", "deferred"),
        ("workbench/store/b.py", "workbench.cli.main", "type"),
        ("workbench/store/b.py", "workbench.io.a", "direct"),
        ("workbench/cli/main.py", "workbench.probes.lens", "direct"),
        ("probes/lens.py", "workbench", "direct"),
        ("probes/lens.py", "workbench.store.b", "direct"),
    }
    assert {place(item) for item in tree.upward()} == {
        "workbench/io/a.py:2 -> workbench.store.b",
        "workbench/cli/main.py:1 -> workbench.probes.lens",
    }
    assert tree.room_circles() == [("io", "store")]
    assert tree.file_circles() == [("workbench.io.a", "workbench.store.b")]


def test_circles_and_depth():
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == [("a", "b", "c")]
    assert circles({("a", "b"), ("a", "c"), ("b", "c")}) == []
    assert depth({("a", "b"), ("a", "c"), ("b", "c")}) == 3


def test_the_command_prints_the_structure_of_this_checkout(tree, monkeypatch, capsys):
    monkeypatch.setattr(command, "Tree", {ROOT.resolve(): tree}.__getitem__)  # read already
    lines = printed([], monkeypatch, capsys)
    assert lines["files"].startswith(f"{len(tree.files)}, ")
    assert lines["upward"] == "none"


def test_the_command_prints_the_structure_of_a_folder(tmp_path, monkeypatch, capsys):
    files = {"workbench/io/a.py": "import workbench.store.b\n", "workbench/store/b.py": "", "probes/lens.py": ""}
    write_tree(tmp_path, files)
    lines = printed([str(tmp_path)], monkeypatch, capsys)
    assert lines["files"] == "3, 1 lines; 0 files in the root of workbench/"
    assert lines["upward"] == "workbench/io/a.py:1 -> workbench.store.b"


def printed(arguments: list[str], monkeypatch, capsys) -> dict[str, str]:
    """Runs the command and returns its lines by name; a name may be two words."""
    monkeypatch.setattr(sys, "argv", ["structure", *arguments])
    command.main()
    return {line[:18].strip(): line[19:] for line in capsys.readouterr().out.splitlines()}
