"""Statistics over a vocabulary: sums in blocks, and the largest values by groups, against numpy."""

import numpy as np
import pytest
import torch

from workbench.analysis.lens import largest_values, log_normaliser


@pytest.mark.parametrize(("rows", "vocab"), [(5, 7), (3, 1000), (40, 5000)])
def test_the_normaliser_is_that_of_float64(rows, vocab):
    logits = 30 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    exact = logits.double().numpy()
    expected = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    stated = log_normaliser(logits, logits.amax(1, keepdim=True))
    np.testing.assert_allclose(stated.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("vocab", "k"), [(7, 3), (1000, 3), (5003, 10)])
def test_the_largest_are_those_of_a_whole_sort(vocab, k):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(1))
    logits[0, [2, 5]] = 9.0  # two equal ones: the first counts as the largest
    values, columns, first = largest_values(logits, k)
    np.testing.assert_array_equal(values.numpy(), -np.sort(-logits.numpy(), axis=1)[:, :k])
    np.testing.assert_array_equal(logits.gather(1, columns).numpy(), values.numpy())
    np.testing.assert_array_equal(first.numpy(), logits.numpy().argmax(1))
