"""Decoder directions of features: nearest features by cosine, and direct effects on the logits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.io.checks import check_kind, whole_number
from workbench.io.errors import RequestError
from workbench.model.unembed import Unembed
from workbench.sae.autoencoder import Sae, not_defined
from workbench.sae.layered import LayeredSae

_LOG = logging.getLogger(__name__)

_BYTES = 64 << 20


def decoder_directions(
    sae: Sae, features: Sequence[int | np.integer] | None = None
) -> Float[Tensor, "feature d_model"]:
    """Returns the direction that one unit of a feature's activation adds to the reconstruction, in float32.

    These are the rows of W_dec, scaled to length 1 for an SAE whose activations include the decoder's norm. Under
    layer_norm they are in units of each row's standard deviation.

    Args:
        sae: The autoencoder.
        features: Ids of the features. None: all.

    Raises:
        RequestError: A feature id outside 0 to d_sae - 1.
        DataError: A direction with NaN or infinite values.
    """
    for feature in features if features is not None else ():
        check_kind("feature", feature, (int, np.integer), "the number of one")
    ids = list(range(sae.d_sae)) if features is None else [int(feature) for feature in features]
    if wrong := [feature for feature in ids if not 0 <= feature < sae.d_sae]:
        raise RequestError(f"feature {wrong[0]} does not exist; the SAE has features 0 to {sae.d_sae - 1}")
    if isinstance(sae, LayeredSae) and features is not None:
        rows = sae.decoder_rows(ids).detach().float()
    else:
        rows = (sae.W_dec if features is None else sae.W_dec[ids]).detach().float()
    finite = rows.isfinite().all(1)
    if not bool(finite.all()):
        raise not_defined(sae.name, [ids[index] for index in (~finite).nonzero()[:, 0].tolist()])
    if getattr(sae.module.cfg, "rescale_acts_by_decoder_norm", False):
        return unit_rows(rows)
    return rows


def unit_directions(sae: Sae) -> Iterator[tuple[slice, Float[Tensor, "feature d_model"]]]:
    """Yields the directions of all features at length 1, in blocks of 64 MiB: their place, and the directions.

    Directions with NaN or infinite values are NaN; a warning names their features.
    """
    first = 0
    for part in sae.parts if isinstance(sae, LayeredSae) else (sae,):
        if part.undefined:
            ids = [first + feature for feature in part.undefined]
            _LOG.warning(f"{not_defined(sae.name, ids)}; they are left out of comparisons")
        step = max(1, _BYTES // (4 * part.W_dec.shape[1]))
        for start in range(0, part.d_sae, step):
            rows = unit_rows(part.W_dec[start : start + step].detach().float())
            yield slice(first + start, first + start + len(rows)), rows
        first += part.d_sae


def unit_rows(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Returns rows at length 1, whatever their size; rows of zeros stay."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)
    scaled = rows / largest.clamp(min=torch.finfo(rows.dtype).tiny)  # so that no square over- or underflows
    return scaled.div_(scaled.norm(dim=1, keepdim=True).clamp(min=1e-12))


def row_scale(sae: Sae, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row 1"] | float:
    """Returns the factor by which the SAE multiplies `decoder_directions` in the reconstruction of each of `rows`.

    1, except under layer_norm (the row's standard deviation) and constant_norm_rescale (its norm / √d_in).
    """
    kind = sae.module.cfg.normalize_activations
    if kind == "layer_norm":
        return sae.input_rows(rows).std(1, keepdim=True)
    if kind == "constant_norm_rescale":
        return sae.input_rows(rows).norm(dim=1, keepdim=True) / sae.d_in**0.5
    return 1.0


def nearest_features(sae: Sae, feature: int | np.integer, k: int = 10) -> pd.DataFrame:
    """Returns the `k` features whose decoder directions have the largest cosine with that of `feature`.

    Cost: one product with the decoder, in blocks of 64 MiB.

    Returns:
        Columns feature and cosine (-1 to 1), largest first. Null: two random directions have 0 ± 1/√d_in, and the
        closest of d_sae random ones about √(2 ln d_sae / d_in). A zero direction has cosine 0; features whose direction
        has NaN or infinite values are left out, with a warning.

    Raises:
        RequestError: A feature that does not exist, or k < 1.
        DataError: The direction of `feature` has NaN or infinite values.
    """
    k = whole_number("k", k, at_least=1)
    direction = unit_rows(decoder_directions(sae, [feature]))[0]
    cosine = np.empty(sae.d_sae, np.float32)
    for place, units in unit_directions(sae):
        cosine[place] = (units @ direction).clamp(-1, 1).cpu().numpy()
    cosine[feature] = np.nan
    order = np.argsort(-cosine, kind="stable")[: min(k, int(np.isfinite(cosine).sum()))]  # NaN comes last
    return pd.DataFrame({"feature": order, "cosine": cosine[order]})


def decoder_logits(sae: Sae, unembed: Unembed, features: Sequence[int | np.integer]) -> Float[Tensor, "feature vocab"]:
    """Returns the direct effect of one unit of each feature's activation on the logits, decoder to unembedding.

    The effect is scale · W_U (gain ⊙ d) minus its mean over the vocabulary, where d is the decoder direction, minus its
    mean under LayerNorm. Unit: logits per unit of activation at a residual stream of root mean square 1; the final norm
    divides by the row's own, which is the same factor for all tokens. Value under the null: 0, the average token's
    effect (subtracting the mean changes no probability). Not included: effects through later blocks, biases, and the
    soft-cap, which is monotonic. Cost: one product with W_U.

    Raises:
        RequestError: The decoder is not as wide as the residual stream.
    """
    directions = decoder_directions(sae, features).to(unembed.weight.device)
    if directions.shape[1] != len(unembed.gain):
        raise RequestError(
            f"the output of SAE {sae.name!r} has width {directions.shape[1]} and the residual stream "
            f"{len(unembed.gain)}; its effect on logits is not defined"
        )
    if unembed.norm == "layer":
        directions = directions - directions.mean(1, keepdim=True)
    effects = unembed.scale * torch.nn.functional.linear(directions * unembed.gain, unembed.weight)
    return effects - effects.mean(1, keepdim=True)


def extreme_tokens(effects: Float[Tensor, " vocab"], unembed: Unembed, k: int) -> pd.DataFrame:
    """Returns the k largest and the k smallest effects, largest first: token_id, token, logit; no token twice."""
    values = effects.cpu().numpy()
    chosen = extremes(values, k)
    return pd.DataFrame(
        {
            "token_id": chosen,
            "token": [unembed.token(int(token)) for token in chosen],
            "logit": values[chosen],
        }
    )


def extremes(values: Float[np.ndarray, " value"], k: int) -> Int64[np.ndarray, " extreme"]:
    """Returns the indices of the k largest and the k smallest values, largest first; none twice."""
    order = np.argsort(-values, kind="stable")
    return order if 2 * k >= len(order) else np.concatenate([order[:k], order[-k:]])
