"""Trial of generation in a batch, where shorter prompts have padding before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.io.torch_state import plain_torch
from workbench.model.forward import generating, input_device, trial_ids
from workbench.model.passes import unseen_pass
from workbench.model.rounding import differ_by_rounding

_LENGTHS, _NEW = (6, 9), 2
_ROUNDED = 1e-3
"""Part of the logits that rounding may change in float32."""


@plain_torch()
def generates_in_batches(module: nn.Module) -> bool:
    """Returns True if a model generates in a padded batch what it generates from each prompt alone.

    False where its state takes in padding (RecurrentGemma), or mixes sequences (RWKV of transformers 5.23).
    Interventions on the model do not see the trial. Costs prompts of 6 and 9 tokens, alone and together, and two tokens
    after each.
    """
    prompts = [trial_ids(module, 1, length, seed=length)[0] for length in _LENGTHS]
    with unseen_pass(module):
        single_logits = torch.cat([_logits(module, [prompt]) for prompt in prompts], 1)
        batch_logits = _logits(module, prompts)
    return differ_by_rounding(module, batch_logits, single_logits, _ROUNDED)


def _logits(module: nn.Module, prompts: Sequence[Tensor]) -> Float[Tensor, "step prompt vocab"]:
    """Logits of the new tokens."""
    from transformers import GenerationConfig  # seconds

    longest = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([nn.functional.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=_NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    model: Any = module
    with generating(module):
        output = model.generate(
            input_ids=ids.to(input_device(module)),
            attention_mask=mask.to(input_device(module)),
            generation_config=config,
        )
    return torch.stack(output.logits).cpu()
