"""Recording by several processes: the store is the one that a single process writes, whoever dies on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from store_example import contents

import workbench as wb
from workbench.errors import DataError, RequestError
from workbench.models import Model
from workbench.store import read_manifest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
WARNINGS = ("-W", "error", "-W", "ignore::DeprecationWarning", "-W", "ignore::ResourceWarning")  # as pyproject.toml's
SETTINGS = {"sites": ["resid_post", "pattern.1"], "context": 64, "segment_rows": 200, "batch_tokens": 256}


def texts() -> list[list[int]]:
    """Token ids of 300 sequences of 5 to 64 tokens."""
    return [[(7 * i + 3 * j) % 297 + 2 for j in range(5 + 7 * i % 60)] for i in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_models) -> Path:
    """A saved model, and `one`, its recording by one process with one thread."""
    place = tmp_path_factory.mktemp("distributed")
    tiny_models["llama"].save_pretrained(place / "model")
    assert run("one", place)[0] == 0
    return place


PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
import workbench as wb
from workbench.errors import WorkbenchError

place, out, texts, settings, who = json.loads(sys.argv[1])
who = who and getattr(wb, who.pop("kind"))(**who)
try:
    store = wb.record(place + "/model", texts, out=out, workers=who, show_progress=False, **settings)
    print(store.rows)
except WorkbenchError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start(out: str, folder: Path, **who) -> subprocess.Popen:
    """Records in a process of its own, as a user's script would; warnings are errors there, too."""
    given = json.dumps([str(folder), str(folder / out), texts(), SETTINGS, who])
    return subprocess.Popen(
        [sys.executable, *WARNINGS, "-c", PROGRAM, given],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(out: str, folder: Path, **who) -> tuple[int, str, str]:
    process = start(out, folder, **who)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(ready, process: subprocess.Popen) -> None:
    while not ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def segments(path: Path) -> dict[str, int]:
    """The finished segments, listed or not, by what tells whether one was written anew."""
    place = path / "segments"
    return {entry.name: entry.stat().st_ino for entry in place.glob("*") if entry.name.isdecimal()}


# ---- shares ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workbench.recorder", "workbench.distributed", "transformers.models.llama"])
    return context


def record_share(folder: str, out: str, rank: int, size: int) -> None:
    import torch

    torch.set_num_threads(1)
    share = wb.Share.from_environment({"RANK": str(rank), "WORLD_SIZE": str(size)})
    wb.record(folder + "/model", texts(), out=f"{folder}/{out}", workers=share, show_progress=False, **SETTINGS)


def start_shares(forks, folder, out, size):
    job = [forks.Process(target=record_share, args=(str(folder), out, rank, size)) for rank in range(size)]
    for process in job:
        process.start()
    return job


def test_shares_side_by_side_give_the_bytes_of_one_process(forks, folder):
    job = start_shares(forks, folder, "shares", 3)
    for process in job:
        process.join(300)
    assert [process.exitcode for process in job] == [0, 0, 0]
    assert contents(folder / "shares") == contents(folder / "one")


def test_shares_one_after_another_each_do_their_own(forks, folder):
    for rank in (1, 0):
        process = forks.Process(target=record_share, args=(str(folder), "serial", rank, 2))
        process.start()
        process.join(300)
        assert process.exitcode == 0
        found = read_manifest(folder / "serial")
        assert {int(name) % 2 for name in segments(folder / "serial")} == ({1} if rank else {0, 1})
        assert found.complete == (rank == 0)
    assert contents(folder / "serial") == contents(folder / "one")


def test_killed_shares_lose_nothing_that_was_finished_whatever_the_size_of_the_next_job(forks, folder):
    moments, path = random.Random(3), folder / "killed"
    for size in (3, 2):
        job = start_shares(forks, folder, "killed", size)
        want = len(segments(path)) + 6
        while len(segments(path)) < want and any(process.is_alive() for process in job):
            time.sleep(0.002)
        for process in job:
            time.sleep(moments.uniform(0, 0.02))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert not (wb.open_store(path).verify()["severity"] == "error").any()
    handed_in = {row.name for row in read_manifest(path).segments}
    handed_in |= {row.stem for row in (path / "segments").glob("*.json") if (path / "segments" / row.stem).is_dir()}
    before = segments(path)
    assert 0 < len(handed_in) < len(segments(folder / "one"))
    for process in start_shares(forks, folder, "killed", 1):
        process.join(300)
    after = segments(path)
    assert {name: after[name] for name in handed_in} == {name: before[name] for name in handed_in}
    leftovers = list(path.rglob("*.partial"))  # of ranks that are no more: a process alone removes them
    assert run("killed", folder)[0] == 0
    assert not list(path.rglob("*.partial")), leftovers
    assert contents(path) == contents(folder / "one")


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}, (5, 6, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
    ],
)
def test_a_share_is_read_from_torchruns_or_sruns_variables(environment, share):
    found = wb.Share.from_environment(environment)
    assert (found.rank, found.size, found.local_rank) == share


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "share: neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS are set; start the"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "share: RANK='one', WORLD_SIZE='2', LOCAL_RANK='0' are no numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "share: rank 2 of 2 processes; ranks count from 0"),
    ],
)
def test_a_share_that_cannot_be_is_refused(environment, message):
    with pytest.raises(RequestError, match=message):
        wb.Share.from_environment(environment)


# ---- Ray ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ray():
    return pytest.importorskip("ray", reason="workers need Ray: pip install 'interp-workbench[distributed]'")


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "ray::_Worker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # gone meanwhile
            continue
    return found


def test_two_ray_workers_give_the_bytes_of_one_process(ray, folder):
    """Also when one of them is killed in the middle: another takes its place, and its segment up."""
    process, path = start("ray", folder, kind="RayWorkers", count=2, threads=1), folder / "ray"
    wait_for(lambda: len(segments(path)) > 3, process)
    busy = workers_of(process)
    assert len(busy) == 2
    busy[0].kill()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert int(out) == read_manifest(path).rows
    assert contents(path) == contents(folder / "one")


def test_a_killed_driver_takes_its_workers_along_and_the_next_one_goes_on(ray, folder):
    process, path = start("driver", folder, kind="RayWorkers", count=2, threads=1), folder / "driver"
    wait_for(lambda: len(segments(path)) > 3, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    committed = read_manifest(path)
    before = segments(path)
    assert 0 < committed.rows < committed.planned_rows
    code, _, err = run("driver", folder, kind="RayWorkers", count=1, threads=1)
    assert (code, err) == (0, "")
    after = segments(path)
    listed = [segment.name for segment in committed.segments]
    assert {name: after[name] for name in listed} == {name: before[name] for name in listed}
    assert contents(path) == contents(folder / "one")


@pytest.fixture(scope="module")
def session(ray):
    """A session that the caller holds already: it is used, and left alone."""
    from workbench import distributed

    with distributed._ray(None, 2) as connected:
        yield connected


def test_a_module_in_memory_is_sent_and_a_callers_session_stays(session, folder, tiny_models, tmp_path):
    model = Model(tiny_models["llama"], None, "model")
    store = wb.record(
        model, texts(), out=tmp_path / "x", workers=wb.RayWorkers(1, threads=1), show_progress=False, **SETTINGS
    )
    assert session.is_initialized()
    assert store["resid_post", 1][:].equal(wb.open_store(folder / "one")["resid_post", 1][:])


def test_a_model_that_was_changed_after_loading_is_refused(session, folder, tmp_path):
    import torch

    model = wb.load_model(folder / "model")
    with torch.no_grad():
        model.module.lm_head.weight.add_(1)
    with pytest.raises(RequestError, match="was changed after load_model: save it and name the directory"):
        wb.record(model, texts(), out=tmp_path / "x", workers=wb.RayWorkers(1, threads=1), show_progress=False)


def test_more_workers_than_ray_has_room_for_are_refused(session, folder, tmp_path):
    with pytest.raises(RequestError, match="8 workers need 24 CPUs and Ray has 2; ask for fewer workers or threads"):
        wb.record(
            folder / "model",
            texts(),
            out=tmp_path / "x",
            workers=wb.RayWorkers(8, threads=3),
            show_progress=False,
            **SETTINGS,
        )


def test_workers_that_always_die_end_in_one_line(session, folder, tmp_path, monkeypatch):
    from workbench import distributed

    class Dies:
        def start(self, *_given):
            os._exit(1)

    monkeypatch.setattr(distributed, "_Worker", Dies)
    with pytest.raises(DataError, match=r"workers died 3 times before a first segment of .* was finished") as raised:
        wb.record(folder / "model", texts(), out=tmp_path / "x", workers=wb.RayWorkers(1), show_progress=False)
    assert "\n" not in str(raised.value)


def test_without_ray_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"workers need Ray, .*: pip install 'interp-workbench\[distributed\]'"):
        wb.record(folder / "model", texts(), out=tmp_path / "x", workers=wb.RayWorkers(2), show_progress=False)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"count": 0}, "workers must be at least 1, not 0"),
        ({"count": 1, "threads": 0}, "threads must be at least 1, not 0"),
        (
            {"count": 1, "kind": "cuda:1"},
            "device of workers must be cpu or cuda, each has one of its own, not 'cuda:1'",
        ),
    ],
)
def test_workers_that_cannot_be_are_refused(asked, message):
    with pytest.raises(RequestError, match=message):
        wb.RayWorkers(**asked)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--workers", "0"], "workers must be at least 1, not 0"),
        (["--threads", "2"], "--ray-address and --threads are about workers; say how many with --workers"),
        (["--workers", "2", "--share"], "--share and --workers are two ways to divide the work; give one of them"),
        (
            ["--share"],
            "share: neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS are set; start the command",
        ),
        (["--workers", "2", "--device", "cuda:1"], "device of workers must be cpu or cuda, each has one of its own"),
    ],
)
def test_the_command_refuses_what_cannot_be(capsys, tmp_path, asked, message):
    from workbench import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(["record", "demo", "a text", "--out", str(tmp_path / "x"), *asked])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_command_takes_its_share(monkeypatch, capsys, tmp_path):
    from workbench import cli

    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": f"A text of a few words, number {i}."}) + "\n" for i in range(12)))
    arguments = ["record", "demo", str(text), "--out", str(tmp_path / "x"), "--segment-rows", "50", "--share"]
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    for rank in ("1", "0"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert not stopped.value.code
        said = capsys.readouterr().out
        assert ("(complete)" in said) == (rank == "0")
        assert ("planned; the same command resumes it" in said) == (rank == "1")
