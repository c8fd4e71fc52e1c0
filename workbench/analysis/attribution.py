"""Effects of patching, estimated from gradients: (clean - corrupt) . gradient, at one run or along the line of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from workbench.analysis.patch_pairs import PairTensors
from workbench.analysis.patching import Plan, Runs, Side, batches, measure
from workbench.model.gradients import capture_gradients, check_gradients
from workbench.model.intervene import intervene
from workbench.model.load import batch_tokens
from workbench.model.row_records import Set
from workbench.sites.grammar import Site

_GRAPH = 4  # divisor of the tokens of a pass whose graph is kept


def end_metric(runs: Runs, part: slice) -> Callable[[Tensor], Float64[Tensor, ""]]:
    """Returns the sum of the metric over some pairs, as a function of the logits of their runs."""

    def metric(logits: Float[Tensor, "batch position vocab"]) -> Float64[Tensor, ""]:
        end = runs.pairs.end[part].to(logits.device)
        rows = logits[torch.arange(len(end), device=logits.device), end].cpu().double()
        return measure(runs.metric, rows, runs.answers[part], runs.clean_logits[part]).sum()

    return metric


def site_gradients(
    runs: Runs,
    base: Side,
    sites: Sequence[Site],
    values: Mapping[str, Float[Tensor, "pair position ..."]] | None = None,
) -> dict[str, Float[Tensor, "pair position ..."]]:
    """Returns the gradient of each pair's metric with respect to the activations of one side's runs.

    The gradient of a pair is its own: no run sees another one. Costs a pass and its backward pass for all sites.

    Args:
        runs: Both runs of every pair.
        base: Side whose runs are repeated.
        sites: Sites to differentiate by.
        values: Activations that sites are set to first, by name of the site. None: those of the run.

    Raises:
        RequestError: The model or a site has no gradients.
    """
    check_gradients(runs.model, sites)
    gradients: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for part in batches(runs.model, runs.pairs, batch_tokens(runs.model) // _GRAPH):
        records = [Set(name, value[part], at="all") for name, value in (values or {}).items()]
        with intervene(runs.model, *records) if records else nullcontext():
            capture_gradients(
                runs.model,
                sites,
                getattr(runs.pairs, base)[part],
                runs.pairs.mask[part],
                end_metric(runs, part),
                receive=lambda _site, _tensor, _first: None,
                receive_gradient=lambda site, tensor, _first: gradients[site.name].append(tensor.cpu().float()),
            )
    return {name: torch.cat(parts) for name, parts in gradients.items()}


@dataclass(frozen=True)
class Attribution:
    """Estimated effect of each activation of some sites, pair by pair, and what the controls need."""

    runs: Runs
    gradients: Mapping[str, Float[Tensor, "pair position ..."]]
    """Gradient at the base run, or its mean along the line to the other one, by name of the site."""

    @classmethod
    def make(cls, runs: Runs, base: Side, sites: Sequence[Site], steps: int) -> Attribution:
        """Computes the gradients.

        Args:
            runs: Both runs of every pair, with the activations of the sites.
            base: Run that is changed.
            sites: Sites.
            steps: 0: the gradient at the base run. n: its mean over n midpoints of the line from the base run's
                activations of a site to the other run's, all positions of one site together.
        """
        if not steps:
            return cls(runs, site_gradients(runs, base, sites))
        gradients = {}
        for site in sites:
            start, end = runs.corrupt_values[site.name], runs.clean_values[site.name]
            if base == "clean":
                start, end = end, start
            total = torch.zeros_like(start, dtype=torch.float32)
            for index in range(steps):
                point = start + (index + 0.5) / steps * (end - start)
                total += site_gradients(runs, base, (site,), {site.name: point})[site.name] / steps
            gradients[site.name] = total
        return cls(runs, gradients)

    def by_position(self, site: Site, plan: Plan | None = None) -> Float64[Tensor, "pair position *head"]:
        """Returns (clean - corrupt) . gradient at each position, and head of a site that has heads.

        Args:
            site: Site.
            plan: Pair and position whose clean and corrupt activations each position gets. None: its own.
        """
        clean, corrupt = self.runs.clean_values[site.name], self.runs.corrupt_values[site.name]
        difference = clean.double() - corrupt.double()
        if plan is not None:
            difference = difference[plan]
        return (difference * self.gradients[site.name].double()).sum(-1)


def at_place(
    values: Float64[Tensor, "pair position *head"], at: Bool[Tensor, "pair position"]
) -> Float64[Tensor, " pair *head"]:
    """Returns the sum over the positions of a place."""
    return torch.where(at.reshape(*at.shape, *[1] * (values.ndim - 2)), values, 0).sum(1)


def some_pairs(runs: Runs, index: Int[np.ndarray, " chosen_pair"]) -> Runs:
    """Returns the runs of some pairs."""
    chosen_pairs = torch.from_numpy(index)
    pairs = PairTensors(
        runs.pairs.clean[chosen_pairs],
        runs.pairs.corrupt[chosen_pairs],
        runs.pairs.mask[chosen_pairs],
        runs.pairs.end[chosen_pairs],
        {name: at[chosen_pairs] for name, at in runs.pairs.places.items()},
    )
    return replace(
        runs,
        pairs=pairs,
        answers=[runs.answers[number] for number in index],
        clean=runs.clean[chosen_pairs],
        corrupt=runs.corrupt[chosen_pairs],
        clean_logits=runs.clean_logits[chosen_pairs],
        clean_values={name: value[chosen_pairs] for name, value in runs.clean_values.items()},
        corrupt_values={name: value[chosen_pairs] for name, value in runs.corrupt_values.items()},
    )


def correlations(
    x: Float64[np.ndarray, " pair *group"], y: Float64[np.ndarray, " pair *group"], resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns Pearson's correlation over pairs and all axes but the second, and the ends of its 95 % interval.

    The interval is a bootstrap over pairs. Values that are NaN, and those that are 0 in both, are left out: there the
    two runs are equal, and nothing is estimated.

    Args:
        x: Values, axes (pair, group, ...).
        y: Values of the same shape.
        resamples: Resamples of pairs.
        seed: Random seed.
    """
    valid = ~(np.isnan(x) | np.isnan(y) | ((x == 0) & (y == 0)))
    x, y = (np.where(valid, values, 0.0).reshape(*values.shape[:2], -1) for values in (x, y))
    valid = valid.reshape(*x.shape).astype(float)
    sums = np.stack([part.sum(-1) for part in (valid, x, y, x * x, y * y, x * y)])  # (sum, pair, group)
    weights = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples)
    mean = _pearson(sums.sum(1))
    if len(x) < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    resampled = _pearson(np.einsum("rp,spg->srg", weights, sums))
    known_groups = ~np.isnan(resampled).all(0)
    low, high = np.nanquantile(np.where(known_groups, resampled, 0.0), (0.025, 0.975), axis=0)
    return mean, np.where(known_groups, low, np.nan), np.where(known_groups, high, np.nan)


def _pearson(sums: Float64[np.ndarray, " sum *group"]) -> Float64[np.ndarray, " *group"]:
    n, x, y, xx, yy, xy = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        vx, vy, cov = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2, xy / n - x * y / n**2
        spread = np.sqrt(np.maximum(vx, 0) * np.maximum(vy, 0))
        return np.where((n > 2) & (spread > 1e-12 * (xx + yy) / n), cov / spread, np.nan)
