"""Parts of the successor scores: chains, successions in a text, the shuffled null, digits, Wilson's interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.analysis.digits import (
    digit_arithmetic,
    digit_features,
    digit_readings,
    held_out_accuracy,
    ridge_digits,
    strict_argmax,
)
from workbench.analysis.successions import successions
from workbench.analysis.successor_tasks import Pairs, make_chain, shuffled_null
from workbench.results.bootstrap import wilson


def chain_of(ids):
    return make_chain("days", list(enumerate(ids)), len(ids), wrap=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([10, 11], {0: 1}),
        ([10, 5, 11], {1: 1}),
        ([10, 12], {}),  # not the next one
        ([10, 5, 5, 5, 5, 5, 5, 5, 11], {7: 1}),  # 8 back, the row itself counted
        ([10, 5, 5, 5, 5, 5, 5, 5, 5, 11], {}),
        ([10, 12, 11], {}),  # the nearest is what counts
        ([11, 10, 11, 12], {1: 1, 2: 2}),
        ([12, 10], {}),  # the last has none
        ([5, 6], {}),
    ],
)
def test_where_a_successor_follows(text, expected):
    ids = np.array(text)
    following = np.append(ids[1:], -1)
    rows, member = successions(ids, following, np.zeros(len(ids), int), chain_of([10, 11, 12]))
    assert dict(zip(rows.tolist(), member.tolist(), strict=True)) == expected


def test_a_successor_does_not_follow_across_texts():
    ids, following = np.array([10, 5, 11]), np.array([-1, 11, -1])
    rows, _ = successions(ids, following, np.array([0, 1, 1]), chain_of([10, 11]))
    assert rows.tolist() == []


def test_strict_argmax():
    nan = float("nan")
    logits = torch.tensor([[[1.0, 3, 2], [3, 3, 1], [0, 0, 0], [-5, -4, -3], [nan, nan, nan]]])
    assert strict_argmax(logits).tolist() == [[1, -1, -1, 2, -1]]


def test_the_null_keeps_to_its_class():
    """Two classes of 2: a head that is right in both has a shuffle as good in one of four."""
    pairs = Pairs(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([1, 2, 1, 2]), np.repeat(np.eye(2), 2, 0))
    scores = np.array([[[1, 2, 1, 2], [-1, -1, -1, -1]]])
    score, macro, p, family = shuffled_null(scores, pairs, np.array([[1.0, 0.0]]), 1500, 0)
    np.testing.assert_allclose(score[0], [[0.5, 0.5], [0, 0]], atol=0.05)
    np.testing.assert_allclose(macro, [[0.5, 0]], atol=0.03)
    np.testing.assert_allclose(p, [[0.25, 1]], atol=0.03)
    np.testing.assert_allclose(family, [[0.25, 1]], atol=0.03)


def digits(numbers, generator):
    """A feature for each last digit, one for the size, and noise."""
    return np.concatenate(
        [np.eye(10)[numbers % 10], numbers[:, None] / 200, 0.05 * generator.normal(size=(len(numbers), 30))], 1
    )


def test_a_planted_digit_is_read_and_noise_is_not():
    generator = np.random.default_rng(0)
    numbers = np.arange(1, 201)
    x = digits(numbers, generator)
    assert held_out_accuracy(x, numbers, 0) == 1
    assert (ridge_digits(x, numbers % 10, digits(np.arange(1, 8), generator)) == np.arange(1, 8)).all()
    assert held_out_accuracy(generator.normal(size=(200, 40)), numbers, 0) < 0.25


def test_a_number_is_held_out_in_every_spelling():
    """Each spelled twice with the same random vector: one in the other's place would make it look known."""
    numbers = np.arange(1, 101)
    x = np.random.default_rng(0).normal(size=(100, 400))
    assert held_out_accuracy(np.concatenate([x, x]), np.concatenate([numbers, numbers]), 0) < 0.3


def digits_of(chains, x, head_logits, size=1.0):
    tasks = list(dict.fromkeys(chain.task for chain in chains))
    return digit_readings(chains, tasks, torch.arange(len(x)), x, size, head_logits, 0)


def test_modulo_10_of_numbers_and_of_a_task_that_was_not_fitted():
    generator = np.random.default_rng(0)
    numbers = chain_at("numbers", range(1, 101), first=0)
    days = chain_at("days", range(1, 8), first=100)
    x = torch.tensor(digits(np.concatenate([numbers.index, days.index]), generator), dtype=torch.float32)
    arrays, known = digits_of([numbers, days], x, lambda x: torch.zeros(len(x), 107))
    assert (arrays["mod10_accuracy"].tolist(), known) == ([1, 1], 100)
    assert arrays["arithmetic"].tolist() == [0, 0]  # ties are failures


def test_a_digit_is_changed_and_the_successor_with_it():
    """States of tens and last digit, one-hot each: a head that puts the digit one on goes with it, whether or not it
    keeps to its ten; too small a step, or features dealt to other digits, give another digit's successor."""
    index = np.arange(10, 100)
    numbers, ids = chain_at("numbers", index, first=0), torch.arange(90)
    states = torch.cat([torch.eye(11)[index // 10], torch.eye(10)[index % 10]], 1)
    features = digit_features(states.double().numpy(), index % 10)
    digits = torch.eye(10)[index % 10].T
    shifts = torch.eye(10).roll(1, 1)

    def by_digit(x):
        return x[:, 11:] @ shifts @ digits + 0.1 * x[:, :11] @ torch.eye(11)[index // 10].T

    def by_number(x):
        return 9 * (x[:, :11] @ torch.eye(11)[index // 10].T) + x[:, 11:] @ shifts @ digits

    assert digit_arithmetic([numbers], ids, states, features, by_digit) == 1
    assert digit_arithmetic([numbers], ids, states, 0.1 * features, by_digit) == 0
    assert digit_arithmetic([numbers], ids, states, np.roll(features, 1, axis=0), by_digit) == 0
    assert digit_arithmetic([numbers], ids, states, features, by_number) == 1  # within its own ten
    short = chain_at("days", range(1, 4), first=0)  # only 1, 2 and 3 can follow: from 0, 1 and 2
    parts = []
    digit_arithmetic([short], ids, states, features, lambda x: parts.append(len(x)) or by_digit(x))
    assert parts == [2 + 2 + 3]
    assert np.isnan(digit_arithmetic([], ids, states, features, by_digit))


def test_digit_features_are_means():
    x, digit = np.arange(24.0).reshape(8, 3), np.array([0, 1, 2, 3, 4, 5, 6, 6])
    features = digit_features(x, digit)
    means = np.array([x[0], x[1], x[2], x[3], x[4], x[5], x[6:8].mean(0), *[x.mean(0)] * 3])
    np.testing.assert_allclose(features, means - means.mean(0))


def test_the_scale_of_the_arithmetic_counts():
    numbers = chain_at("numbers", range(10, 100), first=0)
    x = torch.cat([torch.eye(11)[numbers.index // 10], torch.eye(10)[numbers.index % 10]], 1)
    digits = torch.eye(10)[numbers.index % 10].T

    def head(x):
        return x[:, 11:] @ torch.eye(10).roll(1, 1) @ digits + 0.1 * x[:, :11] @ torch.eye(11)[numbers.index // 10].T

    whole, part = (digits_of([numbers], x, head, size)[0] for size in (1.0, 0.1))
    assert (whole["arithmetic"][0], part["arithmetic"][0]) == (1, 0)
    assert whole["shuffled_arithmetic"][0] < 0.3


def chain_at(task, indices, first):
    chain = [(int(index) - 1, first + place) for place, index in enumerate(indices)]
    return make_chain(task, chain, len(chain), wrap=False)


def test_a_gap_has_no_successor():
    chain = make_chain("numbers", [(0, 50), (1, 51), (3, 53)], 200, wrap=False)
    assert (chain.source.tolist(), chain.target.tolist(), chain.index.tolist()) == ([0], [1], [1, 2, 4])
    whole = make_chain("days", [(0, 50), (1, 51), (6, 56)], 7, wrap=True)
    assert (whole.source.tolist(), whole.target.tolist()) == ([0, 2], [1, 0])


def test_wilson():
    """Against the interval's definition: where the share is 1.96 standard errors of the bound away."""
    share, number = np.array([0.0, 0.5, 0.9, 1.0]), np.array([6, 10, 30, 25])
    for bound in wilson(share, number):
        inside = (bound > 1e-9) & (bound < 1 - 1e-9)
        error = np.sqrt(bound * (1 - bound) / number)
        np.testing.assert_allclose(abs(share - bound)[inside], 1.96 * error[inside])
