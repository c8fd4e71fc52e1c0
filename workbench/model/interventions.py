"""Interventions: forward passes with rows of a site, or the first token embeddings, replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.io.errors import DataError, RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.forward import change_tensor, fixed_shape, run
from workbench.model.load import Model
from workbench.sites.grammar import Site


@contextmanager
def splice(
    module: nn.Module,
    site: Site,
    mask: Bool[Tensor, "batch position"],
    replace: Callable[[Float[Tensor, "row ..."]], Float[Tensor, "row ..."]],
) -> Iterator[None]:
    """Replaces rows of a site in forward passes inside the block; the later layers see the replacement.

    The hook is removed afterwards, also after an exception.

    Args:
        module: A Hugging Face causal LM.
        site: A site that is the only input or output of a module: resid_pre, resid_post, attn_out, mlp_out.
        mask: True at the rows to replace, of the shape of the batch.
        replace: Returns new rows for the site's rows.

    Raises:
        RequestError: A site that is read in several places, or inside of attention.
        DataError: No forward pass reached the site.
    """
    if site.of or site.tap.part not in ("in", "out") or site.name.endswith("hook_resid_mid"):
        raise RequestError(
            f"site {site.short or site.name} cannot be replaced: it is read in several places, or inside of attention; "
            "resid_pre, resid_post, attn_out and mlp_out can"
        )
    calls = 0

    def change(tensor: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        rows = tensor.reshape(mask.numel(), *fixed_shape(site)).clone()
        chosen = mask.flatten().to(rows.device)
        rows[chosen] = replace(rows[chosen]).to(rows)
        return rows.reshape(tensor.shape)

    with change_tensor(module.get_submodule(site.tap.path), site.tap.part, change):
        yield
    if not calls:
        raise DataError(f"site {site.short or site.name} did not come up in the forward pass: nothing was replaced")


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
        site: A site that `splice` can replace.
        prompt: Token embeddings, of the model's table or trained ones.
        states: Activations of the site, each in a sequence of its own.
        fed: Ids of the tokens that follow the prompt.
        gradients: Keep the gradient of `prompt`.

    Returns:
        Logits in float32 at the prompt's last position and at each fed token: answer n follows n fed tokens.

    Raises:
        RequestError: A site that cannot be replaced.
    """
    length = len(prompt)
    ids = torch.cat([torch.zeros(len(fed), length, dtype=fed.dtype), fed.cpu()], dim=1)
    last = torch.zeros(ids.shape, dtype=torch.bool)
    last[:, length - 1] = True

    def embedded(original: Tensor) -> Tensor:
        prompts = prompt.to(original).expand(len(original), -1, -1)
        return torch.cat([prompts, original[:, length:]], dim=1)

    with (
        change_tensor(model.module.get_input_embeddings(), "out", embedded),
        splice(model.module, site, last, lambda _rows: states),
    ):
        logits = run(model.module, ids, torch.ones_like(ids), gradients=gradients).logits
    return logits[:, length - 1 :].float()


@plain_torch()
@torch.no_grad()
def token_embeddings(model: Model, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_embed"]:
    """Returns rows of the model's embedding table, scaled if its module scales them, as `run_prompted` takes them."""
    return model.module.get_input_embeddings()(ids.to(model.device)).clone()
