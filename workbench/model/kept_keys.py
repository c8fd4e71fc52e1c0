"""Keys and values of tokens that are run once, and whether a model's later tokens continue from them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from workbench.io.torch_state import plain_torch
from workbench.model.forward import run, trial_ids
from workbench.model.passes import unseen_pass
from workbench.model.rounding import differ_by_rounding

_KEPT = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of transformers' caches that hold keys and values alone, and can be copied for several runs."""
_BEFORE, _BEHIND = 6, 3  # tokens of the trial
_ROUNDED = 1e-4
"""Part of the logits that rounding may change in float32."""


def keys_and_values(module: nn.Module, ids: Int64[Tensor, "prompt position"], *, gradients: bool = False) -> Any | None:
    """Runs tokens and returns transformers' cache of their keys and values; None for a model that keeps something else.

    Args:
        module: A Hugging Face causal LM.
        ids: Tokens without padding.
        gradients: Keep the gradients of what the tokens' embeddings were made of.
    """
    output = run(module, ids, torch.ones_like(ids), cache=True, gradients=gradients)
    cache = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", ())
    return cache if layers and all(type(layer).__name__ in _KEPT for layer in layers) else None


@plain_torch()
def continues_from_cache(module: nn.Module) -> bool:
    """Returns True if several tokens behind keys and values that were kept get the logits of a whole pass.

    Costs three passes over 6, 2 x 3 and 2 x 9 tokens, which interventions on the model do not see.
    """
    ids = trial_ids(module, 2, _BEFORE + _BEHIND, seed=1)
    ids[:, :_BEFORE] = ids[0, :_BEFORE]
    with unseen_pass(module), torch.inference_mode():
        cache = keys_and_values(module, ids[:1, :_BEFORE])
        if cache is None:
            return False
        cache.batch_repeat_interleave(2)
        behind = run(module, ids[:, _BEFORE:], torch.ones_like(ids), cache=cache).logits
        whole = run(module, ids, torch.ones_like(ids)).logits[:, _BEFORE:]
    return differ_by_rounding(module, behind, whole, _ROUNDED)
