"""Runs whose prompt contains a state of another text, or trained token embeddings."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.io.torch_state import plain_torch
from workbench.model.embedding_records import EmbedTokens
from workbench.model.forward import run
from workbench.model.intervene import intervene
from workbench.model.load import Model
from workbench.model.row_records import Set
from workbench.sites.grammar import Site


@plain_torch()
def run_prompted(
    model: Model,
    site: Site,
    prompt: Float[Tensor, "prompt d_embed"],
    states: Float[Tensor, "row d_model"],
    fed: Int[Tensor, "row fed"],
    *,
    gradients: bool = False,
) -> Float[Tensor, "row answer vocab"]:
    """Returns the model's logits after `prompt`, with the activation at the prompt's last position replaced.

    Costs one pass over row x (prompt + fed) tokens.

    Args:
        model: The model.
        site: A site that `Set` can change.
        prompt: Token embeddings, of the model's table or trained ones.
        states: Activations of the site, each in a sequence of its own.
        fed: Ids of the tokens that follow the prompt.
        gradients: Keep the gradient of `prompt`.

    Returns:
        Logits in float32 at the prompt's last position and at each fed token: answer n follows n fed tokens.

    Raises:
        RequestError: A site that cannot be changed.
    """
    length = len(prompt)
    ids = torch.cat([torch.zeros(len(fed), length, dtype=fed.dtype), fed.cpu()], dim=1)
    records = EmbedTokens(slice(0, length), vectors=prompt), Set(site.name, states, at=length - 1)
    with intervene(model, *records):
        logits = run(model.module, ids, torch.ones_like(ids), gradients=gradients).logits
    return logits[:, length - 1 :].float()
