"""One function decides which device computes: the GPU if there is one, unless a device is named."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from workbench.experiments.train_sae import TrainSae
from workbench.io.torch_state import usable_device
from workbench.results.registry import find_experiment, find_probe, installed_experiments, installed_probes
from workbench.results.result import with_device
from workbench.runs.folders import Run
from workbench.runs.sweep import _device_type


@pytest.fixture
def with_gpu(monkeypatch) -> None:
    """torch finds a GPU: tensors asked for on "cuda" are made on "meta", the only other device of every build."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size, device=str(device).replace("cuda", "meta")))


def test_none_is_the_gpu_if_there_is_one(with_gpu):
    assert usable_device() == usable_device("cuda") == torch.device("meta")
    assert usable_device("cpu") == torch.device("cpu")


def test_none_is_the_cpu_if_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device() == usable_device(None) == torch.device("cpu")
    assert with_device({"device": None, "seed": 1}) == {"device": "cpu", "seed": 1}


def test_results_name_the_device_that_computed(with_gpu):
    assert with_device({"device": None}) == {"device": "meta"}
    assert with_device({"device": "cpu"}) == {"device": "cpu"}
    assert with_device({"seed": 1}) == {"seed": 1}


def test_every_setting_named_device_leaves_the_choice_open():
    settings = [*map(find_probe, installed_probes()), TrainSae]
    settings += [find_experiment(name).Config for name in installed_experiments()]
    defaults = {
        kind.__qualname__ + kind.__module__: field.default
        for kind in settings
        for field in fields(kind)
        if field.name == "device"
    }
    assert len(defaults) > 8
    assert MISSING not in defaults.values()
    assert set(defaults.values()) == {None}


def test_workers_of_a_sweep_have_the_device_that_its_runs_name():
    def chosen(*devices: str | None) -> str | None:
        return _device_type([Run("sinks", SimpleNamespace(device=device), Path()) for device in devices])

    assert [chosen("cpu", "cuda:1"), chosen("cpu", None), chosen("cpu"), chosen(None, "cuda")] == [
        "cuda",
        None,
        "cpu",
        "cuda",
    ]
