"""Rows and their counts travel from a device to the host together, and nothing waits for them too early."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretend_device import PretendDevice

import workbench as wb
from workbench.recording import transfer
from workbench.recording.transfer import BatchRows, as_numpy, one_behind, to_host

ROWS = torch.tensor([[1.0, -7e4, torch.inf], [3e38, torch.nan, -torch.inf]])
"""Beyond float16: two values; not finite: three."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_and_counts_of_a_device_are_those_of_the_cpu(dtype):
    cpu_rows, counts = to_host(ROWS, dtype)()
    assert counts == [2 if dtype == torch.float16 else 0, 3]
    with PretendDevice("xpu") as device:
        arrives = to_host(ROWS.to("xpu"), dtype)
        assert device.waits.total() == 0
        rows, device_counts = arrives()
    assert device_counts == counts
    assert (rows.dtype, rows.shape) == (cpu_rows.dtype, cpu_rows.shape)
    np.testing.assert_array_equal(rows, cpu_rows)
    empty, counts = to_host(ROWS[:0], dtype)()
    assert (empty.shape, counts) == ((0, 3), [0, 0])


def test_on_cuda_one_pinned_buffer_arrives_by_one_event(monkeypatch):
    happened = []

    def event() -> SimpleNamespace:
        return SimpleNamespace(
            record=lambda stream: happened.append(f"recorded on {stream}"),
            synchronize=lambda: happened.append("waited"),
        )

    class Stream(str):
        def wait_stream(self, stream: str) -> None:
            happened.append(f"{self} after {stream}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(transfer, "_streams", {})
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: happened.append(f"used on {stream}"))
    empty = torch.empty

    def pinned(*arguments, pin_memory=False, **options):
        if pin_memory:
            happened.append("pinned")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", pinned)
    with PretendDevice("cuda") as device:
        arrives = to_host(ROWS.to("cuda"), torch.float16)
        assert happened == ["copies after main", "pinned", "used on copies", "recorded on copies"]
        rows, counts = arrives()
        assert happened[4:] == ["waited"]
        assert device.waits.total() == 0
    np.testing.assert_array_equal(rows, to_host(ROWS, torch.float16)()[0])
    assert counts == [2, 3]


def test_places_without_padding_are_copied_once_for_all_sites():
    tensor = torch.arange(12.0).view(2, 3, 2)
    rows = BatchRows(np.array([0, 3]), np.array([3, 1]))
    with PretendDevice("xpu"):
        device_tensor = tensor.to("xpu")
        (real, runs), (again, _) = rows.take(device_tensor, 0), rows.take(device_tensor + 1, 0)
        assert len(rows._indices) == 1
        assert torch.equal(again.cpu() - 1, real.cpu())
    assert runs == [(0, 0, 3), (3, 3, 1)]
    assert as_numpy(real.cpu()).tolist() == tensor.flatten(0, 1)[:4].tolist()


def test_a_recording_waits_for_the_device_in_the_models_code_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with PretendDevice("xpu") as device:
        model, waits = wb.load_model("demo", device="xpu"), {}
        for sequences in (1, 4):
            device.waits.clear()
            ids = [[5, 6, 7, 8]] * sequences
            settings = {"sites": ["resid_post", "z"], "batch_tokens": 4, "show_progress": False}
            wb.record(model, ids, out=tmp_path / str(sequences), **settings)
            waits[sequences] = device.waits.copy()
    assert set(waits[4] - waits[1]) <= {"workbench.model.forward:run"}


def test_work_runs_beside_what_follows_and_its_errors_come_out():
    began, gate, order = threading.Event(), threading.Event(), []

    def work(name):
        began.set()
        assert gate.wait(60)
        order.append(name)

    with one_behind() as later:
        later(lambda: work("first"))
        assert began.wait(60)
        order.append("beside")
        gate.set()
        later(lambda: work("second"))
    assert order == ["beside", "first", "second"]

    def fail():
        raise OSError("disk")

    for count in (1, 2):
        with pytest.raises(OSError, match="disk"):
            _run_behind(fail, count)


def _run_behind(work, count):
    with one_behind() as later:
        for _ in range(count):
            later(work)
