"""Continuations of prompts by a steered model, and what the plain model thinks of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from workbench.model.direction import Direction
from workbench.model.forward import generating, run
from workbench.model.intervene import intervene
from workbench.model.load import end_tokens
from workbench.model.row_records import Add

if TYPE_CHECKING:
    from workbench.model.load import Model

_PROMPTS = 16  # in one pass


@dataclass(frozen=True)
class Continuations:
    """Continuations of prompts of one length."""

    after_prompt: Float64[Tensor, "prompt vocab"]
    """ln P of the steered model after the prompt; with records at "new" tokens alone, that of the plain model."""
    tokens: Int64[Tensor, "prompt new"]
    """Greedy tokens."""
    losses: Float64[Tensor, "prompt new"]
    """-ln P of each under the model without steering."""


def continue_steered(
    model: Model, ids: Int64[Tensor, "prompt position"], records: Sequence[Add], new_tokens: int
) -> Continuations:
    """Continues prompts greedily under steering; no records: the plain model. The end token is not generated."""
    parts = [_continue_prompts(model, part, records, new_tokens) for part in ids.split(_PROMPTS)]
    return Continuations(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _continue_prompts(
    model: Model, ids: Tensor, records: Sequence[Add], new_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    mask, ends = torch.ones_like(ids), end_tokens(model)
    prompt_records = [record for record in records if record.at != "new"]
    with _steered(model, prompt_records):
        after = run(model.module, ids, mask).logits[:, -1].double().cpu().log_softmax(-1)
    active = records if new_tokens > 1 else prompt_records  # a single new token is no input
    with _steered(model, active), generating(model.module):
        sequences = model.module.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=(ends or [0])[0],
        ).cpu()
    logits = run(model.module, sequences, torch.ones_like(sequences)).logits[:, ids.shape[1] - 1 : -1]
    generated = sequences[:, ids.shape[1] :]
    losses = -logits.double().cpu().log_softmax(-1).gather(2, generated[:, :, None])[:, :, 0]
    return after, generated, losses


def random_direction(direction: Direction, seed: int) -> Direction:
    """Returns a random direction of the same site, shape and L2 norm."""
    generator = torch.Generator("cpu").manual_seed(seed)
    vector = torch.randn(direction.vector.shape, generator=generator, dtype=torch.float64, device="cpu")
    vector = vector * (direction.vector.double().norm() / vector.norm())
    return Direction(direction.site, vector, f"random, norm of {direction.name}", {"seed": seed})


def _steered(model: Model, records: Sequence[Add]) -> AbstractContextManager:
    return intervene(model, *records) if records else nullcontext()
