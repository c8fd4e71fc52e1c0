"""Tests of products of selected pairs of rows and features, and of the largest of a row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.sae.products import input_parts, pair_products, top

FEATURES, ROWS = 300, 50


@pytest.mark.parametrize("d_in", [1, 16, 767, 769, 2304])
def test_pairs_have_the_products_of_float64_in_any_number_of_parts(d_in):
    generator = torch.Generator().manual_seed(d_in)
    weight = torch.randn(d_in, FEATURES, generator=generator)
    x = torch.randn(ROWS, d_in, generator=generator)
    parts = input_parts(weight)
    assert torch.equal(torch.cat(parts, 1), weight.T)
    assert len(parts) == -(-d_in // 768)
    for pairs in (0, 1, 100, 2000):
        key = torch.randint(0, ROWS * FEATURES, (pairs,), generator=generator).unique()
        row, feature = key // FEATURES, key % FEATURES
        products = pair_products(x, parts, row, feature)
        expected = (x.double() @ weight.double())[row, feature]
        size = (x.double().norm(dim=1)[:, None] * weight.double().norm(dim=0))[row, feature]
        assert ((products - expected).abs() <= (d_in + 8) * 2**-24 * size).all()
        if pairs:  # a product does not depend on the other pairs
            alone = pair_products(x[row[-1:]], parts, torch.zeros(1, dtype=torch.int64), feature[-1:])
            assert alone[0] == products[-1]


@given(
    rows=st.sampled_from([1, 2, 5, 130]),
    features=st.integers(1, 900),
    share=st.floats(0, 1),
    few=st.booleans(),
    seed=st.integers(0),
)
@settings(max_examples=50, deadline=None)
def test_the_largest_are_numpys(rows, features, share, few, seed):
    """Few values: ties everywhere, also among groups."""
    random = np.random.default_rng(seed)
    k = 1 + int(share * min(features - 1, 60))
    pre = random.integers(0, 3, (rows, features)) if few else random.normal(size=(rows, features))
    pre = torch.from_numpy(pre.astype(np.float32))
    value, place = top(pre, k)
    assert np.array_equal(np.sort(value, 1), np.sort(pre, 1)[:, features - k :])
    assert torch.equal(pre.gather(1, place), value)
    assert all(len(set(line.tolist())) == k for line in place)
