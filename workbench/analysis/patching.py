"""Activation patching: runs of one side of each pair with activations of the other side, and the change of a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from workbench.analysis.patch_pairs import PairTensors, PatchPair
from workbench.io.errors import RequestError
from workbench.model.capture import capture
from workbench.model.forward import run
from workbench.model.intervene import Intervention, intervene
from workbench.model.load import Model, batch_tokens
from workbench.model.row_records import Set
from workbench.sites.grammar import Site

Metric = Literal["logit-difference", "log-probability", "loss", "kl"]
"""logit-difference: log of the sum of exp of the answers' logits, minus that of the wrong ones (for one of each the
difference of two logits); log-probability: ln of the answers' probability; loss: its decrease, which is the same;
kl: -KL(clean ‖ run). In float64, at the last position."""

METRIC_UNITS = {"logit-difference": "logits", "log-probability": "nats", "loss": "nats", "kl": "nats"}
METRICS = get_args(Metric)
Side = Literal["clean", "corrupt"]

_LOGIT_BYTES = 128 << 20  # float32 logits of one batch

Plan = tuple[Int64[Tensor, "pair position"], Int64[Tensor, "pair position"]]
"""Pair and position whose activations each position gets."""


@dataclass(frozen=True)
class Runs:
    """Both runs of every pair: logits at the end, and activations of the sites that are patched."""

    model: Model
    pairs: PairTensors
    answers: Sequence[PatchPair]
    metric: Metric
    clean: Float64[Tensor, " pair"]
    """Metric of the clean runs."""
    corrupt: Float64[Tensor, " pair"]
    clean_logits: Float64[Tensor, "pair vocab"]
    clean_values: dict[str, Float[Tensor, "pair position ..."]]
    corrupt_values: dict[str, Float[Tensor, "pair position ..."]]

    @classmethod
    def make(
        cls, model: Model, pairs: Sequence[PatchPair], sites: Sequence[Site], metric: Metric, by_index: bool
    ) -> Runs:
        """Runs both sides of every pair and keeps the sites' activations, in the model's type, on the CPU."""
        if metric != "kl" and any(not pair.answer for pair in pairs):
            raise RequestError(f"metric {metric!r} needs the answers of every pair; give metric='kl'")
        if metric == "logit-difference" and any(not pair.wrong for pair in pairs):
            raise RequestError("metric 'logit-difference' needs right and wrong answers of every pair")
        tensors = PairTensors.of(pairs, by_index)
        values, logits = [], []
        for ids in (tensors.clean, tensors.corrupt):
            activations: dict[str, list[Tensor]] = {site.name: [] for site in sites}
            ends = []
            for part in batches(model, tensors):
                capture(
                    model.module,
                    sites,
                    ids[part],
                    tensors.mask[part],
                    lambda site, tensor, _first, activations=activations: activations[site.name].append(
                        tensor.detach().cpu().clone()
                    ),
                )
                ends.append(end_logits(model, ids, tensors, part))
            values.append({name: torch.cat(parts) for name, parts in activations.items()})
            logits.append(torch.cat(ends))
        clean, corrupt = (measure(metric, side_logits, pairs, logits[0]) for side_logits in logits)
        return cls(model, tensors, pairs, metric, clean, corrupt, logits[0], values[0], values[1])

    @property
    def used(self) -> Bool[np.ndarray, " pair"]:
        """Pairs that can be normalised: of both signs for logit differences, of a positive gap for other metrics."""
        clean, corrupt = self.clean.numpy(), self.corrupt.numpy()
        return (clean > 0) & (corrupt < 0) if self.metric == "logit-difference" else clean > corrupt

    @property
    def gap(self) -> Float64[np.ndarray, " pair"]:
        """Metric of the clean minus that of the corrupt run."""
        return (self.clean - self.corrupt).numpy()

    def patched(self, base: Side, records: Callable[[slice], list[Intervention]]) -> Float64[Tensor, " pair"]:
        """Returns the metric of one side's runs under interventions, which are made for each batch."""
        parts = []
        for part in batches(self.model, self.pairs):
            logits = end_logits(self.model, getattr(self.pairs, base), self.pairs, part, records(part))
            parts.append(measure(self.metric, logits, self.answers[part], self.clean_logits[part]))
        return torch.cat(parts)

    def effect(
        self,
        base: Side,
        site: Site,
        at: Bool[Tensor, "pair position"],
        donor: Float[Tensor, "pair position ..."],
        head: int | None = None,
    ) -> Float64[Tensor, " pair"]:
        """Returns the metric of one side's runs with the donor's activations at some positions of a site.

        Where they equal the run's own, the run is not repeated: its logits would be the same bit by bit.
        """
        values = self.clean_values if base == "clean" else self.corrupt_values
        present, donor_rows = values[site.name][at], donor[at]
        if head is not None:
            present, donor_rows = present[:, head], donor_rows[:, head]
        if torch.equal(present, donor_rows):
            return self.clean if base == "clean" else self.corrupt
        axes = (slice(None), slice(None)) if head is None else (slice(None), slice(None), slice(head, head + 1))

        def records(part: slice) -> list[Intervention]:
            if not bool(at[part].any()):
                return []
            return [Set(site.name, donor[part][axes], at=at[part], head=head)]

        return self.patched(base, records)

    def gathered(self, side: Side, site: Site, plan: Plan) -> Float[Tensor, "pair position ..."]:
        """Returns activations of one side at other pairs and positions."""
        values = self.clean_values if side == "clean" else self.corrupt_values
        return values[site.name][plan]


def batches(model: Model, pairs: PairTensors, tokens: int | None = None) -> Iterator[slice]:
    """Yields slices of the pairs whose passes fit `tokens`, by default those of a batch, and 128 MiB of logits."""
    length = pairs.clean.shape[1]
    step = max(1, min(tokens or batch_tokens(model), _LOGIT_BYTES // (4 * model.vocab)) // length)
    return (slice(first, min(first + step, len(pairs))) for first in range(0, len(pairs), step))


def end_logits(
    model: Model,
    ids: Int64[Tensor, "pair position"],
    pairs: PairTensors,
    part: slice,
    records: Sequence[Intervention] = (),
) -> Float64[Tensor, "batch vocab"]:
    """Returns the logits after the last token of some pairs' sequences, under interventions."""
    with intervene(model, *records) if records else nullcontext():
        logits = run(model.module, ids[part], pairs.mask[part]).logits
    end = pairs.end[part].to(logits.device)
    return logits[torch.arange(len(end), device=logits.device), end].detach().cpu().double()


def measure(
    metric: Metric,
    logits: Float64[Tensor, "pair vocab"],
    pairs: Sequence[PatchPair],
    clean: Float64[Tensor, "pair vocab"],
) -> Float64[Tensor, " pair"]:
    """Returns a metric of each pair; see `Metric`."""
    if metric == "kl":
        before, after = clean.log_softmax(-1), logits.log_softmax(-1)
        probability = before.exp()
        return -torch.where(probability > 0, probability * (before - after), 0).sum(-1)
    right = torch.stack([row[list(pair.answer)].logsumexp(0) for row, pair in zip(logits, pairs, strict=True)])
    if metric == "logit-difference":
        wrong = torch.stack([row[list(pair.wrong)].logsumexp(0) for row, pair in zip(logits, pairs, strict=True)])
        return right - wrong
    return right - logits.logsumexp(-1)


# ---- donors of the controls -----------------------------------------------------------------------------


def identity_plan(pairs: PairTensors) -> Plan:
    """Returns the plan in which every position gets its own activations."""
    shape = pairs.clean.shape
    return torch.arange(shape[0])[:, None].expand(shape), torch.arange(shape[1]).expand(shape)


def other_pair(
    pairs: PairTensors, answers: Sequence[PatchPair], at: Bool[Tensor, "pair position"], same_answer: bool, seed: int
) -> tuple[Plan, Bool[np.ndarray, " pair"]]:
    """Returns a plan with the positions of another pair, drawn at random, and the pairs that have such a donor.

    The donor has as many positions at this place. It has the same right answer; or it has no answer in common, neither
    right nor wrong, so that its clean and its corrupt run are equally far from both answers of the pair.
    """
    draw = np.random.default_rng(seed)
    source_pair, source_position = (part.clone() for part in identity_plan(pairs))
    counts, has_donor = at.sum(1).tolist(), np.zeros(len(pairs), bool)
    for number, pair in enumerate(answers):
        fits = [
            index
            for index, candidate in enumerate(answers)
            if index != number
            and counts[index] == counts[number] > 0
            and (bool({*pair.answer} & {*candidate.answer}) if same_answer else _differ(pair, candidate))
            and (not same_answer or pair.clean != candidate.clean)
        ]
        if not fits:
            continue
        donor = int(draw.choice(fits))
        source_pair[number, at[number]] = donor
        source_position[number, at[number]] = at[donor].nonzero()[:, 0]
        has_donor[number] = True
    return (source_pair, source_position), has_donor


def shuffled_positions(pairs: PairTensors, at: Bool[Tensor, "pair position"], seed: int) -> Plan:
    """Returns the plan in which each position of a place gets the activations of one outside of it, not the first.

    Of a place that covers everything, and of prompts without another position, each gets those of the next one.
    """
    draw = np.random.default_rng(seed)
    source_pair, source_position = (part.clone() for part in identity_plan(pairs))
    for number, end in enumerate(pairs.end.tolist()):
        inside = at[number].nonzero()[:, 0].tolist()
        outside = [position for position in range(1, end + 1) if position not in inside]
        for position in inside:
            source = int(draw.choice(outside)) if outside else (position % max(end, 1)) + min(end, 1)
            source_position[number, position] = source
    return source_pair, source_position


def _differ(a: PatchPair, b: PatchPair) -> bool:
    """True if no token is an answer, right or wrong, of both; two of the same prompts never are."""
    return not {*a.answer, *a.wrong} & {*b.answer, *b.wrong} and a.clean != b.clean
