"""Controls that several experiments share."""

from __future__ import annotations

import torch

import workbench as wb


def random_copy(model: wb.Model) -> wb.Model:
    """Returns a model of the same shape and tokenizer with Hugging Face's random weights, seed 0.

    A finding that `model` shares with it is not a result of training.
    """
    torch.manual_seed(0)
    module = type(model.module)(model.module.config)
    module.to(device=model.device, dtype=model.dtype)  # pyright: ignore[reportCallIssue]  # transformers decorates it without types
    return wb.Model(module, model.tokenizer, f"{model.name}, random weights")
