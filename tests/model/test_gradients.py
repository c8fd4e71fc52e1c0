"""Gradients at sites: plain autograd with an added zero tensor, central differences, refusals, nothing left behind."""

import copy

import pytest
import torch
from gradient_oracle import batch, check_architecture, difference, gradients_of
from refusals import refused

from workbench.io.errors import DataError, RequestError
from workbench.model.gradients import check_gradients
from workbench.model.load import Model


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_gradients_are_those_of_an_added_zero_tensor_in_plain_autograd(family, tiny_models):
    assert check_architecture(tiny_models[family], family) > 10


def test_the_stream_between_attention_and_mlp_has_the_gradient_of_all_its_paths(tiny_models):
    """resid_mid = resid_pre + attn_out, so its gradient is that of what attention adds."""
    for family in ("gpt2", "llama", "gemma2"):
        model = Model(tiny_models[family], None, family)
        _, gradients = gradients_of(model, model.site_map.select(("resid_mid", "attn_out")), *batch())
        for layer in range(3):
            first, second = gradients[f"resid_mid.{layer}"], gradients[f"attn_out.{layer}"]
            torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_a_site_alone_has_the_gradient_that_it_has_among_others(tiny_model):
    model = Model(tiny_model, None, "tiny")
    names = ("embed", "resid_pre.0", "q.1", "rot_q.1", "z.1", "mlp_out.2", "resid_post.2", "final_norm", "logits")
    known = [name for name in names if any(site.short == name for site in model.site_map.sites.values())]
    _, together = gradients_of(model, model.site_map.select(known), *batch())
    for name in known:
        _, alone = gradients_of(model, model.site_map.select((name,)), *batch())
        torch.testing.assert_close(alone[name], together[name], atol=1e-6, rtol=1e-5)
    expected = torch.zeros_like(together["logits"])
    for line, end in ((0, 6), (1, 4)):
        expected[line, end, 20], expected[line, end, 30] = 1, -1
    assert torch.equal(together["logits"], expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_are_central_differences_in_float64(family, tiny_models):
    module = copy.deepcopy(tiny_models[family]).double()
    model = Model(module, None, family)
    ids, mask = batch()
    names = ("resid_pre.1", "z.0", "mlp_out.1")
    _, gradients = gradients_of(model, model.site_map.select(names), ids, mask)
    draw, step = torch.Generator().manual_seed(0), 1e-2
    for name in names:
        (site,) = model.site_map.select((name,))
        place, gradient = module.get_submodule(site.tap.path), gradients[name]
        direction = torch.randn(gradient.shape, generator=draw, dtype=torch.float64)

        def at(size, site=site, place=place, direction=direction):
            def change(tensor):
                return tensor + size * direction.reshape(tensor.shape)

            if site.tap.part == "in":
                handle = place.register_forward_pre_hook(lambda _m, args: (change(args[0]), *args[1:]))
            else:
                handle = place.register_forward_hook(lambda _m, _a, output: change(output))
            with torch.no_grad():
                value = difference(module(input_ids=ids, attention_mask=mask).logits)
            handle.remove()
            return float(value)

        slope = (at(step) - at(-step)) / (2 * step)
        size = float(gradient.norm() * direction.norm())
        assert slope == pytest.approx(float((gradient * direction).sum()), abs=1e-4 * size)


def test_a_tensor_that_the_model_changes_in_place_keeps_its_own_gradient(tiny_models):
    module, gradients = copy.deepcopy(tiny_models["llama"]), []
    model = Model(module, None, "llama")
    sites = model.site_map.select(("resid_post.1", "resid_pre.2"))
    for triple in (torch.Tensor.mul, torch.Tensor.mul_):
        handle = module.model.layers[2].register_forward_pre_hook(
            lambda _m, args, kwargs, triple=triple: ((triple(args[0], 3), *args[1:]), kwargs), with_kwargs=True
        )
        gradients.append(gradients_of(model, sites, *batch())[1])
        handle.remove()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[0]["resid_post.1"], 3 * gradients[0]["resid_pre.2"])


def test_what_has_no_exact_gradient_is_refused_by_name(tiny_models):
    module = copy.deepcopy(tiny_models["llama"])
    model = Model(module, None, "tiny")
    select = model.site_map.select
    for name in ("pattern.1", "resid_norm.0"):
        call = lambda name=name: check_gradients(model, select((name,)))  # noqa: E731
        assert f"{name} is computed beside" in refused(RequestError, call)
    module.is_quantized = True
    assert "'tiny' is quantised" in refused(RequestError, lambda: check_gradients(model, select(("z",))))
    module.is_quantized = False
    half = Model(copy.deepcopy(module).half(), None, "half")
    assert "computes in float16" in refused(RequestError, lambda: check_gradients(half, select(("z",))))
    forward = module.model.layers[2].forward
    module.model.layers[2].forward = lambda *args, **kwargs: torch.no_grad()(forward)(*args, **kwargs)
    call = lambda: gradients_of(model, select(("resid_post.0",)), *batch())  # noqa: E731
    assert "computes its logits without gradients" in refused(RequestError, call)


def test_a_site_that_nothing_behind_it_uses_is_refused(tiny_models):
    model = Model(tiny_models["llama"], None, "tiny")
    sites = model.site_map.select(("resid_pre.1", "logits"))
    call = lambda: gradients_of(model, sites, *batch(), metric=lambda logits: logits.detach().sum() + 0 * logits.sum())  # noqa: E731
    _, gradients = call()
    assert float(gradients["resid_pre.1"].abs().max()) == 0
    skipped = copy.deepcopy(tiny_models["llama"])
    skipped.model.layers[1].register_forward_hook(lambda _m, args, _output: args[0])
    call = lambda: gradients_of(Model(skipped, None, "tiny"), model.site_map.select(("z.1", "z.2")), *batch())  # noqa: E731
    assert "none of the metric reaches blocks.1.attn.hook_z" in refused(DataError, call)
