"""Steering: generation by plain Hugging Face with a hook written here, the plain model's loss, and scale 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.analysis.continuations import continue_steered, random_direction
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import Steering
from workbench.testing import ProbeContract

TEXTS = ["the little day was Monday and the day was", "Once upon a time the little day was to", "day"]


@pytest.fixture(scope="module")
def tiny(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")


@pytest.fixture(scope="module")
def steered_store(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("steering") / "s.acts"
    return wb.record(tiny, TEXTS, sites=["resid_post.1"], out=out, show_progress=False)


@pytest.fixture(scope="module")
def direction():
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    return wb.Direction("resid_post.1", vector, "test")


class TestContract(ProbeContract):
    probe = Steering

    @pytest.fixture(autouse=True)
    def _settings(self, direction, tmp_path_factory):
        path = direction.save(tmp_path_factory.getbasetemp() / "steering.safetensors")
        settings = {"direction": str(path), "tokens": (" Monday",), "scales": (0.0, 2.0), "prompt": 4}
        type(self).settings = {**settings, "new_tokens": 2, "resamples": 20}

    @pytest.fixture
    def store(self, steered_store):
        return steered_store

    @pytest.fixture
    def model(self, tiny):
        return tiny


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_continuations_are_those_of_a_hook_written_by_hand(tiny, direction, new_tokens):
    ids = torch.randint(5, 300, (3, 6), generator=torch.Generator().manual_seed(0))
    steered = continue_steered(tiny, ids, [wb.Add("resid_post.1", direction, 3)], new_tokens)
    block = tiny.module.model.layers[1]
    sequences = ids.clone()
    with torch.no_grad():
        hook = block.register_forward_hook(lambda _m, _a, output: output + 3 * direction.vector)
        try:
            for step in range(new_tokens):  # without cache
                logits = tiny.module(sequences, use_cache=False).logits[:, -1]
                if step == 0:
                    torch.testing.assert_close(
                        steered.after_prompt, logits.double().log_softmax(-1), atol=1e-5, rtol=1e-5
                    )
                logits[:, tiny.module.generation_config.eos_token_id] = -torch.inf
                sequences = torch.cat([sequences, logits.argmax(-1, keepdim=True)], dim=1)
        finally:
            hook.remove()
        plain = tiny.module(sequences).logits.double().log_softmax(-1)
    assert torch.equal(steered.tokens, sequences[:, 6:])
    for row in range(3):
        expected = [-plain[row, 5 + step, sequences[row, 6 + step]] for step in range(new_tokens)]
        torch.testing.assert_close(steered.losses[row], torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_scale_0_is_the_plain_model_and_the_control_has_the_norm(tiny, steered_store, direction):
    settings = Steering(tokens=(" Monday", " day"), scales=(0.0, 1.0), prompt=4, new_tokens=3, resamples=20)
    result = settings.steer(steered_store, direction, model=tiny)
    at = result.data.sel(scale=0.0)
    for name in ("log_probability", "share", "loss"):
        assert float(at[name].sel(kind="direction")) == float(at[name].sel(kind="random"))
    ids = torch.tensor([steered_store.tokens["token_id"].to_pylist()[:4]])
    with torch.no_grad():
        logs = tiny.module(ids).logits[0, -1].double().log_softmax(-1)
    targets = [tiny.tokenizer.encode(text)[-1] for text in (" Monday", " day")]
    first = result.table[(result.table["scale"] == 0) & (result.table["prompt"] == 0)]
    np.testing.assert_allclose(first["log_probability"], logs[targets].logsumexp(0).item(), atol=1e-5)
    assert result.data.attrs["prompts"] == 2
    assert result.data.attrs["note"] == "1 sequence left out: fewer than 4 tokens"
    control = random_direction(direction, 0)
    assert float(control.vector.norm()) == pytest.approx(float(direction.vector.norm()), rel=1e-6)
    assert abs(control.cosine(direction)) < 0.6


def test_several_layers_are_steered_together(tiny, steered_store, direction):
    settings = {"tokens": (" Monday",), "scales": (0.0, 2.0), "prompt": 4, "new_tokens": 2, "resamples": 5}
    first, two = (
        Steering(layers=layers, **settings).steer(steered_store, direction, model=tiny).data
        for layers in ((1,), (0, 1))
    )
    assert two.attrs["site"] == "resid_post.0, resid_post.1"
    assert float(first["log_probability"].sel(kind="direction", scale=2.0)) != float(
        two["log_probability"].sel(kind="direction", scale=2.0)
    )


def test_more_tokens_than_the_model_takes_are_refused(tiny, steered_store, direction):
    probe = Steering(tokens=(" Monday",), prompt=4, new_tokens=125)
    text = refused(RequestError, lambda: probe.steer(str(steered_store.path), direction, model=tiny))
    assert text == "new_tokens: 129 tokens with the prompt, the model takes 128; give fewer"


def test_a_store_of_chosen_rows_is_refused(tiny, direction, tmp_path):
    """Its tokens are no prompt: some of the text is left out."""
    options = {"sites": ["resid_post.1"], "where": "position % 2 = 0", "show_progress": False}
    store = wb.record(tiny, TEXTS, out=tmp_path / "s.acts", **options)
    probe = Steering(tokens=(" Monday",), prompt=4)
    message = refused(RequestError, lambda: probe.steer(store, direction, model=tiny))
    assert message.startswith("a continuation of prompts needs whole sequences")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "direction is not given"),
        ({"direction": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_runs_without_a_direction_are_refused(settings, message, steered_store):
    assert message in refused(RequestError, lambda: Steering(tokens=(" Monday",), **settings).run(steered_store))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tokens is empty"),
        ({"tokens": ("Mondays",)}, "tokens: 'Mondays' is no single token"),
        ({"tokens": (" day", " Monday", " day")}, "tokens: ' day' is named twice"),
        ({"tokens": (" Monday",), "prompt": 99}, "no selected sequence has 99 tokens"),
        ({"tokens": (" Monday",), "prompt": 4, "layers": (9,)}, "no such layer"),
        ({"scales": (1.0, 1.0)}, "scales must be one or more numbers that differ"),
        ({"at": "last"}, "at must be one of all, new"),
    ],
)
def test_bad_settings_are_refused(settings, message, steered_store, tiny, direction):
    assert message in refused(RequestError, lambda: Steering(**settings).steer(steered_store, direction, model=tiny))
