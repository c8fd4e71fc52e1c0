"""What features write: their decoder directions, which of them are alike, and which tokens they speak for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.model.unembed import Unembed
from workbench.sae.load import Sae


def decoder_directions(sae: Sae, features: Sequence[int] | None = None) -> Float[Tensor, "feature d_model"]:
    """What a unit of each feature's activation adds to the reconstruction, of all features or those named, in float32.

    The rows of W_dec, but for an SAE whose activations are in units of the decoder's norm: there of length 1. Under
    layer_norm, in units of the row's own scale. Raises RequestError for a feature there is not.
    """
    if features is not None and (wrong := [f for f in features if not 0 <= f < sae.d_sae]):
        raise RequestError(f"feature {wrong[0]} does not exist; the SAE has features 0 to {sae.d_sae - 1}")
    rows = (sae.W_dec if features is None else sae.W_dec[list(features)]).detach().float()
    if getattr(sae.module.cfg, "rescale_acts_by_decoder_norm", False):
        return torch.nn.functional.normalize(rows, dim=1)
    return rows


def nearest_features(sae: Sae, feature: int | np.integer, k: int = 10) -> pd.DataFrame:
    """The `k` features whose decoder directions are most like that of `feature`: feature, cosine; closest first.

    Cosine is from -1 to 1; two random directions have 0 ± 1/√d_in, and the closest of d_sae random ones about
    √(2 ln d_sae / d_in). A feature without direction has 0. One product with the decoder.
    """
    if k < 1:
        raise RequestError(f"k must be at least 1, not {k}")
    own = decoder_directions(sae, [feature])[0]
    units = torch.nn.functional.normalize(decoder_directions(sae), dim=1)
    cosine = (units @ torch.nn.functional.normalize(own, dim=0)).clamp(-1, 1).cpu().numpy()
    cosine[feature] = -np.inf
    order = np.argsort(-cosine, kind="stable")[: min(k, sae.d_sae - 1)]
    return pd.DataFrame({"feature": order, "cosine": cosine[order]})


def decoder_logits(sae: Sae, unembed: Unembed, features: Sequence[int]) -> Float[Tensor, "feature vocab"]:
    """How a unit of each feature's activation moves the logits by the direct path, from its decoder to the unembedding.

    scale W_U (gain ⊙ d), less its mean over the vocabulary, with d the decoder's direction, less its own mean under
    LayerNorm. In logits a unit of activation where the residual stream's root mean square is 1: the final norm divides
    by that of the row, which is the same for all tokens. Left out: what later blocks make of it, biases, which are
    there without the feature, and the soft-cap, which keeps the order. The mean does not change a probability; 0 is a
    token moved like the average one.

    Costs one product with W_U. Raises RequestError for a decoder that is not as wide as the residual stream.
    """
    directions = decoder_directions(sae, features).to(unembed.weight.device)
    if directions.shape[1] != len(unembed.gain):
        raise RequestError(
            f"SAE {sae.name!r} writes {directions.shape[1]} numbers and the residual stream has {len(unembed.gain)}; "
            "what it does to logits is not defined"
        )
    if unembed.norm == "layer":
        directions = directions - directions.mean(1, keepdim=True)
    effects = unembed.scale * torch.nn.functional.linear(directions * unembed.gain, unembed.weight)
    return effects - effects.mean(1, keepdim=True)


def extreme_tokens(effects: Float[Tensor, " vocab"], unembed: Unembed, k: int) -> pd.DataFrame:
    """The k largest and the k smallest effects, each token at most once: token_id, token, logit; largest first."""
    values = effects.cpu().numpy()
    order = np.argsort(-values, kind="stable")
    chosen = order if 2 * k >= len(order) else np.concatenate([order[:k], order[-k:]])
    return pd.DataFrame(
        {
            "token_id": chosen,
            "token": [unembed.token(int(token)) for token in chosen],
            "logit": values[chosen],
        }
    )
