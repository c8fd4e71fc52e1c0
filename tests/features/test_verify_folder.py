"""Tests of verify: stores with features, features, results, runs and sweeps, in one table."""

import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import toy_experiment as toy
from refusals import refused

from workbench.features.extract import extract_features
from workbench.features.verify_folder import verify
from workbench.io.errors import RequestError
from workbench.results.result import load_result
from workbench.runs.sweep import grid, sweep

RESULTS_V1 = Path(__file__).parents[1] / "data" / "results-v1"


def rows(path: Path, severity: str = "error") -> list[tuple[str, str]]:
    table = verify(path)
    assert list(table.columns) == ["segment", "file", "finding", "detail", "severity"]
    return [(row.file, row.finding) for row in table.itertuples() if row.severity == severity]


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def flip(file: Path) -> bytes:
    data = file.read_bytes()
    file.unlink()  # plotly's script is one file under several names
    file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :])
    return data


@pytest.fixture
def swept(tmp_path, monkeypatch):
    entries = [EntryPoint("toy", "toy_experiment", "workbench.experiments")]
    monkeypatch.setattr("workbench.results.registry.entry_points", lambda group: entries)
    choices = {"model": ("a", "refused"), "seed": (0, 1)}
    return sweep("toy", grid(toy.Config, choices), tmp_path / "runs", report=lambda _line: None)


def test_the_features_of_a_store_are_checked_with_it(store, sae):
    path = extract_features(store, sae, name="mine", show_progress=False).path
    of_store = rows(store.path)  # its sequences are longer than its context
    assert verify(path).empty
    for name in files(path):
        whole = flip(path / name)
        (problem,) = rows(path)
        assert problem[0] == name
        assert rows(store.path) == [*of_store, (f"features/mine/{name}", problem[1])]
        (path / name).write_bytes(whole)
    (path / "by_row.safetensors").unlink()
    (path / "notes.txt").touch()
    (store.path / "features" / "other").mkdir()
    assert rows(path) == [("by_row.safetensors", "missing file")]
    assert rows(store.path, "note") == [("features/mine/notes.txt", "unlisted"), ("features/other", "unlisted")]


def test_features_of_a_store_that_has_changed_are_a_note(features, tmp_path):
    path = shutil.copytree(features.path, tmp_path / "moved" / "away")
    assert rows(path) == []
    assert rows(path, "note") == [("features.json", "wrong features")]
    assert "there is no store at" in verify(path)["detail"][0]


def test_every_file_of_a_result_is_checked(swept, tmp_path):
    path = next(outcome.run.folder for outcome in swept.outcomes if outcome.state == "done") / "results"
    assert verify(path).empty
    for name in files(path):
        whole = flip(path / name)
        assert [file for file, _ in rows(path)] == [name]
        if not name.startswith("figures"):
            assert name in refused_text(path)
        (path / name).write_bytes(whole)
    (path / "table.parquet").unlink()
    (path / "notes.txt").touch()
    assert rows(path) == [("table.parquet", "missing file")]
    assert rows(path, "note") == [("notes.txt", "unlisted")]


def refused_text(path: Path) -> str:
    from workbench.io.errors import DataError

    return refused(DataError, lambda: load_result(path))


@pytest.mark.parametrize("name", ["logit-lens", "token-erasure"])
def test_a_result_saved_without_checksums_is_read_as_a_whole(name, tmp_path):
    path = shutil.copytree(RESULTS_V1 / name, tmp_path / "result")
    assert (rows(path), rows(path, "note")) == ([], [("result.json", "no checksums")])
    (path / "data.nc").write_bytes((path / "data.nc").read_bytes()[:-1000])
    assert rows(path) == [("result.json", "unreadable")]


def test_runs_and_sweeps_are_checked_with_their_results(swept):
    runs, summary = swept.folder.parent, swept.folder
    complete = next(outcome.run.folder for outcome in swept.outcomes if outcome.state == "done")
    assert rows(complete) == rows(complete, "note") == rows(runs) == []
    assert {finding for _, finding in rows(runs, "note")} == {"incomplete", "leftover"}  # of the runs that failed
    config = complete / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"factor": 1.0', '"factor": 3.0'))
    assert rows(complete) == [("config.json", "wrong name")]
    assert rows(runs) == [(f"{complete.name}/config.json", "wrong name")]
    for damaged, finding in (
        ("{", "unreadable"),
        ("[]", "unreadable"),
        ("{}", "unreadable"),
        ("[" * 9999, "unreadable"),
    ):
        config.write_text(damaged)
        assert rows(complete) == [("config.json", finding)]
    config.write_text(text)
    (complete / "environment.json").unlink()
    flip(complete / "results" / "data.nc")
    flip(summary / "table.parquet")
    assert rows(runs) == [
        (f"{complete.name}/environment.json", "missing file"),
        (f"{complete.name}/results/data.nc", "checksum differs"),
        ("summary/table.parquet", "checksum differs"),
    ]
    renamed = complete.rename(complete.with_name("mine"))
    assert ("config.json", "wrong name") in rows(renamed, "note")


def test_what_is_none_of_these_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    text = refused(RequestError, lambda: verify(tmp_path / "model"))
    assert text == f"{tmp_path}/model is no store, features, result, run or sweep; name the folder of one"
    assert "no store at" in refused(RequestError, lambda: verify(tmp_path / "nowhere"))
    assert "is a file" in refused(RequestError, lambda: verify(tmp_path / "model" / "config.json"))
