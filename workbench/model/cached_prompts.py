"""Prompts whose earlier tokens are run once: changes at the last token then cost one token each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from workbench.io.torch_state import plain_torch
from workbench.model.forward import run
from workbench.model.intervene import Intervention, intervene
from workbench.model.kept_keys import keys_and_values
from workbench.model.load import Model


@dataclass(frozen=True)
class CachedPrompts:
    """Prompts of one length, with the keys and values of all their tokens but the last."""

    model: Model
    ids: Int64[Tensor, "prompt position"]
    cache: Any
    """Cache of transformers, which is never changed."""

    @classmethod
    @plain_torch()
    def make(cls, model: Model, ids: Int64[Tensor, "prompt position"]) -> CachedPrompts | None:
        """Runs all tokens but the last; None for a model that keeps something else than keys and values.

        Args:
            model: The model.
            ids: Prompts without padding.
        """
        before = ids[:, :-1]
        cache = keys_and_values(model.module, before) if before.shape[1] else None
        return None if cache is None else cls(model, ids, cache)

    @plain_torch()
    def logits(self, copies: int = 1, records: Sequence[Intervention] = ()) -> Float64[Tensor, "prompt copy vocab"]:
        """Returns the logits after the last token, under interventions on that token alone.

        Args:
            copies: Runs of each prompt, in one pass.
            records: Interventions; a mask of theirs has the axes (prompt and copy, 1).
        """
        with torch.inference_mode():
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(copies)
        ids = self.ids.repeat_interleave(copies, 0)
        with intervene(self.model, *records) if records else nullcontext():
            logits = run(self.model.module, ids[:, -1:], torch.ones_like(ids), cache=cache).logits
        return logits[:, -1].detach().cpu().double().unflatten(0, (len(self.ids), copies))
