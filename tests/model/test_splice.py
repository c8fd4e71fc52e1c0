"""Replacement of a site during a forward pass."""

from dataclasses import replace

import pytest
import torch
from refusals import refused

from workbench.io.errors import DataError
from workbench.model.forward import run
from workbench.model.interventions import splice
from workbench.model.load import Model


@pytest.fixture(scope="module")
def model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["gpt2"], tiny_tokenizer, "tiny-gpt2")


def batch_of(positions: int = 4):
    return torch.tensor([[5] * positions]), torch.ones(1, positions, dtype=torch.int64)


def test_a_splice_is_removed_after_success_and_after_an_exception(model):
    (site,) = model.site_map.select(["resid_post.1"])
    part = model.module.get_submodule(site.tap.path)
    ids, mask = batch_of()
    before = run(model.module, ids, mask).logits
    hooks = len(part._forward_hooks)

    def fail(_rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), splice(model.module, site, mask.bool(), fail):
        run(model.module, ids, mask)
    assert len(part._forward_hooks) == hooks
    with splice(model.module, site, mask.bool(), torch.zeros_like):
        assert not torch.equal(run(model.module, ids, mask).logits, before)
    assert torch.equal(run(model.module, ids, mask).logits, before)


def test_a_splice_whose_site_never_runs_is_an_error(model):
    (site,) = model.site_map.select(["resid_post.1"])

    def nothing_run():
        with splice(model.module, site, torch.ones(1, 4, dtype=torch.bool), torch.zeros_like):
            pass

    text = refused(DataError, nothing_run)
    assert text == "site resid_post.1 did not come up in the forward pass: nothing was replaced"


@pytest.mark.parametrize("wrap", [tuple, list, dict])
def test_other_outputs_of_a_spliced_module_are_unchanged(wrap, model):
    (site,) = model.site_map.select(["resid_post.1"])
    extra = torch.full((3,), 7.0)

    class Block(torch.nn.Module):
        def forward(self, hidden):
            return {"hidden": hidden, "extra": extra} if wrap is dict else wrap((hidden, extra))

    module = torch.nn.ModuleDict({"block": Block()})
    there = replace(site, shape=(2,), tap=replace(site.tap, path="block", part="out"))
    hidden, mask = torch.arange(8.0).reshape(2, 2, 2), torch.tensor([[True, False], [False, True]])
    with splice(module, there, mask, lambda rows: rows + 100):
        output = module["block"](hidden)
    first, rest = output.values() if wrap is dict else output
    expected = hidden.clone()
    expected[0, 0] += 100
    expected[1, 1] += 100
    assert isinstance(output, wrap)
    assert torch.equal(first, expected)
    assert rest is extra
    assert torch.equal(hidden, torch.arange(8.0).reshape(2, 2, 2))
    there = replace(there, tap=replace(there.tap, part="in"))
    for call in (lambda: module["block"](hidden), lambda: module["block"](hidden=hidden)):
        with splice(module, there, mask, lambda rows: rows + 100):
            output = call()
        assert torch.equal(next(iter(output.values())) if wrap is dict else output[0], expected)
