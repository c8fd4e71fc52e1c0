"""Controls that several experiments put beside a model."""

from __future__ import annotations

import torch

import workbench as wb


def random_copy(model: wb.Model) -> wb.Model:
    """A model of the same shape and tokenizer with Hugging Face's random weights, seed 0: what it shows as well as
    `model`, training did not make."""
    torch.manual_seed(0)
    module = type(model.module)(model.module.config).to(device=model.device, dtype=model.dtype)
    return wb.Model(module, model.tokenizer, f"{model.name}, random weights")
