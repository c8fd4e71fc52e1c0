"""The probe of docs/own-probe.md: installed as a package of its own, used like ours, and true to the contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from planted import linear_unembed, planted_store

import workbench as wb
from workbench.io.errors import RequestError
from workbench.probes import LogitLens
from workbench.testing import ProbeContract

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "own_probe"
PAGE = ROOT / "docs" / "own-probe.md"

sys.path.insert(0, str(PACKAGE))
from norm_growth import NormGrowth  # noqa: E402

COMMANDS = """
import sys
from workbench.cli.main import main
for arguments in (["probes"], ["probe", "norm-growth", "own.acts", "--where", "row > 0", "--out", "norms"],
                  ["report", "norms", "--out", "report.html"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code, arguments
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that pip installed the package into, from a copy: building writes beside the source."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("own")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", str(folder / "site"), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return folder / "site"


def test_the_page_shows_the_package_as_it_is():
    blocks = re.findall(r"^```(?:python|toml)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert blocks == [(PACKAGE / name).read_text() for name in ("norm_growth.py", "pyproject.toml")]
    lines = [line for line in (PACKAGE / "norm_growth.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 40


def test_an_installed_probe_is_used_like_ours(installed, tmp_path):
    planted_norms(tmp_path, first_row=100)  # which the condition leaves out
    path = os.pathsep.join([str(installed), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"^  norm-growth +Measures the norm of the residual stream after each block\.$", result.stdout, re.M
    )
    import pandas as pd

    table = pd.read_parquet(tmp_path / "norms" / "table.parquet")
    np.testing.assert_allclose(table["norm"], [2.0, 4.0, 8.0])  # |(v, v, v, v)| = 2 v
    page = (tmp_path / "report.html").read_text()
    for text in (
        "Mean residual norm grows from 2.0 to 8.0, a factor of 4.0.",
        "Measures the norm of the residual stream after each block.",
        "without training the norm grows",
        "SQL over the token table: the tokens to average over. (default &#34;NOT is_special&#34;)",
        "<code>norm(l) = mean |h_l|</code>",
    ):
        assert text in page


# Without an installation

SCRIPT = """
import workbench as wb
from workbench.pages.report import section, write_report
{source}
store = wb.open_store("own.acts")
result = NormGrowth().run(store)
result.save("norms")
again = wb.load_result("norms")
print(again.headline(), *again.figures())
write_report([section(again)], "report.html", title="Own")
"""


def run_python(folder: Path, code: str, **variables: str) -> str:
    (folder / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def planted_norms(folder: Path, first_row: float = 2.0) -> Path:
    """A store of 6 rows with 2^l in each of the 4 places of block l, and `first_row` in the first row of block 1."""
    norms = {f"resid_post.{layer}": np.full((6, 4), 2.0**layer, np.float32) for layer in range(3)}
    norms["resid_post.1"][0] = first_row
    planted_store(folder / "own.acts", [[1, 2, 3], [4, 5, 6]], norms, linear_unembed(np.eye(8, 4)))
    return folder / "own.acts"


def test_a_probe_of_a_script_is_saved_drawn_and_reported_and_later_needs_its_class(tmp_path):
    planted_norms(tmp_path)
    source = (PACKAGE / "norm_growth.py").read_text()
    printed = run_python(tmp_path, SCRIPT.format(source=source))
    assert printed.strip() == "Mean residual norm grows from 2.0 to 8.0, a factor of 4.0. norm"
    assert "Measures the norm of the residual stream after each block." in (tmp_path / "report.html").read_text()
    result = wb.load_result(tmp_path / "norms")
    np.testing.assert_allclose(result.data["norm"], [2.0, 4.0, 8.0])
    with pytest.raises(RequestError, match=NOT_HERE) as caught:
        result.figures()
    assert "\n" not in str(caught.value)
    assert "__main__ does not define it here" in result._repr_html_()
    loaded = wb.load_result(tmp_path / "norms", probe=NormGrowth)
    assert loaded.headline().startswith("Mean residual norm grows from 2.0 to 8.0")
    loaded.save(tmp_path / "norms")
    assert list(wb.load_result(tmp_path / "norms").figures()) == ["norm"]  # of the class that can be imported


NOT_HERE = (
    r"probe 'norm-growth' is not installed, and its class __main__:NormGrowth is not here \(__main__ does not "
    r"define it here\); import the class and give it: load_result\(path, probe=CLASS\)"
)


def test_a_class_inside_a_function_draws_what_it_made_in_this_process(tmp_path):
    class Inside(NormGrowth):
        name = "inside"

    result = Inside().run(wb.open_store(planted_norms(tmp_path)))
    again = wb.load_result(result.save(tmp_path / "norms"))
    assert list(again.figures()) == ["norm"]
    assert again.maker() is Inside


def test_a_class_that_is_defined_again_draws_from_then_on(tmp_path, monkeypatch):
    result = NormGrowth().run(wb.open_store(planted_norms(tmp_path)))

    class NormGrowthAgain(NormGrowth):
        @staticmethod
        def headline(result):
            return "again"

    monkeypatch.setattr(sys.modules[NormGrowth.__module__], "NormGrowth", NormGrowthAgain)
    assert result.headline() == "again"


def test_a_result_does_not_decide_which_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "side_effect.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    saved = NormGrowth().run(wb.open_store(planted_norms(tmp_path))).save(tmp_path / "norms")
    result = wb.load_result(saved)
    planted = replace(result, provenance={**result.provenance, "probe_class": "side_effect:Probe"})
    with pytest.raises(RequestError, match=r"side_effect:Probe is not here \(side_effect is not imported\); import"):
        planted.figures()
    assert "side_effect" not in sys.modules


def test_the_class_of_another_probe_is_refused(tmp_path):
    saved = NormGrowth().run(wb.open_store(planted_norms(tmp_path))).save(tmp_path / "norms")
    with pytest.raises(RequestError, match="is of the probe 'norm-growth', not of 'logit-lens'"):
        wb.load_result(saved, probe=LogitLens)


# The contract, in this process


@pytest.fixture
def registered(monkeypatch):
    """The probe, importable and registered as if it were installed."""
    entries = {"norm-growth": EntryPoint("norm-growth", "norm_growth:NormGrowth", "workbench.probes")}
    monkeypatch.setattr("workbench.results.registry.installed_probes", lambda: entries)


@pytest.mark.usefixtures("registered")
class TestContract(ProbeContract):
    probe = NormGrowth
    settings = {"where": "row > 0"}  # noqa: RUF012

    @pytest.fixture
    def store(self, tmp_path):
        states = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
        sites = {f"resid_post.{layer}": values for layer, values in enumerate(states)}
        return planted_store(tmp_path / "own.acts", [[1, 2, 3], [4, 5, 6]], sites, linear_unembed(np.eye(8, 4)))
