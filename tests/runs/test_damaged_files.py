"""Damaged files of runs give a run or an error in one line."""

import pytest
import toy_experiment
from mutations import fuzz
from result_operations import toy_result
from toy_experiment import Config

from workbench.io.parse import to_json
from workbench.results.experiment import identity
from workbench.runs.folders import is_complete, load_run, run_in


@pytest.fixture
def complete(tmp_path, monkeypatch):
    """A complete run of the toy, made by hand."""
    monkeypatch.setattr("workbench.results.result.find_maker", lambda *_: toy_experiment)
    run = run_in(tmp_path, "toy", Config())
    run.folder.mkdir()
    toy_result().save(run.folder / "results")
    config = {"format": "workbench.run", "version": 1, "experiment": "toy", "config": identity(run.config)}
    (run.folder / "config.json").write_text(to_json(config))
    (run.folder / "environment.json").write_text(to_json({"files": {"model": "abc"}, "seconds": 1.5}))
    return run


@pytest.mark.parametrize("file", ["config.json", "environment.json"])
def test_of_a_run(file, complete):
    assert is_complete(complete)

    def read():
        return is_complete(complete), load_run(complete.folder)

    fuzz(read, complete.folder / file)
