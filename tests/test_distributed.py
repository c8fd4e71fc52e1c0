"""Recording by several processes: the store is the one that a single process writes, whoever dies on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from store_example import contents

import workbench as wb
from workbench.errors import DataError, RequestError
from workbench.models import Model
from workbench.store import read_manifest

SETTINGS = {"sites": ["resid_post", "pattern.1"], "context": 64, "segment_rows": 200, "batch_tokens": 256}


def texts() -> list[list[int]]:
    """Token ids of 300 sequences of 5 to 64 tokens."""
    return [[(7 * i + 3 * j) % 297 + 2 for j in range(5 + 7 * i % 60)] for i in range(300)]


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workbench.recorder", "workbench.distributed", "transformers.models.llama"])
    return context


@pytest.fixture(scope="module")
def folder(forks, tmp_path_factory, tiny_models) -> Path:
    """A saved model, and `one`, its recording by one process with one thread."""
    place = tmp_path_factory.mktemp("distributed")
    tiny_models["llama"].save_pretrained(place / "model")
    finish(start(forks, place, "one", None))
    return place


def record(folder: Path, out: str, workers) -> wb.Store:
    return wb.record(folder / "model", texts(), out=folder / out, workers=workers, show_progress=False, **SETTINGS)


def record_here(folder: Path, out: str, workers) -> None:
    """All of a process: with one thread, the bytes do not depend on the machine's cores."""
    import torch

    torch.set_num_threads(1)
    record(folder, out, workers)


def start(forks, folder: Path, out: str, workers):
    process = forks.Process(target=record_here, args=(folder, out, workers))
    process.start()
    return process


def finish(*job) -> None:
    for process in job:
        process.join(300)
    assert [process.exitcode for process in job] == [0] * len(job)


def wait_for(ready, process) -> None:
    while not ready():
        assert process.is_alive()
        time.sleep(0.002)


def segments(path: Path) -> dict[str, int]:
    """The finished segments, listed or not, by what tells whether one was written anew."""
    place = path / "segments"
    return {entry.name: entry.stat().st_ino for entry in place.glob("*") if entry.name.isdecimal()}


# ---- shares ------------------------------------------------------------------------------------------------


def start_shares(forks, folder: Path, out: str, size: int):
    return [start(forks, folder, out, wb.Share(rank, size)) for rank in range(size)]


def test_shares_side_by_side_give_the_bytes_of_one_process(forks, folder):
    finish(*start_shares(forks, folder, "shares", 3))
    assert contents(folder / "shares") == contents(folder / "one")


def test_shares_one_after_another_each_do_their_own(forks, folder):
    for rank in (1, 0):
        finish(start(forks, folder, "serial", wb.Share(rank, 2)))
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
    finish(*start_shares(forks, folder, "killed", 1))
    after = segments(path)
    assert {name: after[name] for name in handed_in} == {name: before[name] for name in handed_in}
    leftovers = list(path.rglob("*.partial"))  # of ranks that are no more: a process alone removes them
    finish(start(forks, folder, "killed", None))
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


@pytest.fixture(scope="module")
def session():
    """The one cluster of this module: it takes seconds to start, on two cores twenty. Users come with its address,
    or find it started in their process; then it is used, and left alone."""
    pytest.importorskip("ray", reason="workers need Ray: pip install 'interp-workbench[distributed]'")
    from workbench import distributed

    with distributed._ray(None, 2) as connected:
        yield connected


def ray_workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "ray::_Worker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # gone meanwhile
            continue
    return found


def test_a_killed_worker_and_a_killed_driver_lose_nothing_and_do_nothing_twice(session, forks, folder):
    """Another worker takes up a dead one's segment, the next driver a dead one's store; workers die with their driver.
    In the end there are the bytes of one process."""
    path, workers = folder / "ray", wb.RayWorkers(2, threads=1)
    address = session.get_runtime_context().gcs_address
    process = start(forks, folder, "ray", replace(workers, address=address))
    wait_for(lambda: len(segments(path)) > 3, process)
    busy = ray_workers()
    assert len(busy) == 2
    busy[0].kill()
    held = len(segments(path))
    wait_for(lambda: len(segments(path)) > held + 6 and len(ray_workers()) == 2, process)
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(busy + ray_workers(), timeout=60)
    assert alive == []
    committed, before = read_manifest(path), segments(path)
    assert 0 < committed.rows < committed.planned_rows
    assert record(folder, "ray", workers).rows == committed.planned_rows
    after = segments(path)
    listed = [segment.name for segment in committed.segments]
    assert {name: after[name] for name in listed} == {name: before[name] for name in listed}
    assert contents(path) == contents(folder / "one")


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


@pytest.mark.parametrize("workers", [wb.RayWorkers(2), wb.Share(0, 2)])
def test_features_while_recording_are_one_process_work(demo, tmp_path, workers):
    with pytest.raises(RequestError, match="sae: features are extracted by one process; record its site with workers"):
        wb.record(demo, texts(), out=tmp_path / "x", sae=wb.load_sae("demo"), workers=workers, show_progress=False)
    assert not (tmp_path / "x").exists()


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
        (["--workers", "2", "--sae", "demo"], "--sae: features are extracted by one process; record its site with"),
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
