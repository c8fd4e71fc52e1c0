"""Mean outputs of heads over prompts that show a task, their causal effect, and answers with a vector added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from workbench.analysis.patch_pairs import PairTensors, PatchPair
from workbench.analysis.patching import Runs, batches, end_logits, measure
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.model.cached_prompts import CachedPrompts
from workbench.model.circuits import HeadOutput, check_added, head_outputs
from workbench.model.frozen_output import FrozenOutput
from workbench.model.load import Model, batch_tokens
from workbench.model.row_records import Add, Set
from workbench.sites.grammar import Site

_EXACT, _ROUNDED = 1e-4, 0.05
"""Largest difference of ln P between cached and whole passes, in float32 and in types of 16 bits."""


@dataclass(frozen=True)
class TaskVectors:
    """Mean output of every head at the last token of prompts that show a task."""

    runs: Runs
    """Runs of the prompts, clean, and of those with shuffled examples, corrupt."""
    sites: Mapping[int, Site]
    ends: Mapping[int, Float[Tensor, "pair head d_head"]]
    """Output of every head at the last token of each prompt, by layer."""
    outputs: Mapping[int, HeadOutput]

    @classmethod
    def make(cls, model: Model, pairs: Sequence[PatchPair]) -> TaskVectors:
        """Runs both sides of every pair.

        Raises:
            RequestError: The model has no separate heads, layers with different numbers of them, or layers that add
                more than their heads.
        """
        outputs = head_outputs(model)
        check_added(outputs, model)
        if len({output.heads for output in outputs.values()}) > 1:
            raise RequestError(f"model {model.name!r} has layers with different numbers of heads")
        sites = {layer: model.site_map.select([f"z.{layer}"])[0] for layer in outputs}
        runs = Runs.make(model, pairs, list(sites.values()), "log-probability", False)
        rows = torch.arange(len(pairs))
        ends = {layer: runs.clean_values[site.name][rows, runs.pairs.end] for layer, site in sites.items()}
        return cls(runs, sites, ends, outputs)

    @cached_property
    def means(self) -> Mapping[int, Float[Tensor, "head d_head"]]:
        """Mean output of every head, by layer."""
        return {layer: values.mean(0) for layer, values in self.ends.items()}

    @property
    def layers(self) -> list[int]:
        """Layers with heads."""
        return list(self.sites)

    @property
    def heads(self) -> int:
        """Heads of each layer."""
        return next(iter(self.outputs.values())).heads

    def effects(self) -> Float64[np.ndarray, "pair layer head"]:
        """Returns the change of P(answer) in the corrupt prompts by each head's mean output at the last token.

        The earlier tokens are run once, where the model's cache gives the same answers as whole passes do.
        """
        parts = self._cached()
        effects = np.zeros((len(self.runs.pairs), len(self.layers), self.heads))
        with progress("effects of heads", len(self.layers) * self.heads, "heads") as advance:
            for index, layer in enumerate(self.layers):
                if parts is None:
                    effects[:, index] = self._by_whole_passes(layer, advance)
                else:
                    for rows, prompts in parts:
                        effects[rows, index] = self._by_last_tokens(layer, rows, prompts)
                    advance(self.heads)
        return effects

    def _cached(self) -> list[tuple[list[int], CachedPrompts]] | None:
        """Corrupt prompts by length, in batches; None where the model's cache gives other answers than whole passes."""
        model, pairs = self.runs.model, self.runs.pairs
        exact = model.dtype in (torch.float32, torch.float64)
        parts = []
        for length in sorted({int(end) + 1 for end in pairs.end}):
            rows = torch.nonzero(pairs.end == length - 1)[:, 0].tolist()
            step = max(1, batch_tokens(model) // (length * self.heads))
            for first in range(0, len(rows), step):
                batch = rows[first : first + step]
                prompts = CachedPrompts.make(model, pairs.corrupt[batch, :length])
                if prompts is None:
                    return None
                answers = self._log_probability(prompts.logits(), batch)[:, 0]
                if (answers - self.runs.corrupt[batch]).abs().max() > (_EXACT if exact else _ROUNDED):
                    return None
                parts.append((batch, prompts))
        return parts

    def _by_whole_passes(self, layer: int, advance: Callable[[int], None]) -> Float64[np.ndarray, "pair head"]:
        site, effects = self.sites[layer], []
        donor = self.means[layer].expand(self.runs.corrupt_values[site.name].shape)
        for head in range(self.heads):
            after = self.runs.effect("corrupt", site, self.runs.pairs.places["end"], donor, head)
            effects.append(after.exp() - self.runs.corrupt.exp())
            advance(1)
        return torch.stack(effects, 1).numpy()

    def _by_last_tokens(
        self, layer: int, rows: Sequence[int], prompts: CachedPrompts
    ) -> Float64[np.ndarray, "pair head"]:
        """One copy of each prompt without a change, and one for each head."""
        copies, name = 1 + self.heads, self.sites[layer].name
        copy = torch.arange(copies).repeat(len(rows))[:, None]
        records = [Set(name, self.means[layer][head], at=copy == 1 + head, head=head) for head in range(self.heads)]
        chance = self._log_probability(prompts.logits(copies, records), rows).exp()
        return (chance[:, 1:] - chance[:, :1]).numpy()

    def _log_probability(
        self, logits: Float64[Tensor, "pair copy vocab"], rows: Sequence[int]
    ) -> Float64[Tensor, "pair copy"]:
        answers = [self.runs.answers[row] for row in rows for _ in range(logits.shape[1])]
        flat = logits.flatten(0, 1)
        return measure("log-probability", flat, answers, flat).unflatten(0, logits.shape[:2])

    def vector(self, heads: Sequence[tuple[int, int]]) -> Float[Tensor, " d_model"]:
        """Returns the sum of what some heads add to the stream, mean over the prompts, without projection biases.

        In float32, on the CPU. A norm behind attention keeps the scale that it has in each prompt.
        """
        total = torch.zeros(self.runs.model.d_model, dtype=torch.float64, device="cpu")
        for layer in sorted({layer for layer, _ in heads}):
            layer_heads = [head for at, head in heads if at == layer]
            total += FrozenOutput(self.outputs[layer]).mean_write(self.ends[layer].flatten(1), layer_heads)
        return total.float()


def questions_alone(pairs: Sequence[PatchPair]) -> list[PatchPair]:
    """Returns the questions without the examples before them: the tokens from the label `question` on.

    What the tokenizer puts before a text, such as BOS, stays: the tokens that all prompts begin with on both sides.
    """
    shared = 0
    while (
        all(shared < pair.places["question"][0] for pair in pairs)
        and len({pair.clean[shared] for pair in pairs} | {pair.corrupt[shared] for pair in pairs}) == 1
    ):
        shared += 1
    questions = []
    for pair in pairs:
        ids = (*pair.clean[:shared], *pair.clean[pair.places["question"][0] :])
        questions.append(replace(pair, clean=ids, corrupt=ids, places={"end": (len(ids) - 1,)}))
    return questions


def answers_after(
    model: Model, pairs: Sequence[PatchPair], site: str | None = None, vector: Float[Tensor, " d_model"] | None = None
) -> Float64[np.ndarray, "pair probability_right"]:
    """Returns P(answer) after the clean prompts, and 1 where an answer is the most probable token.

    Args:
        model: The model.
        pairs: The prompts, with their answers.
        site: Site at which a vector is added at the last token. None: the unchanged model.
        vector: The vector.
    """
    tensors = PairTensors.of(pairs, False)
    values = []
    for part in batches(model, tensors):
        end = tensors.places["end"][part]
        records = [] if site is None or vector is None else [Add(site, vector, at=end)]
        log = end_logits(model, tensors.clean, tensors, part, records).log_softmax(-1)
        for row, pair in zip(log, pairs[part], strict=True):
            right = row[list(pair.answer)].logsumexp(0).exp()
            values.append((float(right), float(int(row.argmax()) in pair.answer)))
    return np.array(values)
