"""Equality with SAELens' `encode` for 500 random autoencoders of every architecture, each with a seed of its own."""

import pytest
from random_saes import architectures, check_case, random_case

pytestmark = pytest.mark.torture


@pytest.mark.parametrize("part", range(20))
def test_random_autoencoders_have_saelens_features(part, monkeypatch):
    assert {random_case(seed).architecture for seed in range(part * 25, part * 25 + 25)} == set(architectures())
    for seed in range(part * 25, part * 25 + 25):
        check_case(random_case(seed), monkeypatch)
