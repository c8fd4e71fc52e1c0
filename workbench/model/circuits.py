"""The OV circuit from weights: the output of a head that attends to one token only, and its effect on the logits.

No weight matrices are multiplied by hand. The model's own blocks run over sequences of one token with a replaced
residual stream: a position can attend only to itself, so the input of the output projection is W_V of the stream, for
every architecture (grouped or fused values, biases, norms). The output of a head is its part of that input, through the
projection's weights without bias.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.capture import capture
from workbench.model.forward import change_tensor, fixed_shape, hook_tensor, run, the_tensor, trial_ids
from workbench.model.load import Model
from workbench.model.offload import real_copy, running_device
from workbench.model.unembed import Unembed, centred, fit_norm
from workbench.sites.grammar import Site

FirstMlp = Literal["residual", "mlp", "none"]

_TOKENS = 64  # in one pass, which also computes logits over the vocabulary


@dataclass(frozen=True)
class HeadOutput:
    """Output of the heads of one layer: the projection, and the norm after it if there is one."""

    heads: int
    d_head: int
    project: nn.Module
    norm: nn.Module | None
    factor: float | None = 1.0
    """Number by which the block multiplies it before it adds it to the stream; None: it adds something else, too."""

    @property
    def last(self) -> nn.Module:
        """Module whose output is added to the stream."""
        return self.project if self.norm is None else self.norm

    @plain_torch()
    def weights(self) -> Float[Tensor, "head d_head d_model"]:
        """Returns W_O of each head in float32, without the bias, read by projecting unit vectors."""
        device = running_device(self.project)
        project = real_copy(self.project).float()  # in half precision a large bias would hide a weight
        units = torch.eye(self.heads * self.d_head, device=device)[:, None]
        with torch.inference_mode():
            difference = the_tensor(project(units))[:, 0] - the_tensor(project(torch.zeros_like(units[:1])))[:, 0]
        return difference.reshape(self.heads, self.d_head, -1)

    @plain_torch()
    def directions(self) -> Float[Tensor, "head d_head d_model"]:
        """Returns the direction in which each input of the projection changes the stream, in float32, without biases.

        It is W_O times the block's factor. With a norm behind the projection it is known up to the scale that the norm
        has at a token: times the norm's gain, centred for a LayerNorm.
        """
        directions = (self.factor or 1.0) * self.weights()
        if self.norm is None:
            return directions
        kind, _eps, gain, _shift = fit_norm(self.norm, directions.shape[-1], "behind the output of a block's part")
        directions = centred(directions, kind)
        return directions * gain.to(directions)

    @plain_torch()
    def bias(self) -> Float[Tensor, " d_model"]:
        """Returns the projection's bias in float32; 0 where it has none."""
        project = real_copy(self.project).float()
        zeros = torch.zeros(1, 1, self.heads * self.d_head, device=running_device(self.project))
        with torch.inference_mode():
            return the_tensor(project(zeros))[0, 0].clone()


def head_outputs(model: Model) -> Mapping[int, HeadOutput]:
    """Returns the output of each layer with attention heads, by layer; layers without (state spaces) are left out.

    Raises:
        RequestError: No layer has the sites that this needs.
    """
    sites = model.site_map
    outputs = {}
    for layer in range(sites.n_layers):
        z, o, added = (
            _site(model, f"blocks.{layer}.{name}") for name in ("attn.hook_z", "attn.o.hook_out", "hook_attn_out")
        )
        if z is None or o is None or len(z.shape) != 2:
            continue
        norm = None
        if added is not None and not f"{o.tap.path}.".startswith(f"{added.tap.path}."):
            norm = model.module.get_submodule(added.tap.path)
        heads, d_head = fixed_shape(z)
        factor = _factor(model, f"blocks.{layer}.hook_attn_out")
        outputs[layer] = HeadOutput(heads, d_head, model.module.get_submodule(o.tap.path), norm, factor)
    if not outputs:
        raise RequestError(
            f"model {model.name!r} ({model.architecture}) has no layer with separate attention heads; "
            "this needs an architecture with the site z"
        )
    return outputs


def mlp_outputs(model: Model) -> Mapping[int, HeadOutput]:
    """Returns the output of each layer's neurons, by layer, as one head of d_mlp; layers without mlp_post are left out.

    Raises:
        RequestError: No layer has the sites that this needs.
    """
    outputs = {}
    for layer in range(model.site_map.n_layers):
        post, out, added = (
            _site(model, f"blocks.{layer}.{name}") for name in ("mlp.hook_post", "mlp.out.hook_out", "hook_mlp_out")
        )
        if post is None or out is None or len(post.shape) != 1:
            continue
        norm = None
        if added is not None and not f"{out.tap.path}.".startswith(f"{added.tap.path}."):
            norm = model.module.get_submodule(added.tap.path)
        factor = _factor(model, f"blocks.{layer}.hook_mlp_out")
        outputs[layer] = HeadOutput(1, fixed_shape(post)[0], model.module.get_submodule(out.tap.path), norm, factor)
    if not outputs:
        raise RequestError(
            f"model {model.name!r} ({model.architecture}) has no layer with one set of neurons; "
            "this needs an architecture with the site mlp_post"
        )
    return outputs


def check_added(outputs: Mapping[int, HeadOutput], model: Model) -> None:
    """Refuses layers that add more to the stream than these outputs.

    Raises:
        RequestError: There is one, such as those of Falcon-H1, where attention and a state space are added at once.
    """
    for layer, output in outputs.items():
        if output.factor is None:
            raise RequestError(
                f"layer {layer} of {model.architecture} adds more to the residual stream than the output of its heads, "
                "so what they add is not known; patch z, or change it by wb.intervene"
            )


def check_heads_alone(model: Model) -> None:
    """Refuses a model in which something besides heads moves values between tokens, as a state space does.

    Raises:
        RequestError: A layer has no separate heads, or adds more than their output.
    """
    for layer in range(model.site_map.n_layers):
        heads = _site(model, f"blocks.{layer}.attn.hook_z")
        if heads is None or _factor(model, f"blocks.{layer}.hook_attn_out") is None:
            raise RequestError(
                f"layer {layer} of {model.architecture} moves values between tokens by more than attention heads, so "
                "they are not all that is held; use activation-patching"
            )


def _factor(model: Model, added: str) -> float | None:
    return 1.0 if _site(model, added) is not None else model.site_map.factors.get(added)


@plain_torch()
@torch.inference_mode()
def embedding(model: Model, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """Returns W_E of each token as it enters block 0, in float32: scaled as the model does, without its position.

    The scale is measured on the stream. Costs one pass up to block 0.

    Raises:
        RequestError: The stream is not the embedding times a number, plus a term that is the same for all tokens.
    """
    embed, stream = _site(model, "hook_embed"), _site(model, "blocks.0.hook_resid_pre")
    if embed is None or stream is None or embed.shape != stream.shape or len(stream.shape) != 1:
        raise RequestError(f"model {model.name!r} ({model.architecture}): its token embedding is not its first stream")
    trial_tokens = trial_ids(model.module, 1, 32, seed=2)[0]
    ids_to_run = torch.cat([ids.cpu(), trial_tokens])[:, None]
    activations = {}
    capture(
        model.module,
        (embed, stream),
        ids_to_run,
        torch.ones_like(ids_to_run),
        lambda site, tensor, _first: activations.update({site.name: tensor[:, 0].float()}),
    )
    embedded, entered = activations[embed.name], activations[stream.name].to(activations[embed.name].device)
    embeddings, streams = (part.double() - part.double().mean(0) for part in (embedded.cpu(), entered.cpu()))
    scale = ((embeddings * streams).sum() / embeddings.square().sum()).item()
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.03
    if not (streams - scale * embeddings).norm() <= tolerance * streams.norm():
        raise RequestError(
            f"model {model.name!r} ({model.architecture}): its first stream is more than scaled embedding and position"
        )
    return (1.0 if abs(scale - 1) < tolerance else scale) * embedded[: len(ids)]


@plain_torch()
@torch.inference_mode()
def first_mlp(model: Model, ids: Int[Tensor, " token"], form: FirstMlp = "residual") -> Float[Tensor, "token d_model"]:
    """Returns the embedding of each token after the first MLP, without the attention of block 0, in float32.

    Block 0 runs as it is, in the model's precision, with the output of its attention set to 0; norms before and after
    the MLP are the block's own. Costs one pass over the tokens. Source: Gould et al. 2023 (arXiv 2312.09230).

    Args:
        model: The model.
        ids: Token ids.
        form: "residual": W_E + MLP_0(W_E), the stream after the MLP. "mlp": MLP_0(W_E). "none": W_E, all that a head of
            block 0 can read.

    Raises:
        RequestError: Block 0 has no attention.
    """
    embedded = embedding(model, ids)
    if form == "none":
        return embedded
    first = head_outputs(model).get(0)
    if first is None:
        raise RequestError(f"model {model.name!r} ({model.architecture}): block 0 has no attention to skip")
    block, streams = _block(model, 0), []
    for chunk in embedded.split(_TOKENS):
        with (
            change_tensor(block, "in", partial(_instead, chunk)),
            change_tensor(first.last, "out", torch.zeros_like),
            hook_tensor(block, "out", streams.append),
        ):
            _run_alone(model, len(chunk))
    stream = torch.cat([part.reshape(-1, embedded.shape[1]).float() for part in streams]).to(embedded.device)
    return stream if form == "residual" else stream - embedded


@torch.inference_mode()
def head_writes(
    model: Model, x: Float[Tensor, "token d_model"], layers: Collection[int] | None = None
) -> Iterator[tuple[int, Float[Tensor, "token head d_model"]]]:
    """Yields for each layer, or each of `layers`, the output of its heads that attend only to a stream `x`.

    The output is W_O W_V norm(x), with the layer's own norm and the bias of W_V; the bias of W_O belongs to no head and
    is left out. A norm after the projection (Gemma 2 and 3, OLMo 2) is applied to each head alone: its gain is the
    model's; its scale differs, because the model normalises the sum of all heads. In layers with a learned sink the
    output is smaller by the sink's attention. Costs one pass over the tokens, and (token, head, d_model) float32 of
    memory.
    """
    outputs = {layer: output for layer, output in head_outputs(model).items() if layers is None or layer in layers}
    inputs: dict[int, list[Tensor | None]] = {layer: [] for layer in outputs}
    for chunk in x.split(_TOKENS):
        with ExitStack() as stack:
            for layer, output in outputs.items():
                stack.enter_context(change_tensor(_block(model, layer), "in", partial(_instead, chunk)))
                stack.enter_context(hook_tensor(output.project, "in", inputs[layer].append))
            _run_alone(model, len(chunk))
    for layer, output in outputs.items():
        z = torch.cat(
            [part.float().reshape(-1, output.heads, output.d_head) for part in inputs.pop(layer) if part is not None]
        )
        yield layer, writes_of(output, z)


@plain_torch()
@torch.inference_mode()
def writes_of(output: HeadOutput, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row head d_model"]:
    """Returns the output of each head, given its `z`; a norm after the projection is applied to each head alone."""
    weights = output.weights()
    writes = torch.einsum("rhd,hdm->rhm", z.float().to(weights.device), weights)
    return writes if output.norm is None else real_copy(output.norm).float()(writes)


@plain_torch()
def direct_logits(
    unembed: Unembed,
    write: Float[Tensor, "*row d_model"],
    targets: Int[Tensor, " target"],
    stream: Float[Tensor, "*#row d_model"] | None = None,
) -> Float[Tensor, "*row target"]:
    """Returns the direct contribution of `write` to logits, through final norm and W_U, in float32.

    Terms that do not depend on `write` (the norm's shift, the bias of W_U) are left out, and so is a soft-cap, which
    changes no order. A write of 0 gives 0 for every token.

    Args:
        unembed: The unembedding.
        write: Vectors that are added to the stream.
        targets: Ids of the tokens whose logits are computed.
        stream: Last residual stream that `write` is part of, which sets the scale of the norm. None: `write` itself.
    """
    read = unembed.scale * unembed.gain * unembed.weight[targets]
    logits = centred(write.float(), unembed.norm) @ read.T
    if unembed.norm == "none":
        return logits
    reference = centred((write if stream is None else stream).float(), unembed.norm)
    return logits * torch.rsqrt(reference.square().mean(-1, keepdim=True) + unembed.eps)


def ov_logits(
    model: Model,
    x: Float[Tensor, "token d_model"],
    targets: Int[Tensor, " target"],
    unembed: Unembed,
    layers: Collection[int] | None = None,
) -> Iterator[tuple[int, Float[Tensor, "head token target"]]]:
    """Yields for each layer, or each of `layers`, the logits of `targets` from heads that attend only to `x`.

    With `x = first_mlp(model, ids)` this is the effective OV circuit W_U W_O W_V MLP_0(W_E), for the given tokens and
    targets only. Costs tokens x heads x targets x d_model operations a layer.
    """
    for layer, writes in head_writes(model, x, layers):
        logits = direct_logits(unembed.to(writes.device), writes, targets.to(writes.device))
        yield layer, logits.transpose(0, 1)


# ---- the model's own modules, on other inputs -----------------------------------------------------------


def _site(model: Model, name: str) -> Site | None:
    sites = model.site_map
    return sites.sites.get(sites.synonyms.get(name, name))


def _block(model: Model, layer: int) -> nn.Module:
    return model.module.get_submodule(f"{model.site_map.blocks}.{layer}")


@plain_torch()
def _run_alone(model: Model, tokens: int) -> None:
    """Runs sequences of one arbitrary token each, whose stream hooks replace."""
    ids = torch.zeros(tokens, 1, dtype=torch.long)
    run(model.module, ids, torch.ones_like(ids))


def _instead(value: Tensor, original: Tensor) -> Tensor:
    return value.to(original).reshape(original.shape)
