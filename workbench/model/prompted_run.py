"""Runs whose prompt contains a state of another text, or trained token embeddings."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.io.torch_state import plain_torch
from workbench.model.embedding_records import EmbedTokens
from workbench.model.forward import run
from workbench.model.intervene import intervene
from workbench.model.kept_keys import keys_and_values
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

    Costs one pass over prompt + row x (1 + fed) tokens; over row x (prompt + fed) where the model's cache does not give
    the logits of whole passes.

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
    logits, _ = _run(model, site, prompt, states, fed, gradients=gradients)
    return logits


@plain_torch()
def continue_prompted(
    model: Model,
    site: Site,
    prompt: Float[Tensor, "prompt d_embed"],
    states: Float[Tensor, "row d_model"],
    k: int,
    steps: int,
) -> Int[Tensor, "row step k"]:
    """Returns the model's top k tokens after `prompt` with a state in it, then after each of its own top tokens.

    Costs one pass over prompt + row x steps tokens; over row x (prompt + step) at each step where the model's cache
    does not give the logits of whole passes. For the other arguments see `run_prompted`.

    Args:
        k: Tokens of each prediction.
        steps: Predictions for each row.
    """
    own, top = torch.zeros(len(states), 0, dtype=torch.long), []
    cache: Any = None
    for step in range(steps):
        if cache is None:
            logits, cache = _run(model, site, prompt, states, own)
        else:
            seen = torch.ones(len(states), len(prompt) + step, dtype=torch.long)
            logits = run(model.module, own[:, -1:], seen, cache=cache).logits.float()
        top.append(logits[:, -1].topk(k, dim=-1).indices.cpu())
        own = torch.cat([own, top[-1][:, :1]], dim=1)
    return torch.stack(top, 1)


def _run(
    model: Model,
    site: Site,
    prompt: Float[Tensor, "prompt d_embed"],
    states: Float[Tensor, "row d_model"],
    fed: Int[Tensor, "row fed"],
    gradients: bool = False,
) -> tuple[Float[Tensor, "row answer vocab"], Any]:
    """What `run_prompted` returns, and the cache that the next tokens continue; None where none gives whole passes."""
    last, behind = len(prompt) - 1, 0
    cache: Any = model.continues_from_cache
    if cache and last:
        behind, cache = last, _kept(model, prompt[:last], len(fed), gradients)
    ids = torch.cat([torch.zeros(len(fed), 1 + last - behind, dtype=fed.dtype), fed.cpu()], dim=1)
    of_prompt, replaced = torch.zeros(2, *ids.shape, dtype=torch.bool)
    of_prompt[:, : 1 + last - behind] = replaced[:, last - behind] = True
    records = EmbedTokens(of_prompt, vectors=prompt), Set(site.name, states, at=replaced)
    with intervene(model, *records):
        seen = torch.ones(len(fed), behind + ids.shape[1], dtype=torch.long)
        output = run(model.module, ids, seen, gradients=gradients, cache=cache)
    return output.logits[:, last - behind :].float(), output.past_key_values if model.continues_from_cache else None


def _kept(model: Model, prompt: Float[Tensor, "prompt d_embed"], rows: int, gradients: bool) -> Any:
    """Keys and values of a prompt's earlier tokens, which no row changes, for each row."""
    ids = torch.zeros(1, len(prompt), dtype=torch.long)
    with intervene(model, EmbedTokens(slice(0, len(prompt)), vectors=prompt)):
        cache: Any = keys_and_values(model.module, ids, gradients=gradients)
    with nullcontext() if gradients else torch.inference_mode():
        cache.batch_repeat_interleave(rows)
    return cache
