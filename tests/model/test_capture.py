"""Tests of one forward pass under hooks: its tensors, what is not computed, and that no hooks remain."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from capture_example import LENGTHS, N, captured
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workbench.io.errors import DataError
from workbench.model.capture import capture
from workbench.model.discovery import find_sites
from workbench.model.forward import attention_weights, evaluating, first_tensor, hook_tensor
from workbench.sites.grammar import Site, Tap


def hooks(module):
    """Hooks on all submodules. transformers adds its own, to stay, when a model is first asked for hidden states."""
    return [(*part._forward_hooks, *part._forward_pre_hooks) for part in module.modules()]


def count_runs(module, *paths):
    """A counter of how often each submodule runs from now on."""
    runs = Counter()
    for path in paths:
        part = module.get_submodule(path)
        part.register_forward_pre_hook(lambda *_, path=path: runs.update([path]))
    return runs


# ---- what comes out -------------------------------------------------------------------------------------


def test_a_hooked_site_is_what_passes_through_its_module(llama, batch):
    module, sites = llama
    names = ["embed", "resid_pre.1", "q.0", "attn_out.1", "resid_mid.1", "mlp_post.2", "resid_post.2", "final_norm"]
    values = captured(module, sites.select([*names, "logits"]), batch)
    outputs = {}
    layers = module.model.layers
    module.model.embed_tokens.register_forward_hook(lambda _m, _a, out: outputs.update({"embed": out}))
    layers[1].register_forward_pre_hook(lambda _m, args: outputs.update({"resid_pre.1": args[0]}))
    layers[0].self_attn.q_proj.register_forward_hook(
        lambda _m, _a, out: outputs.update({"q.0": out.unflatten(2, (4, 8))})
    )
    layers[1].self_attn.register_forward_hook(lambda _m, _a, out: outputs.update({"attn_out.1": out[0]}))
    layers[1].post_attention_layernorm.register_forward_pre_hook(lambda _m, a: outputs.update({"resid_mid.1": a[0]}))
    layers[2].mlp.down_proj.register_forward_pre_hook(lambda _m, args: outputs.update({"mlp_post.2": args[0]}))
    module.model.norm.register_forward_pre_hook(lambda _m, args: outputs.update({"resid_post.2": args[0]}))
    module.model.norm.register_forward_hook(lambda _m, _a, out: outputs.update({"final_norm": out}))
    with torch.no_grad():
        outputs["logits"] = module(input_ids=batch[0], attention_mask=batch[1]).logits
    assert values.keys() == outputs.keys()
    for short, expected in outputs.items():
        assert torch.equal(values[short], expected), short


def test_attention_parts_are_those_of_the_call(llama, batch):
    """Against the projections, rotated here in float64 by the textbook formula."""
    module, sites = llama
    values = captured(module, sites.select(["q.1", "k.1", "v.1", "rot_q.1", "rot_k.1", "z.1", "pattern.1"]), batch)
    position = np.arange(N)[:, None]
    angle = position * 10_000.0 ** -(np.arange(4) / 4)
    cos, sin = (np.tile(f(angle), 2)[None, :, None, :] for f in (np.cos, np.sin))
    for part in ("q", "k"):
        x = values[f"{part}.1"].double().numpy()
        turned = np.concatenate([-x[..., 4:], x[..., :4]], axis=-1)
        np.testing.assert_allclose(values[f"rot_{part}.1"], x * cos + turned * sin, atol=1e-5)
    q, k, v = (values[name].double().numpy() for name in ("rot_q.1", "rot_k.1", "v.1"))
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    scores = np.einsum("bqhd,bkhd->bqhk", q, k) / math.sqrt(8)
    scores = np.where(np.tril(np.ones((N, N), bool))[None, :, None, :], scores, -np.inf)
    pattern = np.exp(scores - scores.max(-1, keepdims=True))
    pattern /= pattern.sum(-1, keepdims=True)
    z = np.einsum("bqhk,bkhd->bqhd", pattern, v)
    for row, n in enumerate(LENGTHS):  # causal: padding on the right changes nothing to its left
        np.testing.assert_allclose(values["pattern.1"][row, :n], pattern[row, :n], atol=1e-6)
        np.testing.assert_allclose(values["z.1"][row, :n], z[row, :n], atol=1e-5)


def test_patterns_see_neither_padding_nor_the_future(tiny_models, maps, batch):
    for family, module in tiny_models.items():
        for short, pattern in captured(module, maps[family].select(["pattern"]), batch).items():
            for row, n in enumerate(LENGTHS):
                real = pattern[row, :n].transpose(0, 1)  # head, query, key
                assert not real[..., n:].any(), (family, short)
                assert not real.triu(1).any(), (family, short)
                torch.testing.assert_close(real.sum(-1), torch.ones(real.shape[:2]), rtol=0, atol=1e-5)


def test_a_pattern_a_module_returns_is_turned_to_rows(batch):
    from workbench.experiments.architectures.tiny import tiny_model

    module = tiny_model("bloom")
    (site,) = find_sites(module).select(["pattern.1"])
    assert site.tap.part == "returned_weights"
    ids = batch[0] % 100 + 8
    pattern = captured(module, [site], (ids, batch[1]))["pattern.1"]
    with torch.no_grad():
        expected = module(input_ids=ids, attention_mask=batch[1], output_attentions=True).attentions[1]
    assert torch.equal(pattern, expected.permute(0, 2, 1, 3))


def test_nothing_asked_runs_nothing(llama, batch):
    module, _ = llama
    runs = count_runs(module, "model.embed_tokens")
    capture(module, (), *batch, lambda *_: pytest.fail("nothing was asked"))
    assert not runs


# ---- what is never computed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site_names", "modules"),
    [
        (["resid_post.0"], {"model.layers.0"}),
        (["resid_pre.1"], {"model.layers.0", "model.layers.1"}),
        (["z.1", "embed"], {"model.layers.0", "model.layers.1"}),
        (["resid_post"], {"model.layers.0", "model.layers.1", "model.layers.2"}),
        (["final_norm"], {"model.layers.0", "model.layers.1", "model.layers.2", "model.norm"}),
        (["logits"], {"model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"}),
    ],
)
def test_the_pass_ends_with_the_deepest_site(llama, batch, site_names, modules):
    module, sites = llama
    runs = count_runs(module, *(f"model.layers.{layer}" for layer in range(3)), "model.norm", "lm_head")
    captured(module, sites.select(site_names), batch)
    assert runs == dict.fromkeys(modules, 1)


def test_a_site_inside_a_block_spares_the_rest_of_it(llama, batch):
    module, sites = llama
    runs = count_runs(module, "model.layers.1.self_attn.o_proj", "model.layers.1.mlp")
    captured(module, sites.select(["pattern.1"]), batch)
    assert not runs


def test_sdpa_computes_the_output_while_patterns_are_read(llama, batch, monkeypatch):
    module, sites = llama
    calls = Counter()
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.update(["sdpa"])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    captured(module, sites.select(["pattern.1", "resid_post.2"]), batch)
    assert calls["sdpa"] == 3


# ---- nothing stays behind -------------------------------------------------------------------------------

EVERY_PART = ["embed", "resid_pre.1", "pattern.1", "z.1", "rot_q.1", "resid_post.1", "logits"]


def test_hooks_are_gone_after_success(llama, batch):
    module, sites = llama
    before = hooks(module)
    assert set(captured(module, sites.select(EVERY_PART), batch)) == set(EVERY_PART)
    assert hooks(module) == before


@pytest.mark.parametrize("where", EVERY_PART)
def test_hooks_are_gone_after_an_exception_in_receive(llama, batch, where):
    module, sites = llama
    before, table = hooks(module), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)

    def receive(site, _tensor, _first):
        if site.short == where:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        capture(module, sites.select(EVERY_PART), *batch, receive)
    assert hooks(module) == before
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == table
    captured(module, sites.select(EVERY_PART), batch)  # and the model is as good as before


def test_hooks_are_gone_after_an_exception_in_the_model(llama, batch):
    module, sites = llama
    module.model.layers[2].mlp.forward = lambda *_: 1 / 0
    before, table = hooks(module), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with pytest.raises(ZeroDivisionError):
        captured(module, sites.select(EVERY_PART), batch)
    assert hooks(module) == before
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == table


def test_model_code_cannot_swallow_the_end_of_the_pass(llama, batch):
    module, sites = llama
    block, inner = module.model.layers[1], module.model.layers[1].forward

    def forgiving(*args, **kwargs):
        try:
            return inner(*args, **kwargs)
        except Exception:
            pytest.fail("the end of the pass was caught")

    block.forward = forgiving
    runs = count_runs(module, "model.layers.2")
    captured(module, sites.select(["mlp_out.1"]), batch)
    assert not runs


def test_the_mode_of_every_part_is_as_before(llama, batch):
    module, sites = llama
    module.train()
    module.model.layers[1].eval()
    modes = [part.training for part in module.modules()]
    assert any(modes)
    assert not all(modes)
    captured(module, sites.select(["resid_post"]), batch)
    assert [part.training for part in module.modules()] == modes


def test_dropout_is_off_and_no_gradient_is_kept(llama, batch):
    module, sites = llama
    expected = captured(module, sites.select(["resid_post.2"]), batch)["resid_post.2"]
    for layer in module.model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.9))
    module.train()
    stream = captured(module, sites.select(["resid_post.2"]), batch)["resid_post.2"]
    assert torch.equal(stream, expected)
    assert not stream.requires_grad


def test_evaluating_restores_after_an_exception():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)).train()
    module[1].eval()
    with pytest.raises(KeyError) as inside, evaluating(module):
        raise KeyError(*(part.training for part in module.modules()))
    assert inside.value.args == (False, False, False)
    assert [part.training for part in module.modules()] == [True, True, False]


# ---- sites that are not as the map says -----------------------------------------------------------------


def test_a_module_that_runs_twice_is_an_error(llama, batch):
    module, sites = llama
    module.model.layers[1] = module.model.layers[0]
    with pytest.raises(DataError) as error:
        captured(module, sites.select(["resid_post.0", "logits"]), batch)
    assert str(error.value) == "site resid_post.0: it ran twice, or without a tensor, in one forward pass"


def test_a_site_that_does_not_come_is_an_error(llama, batch):
    module, sites = llama
    module.model.layers[1].mlp.forward = torch.zeros_like
    with pytest.raises(DataError) as error:
        captured(module, sites.select(["mlp_post.1", "mlp_pre.1", "resid_post.1"]), batch)
    assert str(error.value) == (
        "sites blocks.1.mlp.hook_post, blocks.1.mlp.hook_pre did not come up in a forward pass of LlamaForCausalLM"
    )


def test_a_module_without_a_tensor_is_an_error(llama, batch):
    module, sites = llama
    (site,) = sites.select(["mlp_out.1"])
    module.model.layers[1].mlp.register_forward_hook(lambda *_: "no tensor")
    with pytest.raises(DataError, match=r"site mlp_out\.1: it ran twice, or without a tensor"):
        captured(module, [site], batch)


@pytest.mark.parametrize("shape", [(31,), (33,), (4, 4)])
def test_another_shape_than_the_maps_is_an_error(llama, batch, shape):
    module, sites = llama
    site = replace(sites.select(["resid_post.1"])[0], shape=shape)
    with pytest.raises(DataError) as error:
        captured(module, [site], batch)
    assert str(error.value) == "site resid_post.1: a tensor of shape (2, 9, 32) for a batch (2, 9)"


def test_batch_and_position_in_one_axis_are_told_apart(batch):
    """Mixtures of experts see tokens in one row."""

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = torch.nn.Embedding(300, 6), torch.nn.Identity()
            self.config = type("Config", (), {"_attn_implementation": "sdpa"})()
            self.config.get_text_config = lambda decoder: self.config

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, attention_mask):
            return self.body(self.embed(input_ids).flatten(0, 1))

    module = Flat()
    site = Site("blocks.0.hook_resid_post", ("head", "d_head"), (2, 3), Tap("body", "out"))
    stream = captured(module, [site], batch)["resid_post.0"]
    assert torch.equal(stream, module.embed(batch[0]).detach().unflatten(2, (2, 3)))


# ---- small tools ----------------------------------------------------------------------------------------


def test_the_first_tensor_is_found_wherever_it_is():
    tensor, second = torch.ones(1), torch.zeros(1)
    assert first_tensor(tensor) is tensor
    assert first_tensor((None, tensor, second)) is tensor
    assert first_tensor([tensor]) is tensor
    assert first_tensor({"mask": None, "hidden": tensor, "other": second}) is tensor
    assert first_tensor((None, "text")) is None
    assert first_tensor(None) is None


def test_attention_weights_are_square_and_behind_the_output():
    output, weights = torch.ones(2, 5, 8), torch.ones(2, 4, 5, 5)
    assert attention_weights((output, weights)) is weights
    assert attention_weights((output, torch.ones(2, 4, 5, 6), weights)) is weights
    assert attention_weights((weights, output)) is None
    assert attention_weights(weights) is None


def test_a_hook_sees_keyword_arguments():
    class Keywords(torch.nn.Module):
        def forward(self, *, scale, hidden):
            return scale * hidden

    module, inputs, hidden = Keywords(), [], torch.ones(2)
    with hook_tensor(module, "in", inputs.append):
        module(scale=2.0, hidden=hidden)
    module(scale=2.0, hidden=hidden)  # outside: no hook any more
    assert len(inputs) == 1
    assert inputs[0] is hidden
