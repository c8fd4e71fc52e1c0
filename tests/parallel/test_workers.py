"""Recording by several processes: the store is the one that a single process writes, whoever dies on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from forks import fork_context
from refusals import refused
from store_example import contents
from warned import warned

import workbench as wb
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.store.manifest import read_manifest

SETTINGS = {"sites": ["resid_post", "pattern.1"], "context": 64, "segment_rows": 150, "batch_tokens": 256}


def texts() -> list[list[int]]:
    """Token ids of 150 sequences of 5 to 64 tokens."""
    return [[(7 * i + 3 * j) % 297 + 2 for j in range(5 + 7 * i % 60)] for i in range(150)]


@pytest.fixture(scope="module")
def forks():
    return fork_context()


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
    os.environ["RAY_AUTH_MODE"] = "token"  # of the cluster that `session` starts; an address alone does not tell
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
    known = {}
    for entry in (path / "segments").glob("*"):
        if entry.name.isdecimal():
            with suppress(FileNotFoundError):  # one whose writer was killed before it handed it in is written anew
                known[entry.name] = entry.stat().st_ino
    return known


# ---- shares ------------------------------------------------------------------------------------------------


def start_shares(forks, folder: Path, out: str, size: int):
    return [start(forks, folder, out, wb.Share(rank, size)) for rank in range(size)]


def test_shares_side_by_side_give_the_bytes_of_one_process(forks, folder):
    finish(*start_shares(forks, folder, "shares", 3))
    assert contents(folder / "shares") == contents(folder / "one")


def test_shares_one_after_another_each_do_their_own(forks, folder):
    for rank in (1, 0):
        finish(start(forks, folder, "serial", wb.Share(rank, 2)))
        manifest = read_manifest(folder / "serial")
        assert {int(name) % 2 for name in segments(folder / "serial")} == ({1} if rank else {0, 1})
        assert manifest.complete == (rank == 0)
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
    read = wb.Share.from_environment(environment)
    assert (read.rank, read.size, read.local_rank) == share


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
    from workbench.parallel import ray as parallel

    with parallel._ray(None, 2) as connected:
        connected.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # what workers could not import
        yield connected


def ray_workers() -> list[psutil.Process]:
    workers = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "ray::_Worker" in " ".join(child.cmdline()):
                workers.append(child)
        except psutil.Error:  # gone meanwhile
            continue
    return workers


def test_a_killed_worker_and_a_killed_driver_lose_nothing_and_do_nothing_twice(session, forks, folder):
    """Another worker takes up a dead one's segment, the next process a dead driver's store; workers die with their
    driver. In the end there are the bytes of one process."""
    path, workers = folder / "ray", wb.RayWorkers(2, threads=1)
    address = session.get_runtime_context().gcs_address
    process = start(forks, folder, "ray", replace(workers, address=address))
    wait_for(lambda: len(segments(path)) > 3, process)
    busy = ray_workers()
    assert len(busy) == 2
    busy[0].kill()
    before_kill = len(segments(path))
    wait_for(lambda: len(segments(path)) > before_kill + 6, process)
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(busy + ray_workers(), timeout=60)
    assert alive == []
    committed, before = read_manifest(path), segments(path)
    assert 0 < committed.rows < committed.planned_rows
    finish(start(forks, folder, "ray", None))
    after = segments(path)
    listed = [segment.name for segment in committed.segments]
    assert {name: after[name] for name in listed} == {name: before[name] for name in listed}
    assert contents(path) == contents(folder / "one")


def test_features_by_workers_are_those_of_one_process(in_this_process, folder, tmp_path, monkeypatch):
    from sae_example import save_sae

    monkeypatch.setattr("workbench.features.encoding.SEGMENT_ROWS", 2000)
    store = wb.open_store(folder / "one")
    settings = {"d_in": store["resid_post", 1].shape[1], "hook_name": "blocks.1.hook_resid_post"}
    sae = wb.load_sae(save_sae(tmp_path / "sae", "topk", d_sae=64, **settings), device="cpu")
    features = [
        wb.extract_features(store, sae, out=tmp_path / name, workers=workers, force=True, show_progress=False)
        for name, workers in (("one", None), ("two", wb.RayWorkers(1, threads=1)))
    ]
    assert np.array_equal(features[0][:].toarray() != 0, features[1][:].toarray() != 0)
    np.testing.assert_allclose(features[0][:].toarray(), features[1][:].toarray(), rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "sae", "two"]
    assert contents(features[0].path).keys() == contents(features[1].path).keys()


def test_features_of_several_layers_go_to_workers_of_ray(session, tmp_path, monkeypatch):
    """The autoencoder and the sites that its layers read are files for a process of their own."""
    from features_example import extracted
    from sae_example import save_sae
    from several_sites import D_IN, MIDS, stream_store

    from workbench.sae.layered import layered

    monkeypatch.setattr("workbench.features.encoding.SEGMENT_ROWS", 12)
    store, parts = stream_store(tmp_path / "x.acts"), []
    for layer, site in enumerate(MIDS):
        about = {"d_in": D_IN, "seed": layer, "hook_name": site.name, "model_name": "demo"}
        parts.append(wb.load_sae(save_sae(tmp_path / f"sae {layer}", "jumprelu", **about), device="cpu"))
    sae, places = layered(parts, "two"), {"one": None, "ray": wb.RayWorkers(1, threads=1)}
    local, ray = (extracted(store, sae, out=tmp_path / name, workers=workers) for name, workers in places.items())
    np.testing.assert_allclose(ray[:].toarray(), local[:].toarray(), rtol=1e-6)
    assert ray.sites.equals(local.sites)
    assert (local.counts > 0).sum() > 20


def test_a_sweep_by_workers_has_the_table_of_one_process(session, tmp_path):
    from workbench.experiments.sinks import Config
    from workbench.runs.sweep import grid, sweep

    choices = {"model": ("demo", str(tmp_path / "none")), "input": ("random",), "rows": (640,), "length": (32,)}
    choices |= {"recordings": (tmp_path / "recordings",)}
    configs, lines = grid(Config, choices), []
    in_process = sweep("sinks", configs, tmp_path / "one", report=lines.append)
    two = sweep("sinks", configs, tmp_path / "two", workers=wb.RayWorkers(1, threads=1), report=lines.append)
    assert [outcome.state for outcome in two.outcomes] == ["done", "failed"]
    assert len(lines) == 4
    assert [outcome.message for outcome in two.failed] == [outcome.message for outcome in in_process.failed]
    tables = [contents(swept.folder)["table.parquet"] for swept in (in_process, two)]
    assert tables[0] == tables[1]


def dies_over_three(device: str, folder: Path):
    """Returns a function that kills its process over task 3 and runs the others; each attempt leaves a byte."""

    def do(task: int) -> int:
        with open(folder / str(task), "a") as file:
            file.write("x")
        if task == 3:
            os._exit(1)
        return 10 * task

    return do


def test_a_task_that_kills_its_workers_is_given_up_and_the_others_are_done(session, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.parallel.ray.DEATHS", 2)
    tasks, workers = list(range(6)), wb.RayWorkers(2, threads=1)
    with warned(r"a worker died \(The actor died unexpectedly .*\) and is replaced"):
        answers = dict(workers.map(dies_over_three, (tmp_path,), tasks, lambda task, error: f"{task} lost", "cpu"))
    assert answers == {task: "3 lost" if task == 3 else 10 * task for task in tasks}
    tried = {task: len((tmp_path / str(task)).read_text()) for task in tasks}
    assert tried == {task: 2 if task == 3 else 1 for task in tasks}


def test_a_module_in_memory_is_sent(in_this_process, folder, tmp_path):
    model = Model(wb.load_model(folder / "model").module, None, "model")
    store = wb.record(model, texts(), out=tmp_path / "x", workers=wb.RayWorkers(1), show_progress=False, **SETTINGS)
    assert store["resid_post", 1][:].equal(wb.open_store(folder / "one")["resid_post", 1][:])


def test_a_module_that_cannot_be_sent_is_refused(in_this_process, folder, tmp_path):
    import torch

    module = wb.load_model(folder / "model").module
    module(torch.tensor([[2, 3]]), output_hidden_states=True)  # leaves hooks that hold a context variable
    options = {"out": tmp_path / "x", "workers": wb.RayWorkers(1), "show_progress": False}
    message = refused(RequestError, lambda: wb.record(Model(module, None, "mine"), texts(), **options))
    assert message.startswith("module 'mine' cannot be sent to workers (")
    assert message.endswith("); save it with save_pretrained and name the directory")


def test_a_model_that_was_changed_after_loading_is_refused(in_this_process, folder, tmp_path):
    import torch

    model = wb.load_model(folder / "model")
    with torch.no_grad():
        model.module.lm_head.weight.add_(1)
    with pytest.raises(RequestError, match=r"its weights are other ones .*: save it and name the directory"):
        wb.record(model, texts(), out=tmp_path / "x", workers=wb.RayWorkers(1), show_progress=False)


def test_a_worker_that_does_not_see_the_files_refuses(folder, tmp_path):
    from workbench.features.encoding import EncodingSettings, begin_spans
    from workbench.features.feature_segments import SegmentFolder
    from workbench.parallel import ray as parallel
    from workbench.sae.input_rows import PackedArray, Reading
    from workbench.sae.saved import SavedSae

    with pytest.raises(RequestError, match=f"finds no {tmp_path}/gone; work in a folder that all machines share"):
        parallel._Worker().start(str(tmp_path / "gone"), "cpu", 1, (str, ()))
    (site,) = read_manifest(folder / "one").sites[:1]
    missing = SegmentFolder(tmp_path / "gone" / "x")
    with pytest.raises(RequestError, match=r"does not see .*; features must be on a disk that all machines share"):
        begin_spans(
            "cpu",
            PackedArray(folder / "one", Reading(site)),
            SavedSae(tmp_path, "sae", ""),
            EncodingSettings(),
            missing,
        )


def test_other_versions_of_a_worker_are_reported_once():
    from workbench.io.versions import library_versions
    from workbench.parallel import ray as parallel

    reported = set()
    with warned(r"a worker runs torch 1\.0 \(here .*\): its rows may differ in the last bits"):
        parallel._warn_of_other_versions(library_versions() | {"torch": "1.0"}, reported)
    parallel._warn_of_other_versions(library_versions() | {"torch": "1.0"}, reported)
    parallel._warn_of_other_versions(library_versions(), reported)


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


def always_dies(_device: str):
    os._exit(1)


def test_workers_that_die_before_their_first_task_end_the_work(session, monkeypatch):
    monkeypatch.setattr("workbench.parallel.ray.DEATHS", 1)

    def lost(task, error):
        assert task is None
        raise DataError(f"lost: {type(error).__name__}")

    with pytest.raises(DataError, match="lost: ActorDiedError"):
        list(wb.RayWorkers(1, threads=1).map(always_dies, (), [0, 1], lost, "cpu"))


def test_workers_that_die_too_often_end_the_work_with_one_line(folder, tmp_path, monkeypatch):
    """A recording and an extraction end there; a sweep goes on with its other cells."""
    from sae_example import save_sae

    from workbench.experiments.sinks import Config
    from workbench.runs.sweep import sweep

    def loses(_self, _begin, _arguments, tasks, on_lost, _device=None):
        for task in tasks:
            yield task, on_lost(task, RuntimeError("the machine is gone\nits log: ..."))

    monkeypatch.setattr(wb.RayWorkers, "map", loses)
    end = (
        " was finished (the machine is gone); what is committed stays: try fewer workers if memory ran out, and run "
        "the same command to resume"
    )
    message = refused(DataError, lambda: record(folder, str(tmp_path / "x"), wb.RayWorkers(2)))
    assert message == f"workers died 3 times before segment 00000 of {tmp_path / 'x'}{end}"
    store = wb.open_store(folder / "one")
    width = store["resid_post", 1].shape[1]
    sae = wb.load_sae(save_sae(tmp_path / "sae", d_in=width, hook_name="blocks.1.hook_resid_post"), device="cpu")
    options = {"out": tmp_path / "f", "force": True, "show_progress": False}
    message = refused(DataError, lambda: wb.extract_features(store, sae, workers=wb.RayWorkers(2), **options))
    assert message == f"workers died 3 times before rows 0 to {store.rows - 1} of {tmp_path / '.f.partial'}{end}"
    assert not (tmp_path / ".f.partial").exists()
    swept = sweep("sinks", [Config(seed=seed) for seed in (0, 1)], tmp_path / "s", workers=wb.RayWorkers(2), report=str)
    assert [outcome.state for outcome in swept.outcomes] == ["failed"] * 2
    assert swept.outcomes[1].message == f"workers died 3 times before {swept.outcomes[1].run.folder.name}{end}"


@pytest.mark.parametrize("sent", [False, True])
def test_without_ray_the_error_says_what_to_install(sent, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    model = Model(wb.load_model(folder / "model").module, None, "mine") if sent else folder / "model"
    with pytest.raises(RequestError, match=r"workers need Ray, .*: pip install 'interp-workbench\[distributed\]'"):
        wb.record(model, texts(), out=tmp_path / "x", workers=wb.RayWorkers(2), show_progress=False)


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"count": 0}, "workers must be at least 1, not 0"),
        ({"count": 1, "threads": 0}, "threads must be from 1 to 1024, not 0"),
        (
            {"count": 1, "kind": "cuda:1"},
            "device of workers must be cpu or cuda, each has one of its own, not 'cuda:1'",
        ),
    ],
)
def test_workers_that_cannot_be_are_refused(workers, message):
    with pytest.raises(RequestError, match=message):
        wb.RayWorkers(**workers)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "workers must be at least 1, not 0"),
        (["--threads", "2"], "--ray-address and --threads configure workers; give their number with --workers"),
        (["--workers", "2", "--share"], "--share and --workers are two ways to divide the work; give one of them"),
        (
            ["--share"],
            "share: neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS are set; start the command",
        ),
        (["--workers", "2", "--device", "cuda:1"], "device of workers must be cpu or cuda, each has one of its own"),
    ],
)
def test_the_command_refuses_what_cannot_be(capsys, tmp_path, options, message):
    from workbench.cli import main as cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(["record", "demo", "a text", "--out", str(tmp_path / "x"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_command_takes_its_share(monkeypatch, capsys, tmp_path):
    from workbench.cli import main as cli

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
        printed = capsys.readouterr().out
        assert ("(complete)" in printed) == (rank == "0")
        assert ("planned; the same command resumes it" in printed) == (rank == "1")
