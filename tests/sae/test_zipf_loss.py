"""The auxiliary loss for features below Zipf's law, against planted densities and SAELens' aux-k."""

import numpy as np
import pytest
import torch
from refusals import refused
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

from workbench.io.errors import RequestError
from workbench.sae.zipf_loss import WEIGHT, aux_zipf_loss, below_expectation, expected_densities, with_zipf_loss


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.7, 12.0), (1.6, 300.0)])
def test_a_planted_law_and_the_features_below_it_are_found(a, b):
    draw = np.random.default_rng(0)
    law = 0.3 * (1 + b) ** a / (np.arange(1, 401) + b) ** a
    density = law.copy()
    density[350:] = law[350:] / 10  # the rarest fall short of the law, as trained features do
    order = draw.permutation(400)
    np.testing.assert_allclose(expected_densities(density[order]), law[order], rtol=0.05)
    assert np.array_equal(below_expectation(density[order]), (order >= 350))
    assert not below_expectation(law[order]).any()


def test_without_a_law_the_dead_features_are_below_expectation():
    density = np.array([0, 0.2, 0, 0.1, 0, 0])
    assert np.isnan(expected_densities(density)).all()
    assert below_expectation(density).tolist() == [True, False, True, False, True, True]
    mostly_dead = np.append(1 / np.arange(1, 11), np.zeros(90))
    assert below_expectation(mostly_dead).tolist() == [False] * 10 + [True] * 90


def test_the_loss_is_relative_to_the_error():
    error = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert aux_zipf_loss(error, error) == 0
    assert aux_zipf_loss(error, torch.zeros_like(error)) == 1
    assert aux_zipf_loss(7 * error, 7 * (error / 2)) == pytest.approx(0.25)
    assert aux_zipf_loss(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def step(sae, rows):
    return TrainStepInput(
        sae_in=rows, coefficients={}, dead_neuron_mask=sae._below, n_training_steps=0, is_logging_step=False
    )


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("below", [2, 9])
def test_of_dead_features_it_is_saelens_aux_loss_in_relative_units(architecture, below):
    kind, config = get_sae_training_class(architecture)
    torch.manual_seed(0)
    sae = with_zipf_loss(kind)(config(d_in=8, d_sae=24, k=3))
    rows = torch.randn(40, 8)
    sae._below[:below] = True
    activations, hidden = sae.encode_with_hidden_pre(rows)
    output = sae.decode(activations)
    loss = sae.calculate_aux_loss(step(sae, rows), activations, hidden, output)["aux_zipf_loss"]
    saelens_loss = sae.calculate_topk_aux_loss(
        sae_in=rows, sae_out=output, hidden_pre=hidden, dead_neuron_mask=sae._below
    ) / min(below / 4, 1)  # its scale for few dead features
    error = (rows - output).square().sum(1).mean()
    variance = (rows - rows.mean(0)).square().sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float((WEIGHT * variance * saelens_loss / error).detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, sae.W_dec)
    assert gradient[:below].abs().sum() > 0
    assert gradient[below:].abs().sum() == 0  # the error is not trained through


def test_densities_run_along_and_features_below_them_take_part():
    kind, config = get_sae_training_class("topk")
    torch.manual_seed(0)
    sae = with_zipf_loss(kind)(config(d_in=8, d_sae=24, k=3))
    with torch.no_grad():
        sae.b_enc[:5] = -100  # dead
    losses = [sae.training_forward_pass(step(sae, torch.randn(64, 8))).losses["aux_zipf_loss"] for _ in range(11)]
    assert losses[:10] == [0] * 10
    assert losses[10] > 0
    assert sae._below[:5].all()
    assert float(sae._density.sum()) / (1 - 0.99**11) == pytest.approx(3, abs=0.01)
    assert set(sae.state_dict()) == set(kind(config(d_in=8, d_sae=24, k=3)).state_dict())


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "abstopk", "matryoshka_batchtopk"])
def test_other_architectures_are_refused(architecture):
    kind, _ = get_sae_training_class(architecture)
    text = refused(RequestError, lambda: with_zipf_loss(kind))
    assert text.startswith("aux_loss 'zipf' is for topk and batchtopk, not ")
