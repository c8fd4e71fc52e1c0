"""Output of each attention head, computed from recorded z and the model's output projection."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.capture import capture
from workbench.model.circuits import HeadOutput, head_outputs
from workbench.model.forward import the_tensor, trial_ids
from workbench.model.load import Model
from workbench.model.offload import real_copy, running_device
from workbench.model.reload import recorded_model
from workbench.store.computed import ComputedArray
from workbench.store.layers import known_layer
from workbench.store.manifest import SiteRecord
from workbench.store.reader import ActivationArray, StoreOrPath, opened


def head_results(store: StoreOrPath, layer: int, model: Model | str | None = None) -> ComputedArray:
    """Returns the output of each head of a layer, `hook_result` of TransformerLens: z times the head's part of W_O.

    The sum over heads and the bias is the output of the layer's projection: `attn_out`, where no norm comes after it
    (Gemma 2 and 3, OLMo 2: what that norm reads). Null: 0 for a head whose z is 0. Costs heads x d_head x d_model
    operations a row; the weights are float32, and the values as exact as the stored z.

    Args:
        store: A store with z of the layer, or its path.
        layer: Layer; -1 is the last one.
        model: The recorded model, or what `load_model` takes. None: the name in the manifest.

    Returns:
        Array with the axes (row, head, d_model), computed where it is indexed.

    Raises:
        RequestError: z was not recorded, the model is another one, or its output projection is not linear in z.
    """
    store = opened(store)
    number = known_layer(store.manifest, layer)
    array = store["z", number]
    weights, _bias = output_weights(recorded_model(store, model), number)
    name, axes, shape = f"blocks.{number}.attn.hook_result", ("row", "head", "d_model"), tuple(weights.shape[::2])
    site = SiteRecord(name, f"result.{number}", axes, shape, "float32")
    return ComputedArray(store, site, partial(_results, array, weights))


@torch.inference_mode()
def _results(
    array: ActivationArray, weights: Float[Tensor, "head d_head d_model"], ids: Int64[np.ndarray, " row"]
) -> Float[Tensor, "row head d_model"]:
    return torch.einsum("rhd,hdm->rhm", array[ids].to(weights.device).float(), weights).cpu()


@plain_torch()
def output_weights(model: Model, layer: int) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"]]:
    """Returns W_O of each head of a layer and the bias, in float32, after comparing them with the model's own output.

    Raises:
        RequestError: The layer has no heads, or its projection of z is not linear, gated, or reads more than z.
    """
    output = head_outputs(model).get(layer)
    refusal = f"layer {layer} of model {model.name!r} ({model.architecture})"
    if output is None:
        raise RequestError(f"{refusal} has no attention heads with the site z; choose another layer")
    weights, bias = output.weights(), _bias(output)
    rows: dict[str, Tensor] = {}
    (z,) = model.site_map.select((f"z.{layer}",))
    (projected,) = model.site_map.select((f"blocks.{layer}.attn.o.hook_out",))
    ids = trial_ids(model.module, 2, 8, seed=3)
    capture(
        model.module,
        (z, projected),
        ids,
        torch.ones_like(ids),
        lambda site, tensor, _first: rows.update({site.name: tensor.float().to(weights.device, copy=True)}),
    )
    expected = rows[projected.name]
    with torch.inference_mode():
        sums = torch.einsum("bphd,hdm->bpm", rows[z.name], weights) + bias
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.03
    if sums.shape != expected.shape or not (sums - expected).norm() <= tolerance * expected.norm():
        raise RequestError(
            f"{refusal}: its output is not z times weights plus a bias (it may gate or norm z first), so it does not "
            "divide into heads; record attn_out in place of it"
        )
    return weights, bias


def _bias(output: HeadOutput) -> Float[Tensor, " d_model"]:
    device = running_device(output.project)
    project = real_copy(output.project).float()
    with torch.inference_mode():
        return the_tensor(project(torch.zeros(1, 1, output.heads * output.d_head, device=device)))[0, 0]
