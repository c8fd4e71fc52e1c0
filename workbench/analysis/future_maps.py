"""Maps from one hidden state to the model's output some tokens ahead: ridge regression and softmax regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.future import NO_TARGET
from workbench.analysis.future_task import FutureTask
from workbench.analysis.lens import largest_values, log_normaliser
from workbench.analysis.rows import blocks
from workbench.io.torch_state import device_for_float64, plain_torch
from workbench.model.unembed import Unembed
from workbench.store.reader import ActivationArray

_BATCH = 256
_CHOOSING = 300  # validation rows for the choice of the penalty


@dataclass(frozen=True)
class AffineMap:
    """Logits of states h: (h - mean) * scale @ weight + bias, through the unembedding if there is one."""

    weight: Float[Tensor, "d_model out"]
    bias: Float[Tensor, " out"]
    mean: Float[Tensor, " d_model"] | None = None
    """None: 0."""
    scale: Float[Tensor, " d_model"] | None = None
    """None: 1."""
    unembed: Unembed | None = None
    """None: `out` is the vocabulary. Otherwise it is d_model."""

    def __call__(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        states = states.float()
        states = states if self.mean is None else states - self.mean
        output = (states if self.scale is None else states * self.scale) @ self.weight + self.bias
        return output if self.unembed is None else self.unembed(output)


@dataclass(frozen=True)
class FutureMap:
    """A fitted map with its scores on the validation rows of its horizon."""

    logits: AffineMap
    """Map from states `[row, d_model]` to logits `[row, vocab]`."""
    cross_entropy: float
    """Mean -ln p of the target, in nats."""
    precision: float
    """Share of rows whose top token is the target."""
    choice: float
    """The penalty or the epoch that was chosen."""

    def top_tokens(
        self, site: ActivationArray, rows: Int[np.ndarray, " row"], top_k: int, unembed: Unembed
    ) -> tuple[Int[np.ndarray, "row k"], Float[np.ndarray, "row k"]]:
        """Returns the first k predicted tokens of each row and their probabilities."""
        ids, probability = np.zeros((len(rows), top_k), np.int64), np.zeros((len(rows), top_k), np.float32)
        with torch.inference_mode():
            for block in blocks(len(rows), unembed.vocab):
                scores = self.logits(site[rows[block]].to(unembed.weight.device))
                values, tokens, _ = largest_values(scores, top_k)
                ids[block] = tokens.cpu().numpy()
                probability[block] = (values - log_normaliser(scores, values[:, :1])[:, None]).exp().cpu().numpy()
        return ids, probability


@plain_torch()
def fit_linear(site: ActivationArray, task: FutureTask, horizons: int, penalties: Sequence[float]) -> list[FutureMap]:
    """Returns for each horizon W_U LN_f(g h), g the ridge map to the last block's state at T+N.

    The penalty with the lowest cross-entropy on at most 300 validation rows, spread over all, is chosen. Costs 2 rows
    d_model^2 products in float64 per horizon, an eigendecomposition, and products with W_U: one for each validation
    row, and for each penalty and one of the 300.
    """
    best, device = [], task.unembed.weight.device
    for horizon, gram, cross in _moments(site, task, horizons):
        rows = task.rows.at("validation", horizon)
        few = rows[np.linspace(0, len(rows) - 1, min(len(rows), _CHOOSING)).round().astype(np.int64)]
        candidates = [
            _validate(
                AffineMap(weight.float().to(device), bias.float().to(device), unembed=task.unembed),
                site,
                task,
                horizon,
                penalty,
                few,
            )
            for penalty, (weight, bias) in zip(penalties, ridge_maps(gram, cross, penalties), strict=True)
        ]
        best_map = min(candidates, key=lambda candidate: candidate.cross_entropy)
        whole = len(few) == len(rows)
        best.append(best_map if whole else _validate(best_map.logits, site, task, horizon, best_map.choice, rows))
    return best[::-1]


@plain_torch()
def fit_direct(
    site: ActivationArray, task: FutureTask, horizons: int, *, epochs: int, learning_rate: float, seed: int
) -> list[FutureMap]:
    """Returns for each horizon softmax(A h + b), trained on the model's top token at T+N with AdamW.

    Training starts at the unigram distribution; all horizons share their batches, each keeps its best epoch by
    validation cross-entropy, and the first epoch that improves none is the last.
    """
    device, vocab = task.unembed.weight.device, task.unembed.vocab
    mean, scale = _standardization(site, task.rows.training, device)
    weight = torch.zeros(len(mean), horizons, vocab, device=device, requires_grad=True)
    unigrams = [_log_unigrams(task.model_top[task.rows.at("training", n) + n], vocab) for n in range(horizons)]
    bias = torch.stack(unigrams).to(device).requires_grad_(True)

    def validation_divergence(horizon: int, epoch: int) -> FutureMap:
        matrix, offset = weight[:, horizon].detach().clone(), bias[horizon].detach().clone()
        rows = task.rows.at("validation", horizon)
        return _validate(AffineMap(matrix, offset, mean, scale), site, task, horizon, float(epoch), rows)

    best = [validation_divergence(horizon, 0) for horizon in range(horizons)]
    optimizer = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=0.0)
    steps = max(1, epochs * -(-len(task.rows.training) // _BATCH))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        order = generator.permutation(task.rows.training)
        for batch in map(np.sort, np.split(order, range(_BATCH, len(order), _BATCH))):
            targets = torch.from_numpy(task.rows.targets(batch, task.model_top, horizons)).to(device)
            states = (site[batch].to(device).float() - mean) * scale
            logits = torch.einsum("rd,dhv->rhv", states, weight) + bias
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
            )
            (loss / len(batch)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        latest = [validation_divergence(horizon, epoch) for horizon in range(horizons)]
        improved = [new.cross_entropy < old.cross_entropy for new, old in zip(latest, best, strict=True)]
        best = [new if better else old for new, old, better in zip(latest, best, improved, strict=True)]
        if not any(improved):
            break
    return best


def ridge_maps(
    gram: Float[Tensor, "x x"], cross: Float[Tensor, "x y"], penalties: Sequence[float]
) -> Iterator[tuple[Float[Tensor, "d_model y"], Float[Tensor, " y"]]]:
    """Yields one affine map (weight, bias) per penalty, from sums of x x' and x y' where x ends in a 1.

    Minimises mean |y - x W - b|^2 + penalty v |W|^2, with v the mean variance of a dimension of x and b not penalised.
    Costs one eigendecomposition and one product per penalty.
    """
    rows = gram[-1, -1]
    mean, target = gram[-1, :-1] / rows, cross[-1] / rows
    values, vectors = torch.linalg.eigh(gram[:-1, :-1] / rows - torch.outer(mean, mean))
    rotated = vectors.T @ (cross[:-1] / rows - torch.outer(mean, target))
    # the variance of constant states is 0 or a rounding error
    spread = torch.maximum(values.mean(), 1e-10 * mean.square().mean()) + torch.finfo(torch.float64).tiny
    for penalty in penalties:
        weight = vectors @ (rotated / (values.clamp(min=0) + penalty * spread)[:, None])
        yield weight, target - mean @ weight


def _validate(
    logits: AffineMap,
    site: ActivationArray,
    task: FutureTask,
    horizon: int,
    choice: float,
    rows: Int[np.ndarray, " row"],
) -> FutureMap:
    """A map with its scores on some validation rows."""
    targets = task.model_top[rows + horizon]
    loss = hits = 0.0
    with torch.inference_mode():
        for block in blocks(len(rows), task.unembed.vocab):
            scores = logits(site[rows[block]].to(task.unembed.weight.device))
            target = torch.from_numpy(targets[block]).to(scores.device)
            peak, _, top = largest_values(scores, 1)
            loss += (log_normaliser(scores, peak) - scores.gather(1, target[:, None])[:, 0]).sum().item()
            hits += (top == target).sum().item()
    return FutureMap(logits, loss / len(rows), hits / len(rows), choice)


def _moments(
    site: ActivationArray, task: FutureTask, horizons: int
) -> Iterator[tuple[int, Float[Tensor, "x x"], Float[Tensor, "x y"]]]:
    """For each horizon, the last first, sums over its training rows of x x' and x y'; x: state and 1, y: h_(T+N).

    Every row that reaches one horizon reaches the shorter ones, so that the Gram matrix only grows and is summed once.
    """
    width, device = site.shape[1] + 1, device_for_float64(task.unembed.weight.device)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    for horizon in reversed(range(horizons)):
        rows = task.rows.at("training", horizon)
        cross = torch.zeros(width, task.final.shape[1], dtype=torch.float64, device=device)
        for block in blocks(len(rows), 4 * width):
            states = site[rows[block]].to(device).double()
            x = torch.cat([states, states.new_ones(len(states), 1)], dim=1)
            cross += x.T @ task.final[rows[block] + horizon].to(device).double()
            new = torch.from_numpy(task.rows.reach[rows[block]] == horizon + 1).to(device)
            gram += x[new].T @ x[new]
        yield horizon, gram, cross


def _standardization(
    site: ActivationArray, rows: Int[np.ndarray, " row"], device: torch.device
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Mean, and 1 / standard deviation with a floor for nearly constant dimensions."""
    target, device = device, device_for_float64(device)
    total, squares = (torch.zeros(site.shape[1], dtype=torch.float64, device=device) for _ in range(2))
    for block in blocks(len(rows), 4 * site.shape[1]):
        states = site[rows[block]].to(device).double()
        total, squares = total + states.sum(0), squares + states.square().sum(0)
    mean = total / len(rows)
    variance = (squares / len(rows) - mean.square()).clamp(min=0)
    floor = torch.maximum(1e-4 * variance.mean(), 1e-10 * mean.square().mean())
    return mean.float().to(target), (variance + floor + 1e-30).rsqrt().float().to(target)


def _log_unigrams(tokens: Int[np.ndarray, " row"], vocab: int) -> Float[Tensor, " vocab"]:
    """Log frequencies with half a count added to every token."""
    counts = torch.from_numpy(np.bincount(tokens, minlength=vocab) + 0.5)
    return (counts / counts.sum()).log().float()
