"""An autoencoder under TopK(k): the features that an extraction with the rule makes, in float64 NumPy and on disk."""

import numpy as np
import pytest
import torch
from refusals import refused
from sae_example import save_sae
from safetensors.numpy import load_file

from workbench.io.errors import RequestError
from workbench.sae.encode import encoder
from workbench.sae.load import load_sae
from workbench.sae.ruled import with_sparsity
from workbench.sae.sparsity import MutualChoice, TopK

K = 3


@pytest.mark.parametrize(("architecture", "settings"), [("standard", {}), ("topk", {"k": 8}), ("jumprelu", {})])
def test_its_features_are_the_k_largest_of_a_row(architecture, settings, tmp_path):
    sae = load_sae(save_sae(tmp_path / "sae", architecture, d_in=16, d_sae=40, **settings))
    ruled = with_sparsity(with_sparsity(sae, TopK(9)), TopK(K))  # the last rule alone
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    stored = load_file(tmp_path / "sae/sae_weights.safetensors")
    weights = {name: part.astype(np.float64) for name, part in stored.items()}
    shift = weights["b_dec"] if sae.module.cfg.apply_b_dec_to_input else 0
    pre = (x.double().numpy() - shift) @ weights["W_enc"] + weights["b_enc"]
    expected = np.where(pre >= np.sort(pre, axis=1)[:, -K, None], np.maximum(pre, 0), 0)
    np.testing.assert_allclose(ruled.encode(x), expected, atol=1e-5)
    sparse = encoder(ruled)(x)
    of_rule = encoder(sae, TopK(K))(x)
    assert torch.equal(sparse.feature, of_rule.feature)
    assert torch.equal(sparse.value, of_rule.value)
    assert sparse.feature.tolist() == np.nonzero(expected)[1].tolist()
    x.requires_grad_(True)
    ruled.encode(x, gradients=True)[0].sum().backward()
    np.testing.assert_allclose(x.grad[0], weights["W_enc"] @ (expected[0] > 0), atol=1e-5)


def test_its_name_and_fingerprint_have_the_rule(tmp_path):
    sae = load_sae(save_sae(tmp_path / "sae", "standard", d_in=16, d_sae=40))
    ruled = with_sparsity(sae, TopK(K))
    assert ruled.name == f"sae-topk-{K}"
    assert len({variant.fingerprint() for variant in (sae, ruled, with_sparsity(sae, TopK(4)))}) == 3
    assert ruled.config() == sae.config() | {"allocation": {"choice": "topk", "k": K}}


def test_rules_that_no_row_can_follow_are_refused(tmp_path):
    sae = load_sae(save_sae(tmp_path / "sae", "standard", d_in=16, d_sae=40))
    pursuit = load_sae(save_sae(tmp_path / "pursuit", "matching_pursuit", d_in=16, d_sae=40))
    message = refused(RequestError, lambda: with_sparsity(sae, MutualChoice(3)))
    assert message == "rule is MutualChoice(k=3), expected TopK(k): others rank the rows of a whole store"
    assert "k is 41, but SAE 'sae' has only 40 features" in refused(RequestError, lambda: with_sparsity(sae, TopK(41)))
    assert "has no pre-activations to select from" in refused(RequestError, lambda: with_sparsity(pursuit, TopK(3)))
