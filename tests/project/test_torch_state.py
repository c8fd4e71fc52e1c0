"""Results do not depend on torch's ambient state: autocast, default device and dtype, inference mode, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_device import PretendDevice

import workbench as wb
from workbench.embedded import demo_corpus
from workbench.probes import (
    AttentionSinks,
    DirectLogitAttribution,
    FutureLens,
    FuturePrompts,
    LogitLens,
    SuccessorHeads,
    TokenErasure,
    TunedLens,
)
from workbench.sae.encode import encoder
from workbench.sae.metrics import sae_metrics

SITES = ("resid_pre.0", "attn_out", "mlp_out", "resid_post", "pattern", "z", "v", "attn_received", "resid_norm")
PROBES = (
    LogitLens(),
    TunedLens(epochs=1),
    AttentionSinks(length=16, resamples=20),
    TokenErasure(epochs=1, resamples=20),
    FutureLens(horizons=1, epochs=1, direct_vocab=50, ridge=(0.01,)),
    FuturePrompts(horizons=2, epochs=1, training_rows=16, row_limit=8, prompts=(), prompt_tokens=2),
    SuccessorHeads(permutations=20, row_limit=100),
    DirectLogitAttribution(parts="heads", resamples=20),
)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], ...]] = {
    "autocast and default device": (lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")),
    "float64 and inference mode": (lambda: default_dtype(torch.float64), torch.inference_mode),
    "float16, no gradients, deterministic": (lambda: default_dtype(torch.float16), torch.no_grad, deterministic),
}
"""States that are entered together."""


def numbers(folder: Path, device: str = "cpu") -> dict[str, np.ndarray]:
    """Everything that is computed, by name."""
    model, sae = wb.load_model("demo", device=device), wb.load_sae("demo", device=device)
    texts = [
        {
            "text": document["text"][:160],
            "spans": {"word": [span for span in document["spans"]["word"] if span["end"] <= 160]},
        }
        for document in demo_corpus()[:8]
    ]
    options = {"sites": SITES, "dtype": "float32", "context": 48, "show_progress": False}
    store = wb.record(model, texts, out=folder / "s.acts", **options)
    features = wb.extract_features(store, sae, show_progress=False)
    metrics = sae_metrics(store, sae, model=model)
    computed = {site.label: store[site.name][:].numpy() for site in store.manifest.sites}
    computed["features"] = features[np.arange(store.rows)].toarray()
    computed["metrics"] = np.array([metrics.l0, metrics.explained_variance, metrics.loss.recovered])
    computed["encoded"] = sae.encode(store["resid_post", 2][:8]).cpu().numpy()
    for probe in PROBES:
        settings = {"device": device} if hasattr(probe, "device") else {}
        result = replace(probe, **settings).run(store, model=model)
        for name, values in result.data.items():
            if values.dtype.kind in "fiub":
                computed[f"{probe.name} {name}"] = values.values
    return computed


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, np.ndarray]:
    return numbers(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("state", STATES)
def test_results_are_those_of_a_fresh_process(state, expected, tmp_path):
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    with ExitStack() as stack:
        for enter in STATES[state]:
            stack.enter_context(enter())
        computed = numbers(tmp_path)
    assert before == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert computed.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(computed[name], values, err_msg=f"{state}: {name}")


# ---- on a pretend accelerator ---------------------------------------------------------------------------


@pytest.fixture
def moved_modules(monkeypatch):
    """Modules take the moved tensor itself, as on devices whose tensors cannot be put into a CPU tensor."""
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)


def test_a_device_that_mixes_with_no_other_and_has_no_float64_gives_the_same(expected, tmp_path, moved_modules):
    with PretendDevice("mps"):
        assert wb.load_model("demo", device="mps").device == wb.load_sae("demo", device="mps").device != "cpu"
        computed = numbers(tmp_path, "mps")
    for name, values in expected.items():
        np.testing.assert_allclose(computed[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


def test_what_a_device_with_float64_computes_in_it_stays_there(expected, tmp_path, moved_modules):
    model, texts = wb.load_model("demo", device="cpu"), [document["text"][:200] for document in demo_corpus()[:4]]
    store = wb.record(model, texts, sites=("resid_post",), out=tmp_path / "s.acts", show_progress=False)
    rows, lens = store["resid_post", 2][:].float(), FutureLens(horizons=1, epochs=1, direct_vocab=50, ridge=(0.01,))
    on_cpu = encoder(wb.load_sae("demo", device="cpu"), precision="bfloat16")(rows)
    result = replace(lens, device="cpu").run(store)
    features = wb.extract_features(store, wb.load_sae("demo", device="cpu"), show_progress=False)
    with PretendDevice("xpu"):
        on_device = encoder(wb.load_sae("demo", device="xpu"), precision="bfloat16")(rows.to("xpu"))
        assert [part.device.type for part in (on_device.indptr, on_device.feature, on_device.value)] == ["xpu"] * 3
        assert torch.equal(on_device.indptr.cpu(), on_cpu.indptr)
        assert torch.equal(on_device.feature.cpu(), on_cpu.feature)
        torch.testing.assert_close(on_device.value.cpu(), on_cpu.value)
        moved = replace(lens, device="xpu").run(store)
        model, sae = wb.load_model("demo", device="xpu"), wb.load_sae("demo", device="xpu")
        wb.record(model, texts, sae=sae, out=tmp_path / "f.acts", show_progress=False)
    for name, values in result.data.items():
        if values.dtype.kind in "fiub":
            np.testing.assert_allclose(moved.data[name], values, rtol=1e-3, atol=1e-4, err_msg=str(name))
    (recorded,) = (tmp_path / "f.acts" / "features").iterdir()
    on_cpu, on_device = (matrix[np.arange(store.rows)].toarray() for matrix in (features, wb.open_features(recorded)))
    np.testing.assert_allclose(on_cpu, on_device, rtol=1e-3, atol=1e-3)


def test_the_pretend_device_refuses_what_cuda_refuses():
    with PretendDevice("xpu") as device:
        on_device, on_cpu = torch.arange(3.0, device="xpu"), torch.arange(3.0)
        for mixed in (
            lambda: on_device + on_cpu,
            lambda: torch.cat([on_cpu, on_device]),
            lambda: on_cpu[on_device.long()],
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="can't convert xpu:0 device type tensor to numpy"):
            on_device.numpy()
        assert (
            (on_device[on_cpu.long()] + torch.tensor(1.0)).device == on_device.to("xpu").device == torch.device("xpu")
        )
        assert on_device.double().device.type == "xpu"
        assert device.waits.total() == 0
        assert type(on_device.cpu().add_(1)) is torch.Tensor
        assert on_device.tolist() == [0.0, 1.0, 2.0]
        assert device.waits.total() == 2
    with PretendDevice("mps"), pytest.raises(TypeError, match="float64"):
        torch.zeros(3, device="mps").double()
