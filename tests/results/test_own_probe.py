"""The probe of docs/own-probe.md: installed as a package of its own, used like ours, and true to the contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from planted import linear_unembed, planted_store

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
    ran = subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", str(folder / "site"), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return folder / "site"


def test_the_page_shows_the_package_as_it_is():
    blocks = re.findall(r"^```(?:python|toml)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert blocks == [(PACKAGE / name).read_text() for name in ("norm_growth.py", "pyproject.toml")]
    lines = [line for line in (PACKAGE / "norm_growth.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 40


def test_an_installed_probe_is_used_like_ours(installed, tmp_path):
    norms = {f"resid_post.{layer}": np.full((6, 4), 2.0**layer, np.float32) for layer in range(3)}
    norms["resid_post.1"][0] = 100  # the row that the condition leaves out
    planted_store(tmp_path / "own.acts", [[1, 2, 3], [4, 5, 6]], norms, linear_unembed(np.eye(8, 4)))
    path = os.pathsep.join([str(installed), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^  norm-growth +Measures the norm of the residual stream after each block\.$", ran.stdout, re.M)
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
