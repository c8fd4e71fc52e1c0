"""Runs a model on with something of it replaced: rows of a site, or the embeddings of the first tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.io.errors import DataError, RequestError
from workbench.model.forward import change_tensor, run
from workbench.model.load import Model
from workbench.sites.grammar import Site


@contextmanager
def splice(
    module: nn.Module,
    site: Site,
    mask: Bool[Tensor, "batch position"],
    replace: Callable[[Float[Tensor, "row ..."]], Float[Tensor, "row ..."]],
) -> Iterator[None]:
    """Inside, the site's rows where `mask` is true are what `replace` makes of them; the model runs on with those.

    For forward passes over a batch of the mask's shape. The hook is gone afterwards, exceptions included.

    Raises RequestError for a site that is not the one way into or out of a module, DataError where the block is left
    and the site was not seen.
    """
    if site.of or site.tap.part not in ("in", "out") or site.name.endswith("hook_resid_mid"):
        raise RequestError(
            f"site {site.short or site.name} cannot be replaced: it is read in several places, or inside of attention; "
            "resid_pre, resid_post, attn_out and mlp_out can"
        )
    seen = 0

    def change(tensor: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        rows = tensor.reshape(mask.numel(), *site.shape).clone()
        chosen = mask.flatten().to(rows.device)
        rows[chosen] = replace(rows[chosen]).to(rows)
        return rows.reshape(tensor.shape)

    with change_tensor(module.get_submodule(site.tap.path), site.tap.part, change):
        yield
    if not seen:
        raise DataError(f"site {site.short or site.name} did not come up in the forward pass: nothing was replaced")


def run_prompted(
    model: Model,
    site: Site,
    prompt: Float[Tensor, "prompt d_embed"],
    states: Float[Tensor, "row d_model"],
    fed: Int[Tensor, "row fed"],
    *,
    gradients: bool = False,
) -> Float[Tensor, "row answer vocab"]:
    """What the model says after `prompt` when the site's row at the prompt's last position is each of `states`.

    `prompt`: token embeddings as the model's own table gives them, or any others. `fed`: token ids that follow the
    prompt, unchanged. Logits in float32 of the prompt's last position and of each fed token: answer n has seen n fed
    tokens. With `gradients` they carry the gradient of `prompt`. Costs one pass over row x (prompt + fed) tokens.

    Raises RequestError for a site that cannot be replaced.
    """
    length = len(prompt)
    ids = torch.cat([torch.zeros(len(fed), length, dtype=fed.dtype), fed.cpu()], dim=1)
    last = torch.zeros(ids.shape, dtype=torch.bool)
    last[:, length - 1] = True

    def embedded(original: Tensor) -> Tensor:
        own = prompt.to(original).expand(len(original), -1, -1)
        return torch.cat([own, original[:, length:]], dim=1)

    with (
        change_tensor(model.module.get_input_embeddings(), "out", embedded),
        splice(model.module, site, last, lambda _rows: states),
    ):
        logits = run(model.module, ids, torch.ones_like(ids), gradients=gradients).logits
    return logits[:, length - 1 :].float()


@torch.no_grad()
def token_embeddings(model: Model, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_embed"]:
    """The rows of the model's embedding table, scaled where its module scales them, as `run_prompted` takes them."""
    return model.module.get_input_embeddings()(ids.to(model.device)).clone()
