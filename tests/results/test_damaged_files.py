"""Damaged files of results give a result or an error in one line."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import result_operations
import xarray as xr
from mutations import fuzz

from workbench.io.errors import WorkbenchError
from workbench.results.result import Result, load_result

FIRST_VERSION = Path(__file__).parents[1] / "data" / "results-v1"
PROVENANCE = result_operations.PROVENANCE | {"settings": {"k": 3}}


class Bare(Result):
    def figures(self):
        return {}


@pytest.fixture
def saved(tmp_path):
    data = xr.Dataset(
        {
            "x": (("layer", "head"), np.eye(3, 2), {"units": "nats"}),
            "word": ("layer", ["a", "ü", ""]),
            "count": ("layer", np.array([2**60, 1, 2])),
            "none": ("empty", np.empty(0, np.float16)),
        },
        coords={"layer": [0, 1, 2]},
    )
    table = pd.DataFrame({"x": [0.5, 1.5], "word": ["a", None]})
    return Bare("mine", data, table, PROVENANCE).save(tmp_path / "mine")


def show(folder):
    """Everything that reads a result without its probe."""
    result = load_result(folder)
    return repr(result), result.source()


@pytest.mark.parametrize("file", ["result.json", "data.nc", "table.parquet"])
def test_of_a_result_without_checksums(file, tmp_path):
    folder = shutil.copytree(FIRST_VERSION / "token-erasure", tmp_path / "old")
    outcomes = fuzz(lambda: show(folder), folder / file)
    assert outcomes["DataError"] > 0.1 * outcomes.total()


@pytest.mark.parametrize("file", ["result.json", "data.nc", "table.parquet"])
def test_of_a_result(file, saved):
    outcomes = fuzz(lambda: show(saved), saved / file)
    assert outcomes["DataError"] > 0.1 * outcomes.total()


@pytest.mark.parametrize("file", ["result.json", "data.nc", "table.parquet"])
def test_a_pipe_in_place_of_a_file_is_refused(file, saved, monkeypatch):
    (saved / file).unlink()
    os.mkfifo(saved / file)
    with pytest.raises(WorkbenchError) as caught:
        load_result(saved)
    assert "\n" not in str(caught.value)
