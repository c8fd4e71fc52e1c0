"""Results do not depend on torch's ambient state: autocast, default device and dtype, inference mode, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_mps import MPS, PretendMps, move_to_mps

import workbench as wb
from workbench.embedded import demo_corpus
from workbench.model.load import Model
from workbench.probes import (
    AttentionSinks,
    FutureLens,
    FuturePrompts,
    LogitLens,
    SuccessorHeads,
    TokenErasure,
    TunedLens,
)
from workbench.sae.load import Sae
from workbench.sae.metrics import sae_metrics

SITES = ("resid_post", "pattern", "z", "v", "attn_received", "resid_norm")
PROBES = (
    LogitLens(),
    TunedLens(epochs=1),
    AttentionSinks(length=16, resamples=20),
    TokenErasure(epochs=1, resamples=20),
    FutureLens(horizons=1, epochs=1, direct_vocab=50, ridge=(0.01,)),
    FuturePrompts(horizons=2, epochs=1, training_rows=16, row_limit=8, prompts=(), prompt_tokens=2),
    SuccessorHeads(permutations=20, row_limit=100),
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


def numbers(folder: Path, model: Model | None = None, sae: Sae | None = None) -> dict[str, np.ndarray]:
    """Everything that is computed, by name."""
    model, sae = model or wb.load_model("demo"), sae or wb.load_sae("demo")
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
    found = {site.label: store[site.name][:].numpy() for site in store.manifest.sites}
    found["features"] = features[np.arange(store.rows)].toarray()
    found["metrics"] = np.array([metrics.l0, metrics.explained_variance, metrics.loss.recovered])
    found["encoded"] = sae.encode(store["resid_post", 2][:8]).cpu().numpy()
    for probe in PROBES:
        result = probe.run(store, model=model)
        for name, values in result.data.items():
            if values.dtype.kind in "fiub":
                found[f"{probe.name} {name}"] = values.values
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, np.ndarray]:
    return numbers(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("state", STATES)
def test_results_are_those_of_a_fresh_process(state, expected, tmp_path):
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    with ExitStack() as stack:
        for enter in STATES[state]:
            stack.enter_context(enter())
        found = numbers(tmp_path)
    assert before == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=f"{state}: {name}")


def test_a_device_without_float64_gives_the_same(expected, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.__future__, "_overwrite_module_params_on_conversion", True
    )  # Module.cpu() keeps no subclass
    model, sae = wb.load_model("demo"), wb.load_sae("demo")
    move_to_mps(model.module)
    move_to_mps(sae.module)
    with PretendMps():
        assert (model.device, sae.device) == (MPS, MPS)
        with pytest.raises(TypeError, match="float64"):
            model.module.lm_head.weight.double()
        found = numbers(tmp_path, model, sae)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
