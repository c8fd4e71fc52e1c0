"""What happens when things go wrong: killed at any moment, a full disk, two writers."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import workbench as wb
from workbench.errors import WorkbenchError

KILLS = 10


def run_recording(out: str, file_limit: int | None, told) -> None:
    """In a process of its own: records a tiny random model in many small segments; tells how it ended."""
    import resource

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from workbench.models import Model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **shape)).eval()
    texts = [np.random.default_rng(i).integers(2, 300, 5 + 7 * i % 60).tolist() for i in range(160)]
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
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
        told.put(("done", store.rows))
    except WorkbenchError as error:
        told.put((type(error).__name__, str(error)))


@pytest.fixture(scope="module")
def processes():
    """Processes that have everything imported before they begin, so a kill hits the recording and not an import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["workbench.recorder", "workbench.sitemap", "transformers.models.llama.modeling_llama"]
    )
    return context


def start(processes, out: Path, file_limit: int | None = None):
    told = processes.SimpleQueue()
    process = processes.Process(target=run_recording, args=(str(out), file_limit, told))
    process.start()
    return process, told


def finish(processes, out: Path, file_limit: int | None = None) -> tuple:
    process, told = start(processes, out, file_limit)
    process.join(120)
    assert process.exitcode == 0
    return told.get()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    """A recording nobody killed, and how long its process took."""
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
        process, _told = start(processes, tmp_path / "s")
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
            import shutil

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
