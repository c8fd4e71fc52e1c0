"""pyproject.toml, constraints.txt and environment.yml describe one environment; the Makefile sets it up."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PIP = next(part["pip"] for part in ENVIRONMENT["dependencies"] if isinstance(part, dict))


def requirements(*extras: str) -> list[Requirement]:
    return [Requirement(text) for text in (*PROJECT["dependencies"], *(text for e in extras for text in EXTRAS[e]))]


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    unpinned = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert unpinned == []  # no paths, addresses or local builds: they hold on one machine only
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("requirement", requirements(*EXTRAS), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_within_its_bounds(requirement):
    pinned = pins()[canonicalize_name(requirement.name)]
    assert pinned in requirement.specifier
    assert any(clause.operator == ">=" for clause in requirement.specifier), "give it a lower bound"


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_lower_bounds_are_the_oldest_versions_that_are_tested(requirement):
    oldest = pins("constraints-oldest.txt").get(canonicalize_name(requirement.name))
    if requirement.name in ("torch", "sae-lens"):  # tested with one version
        return
    (floor,) = (clause.version for clause in requirement.specifier if clause.operator == ">=")
    assert oldest is not None
    assert oldest.split(".")[: floor.count(".") + 1] == floor.split(".")


def test_the_fixed_packages_are_in_the_conda_environment():
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", PIP[1])[1].split(",")
    names = {requirement.name for requirement in requirements(*extras)}
    assert {"transformer-lens", "torch", "einops", "plotly", "jupyterlab", "sae-lens"} <= names
    assert set(extras) == {"dev", "notebook", "export"}


def test_environment_and_makefile_install_the_same():
    assert PIP[0] == "-c constraints.txt"
    dry = run_make("-n", "-W", "pyproject.toml", "lint")
    assert dry.returncode == 0, dry.stderr
    installs = [line for line in dry.stdout.splitlines() if "pip install" in line]
    assert installs == [f'.venv/bin/pip install -c constraints.txt -e "{PIP[1].removeprefix("-e ")}"']


def test_the_python_of_the_environment_is_one_the_project_takes():
    (python,) = (part.removeprefix("python=") for part in ENVIRONMENT["dependencies"] if "python=" in part)
    assert python in SpecifierSet(PROJECT["requires-python"])
    assert f"Python {python}," in (ROOT / "constraints.txt").read_text().splitlines()[0]


def test_make_demo_runs_the_demo_where_it_is_told(tmp_path):
    workbench = tmp_path / "bin" / "workbench"  # writes down how it was called
    workbench.parent.mkdir()
    workbench.write_text(f'#!/bin/sh\nprintf "%s|" "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n')
    workbench.chmod(0o755)
    for variables in ((), ("OUT=it's here",)):
        demo = run_make("-o", ".venv/.installed", f"BIN={workbench.parent}", "demo", *variables)
        assert demo.returncode == 0, demo.stderr
    assert (tmp_path / "calls").read_text().splitlines() == ["demo|--out|runs/demo|", "demo|--out|it's here|"]


def test_the_list_of_packages_is_complete():
    """Every folder with modules is installed, except the studies under experiments/."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tool["package-dir"] == {
        "workbench": "workbench",
        "workbench.probes": "probes",
        "workbench.experiments": "experiments",
    }
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "workbench").rglob("*.py")}
    assert sorted(tool["packages"]) == sorted(
        ["workbench.probes", "workbench.experiments", *(".".join(folder.parts) for folder in folders)]
    )
    needed = {path for suffix in (".css", ".js") for path in (ROOT / "workbench").rglob(f"*{suffix}")}
    packaged = {
        path
        for package, patterns in tool["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert needed <= packaged


def test_everything_embedded_is_packaged_and_small():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "workbench" / "embedded"
    packaged = {path for pattern in patterns["workbench.embedded"] for path in folder.glob(pattern)}
    present = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packaged == present
    assert sum(path.stat().st_size for path in present) < 20_000_000


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split())
    listed = {line.split()[1] for line in run_make("help").stdout.splitlines()}
    assert listed == targets


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()


def test_entry_points_name_what_exists():
    from importlib import import_module

    for target in (*PROJECT["scripts"].values(), *PROJECT["entry-points"]["workbench.probes"].values()):
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))
