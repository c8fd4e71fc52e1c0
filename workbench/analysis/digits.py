"""Last digits of numbers in hidden states: linear read-out, mean features, arithmetic on them (arXiv 2312.09230)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.successor_tasks import Chain

NUMBERS = 50
"""Numbers that are single tokens, which the readings need."""
_READINGS = ("mod10_accuracy", "arithmetic", "shuffled_arithmetic")
_PENALTY, _SPLITS = 0.1, 10


def digit_readings(
    chains: Sequence[Chain],
    tasks: Sequence[str],
    ids: Int[Tensor, " token"],
    x: Float[Tensor, "token d_model"],
    size: float,
    head_logits: Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token target"]],
    seed: int,
) -> tuple[dict[str, Float[np.ndarray, " task"]], int]:
    """Returns readings of the index modulo 10 by a map fitted on numbers, for each task, and the number of numbers.

    `mod10_accuracy` on the members, numbers held out; `arithmetic` with the features of digits, and with those of other
    digits, `shuffled_arithmetic`. All are NaN where fewer than `NUMBERS` numbers are single tokens.

    Args:
        chains: Classes of tokens.
        tasks: Tasks of the classes.
        ids: Sorted token ids, the rows of `x`.
        x: Input of the heads for each token.
        size: Factor of the features that are added and subtracted.
        head_logits: Map from the input of the heads to the logits that one head gives the tokens `ids`.
        seed: Random seed of the splits and of the shuffle.
    """
    values = x.cpu().double().numpy()
    of_task = {task: [chain for chain in chains if chain.task == task] for task in tasks}
    states = {
        task: values[np.searchsorted(ids.numpy(), np.concatenate([chain.ids for chain in part]))]
        for task, part in of_task.items()
    }
    index = {task: np.concatenate([chain.index for chain in part]) for task, part in of_task.items()}
    number_count = len(states.get("numbers", ()))
    if number_count < NUMBERS:
        return {name: np.full(len(tasks), np.nan) for name in _READINGS}, number_count
    numbers, digit = states["numbers"], index["numbers"] % 10
    features = digit_features(numbers, digit)
    steps = {"arithmetic": features, "shuffled_arithmetic": features[np.random.default_rng(seed).permutation(10)]}
    accuracy = [
        held_out_accuracy(numbers, index[task], seed)
        if task == "numbers"
        else (ridge_digits(numbers, digit, states[task]) == index[task] % 10).mean()
        for task in tasks
    ]
    arrays = {
        name: np.array([digit_arithmetic(of_task[task], ids, x, size * step, head_logits) for task in tasks])
        for name, step in steps.items()
    }
    return {"mod10_accuracy": np.array(accuracy), **arrays}, number_count


def strict_argmax(logits: Float[Tensor, "head member output"]) -> Int[np.ndarray, "head member"]:
    """Returns the index of the largest logit, or -1 if it is tied or not a number."""
    top = logits.topk(2, dim=-1)
    return torch.where(top.values[..., 0] > top.values[..., 1], top.indices[..., 0], -1).cpu().numpy()


def ridge_digits(
    x: Float[np.ndarray, "token d_model"], digit: Int[np.ndarray, " token"], query: Float[np.ndarray, "query d_model"]
) -> Int[np.ndarray, " query"]:
    """Returns the digit that a ridge regression from `x` to one-hot digits gives to each row of `query`.

    The penalty is a tenth of the mean squared length of a centred token. Closed form.
    """
    mean = x.mean(0)
    kernel = (x - mean) @ (x - mean).T
    penalty = _PENALTY * np.trace(kernel) / len(x)
    one_hot = np.eye(10)[digit]
    weights = np.linalg.solve(kernel + penalty * np.eye(len(x)), one_hot - one_hot.mean(0))
    return ((query - mean) @ (x - mean).T @ weights + one_hot.mean(0)).argmax(1)


def held_out_accuracy(x: Float[np.ndarray, "token d_model"], index: Int[np.ndarray, " token"], seed: int) -> float:
    """Returns the accuracy of `ridge_digits` on a tenth of the numbers, held out in every spelling; mean of 10 splits.

    Chance is 0.1.
    """
    generator, accuracy = np.random.default_rng(seed), []
    for _ in range(_SPLITS):
        numbers = generator.permutation(np.unique(index))
        test = np.isin(index, numbers[: max(1, len(numbers) // 10)])
        accuracy.append((ridge_digits(x[~test], index[~test] % 10, x[test]) == index[test] % 10).mean())
    return float(np.mean(accuracy))


def digit_features(
    x: Float[np.ndarray, "token d_model"], digit: Int[np.ndarray, " token"]
) -> Float[np.ndarray, "digit d_model"]:
    """Returns the mean of the tokens of each last digit minus the mean over digits.

    A digit without tokens has the mean of all tokens.
    """
    means = np.array([x[digit == i].mean(0) if (digit == i).any() else x.mean(0) for i in range(10)])
    return means - means.mean(0)


def digit_arithmetic(
    chains: Sequence[Chain],
    ids: Int[Tensor, " token"],
    x: Float[Tensor, "token d_model"],
    features: Float[np.ndarray, "digit d_model"],
    head_logits: Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token target"]],
) -> float:
    """Returns how often changing the last digit in a state changes the successor accordingly.

    It is the share of members of last digit i and digits j != i for which x - f_i + f_j makes a member that ends in
    j + 1 the strict maximum of its class; digits j whose successor no member has are left out. NaN without any.

    Args:
        chains: Classes whose members are changed.
        ids: Sorted token ids, the rows of `x`.
        x: What heads read of each token.
        features: f, the feature of each last digit.
        head_logits: Map from what a head reads to the logits it gives the tokens `ids`.
    """
    hits = []
    steps = torch.from_numpy(features).to(x)
    for chain in chains:
        places = torch.from_numpy(np.searchsorted(ids.numpy(), chain.ids))
        member, j = (part.ravel() for part in np.indices((len(chain.ids), 10)))
        i, target_digit = chain.index[member] % 10, (j + 1) % 10
        possible = (i != j) & np.isin(target_digit, chain.index % 10)
        member, j, i, target_digit = (part[possible] for part in (member, j, i, target_digit))
        if not len(member):
            continue
        logits = head_logits(x[places[member]] - steps[i] + steps[j])[:, places]
        top = strict_argmax(logits[None])[0]
        hits.append((top >= 0) & (chain.index[top] % 10 == target_digit))
    return float(np.concatenate(hits).mean()) if hits else float("nan")
