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
from workbench.model.forward import run, trial_ids
from workbench.model.intervene import Intervention, intervene
from workbench.model.load import Model
from workbench.model.passes import unseen_pass

_KEPT = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of transformers' caches that hold keys and values alone, and can be copied for several runs."""
_BEFORE, _BEHIND = 6, 3  # tokens of the trial
_EXACT, _ROUNDED = 1e-4, 0.05
"""Part of the logits that rounding may change, in float32 and in types of 16 bits."""


def keys_and_values(model: Model, ids: Int64[Tensor, "prompt position"], *, gradients: bool = False) -> Any | None:
    """Runs tokens and returns transformers' cache of their keys and values; None for a model that keeps something else.

    Args:
        model: The model.
        ids: Tokens without padding.
        gradients: Keep the gradients of what the tokens' embeddings were made of.
    """
    output = run(model.module, ids, torch.ones_like(ids), cache=True, gradients=gradients)
    cache = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", ())
    return cache if layers and all(type(layer).__name__ in _KEPT for layer in layers) else None


@plain_torch()
def continues_from_cache(model: Model) -> bool:
    """Returns True if several tokens behind keys and values that were kept get the logits of a whole pass.

    Costs three passes over 6, 2 x 3 and 2 x 9 tokens, which interventions on the model do not see.
    """
    ids = trial_ids(model.module, 2, _BEFORE + _BEHIND, seed=1)
    ids[:, :_BEFORE] = ids[0, :_BEFORE]
    with unseen_pass(model.module), torch.inference_mode():
        cache = keys_and_values(model, ids[:1, :_BEFORE])
        if cache is None:
            return False
        cache.batch_repeat_interleave(2)
        behind = run(model.module, ids[:, _BEFORE:], torch.ones_like(ids), cache=cache).logits.double()
        whole = run(model.module, ids, torch.ones_like(ids)).logits[:, _BEFORE:].double()
    exact = model.dtype in (torch.float32, torch.float64) and not getattr(model.module, "is_quantized", False)
    size = (whole - whole.mean(-1, keepdim=True)).norm()
    return bool((behind - whole).norm() <= (_EXACT if exact else _ROUNDED) * size)


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
        cache = keys_and_values(model, before) if before.shape[1] else None
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
