"""The gradient at a site by ordinary autograd: that of a tensor of zeros, added there by a plain hook."""

import torch

from workbench.model.gradients import capture_gradients
from workbench.model.load import Model

KINDS = [
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "rot_q",
    "rot_k",
    "z",
    "mlp_post",
]
"""Kinds of sites that are tried in every architecture."""


def batch(vocab=300):
    ids = torch.randint(2, vocab, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


def difference(logits):
    return (logits[0, 6, 20] - logits[0, 6, 30]) + (logits[1, 4, 20] - logits[1, 4, 30])


def gradients_of(model, sites, ids, mask, metric=difference):
    values, gradients = {}, {}
    capture_gradients(
        model,
        sites,
        ids,
        mask,
        metric,
        receive=lambda site, tensor, _first: values.update({site.short: tensor.clone()}),
        receive_gradient=lambda site, tensor, _first: gradients.update({site.short: tensor.clone()}),
    )
    return values, gradients


def added_zero(module, site, ids, mask):
    """The gradient of a tensor of zeros that a plain hook adds where the site is, by ordinary autograd."""
    place, zeros = module.get_submodule(site.tap.path), []

    def add(tensor):
        zeros.append(torch.zeros_like(tensor, requires_grad=True))
        return tensor + zeros[0]

    def before(_module, args, kwargs):
        if args:
            return (add(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: add(kwargs[name])}

    def after(_module, _args, output):
        return add(output) if isinstance(output, torch.Tensor) else (add(output[0]), *output[1:])

    if site.tap.part == "in":
        handle = place.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = place.register_forward_hook(after)
    try:
        logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(difference(logits), zeros)
    return gradient.reshape(*ids.shape, *site.shape)


def check_architecture(module, kind):
    """Compares all sites that modules take or give; returns their number.

    Not resid_mid, which the model also adds behind the MLP: a zero added to the norm's input alone is less.
    """
    model = Model(module, None, kind)
    ids, mask = batch(min(300, model.vocab))
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in model.site_map.sites.values())]
    sites = model.site_map.select(kinds)
    values, gradients = gradients_of(model, sites, ids, mask)
    assert gradients.keys() == values.keys() == {site.short for site in sites}
    compared = [site for site in sites if site.tap.part in ("in", "out") and site.kind != "resid_mid"]
    assert compared
    for site in compared:
        expected = added_zero(module, site, ids, mask)
        scale = float(expected.abs().max()) or 1.0
        torch.testing.assert_close(gradients[site.short] / scale, expected / scale, atol=2e-6, rtol=0)
        assert float(gradients[site.short].abs().max()) > 0
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    return len(compared)
