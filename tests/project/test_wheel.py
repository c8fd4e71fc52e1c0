"""A wheel built from the repository works next to a user's folders with the names of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"


def run(*command: object, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the files that git tracks or would track."""
    pytest.importorskip("setuptools", reason="a wheel is built by setuptools: install the extra [dev]")
    if not (ROOT / ".git").exists():
        pytest.skip("this checkout is no git repository, so there is no list of its files")
    folder = tmp_path_factory.mktemp("wheel")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "clone" / name)
    build = (
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder / "dist",
        folder / "clone",
    )
    run(sys.executable, "-m", *build, cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel, a probe of others, and the dependencies of this one."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    folders = [path for path in sys.path if "site-packages" in path]
    (packages / "dependencies.pth").write_text("\n".join(folders) + "\n")
    shutil.copy(ROOT / "tests" / "own_probe" / "norm_growth.py", packages)
    (packages / "own-1.0.dist-info").mkdir()
    (packages / "own-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    entry = "[workbench.probes]\nnorm-growth = norm_growth:NormGrowth\n"
    (packages / "own-1.0.dist-info" / "entry_points.txt").write_text(entry)
    return python


def write_user_modules(place: Path, kind: str) -> None:
    """Writes `probes` and `experiments` of a user's into a folder, as folders or as files."""
    for name in ("probes", "experiments"):
        path = place / name / "__init__.py" if kind == "folders" else place / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("OF = 'the user'\n")


def test_the_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
    assert {path.parts[0] for path in names} == {"workbench", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    inside = {str(path) for path in names}
    studies = [path for path in names if path.parts[:2] == ("workbench", "experiments") and len(path.parts) > 3]
    assert studies == []
    assert not any(part in str(path) for path in names for part in ("benchmark", "tests/", "demo_model"))
    assert inside >= {
        "workbench/py.typed",
        "workbench/__main__.py",
        "workbench/probes/logit_lens.py",
        "workbench/experiments/sinks.py",
        "workbench/embedded/corpus.jsonl",
        "workbench/embedded/model/model.safetensors",
        "workbench/embedded/sae/sae_weights.safetensors",
    }
    sources = {path for folder in ("workbench", "probes") for path in (ROOT / folder).rglob("*.py")}
    sources |= {
        *(ROOT / "experiments").glob("*.py"),
        *(ROOT / "workbench").rglob("*.css"),
        *ROOT.glob("workbench/**/*.js"),
    }
    installed = {str(path.relative_to(ROOT)) for path in sources}
    installed = {name if name.startswith("workbench") else f"workbench/{name}" for name in installed}
    assert installed <= inside
    assert wheel.stat().st_size < 20_000_000


PROGRAM = """
import runpy
import sys
from importlib.metadata import entry_points
from pathlib import Path

import workbench as wb

data, out = Path(sys.argv[1]), Path(sys.argv[2])
assert "site-packages" in wb.__file__, wb.__file__
for group in ("workbench.probes", "workbench.experiments"):
    for entry in entry_points(group=group):
        entry.load()
from workbench.probes import LogitLens
from workbench.results.registry import find_probe
import workbench.experiments.sinks
import probes, experiments
assert probes.OF == experiments.OF == "the user"

stored = wb.open_store(data / "store-v1")
assert stored.rows == len(stored.tokens)
assert set(stored.verify()["severity"]) <= {"note"}
for folder in sorted((data / "results-v1").iterdir()):
    result = wb.load_result(folder)
    assert result.headline() and result.figures()

store = wb.record(wb.load_model("demo"), wb.demo_corpus()[:2], out=out / "a.acts", show_progress=False)
for probe in (LogitLens(), find_probe("norm-growth")()):
    result = probe.run(store)
    result.save(out / probe.name)
    assert wb.load_result(out / probe.name).figures()
wb.export(wb.load_result(out / "logit-lens"), out / "figures", formats=["html"])

from workbench.cli.main import main

for arguments in (["probes"], ["sweep"]):  # as commands, without another start of torch
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code, arguments
sys.argv = ["sinks", "--help"]
runpy.run_module("workbench.experiments.sinks", run_name="__main__")
"""


def test_files_of_the_same_names_hide_nothing(python, tmp_path):
    write_user_modules(tmp_path, "files")
    program = (
        "import probes, experiments, workbench.probes, workbench.experiments; "
        "from workbench.results.registry import installed_probes; "
        "print(probes.OF, experiments.OF, *workbench.probes.__all__, *installed_probes())"
    )
    printed = run(python, "-c", program, cwd=tmp_path)
    assert printed.startswith("the user the user ")
    assert {"LogitLens", "logit-lens", "norm-growth"} <= set(printed.split())


def test_everything_works_beside_folders_of_the_same_names(python, tmp_path):
    place = tmp_path / "place"
    write_user_modules(place, "folders")
    (place / "program.py").write_text(PROGRAM)
    printed = run(python, "program.py", DATA, tmp_path / "out", cwd=place, HF_HUB_OFFLINE="1")
    for part in ("logit-lens", "norm-growth", "sinks", "usage:"):
        assert part in printed
    command = python.parent / "workbench"
    assert run(command, "--version", cwd=place).startswith("workbench ")
    assert run(python, "-m", "workbench", "info", tmp_path / "out" / "a.acts", cwd=place).startswith("store ")


def test_importing_the_package_is_quick_and_light(python, tmp_path):
    program = (
        "import sys, time; began = time.process_time(); import workbench; print(time.process_time() - began); "
        "assert not {'torch', 'numpy', 'pandas', 'plotly', 'transformers'} & set(sys.modules)"
    )
    assert min(float(run(python, "-c", program, cwd=tmp_path)) for _ in range(5)) < 0.05
