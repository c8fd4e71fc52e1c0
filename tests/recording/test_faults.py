"""Fault tests: processes killed at any moment, a full disk, two writers."""

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forks import fork_context
from sae_example import save_sae
from store_example import contents, write_store

import workbench as wb
from workbench.io.errors import WorkbenchError
from workbench.store.manifest import SiteRecord

KILLS = 10


def limit_file_size(size: int | None) -> None:
    """Larger files cannot be written by this process from here on."""
    import resource

    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def run_recording(out: str, file_limit: int | None, answers) -> None:
    """In a process of its own: records a tiny random model in many small segments; tells how it ended."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from workbench.model.load import Model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **shape)).eval()
    texts = [np.random.default_rng(i).integers(2, 300, 5 + 7 * i % 60).tolist() for i in range(160)]
    limit_file_size(file_limit)
    try:
        store = wb.record(
            Model(module, None, "tiny"),
            texts,
            out=out,
            sites=["resid_post", "pattern.1"],
            context=64,
            segment_rows=200,
            batch_tokens=256,
            show_progress=False,
        )
        answers.put(("done", store.rows))
    except WorkbenchError as error:
        answers.put((type(error).__name__, str(error)))


def run_extraction(out: str, file_limit: int | None, answers, mutual: bool = False) -> None:
    """In a process of its own: features of the store beside `out`, in many small segments; tells how it ended."""
    import torch

    from workbench.features import encoding
    from workbench.sae.sparsity import MutualChoice

    torch.set_num_threads(1)
    store = wb.open_store(Path(out).with_name("x.acts"))
    sae = wb.load_sae(Path(out).with_name("sae"), device="cpu")
    encoding.SEGMENT_ROWS = 250
    limit_file_size(file_limit)
    answers.put("begun")
    try:
        sparsity = MutualChoice(6) if mutual else None
        features = wb.extract_features(store, sae, out=out, sparsity=sparsity, batch_rows=50, show_progress=False)
        answers.put(("done", features.shape[0]))
    except WorkbenchError as error:
        answers.put((type(error).__name__, str(error)))


@pytest.fixture(scope="module")
def processes():
    """Processes that have everything imported before they begin, so a kill hits the work and not an import."""
    return fork_context()


def start(processes, out: Path, file_limit: int | None = None, work=run_recording):
    answers = processes.SimpleQueue()
    process = processes.Process(target=work, args=(str(out), file_limit, answers))
    process.start()
    return process, answers


def finish(processes, out: Path, file_limit: int | None = None, work=run_recording) -> tuple:
    process, answers = start(processes, out, file_limit, work)
    process.join(120)
    assert process.exitcode == 0
    while (end := answers.get()) == "begun":
        pass
    return end


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    """An uninterrupted recording, and the duration of its process."""
    out = tmp_path_factory.mktemp("undisturbed") / "s"
    finish(processes, out.with_name("warm-up"))
    began = time.monotonic()
    finish(processes, out)
    return out, time.monotonic() - began


def test_killed_at_ten_random_moments_it_resumes_to_the_same_bytes(processes, undisturbed, tmp_path):
    whole, seconds = undisturbed
    moments = random.Random(7)
    kills, rows = 0, []
    for _ in range(KILLS * 3):
        process, _answers = start(processes, tmp_path / "s")
        # from before the store exists to near the end of what one undisturbed run would take
        process.join(moments.uniform(0.05, 0.9) * seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if (tmp_path / "s" / "manifest.json").exists():
            rows.append(wb.open_store(tmp_path / "s").rows)  # readable at every moment
            assert not (wb.open_store(tmp_path / "s").verify()["severity"] == "error").any()
        if kills == KILLS:
            break
        if rows and rows[-1] == wb.open_store(whole).rows:  # finished early: begin again
            shutil.rmtree(tmp_path / "s")
            rows.clear()
    assert kills == KILLS
    assert rows == sorted(rows)
    assert finish(processes, tmp_path / "s")[0] == "done"
    assert contents(tmp_path / "s") == contents(whole)


def test_a_full_disk_ends_in_one_line_and_resume_finishes(processes, undisturbed, tmp_path):
    """A limit on file size stands for the disk: the same failing write, without needing a file system of one's own."""
    whole, _ = undisturbed
    name, text = finish(processes, tmp_path / "s", file_limit=100_000)
    assert name == "DataError"
    assert "disk full while writing segment 000" in text
    assert "rows are committed and readable; free space and run the same command to resume" in text
    assert "\n" not in text
    committed = wb.open_store(tmp_path / "s")
    assert not (committed.verify()["severity"] == "error").any()
    assert finish(processes, tmp_path / "s") == ("done", wb.open_store(whole).rows)
    assert contents(tmp_path / "s") == contents(whole)


def test_a_second_recorder_is_refused_while_readers_read(processes, tmp_path):
    first, _ = start(processes, tmp_path / "s")
    while not (tmp_path / "s" / "manifest.json").exists():
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGSTOP)  # in the middle of its work, the lock held
    assert wb.open_store(tmp_path / "s").rows >= 0
    name, text = finish(processes, tmp_path / "s")
    assert (name, text) == (
        "RequestError",
        f"{tmp_path / 's'} is being written by another process; wait for it or choose another out",
    )
    os.kill(first.pid, signal.SIGCONT)
    first.join(120)
    assert first.exitcode == 0
    assert wb.open_store(tmp_path / "s").manifest.complete


@pytest.fixture(scope="module", params=[False, True], ids=["each row for itself", "rows compete"])
def extraction(request, processes, tmp_path_factory):
    """A folder with a store and an autoencoder, the work on them, and what it gives undisturbed in how many seconds."""
    folder = tmp_path_factory.mktemp("extraction")
    site = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (16,), "float32")
    write_store(folder / "x.acts", [[8] * 100] * 10, sites=(site,))
    save_sae(folder / "sae", "jumprelu", d_in=16, d_sae=200, hook_name=site.name, model_name="demo")
    work = partial(run_extraction, mutual=request.param)
    process, answers = start(processes, folder / "whole", work=work)
    assert answers.get() == "begun"
    began = time.monotonic()
    assert answers.get() == ("done", 8000)
    seconds = time.monotonic() - began
    process.join(120)
    return folder, work, contents(folder / "whole"), seconds


def test_an_extraction_killed_at_random_moments_resumes_to_the_same_bytes(processes, extraction):
    folder, work, whole, seconds = extraction
    out, unfinished = folder / "features", folder / ".features.partial"
    moments, kills, names = random.Random(7), 0, set()
    for _ in range(KILLS * 3):
        process, answers = start(processes, out, work=work)
        assert answers.get() == "begun"
        process.join(moments.uniform(0, 0.6) * seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        else:
            seconds *= 0.7  # the undisturbed run met a busier machine
        process.join()
        names |= {path.name.split("-")[0] for path in unfinished.rglob("*")}
        if out.exists():  # never there before it is whole
            assert contents(out) == whole
            shutil.rmtree(out)
        if kills == KILLS:
            break
    assert kills == KILLS
    assert {"extraction.json", "000000000250"} <= names
    assert finish(processes, out, work=work) == ("done", 8000)
    assert contents(out) == whole
    assert not unfinished.exists()
    shutil.rmtree(out)


def test_a_full_disk_stops_an_extraction_and_resume_finishes(processes, extraction):
    folder, work, whole, _ = extraction
    out = folder / "features"
    name, text = finish(processes, out, 200_000, work)
    assert name == "DataError"
    assert text == (
        f"disk full while writing features {out} (File too large): what is committed stays; free space and run the "
        "same command to resume"
    )
    assert not out.exists()
    assert finish(processes, out, work=work) == ("done", 8000)
    assert contents(out) == whole
    shutil.rmtree(out)


def test_a_second_extraction_is_refused(processes, extraction):
    folder, work, whole, _ = extraction
    out, unfinished = folder / "features", folder / ".features.partial"
    first, _ = start(processes, out, work=work)
    while not (unfinished / "extraction.json").exists():
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # in the middle of its work, the lock held
    assert finish(processes, out, work=work) == (
        "RequestError",
        f"{unfinished} is being written by another process; wait for it or choose another out",
    )
    os.kill(first.pid, signal.SIGCONT)
    first.join(120)
    assert first.exitcode == 0
    assert contents(out) == whole
    shutil.rmtree(out)
