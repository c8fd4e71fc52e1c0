"""A sample of the random autoencoders of tests/torture: equality with SAELens' `encode`."""

import pytest
from random_saes import architectures, check_case, random_case


@pytest.mark.parametrize("seed", range(1000, 1026))
def test_a_random_autoencoder_has_saelens_features(seed, monkeypatch):
    check_case(random_case(seed), monkeypatch)


def test_the_sample_has_every_architecture():
    assert {random_case(seed).architecture for seed in range(1000, 1026)} == set(architectures())
