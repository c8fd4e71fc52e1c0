"""A model of the same shape with random weights: a finding that both share is not a result of training."""

from __future__ import annotations

from typing import Any

import torch

from workbench.io.torch_state import plain_torch
from workbench.model.in_dtype import in_dtype
from workbench.model.load import Model


@plain_torch()
def random_copy(model: Model, seed: int = 0) -> Model:
    """Returns a model of the same shape and tokenizer with Hugging Face's random weights.

    Takes as much memory as the model. The random state of the process stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = type(model.module)(model.module.config)
    module = in_dtype(module, model.dtype).to(device=model.device)
    return Model(module.eval(), model.tokenizer, f"{model.name}, random weights")
