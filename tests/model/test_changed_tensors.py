"""Hooks that change one tensor of a module, for any form of its input and output."""

import pytest
import torch

from workbench.model.forward import change_tensor


@pytest.mark.parametrize("wrap", [tuple, list, dict])
def test_other_inputs_and_outputs_of_a_changed_module_stay(wrap):
    extra = torch.full((3,), 7.0)

    class Block(torch.nn.Module):
        def forward(self, hidden):
            return {"hidden": hidden, "extra": extra} if wrap is dict else wrap((hidden, extra))

    block, hidden = Block(), torch.arange(8.0).reshape(2, 2, 2)
    with change_tensor(block, "out", lambda tensor: tensor + 100):
        output = block(hidden)
    first, rest = output.values() if wrap is dict else output
    assert isinstance(output, wrap)
    assert torch.equal(first, hidden + 100)
    assert rest is extra
    assert torch.equal(hidden, torch.arange(8.0).reshape(2, 2, 2))
    for call in (lambda: block(hidden), lambda: block(hidden=hidden)):
        with change_tensor(block, "in", lambda tensor: tensor + 100):
            output = call()
        assert torch.equal(next(iter(output.values())) if wrap is dict else output[0], hidden + 100)
    assert not block._forward_hooks
    assert not block._forward_pre_hooks
