"""Neurons of an MLP as a dictionary, so that a feature store, its pages and its questions answer for neurons, too."""

from __future__ import annotations

import torch

from workbench.io.checks import check
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.circuits import mlp_outputs
from workbench.model.load import Model, check_model
from workbench.sae.autoencoder import Sae
from workbench.sae.conversion import converted
from workbench.sae.load import from_converted

NAME = "neurons"


@plain_torch()
def neuron_dictionary(model: Model, layer: int, *, minimum: float = 0.0) -> Sae:
    """Returns the neurons of one MLP as a transcoder from `mlp_post` to `mlp_out`.

    Feature i is neuron i, d_mlp of them. In a gated MLP, whose neurons take both signs, feature d_mlp + i is the
    negative part of neuron i, as a positive number. The decoder is W_out (minus it for negative parts), so that effects
    on logits are those of the neuron. With `minimum` 0, and both signs, it decodes to the MLP's output.

    Cost: a product of d_mlp x d_mlp numbers (twice that, gated) for each row. Of neurons that are rarely 0 a feature
    store is large, about 6 bytes a neuron and row; `minimum`, or `sparsity=TopK(k)` of `extract_features`, makes it
    small.

    Args:
        model: The model.
        layer: The block, from 0; a negative one counts from the last.
        minimum: Activations up to this, in absolute value, are left out.

    Raises:
        RequestError: No such layer, its MLP has no single set of neurons (mixtures of experts, state spaces), or the
            block norms or multiplies the MLP's output before it adds it.
    """
    check_model(model)
    check("minimum", minimum, at_least=0, below=float("inf"))
    outputs = mlp_outputs(model)
    layer = layer + model.site_map.n_layers if layer < 0 else layer
    if layer not in outputs:
        raise RequestError(f"layer {layer} of {model.name!r} has no neurons; layers with them are {sorted(outputs)}")
    output = outputs[layer]
    if output.norm is not None or output.factor != 1:
        change = "changes" if output.norm is None else "norms"
        raise RequestError(
            f"layer {layer} of {model.architecture} {change} the MLP's output before it adds it, so that no decoder "
            "gives what a neuron adds; use the probe direct-logit-attribution with parts='neurons'"
        )
    decoder, bias = (part.cpu().clone() for part in (output.weights()[0], output.bias()))  # no inference tensors
    units = torch.eye(output.d_head)
    if gated(model, layer):
        decoder, units = torch.cat([decoder, -decoder]), torch.cat([units, -units])
    weights = {
        "W_enc": units.T.contiguous(),
        "b_enc": torch.zeros(len(units)),
        "W_dec": decoder.contiguous(),
        "b_dec": bias,
    }
    if minimum:
        weights["threshold"] = torch.full((len(units),), float(minimum))
    about = {
        "hook_name": f"blocks.{layer}.mlp.hook_post",
        "hook_name_out": f"blocks.{layer}.hook_mlp_out",
        "model_name": model.name,
    }
    kind = "jumprelu_transcoder" if minimum else "transcoder"
    transcoder = converted(kind, weights, {"apply_b_dec_to_input": False}, about)
    return Sae(from_converted(transcoder, NAME, model.device), NAME)


def gated(model: Model, layer: int) -> bool:
    """Returns True if the neurons of a layer are products of two linear maps, one through the activation function."""
    return f"mlp_pre_linear.{layer}" in model.sites
