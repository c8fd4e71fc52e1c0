"""Imports stay light, their names are the right ones, and shapes are checked in the test run."""

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "transformer_lens", "sae_lens", "plotly", "datasets")
LIGHT = (
    "workbench",
    "workbench.cli.main",
    "workbench.io.errors",
    "workbench.sites.settings",
    "workbench.sites.grammar",
    "workbench.corpus.tokens",
    "workbench.store",
    "workbench.store.manifest",
    "workbench.io.tensors",
    "workbench.store.writer",
    "workbench.store.query",
    "workbench.store.verify",
)
PACKAGES = {"workbench": "workbench", "probes": "workbench.probes", "experiments": "workbench.experiments"}
"""Folders of the repository with the names that they are installed under."""
SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_no_heavy_library(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_every_public_name_is_there():
    import workbench

    assert dir(workbench) == sorted(workbench.__all__)
    for name in workbench.__all__:
        assert getattr(workbench, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'workbench' has no attribute 'opn_store'"):
        workbench.opn_store  # noqa: B018


def test_no_public_name_is_the_name_of_a_submodule():
    """Importing `workbench.x` binds x in `workbench`; a public function x would be gone."""
    import workbench

    modules = {module.name for module in pkgutil.iter_modules(workbench.__path__)} | {"probes", "experiments"}
    assert modules >= {"store", "cli"}
    assert modules & set(workbench.__all__) == set()
    for folder in PACKAGES.values():
        package = import_module(folder)
        public = set(getattr(package, "__all__", ()))
        assert public & {module.name for module in pkgutil.iter_modules(package.__path__)} == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-c", "import probes"), "write `from workbench.probes import ...`"),
        (("-c", "from probes import LogitLens"), "write `from workbench.probes import ...`"),
        (("-c", "import experiments.sinks"), "write `from workbench.experiments import ...`"),
        (("-m", "experiments.sinks"), "or `python -m workbench.experiments.NAME`"),
        (("-m", "probes.logit_lens"), "write `from workbench.probes import ...`"),
    ],
)
def test_the_folders_as_packages_of_their_own_name_the_right_import(arguments, message):
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def imported_in(node: ast.AST) -> set[str]:
    """Local names bound by the imports inside a node."""
    imports = [part for part in ast.walk(node) if isinstance(part, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name.split(".")[0] for statement in imports for alias in statement.names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrays_in_checked_shapes_are_really_imported(path):
    """jaxtyping silently checks nothing where the array type is imported for type checkers alone."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    guarded = [node for node in nodes if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    unreal = set().union(*(imported_in(node) for node in guarded))
    shapes = set().union(*(imported_in(n) for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "jaxtyping"))
    checked = [node for node in nodes if isinstance(node, ast.Subscript) and names_in(node.value) & shapes]
    assert [ast.unparse(node) for node in checked if names_in(node) & unreal] == []


@pytest.mark.parametrize("package", PACKAGES.values())
def test_the_canary_a_wrong_shape_is_refused(package, tmp_path, monkeypatch):
    """A module added to the package is checked, results and dtypes included."""
    (tmp_path / "canary.py").write_text(
        "import numpy as np\n"
        "from jaxtyping import Float\n"
        "def row_sums(x: Float[np.ndarray, 'row d_model']) -> Float[np.ndarray, ' row']:\n"
        "    return x.sum(1)\n"
        "def column_sums(x: Float[np.ndarray, 'row d_model']) -> Float[np.ndarray, ' row']:\n"
        "    return x.sum(0)\n"
        "def adder(term: int | float):\n"
        "    def add(x: int) -> int:\n"
        "        return x + term\n"
        "    return add\n"
    )
    parent = import_module(package)
    monkeypatch.setattr(parent, "__path__", [*parent.__path__, str(tmp_path)])
    canary = import_module(f"{package}.canary")
    monkeypatch.delitem(sys.modules, f"{package}.canary")
    assert canary.row_sums(np.ones((2, 3))).tolist() == [3, 3]
    for call in (
        lambda: canary.row_sums(np.ones(2)),
        lambda: canary.row_sums(np.ones((2, 3), dtype=int)),
        lambda: canary.column_sums(np.ones((2, 3))),
    ):
        with pytest.raises(Exception, match="Type-check error whilst checking the"):
            call()
    assert [canary.adder(term)(1) for term in (1, 2)] == [2, 3]
    for wrong in (lambda: canary.adder(1)("x"), lambda: canary.adder(0.5)(1)):
        with pytest.raises(Exception, match="violates type hint"):
            wrong()
