"""Tests of run folders and sweeps: complete or absent, run once, never overwritten, byte-identical."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import re
import sys
import threading
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import toy_experiment as toy
from refusals import refused
from toy_experiment import Config
from warned import warned

import workbench as wb
from workbench.cli import main as cli
from workbench.io.errors import DataError, RequestError
from workbench.io.tasks import ThisProcess
from workbench.io.torch_state import usable_device
from workbench.results.experiment import identity, make_result
from workbench.results.registry import find_experiment, installed_experiments, summary
from workbench.runs.folders import Run, attempt, execute, is_complete, load_run, run_in, run_name
from workbench.runs.sweep import grid, sweep


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The toy is the only experiment, and has not run yet."""
    entries = [EntryPoint("toy", "toy_experiment", "workbench.experiments")]
    monkeypatch.setattr("workbench.results.registry.entry_points", lambda group: entries)
    toy.RAN.clear()


def files(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- one run --------------------------------------------------------------------------------------------


def test_a_run_folder_holds_config_environment_log_results_and_figures(tmp_path, capsys):
    run = Run("toy", Config(factor=2.0, seed=3), tmp_path / "runs" / "one")
    result = execute(run)
    assert sorted(files(run.folder, but=("plotly.min.js",))) == [
        "config.json",
        "environment.json",
        "log.txt",
        "results/data.nc",
        "results/figures/lines.html",
        "results/result.json",
        "results/table.parquet",
    ]
    assert [path.name for path in run.folder.parent.iterdir()] == ["one"]
    config, environment, again = load_run(run.folder)
    assert config == {"model": "a", "factor": 2.0, "seed": 3, "positions": [0, 1, 2]}
    assert {"commit", "changed", "device", "platform", "python", "seconds", "started", "threads"} < set(environment)
    assert environment["versions"]["numpy"] == np.__version__
    pd.testing.assert_frame_equal(again.table, result.table)
    assert again.table["y"].tolist() == [3.0, 5.0, 7.0]
    assert list(again.table.columns) == ["model", "factor", "seed", "positions", "x", "y"]
    assert again.table["positions"].tolist() == ["0 1 2"] * 3
    assert again.headline() == "y up to 7"
    assert again.figure("lines").to_json() == result.figure().to_json()
    log = (run.folder / "log.txt").read_text()
    assert "seed=3" in log
    assert "drawing a line" in log
    assert "y up to 7" in log
    assert capsys.readouterr().out == "drawing a line\n"


def test_what_is_complete_is_read_and_not_run(tmp_path):
    run = Run("toy", Config(), tmp_path / "one")
    first = execute(run)
    before = files(tmp_path)
    elsewhere = Run("toy", Config(recordings=Path("elsewhere")), run.folder)  # not part of what a run is
    for same_run in (run, elsewhere):
        pd.testing.assert_frame_equal(execute(same_run).table, first.table)
    assert (len(toy.RAN), files(tmp_path)) == (1, before)


def test_two_identical_runs_have_identical_results(tmp_path):
    for name in ("one", "two"):
        execute(Run("toy", Config(seed=4), tmp_path / name))
    first_files, second_files = (files(tmp_path / name / "results") for name in ("one", "two"))
    assert first_files == second_files


def test_a_run_of_any_device_is_complete_where_the_device_is_left_open(tmp_path):
    @dataclass(frozen=True)
    class WithDevice(Config):
        device: str | None = None

    execute(Run("toy", WithDevice(device="cpu"), tmp_path / "one"))
    assert is_complete(Run("toy", WithDevice(), tmp_path / "one"))
    execute(Run("toy", WithDevice(), tmp_path / "two"))
    assert set(execute(Run("toy", WithDevice(), tmp_path / "two")).table["device"]) == {usable_device().type}
    with pytest.raises(RequestError, match="holds a run with device None, not 'cpu'"):
        is_complete(Run("toy", WithDevice(device="cpu"), tmp_path / "two"))


def test_nothing_else_is_overwritten(tmp_path):
    folder = tmp_path / "one"
    execute(Run("toy", Config(), folder))
    before = files(tmp_path)
    second_run = Run("toy", Config(factor=2.0, seed=1), folder)
    assert refused(RequestError, lambda: execute(second_run)) == (
        f"out {str(folder)!r} holds a run with factor 1.0, not 2.0; choose another folder or remove it"
    )
    assert refused(RequestError, lambda: execute(Run("boy", Config(), folder))) == (
        f"out {str(folder)!r} holds a run of toy, not of boy; choose another folder"
    )
    users_folder = tmp_path / "mine"
    users_folder.mkdir()
    (users_folder / "notes.txt").write_text("kept")
    assert refused(RequestError, lambda: execute(Run("toy", Config(), users_folder))) == (
        f"out {str(users_folder)!r} exists and is not a run; choose another folder"
    )
    assert files(tmp_path) == before | {"mine/notes.txt": b"kept"}
    assert len(toy.RAN) == 1


@pytest.mark.parametrize("name", ["text.jsonl", "model/weights"])
def test_a_run_of_files_that_were_changed_since_is_not_taken_for_one_of_these(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("one")
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    model = str(tmp_path / name.split("/")[0])
    run = Run("toy", Config(model=model), tmp_path / "run")
    execute(run)
    assert is_complete(run)
    file.write_text("three")
    assert refused(RequestError, lambda: execute(run)) == (
        f"out {str(run.folder)!r} holds a run of model {model!r} from before its files changed; remove it "
        "to run again, or choose another folder"
    )
    file.unlink()
    (tmp_path / "model" / "config.json").unlink()
    assert is_complete(run)  # what is gone has not changed what was found
    assert len(toy.RAN) == 1


def test_an_empty_folder_is_filled(tmp_path):
    run = Run("toy", Config(), tmp_path / "empty")
    run.folder.mkdir()
    assert not is_complete(run)
    execute(run)
    assert is_complete(run)


def test_what_a_killed_run_left_is_no_run_and_is_written_anew(tmp_path, monkeypatch):
    run = Run("toy", Config(), tmp_path / "one")

    def killed(_config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toy, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(run)
    partial = tmp_path / "one.partial"
    assert not run.folder.exists()
    assert "KeyboardInterrupt" in (partial / "log.txt").read_text()
    (partial / "results").mkdir()
    (partial / "results" / "half").write_text("of a table")
    execute(run)
    assert "results/half" not in files(run.folder)
    assert not partial.exists()


def test_an_error_is_told_in_one_line_and_its_traceback_kept(tmp_path):
    outcome = attempt(Run("toy", Config(model="broken"), tmp_path / "one"))
    log = tmp_path / "one.partial" / "log.txt"
    assert (outcome.state, outcome.message) == ("failed", f"unexpected RuntimeError: the line broke; see {log}")
    assert "Traceback" in log.read_text()
    assert attempt(Run("toy", Config(model="refused"), tmp_path / "two")).message == (
        "model 'refused' is refused; give another"
    )


def test_warnings_are_in_the_log_and_still_shown(tmp_path, monkeypatch):
    real = toy.run

    def warning(config):
        warnings.warn("few tokens", stacklevel=1)
        return real(config)

    monkeypatch.setattr(toy, "run", warning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = warnings.showwarning
        execute(Run("toy", Config(), tmp_path / "one"))
        assert warnings.showwarning is before
    assert "warning: few tokens" in (tmp_path / "one" / "log.txt").read_text()
    assert [str(warning.message) for warning in caught] == ["few tokens"]


def test_logged_warnings_are_in_the_log_and_still_shown(tmp_path, monkeypatch, capsys):
    real = toy.run

    def warning(config):
        logging.getLogger("workbench.runs").warning("few tokens")
        return real(config)

    monkeypatch.setattr(toy, "run", warning)
    with warned("^few tokens$"):
        execute(Run("toy", Config(), tmp_path / "one"))
    assert "warning: few tokens" in (tmp_path / "one" / "log.txt").read_text()
    assert capsys.readouterr().err == "few tokens\n"


def test_two_at_once_run_it_once(tmp_path, monkeypatch):
    run = Run("toy", Config(), tmp_path / "one")
    inside, go_on, real = threading.Event(), threading.Event(), toy.run

    def slow(config):
        inside.set()
        assert go_on.wait(30)
        return real(config)

    monkeypatch.setattr(toy, "run", slow)
    monkeypatch.setattr(sys, "stderr", waiting := io.StringIO())
    results = []
    threads = [threading.Thread(target=lambda: results.append(execute(run))) for _ in range(2)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    while "waiting for another process" not in waiting.getvalue():
        threads[1].join(0.01)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(toy.RAN) == 1
    pd.testing.assert_frame_equal(results[0].table, results[1].table)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("name", ["config.json", "environment.json", "results/table.parquet"])
def test_a_damaged_run_is_named(tmp_path, name):
    run = Run("toy", Config(), tmp_path / "one")
    execute(run)
    (run.folder / name).write_text("{")
    text = refused(DataError, lambda: load_run(run.folder))
    assert text.startswith((f"{run.folder / name} is not JSON (", f"result {str(run.folder / 'results')!r} is damaged"))
    assert refused(RequestError, lambda: load_run(tmp_path)).startswith(f"run {str(tmp_path)!r}: no config.json there")


def test_a_name_is_made_of_the_config_alone():
    assert run_name(Config()).startswith("a-")
    assert run_name(Config(model="/x/gpt 2", factor=0.5, positions=(1, 2))).startswith(
        "gpt_2,factor=0.5,positions=1+2-"
    )
    assert run_name(Config(model="/x/m")) != run_name(Config(model="/y/m"))
    assert run_name(Config(recordings=Path("y"))) == run_name(Config())
    assert len(run_name(Config(model="m" * 500))) < 120
    assert run_name(Config(model="../..")).count("/") == 0


def test_a_setting_and_a_column_of_one_name_are_refused():
    text = refused(RequestError, lambda: make_result("toy", Config(), pd.DataFrame({"seed": [1]})))
    assert text == "table of toy has a column 'seed', and so has its config; rename one"


def test_experiments_are_listed_and_found():
    (entry,) = installed_experiments().values()
    assert summary(entry) == "A toy: y = factor x + seed. It counts how often it ran, and two of its models fail."
    assert find_experiment("toy") is toy
    assert refused(RequestError, lambda: find_experiment("toys")) == (
        "experiment 'toys' is not installed; nearest: toy; known: toy"
    )
    missing = EntryPoint("gone", "no_such_package.study", "workbench.experiments")
    assert summary(missing) == "cannot be loaded: there is no module no_such_package.study"


# ---- sweeps ---------------------------------------------------------------------------------------------

CHOICES = {"model": ("a", "broken", "b"), "factor": (1.0, 2.0), "seed": (0, 1)}


def swept(out, choices=CHOICES, **options):
    lines = []
    return sweep("toy", grid(Config, choices), out, report=lines.append, **options), lines


def test_a_grid_is_every_combination_once():
    configs = grid(Config, {"seed": (0, 1, 1), "factor": (1.0, 2.0)})
    assert [(config.factor, config.seed) for config in configs] == [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1)]
    assert grid(Config, {}) == [Config()]
    assert refused(RequestError, lambda: grid(Config, {"sead": (1,)})).startswith(
        "'sead' is not a setting of this experiment; nearest: seed"
    )
    assert refused(RequestError, lambda: grid(Config, {"seed": ()})) == (
        "seed has no value to sweep over; give one or more"
    )
    assert refused(RequestError, lambda: grid(Config, {"factor": (1.0, -1.0)})).startswith(
        "factor must not be negative"
    )


def test_a_sweep_ends_in_one_table_and_figure_although_cells_fail(tmp_path):
    sweep_result, lines = swept(tmp_path)
    assert [outcome.state for outcome in sweep_result.outcomes] == ["done"] * 4 + ["failed"] * 4 + ["done"] * 4
    assert len(lines) == len(toy.RAN) == 12
    assert lines[0].startswith("[ 1 of 12; ")
    assert "] model=a factor=1.0 seed=0: " in lines[0]
    assert lines[-1].startswith("[12 of 12] model=b factor=2.0 seed=1: ")
    assert "model=broken factor=1.0 seed=0: FAILED: unexpected RuntimeError: the line broke; see " in lines[4]
    table = pd.read_csv(tmp_path / "summary" / "table.csv")
    expected = [
        (model, factor, seed, x, factor * x + seed)
        for model, factor, seed, x in itertools.product("ab", (1.0, 2.0), (0, 1), range(3))
    ]
    assert table[["model", "factor", "seed", "x", "y"]].to_records(index=False).tolist() == expected
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "summary" / "table.parquet"), sweep_result.result.table)
    assert wb.load_result(tmp_path / "summary").figure().data[0].x.tolist() == [0, 1, 2] * 8
    assert [path.name for path in (tmp_path / "summary" / "figures").glob("*.html")] == ["lines.html"]
    cells = json.loads((tmp_path / "summary" / "sweep.json").read_text())["cells"]
    assert [run["state"] for run in cells] == ["complete"] * 4 + ["failed"] * 4 + ["complete"] * 4
    assert cells[4]["config"]["model"] == "broken"
    assert "the line broke" in cells[4]["error"]


def test_a_rerun_does_nothing_twice_and_tries_again_what_failed(tmp_path):
    swept(tmp_path)
    before = files(tmp_path / "summary")
    toy.RAN.clear()
    again, lines = swept(tmp_path)
    assert [config.model for config in toy.RAN] == ["broken"] * 4
    assert [outcome.state for outcome in again.outcomes] == ["skipped"] * 4 + ["failed"] * 4 + ["skipped"] * 4
    assert ": already complete: y up to " in lines[0]
    assert files(tmp_path / "summary") == before
    wider, _ = swept(tmp_path, CHOICES | {"model": ("a", "b"), "seed": (0, 1, 2)})
    assert [(config.seed, config.model) for config in toy.RAN[4:]] == [(2, "a"), (2, "a"), (2, "b"), (2, "b")]
    assert len(wider.result.table) == 12 * 3


def test_two_identical_sweeps_have_identical_tables(tmp_path):
    for name in ("one", "two"):
        swept(tmp_path / name, {"model": ("a", "b"), "seed": (0, 1)})
    first, two = (files(tmp_path / name / "summary") for name in ("one", "two"))
    assert first == two


class Backwards(ThisProcess):
    """Workers that end in another order."""

    def map(self, begin, arguments, tasks, on_lost, device=None):
        return super().map(begin, arguments, tasks[::-1], on_lost, device)


def test_cells_may_end_in_any_order(tmp_path):
    swept(tmp_path / "one")
    swept(tmp_path / "two", workers=Backwards())
    first_files, second_files = (files(tmp_path / name / "summary", but=("sweep.json",)) for name in ("one", "two"))
    assert first_files == second_files


def test_shares_run_their_own_cells_and_the_last_has_them_all(tmp_path):
    swept(tmp_path / "one")
    toy.RAN.clear()
    choices = CHOICES | {"model": ("a", "b")}
    first, lines = swept(tmp_path / "two", choices, workers=wb.Share(1, 2))
    assert [config.seed for config in toy.RAN] == [1] * 4
    assert [outcome.run.config.seed for outcome in first.outcomes] == [1] * 4
    assert [run.config.seed for run in first.pending] == [0] * 4
    assert lines[-1].startswith("[4 of 4] model=b factor=2.0 seed=1: ")
    states = [run["state"] for run in json.loads((tmp_path / "two" / "summary" / "sweep.json").read_text())["cells"]]
    assert states == ["left", "complete"] * 4
    last, _ = swept(tmp_path / "two", choices, workers=wb.Share(0, 2))
    assert [outcome.state for outcome in last.outcomes] == ["done", "skipped"] * 4
    assert (last.pending, len(toy.RAN)) == ((), 8)
    first_files, second_files = (files(tmp_path / name / "summary", but=("sweep.json",)) for name in ("one", "two"))
    assert first_files == second_files


def test_a_sweep_in_which_all_fails_has_no_table(tmp_path):
    sweep_result, _ = swept(tmp_path, {"model": ("broken", "refused")})
    assert sweep_result.result is None
    assert len(sweep_result.failed) == 2
    assert list(files(tmp_path / "summary")) == ["sweep.json"]


def test_a_summary_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "summary").mkdir()
    (tmp_path / "summary" / "thesis.txt").write_text("kept")
    assert refused(RequestError, lambda: swept(tmp_path)) == (
        f"out {str(tmp_path)!r} holds a summary that no sweep wrote; choose another folder"
    )
    assert toy.RAN == []


def test_plotlys_script_is_on_the_disk_once(tmp_path):
    swept(tmp_path, {"seed": (0, 1, 2)})
    scripts = list(tmp_path.rglob("plotly.min.js"))
    assert len(scripts) == 4
    assert len({script.stat().st_ino for script in scripts}) == 1


# ---- the command line -----------------------------------------------------------------------------------


def command(call, *arguments) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as stopped,
    ):
        call([str(argument) for argument in arguments])
    return stopped.value.code or 0, out.getvalue(), err.getvalue()


def test_the_sweep_command(tmp_path):
    grid_of = ("--model", "a", "refused", "--factor", 1, 2, "--seed", 0, 1, 2, "--positions", 5, 6, "--out", tmp_path)
    code, out, err = command(cli.main, "sweep", "toy", *grid_of)
    assert code == 1
    assert out.count("already complete") == 0
    name = run_in(tmp_path, "toy", Config(model="refused", positions=(5, 6))).folder.name
    assert f"failed  {name}: model 'refused' is refused; give another\n" in err
    assert err.count("failed  ") == err.count("\n") == 6
    assert out.endswith(
        f"6 done, 0 skipped, 6 failed\ntable   {tmp_path}/summary/table.csv\n"
        f"figure  {tmp_path}/summary/figures/lines.html\n"
    )
    assert pd.read_csv(tmp_path / "summary" / "table.csv")["x"].tolist() == [5, 6] * 6
    code, out, _ = command(cli.main, "sweep", "toy", "--seed", 0, 1, "--positions", 5, 6, "--out", tmp_path)
    assert (code, out.count("already complete")) == (0, 2)


def test_the_sweep_command_tells_what_can_be_swept():
    code, out, _ = command(cli.main, "sweep")
    assert code == 0
    assert re.search(r"^  toy +A toy: y = factor x \+ seed\.", out, re.M)
    code, out, _ = command(cli.main, "sweep", "toy", "--help")
    assert code == 0
    text = " ".join(out.split())
    meanings = ("Its slope.", "Name of the line: a, b, broken, refused.", "Changes no number.")
    for part in (*meanings, "every combination is run"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiy",), "experiment 'tiy' is not installed; nearest: toy; known: toy"),
        (("toy", "--factor", "-1"), "factor must not be negative, but is -1.0"),
        (("toy", "--seed"), "seed has no value to sweep over; give one or more"),
        (("toy", "--sead", "1"), "nearest: --seed; see workbench sweep toy --help"),
    ],
)
def test_the_sweep_command_refuses_in_one_line(arguments, message, tmp_path):
    code, out, err = command(cli.main, "sweep", *arguments, "--out", tmp_path / "s")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "s").exists()


def test_an_experiment_is_a_script_of_its_own(tmp_path):
    def script(arguments):
        cli.run_experiment("toy", arguments)

    options = ("--factor", 3, "--out", tmp_path / "one")
    code, out, err = command(script, *options)
    assert (code, err) == (0, "")
    assert out == f"drawing a line\ny up to 6\nfigure  {tmp_path}/one/results/figures/lines.html\n"
    code, out, _ = command(script, *options)
    assert (code, out.splitlines()[0]) == (0, f"already complete: {tmp_path}/one")
    code, out, err = command(script, "--factor", 4, "--out", tmp_path / "one")
    assert (code, out) == (2, "")
    assert err == (
        f"workbench: --out '{tmp_path}/one' holds a run with factor 3.0, not 4.0; choose another folder or remove it\n"
    )
    code, out, _ = command(script, "--help")
    assert (code, "python -m toy_experiment" in out) == (0, True)


def test_without_out_a_run_is_a_cell_of_the_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(lambda arguments: cli.run_experiment("toy", arguments), "--factor", 2)
    code, out, _ = command(cli.main, "sweep", "toy", "--factor", 1, 2)
    assert (code, out.count("already complete"), len(toy.RAN)) == (0, 1, 2)


def test_identity_is_json():
    assert identity(Config()) == json.loads(json.dumps(identity(Config())))
