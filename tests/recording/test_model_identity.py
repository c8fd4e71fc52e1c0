"""A recording is known by what the forward pass computes: weights and config alone do not decide it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.packing import pack_model, unpack_model
from workbench.model.reload import check_recorded
from workbench.recording.cache import record_once

TEXTS, MORE = [[5, 6, 7, 8, 9], [10, 11, 12]], [[20, 21, 22]]
SETTINGS = {"sites": ["resid_post.2"], "dtype": "float32", "show_progress": False}


class AdaptedLinear(torch.nn.Module):
    """A layer as PEFT makes one: the base layer, and the adapter's part while that is not disabled."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)
        self.disable_adapters, self.active_adapters, self.merged_adapters = False, ["default"], []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + (0 if self.disable_adapters else 1e-4 * self.lora_A(x))


@pytest.fixture
def module(tiny_models):
    module = copy.deepcopy(tiny_models["llama"])
    layer = module.model.layers[0].mlp
    torch.manual_seed(0)
    layer.down_proj = AdaptedLinear(layer.down_proj)
    return module.requires_grad_(False)


def steer(strength):
    return lambda _module, _arguments, output: output + strength


def hook(module):
    return module.model.layers[1].register_forward_hook(steer(1.0)).remove


def pre_hook(module):
    return module.model.layers[1].register_forward_pre_hook(lambda _module, arguments: (2 * arguments[0],)).remove


def disabled_adapter(module):
    layer = module.model.layers[0].mlp.down_proj
    layer.disable_adapters = True
    return lambda: setattr(layer, "disable_adapters", False)


def buffer(module):
    rotary = module.model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary.inv_freq *= 0.5
    return lambda: rotary.inv_freq.copy_(before)


def attribute(module):
    attention = module.model.layers[1].self_attn
    before, attention.scaling = attention.scaling, 0.9 * attention.scaling
    return lambda: setattr(attention, "scaling", before)


def config(module):
    before, module.config.rms_norm_eps = module.config.rms_norm_eps, 0.5  # not read after construction, as Llama's is
    return lambda: setattr(module.config, "rms_norm_eps", before)


def method(module):
    layer = module.model.layers[2].mlp
    layer.forward = lambda x: 0 * x
    return lambda: delattr(layer, "forward")


CHANGES = {
    hook: "its forward hooks are model.layers.1: ",
    pre_hook: "its forward hooks are model.layers.1: ",
    disabled_adapter: "its adapters are disabled default, not active default",
    buffer: "its buffer model.rotary_emb.inv_freq has other values",
    attribute: "after a short fixed text differs by ",
    config: "its config has rms_norm_eps = 0.5, not ",
    method: "after a short fixed text differs by ",
}


def record(model: Model, out: Path, texts=TEXTS, **options) -> torch.Tensor:
    return wb.record(model, texts, out=out, **SETTINGS, **options)["resid_post", 2][:].clone()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_behaves_otherwise_is_refused_with_what_differs(module, change, tmp_path):
    model = Model(module, None, "tiny")
    plain = record(model, tmp_path / "s")
    store = wb.open_store(tmp_path / "s")
    undo = change(module)
    for call in (
        lambda: record(model, tmp_path / "s"),
        lambda: record(model, tmp_path / "s", MORE, append=True),
        lambda: check_recorded(store, model),
    ):
        assert CHANGES[change] in refused(RequestError, call)
    assert change is config or not torch.equal(record(model, tmp_path / "t"), plain)
    if change is hook:
        compared = wb.compare(store, wb.open_store(tmp_path / "t"), probes=())
        assert compared.model_difference.startswith(CHANGES[hook])
    undo()
    assert torch.equal(record(model, tmp_path / "s"), plain)
    check_recorded(store, model)


def test_an_interrupted_recording_is_not_resumed_with_another_behaviour(module, tmp_path, monkeypatch):
    from workbench.recording import segments

    model, real = Model(module, None, "tiny"), segments.SegmentRecorder.write

    def killed(self, planned, *arguments, **options):
        if planned.name == "00001":
            raise KeyboardInterrupt
        real(self, planned, *arguments, **options)

    monkeypatch.setattr(segments.SegmentRecorder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        record(model, tmp_path / "s", segment_rows=5)
    monkeypatch.undo()
    undo = hook(module)
    assert "its forward hooks are " in refused(RequestError, lambda: record(model, tmp_path / "s", segment_rows=5))
    undo()
    assert len(record(model, tmp_path / "s", segment_rows=5)) == 8


def test_a_cache_has_a_recording_for_each_behaviour(module, tmp_path):
    """Two hooks of one name, whose strength alone differs, too."""
    model = Model(module, None, "tiny")

    def once() -> tuple[str, torch.Tensor]:
        store = record_once(model, TEXTS, folder=tmp_path / "cache", **SETTINGS)
        return store.path.parent.name, store["resid_post", 2][:].clone()

    plain, truth = once(), record(model, tmp_path / "plain")
    steered = {}
    for strength in (1.0, 2.0):
        handle = module.model.layers[1].register_forward_hook(steer(strength))
        steered[strength] = once()
        assert torch.equal(steered[strength][1], record(model, tmp_path / str(strength)))
        assert once()[0] == steered[strength][0]
        handle.remove()
    assert torch.equal(plain[1], truth)
    assert [steered[1.0][0], steered[2.0][0]] == [f"{plain[0]}-2", f"{plain[0]}-3"]
    assert once()[0] == plain[0]


def test_workers_refuse_what_they_cannot_load_again(tmp_path):
    pytest.importorskip("ray", reason="workers need Ray: install the extra [distributed]")
    from workbench.model.stored_model import model_record

    model = wb.load_model("demo", device="cpu")
    plain = model_record(model)
    assert unpack_model(pack_model(model, plain), "cpu", plain).fingerprint() == plain.fingerprint
    handle = model.module.model.layers[0].register_forward_hook(steer(1.0))
    assert refused(RequestError, lambda: pack_model(model, model_record(model))).startswith(
        "model 'demo' has a forward hook (model.layers.0: "
    )
    handle.remove()
    model.module.model.layers[0].self_attn.scaling *= 0.5
    changed = model_record(model)
    text = refused(RequestError, lambda: unpack_model(pack_model(model, changed), "cpu", changed))
    assert text.startswith("model 'demo' is another one in a worker: its ")
    assert text.endswith("pass the module itself, or record without workers")
