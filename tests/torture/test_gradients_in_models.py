"""Gradients at every site that modules take or give, in the architectures that interventions are tried in."""

import pytest
from change_oracles import TYPES
from gradient_oracle import check_architecture


@pytest.mark.torture
@pytest.mark.parametrize("kind", TYPES)
def test_gradients_are_those_of_plain_autograd(kind):
    from workbench.experiments.architectures.tiny import tiny_model

    assert check_architecture(tiny_model(kind), kind) >= 6
