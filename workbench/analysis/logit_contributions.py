"""Contributions of the active features of one token to logits, through the final norm frozen at that token's scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from workbench.analysis.frozen_norm import norm_bias, read_directions, token_ids
from workbench.features.feature_store import Features
from workbench.features.labels import with_names
from workbench.features.promoted import check_sae, check_writes_residual
from workbench.io.checks import check, check_kind
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.unembed import Unembed, load_unembed
from workbench.sae.autoencoder import Sae
from workbench.sae.decoder import decoder_directions, row_scale
from workbench.sae.site import site_names
from workbench.store.reader import Store

Part = tuple[str, int | None, float, Float64[Tensor, " d_model"]]
"""Name of a term, its feature, its activation, and what it adds to the residual stream."""

Term = tuple[str, int | None, float, Float64[Tensor, " token"], Float64[Tensor, " token"]]
"""Name of a term, its feature, its activation, and what it adds to the logit of each token, and relatively."""


@plain_torch()
def feature_contributions(
    features: Features,
    sae: Sae,
    row: int | np.integer,
    tokens: str | int | Sequence[str | int] | None = None,
    *,
    k: int | None = None,
) -> pd.DataFrame:
    """Returns what each active feature of a row (token) adds directly to the logits after it.

    The final norm is linear once its scale is taken from the row's own last residual stream and held fixed; then the
    logit is a sum over what was added to the stream. A feature's term is its activation times the effect of its decoder
    direction. For an SAE of the last residual stream the features, the SAE's bias, its error and the biases of norm and
    unembedding sum to the logit. Otherwise a feature's term is its direct effect alone, without what later blocks make
    of it, and "rest of the stream" holds everything else, so that the terms sum to the logit, too. This is a
    decomposition, not an effect: `feature_effect` changes the feature and runs the model.

    Cost: reads the store's unembedding and one row, and computes the SAE's fingerprint. Precision: the sum is the logit
    of the stored last residual stream in float64; with rows stored in bfloat16, the model's own logit may differ by
    2^-9 times the sum of the absolute terms.

    Args:
        features: Features of the row.
        sae: The SAE that made them.
        row: Id of the row.
        tokens: Tokens, as text or id, whose logits are decomposed. None: the one with the largest logit.
        k: Largest number of features per token, by absolute `relative`; the others are one line. None: all.

    Returns:
        One line per token and term, features first, largest absolute `relative` first: token_id; token; term; feature
        and activation, missing for other terms; logit, the term, before a soft-cap; relative, the term minus its mean
        over the vocabulary, which alone changes probabilities; description, where features have labels. Null: 0.

    Raises:
        RequestError: Another SAE, one that does not write to the residual stream or whose features do not add up
            (temporal), a row or token that does not exist, or a store without unembedding or last residual stream.
    """
    check("k", k, at_least=1, whole=True, optional=True)
    check("row", row, at_least=0, at_most=len(features) - 1, whole=True)
    check_sae(features, sae)
    check_writes_residual(features, sae)
    _check_adds_up(sae)
    store = features.store
    unembed = load_unembed(store.path)
    last = f"resid_post.{store.manifest.model.n_layers - 1}"
    stream = store[last][int(row)].double()
    ids = _token_ids(unembed, tokens, stream)
    parts = _parts(features, sae, int(row), stream, store[last].name)
    logit, relative = _logits(unembed, torch.stack([part[3] for part in parts]), stream, ids)
    names = [
        (*part[:3], logits, centred) for part, logits, centred in zip(parts, logit[:-1], relative[:-1], strict=True)
    ]
    names += [
        ("bias of the final norm", None, np.nan, logit[-1], relative[-1]),
        ("bias of the unembedding", None, np.nan, *_bias(unembed, ids)),
    ]
    tables = [_table(names, index, token, unembed, k) for index, token in enumerate(ids)]
    return with_names(pd.concat(tables, ignore_index=True).astype({"feature": "Int64"}), features.labels)


def _check_adds_up(sae: Sae) -> None:
    """Refuses an SAE whose features of a row are no terms of its stream."""
    if sae.n_sites > 1:
        raise RequestError(f"SAE {sae.name!r} reads several sites of a row; extract the features of one layer")
    if sae.sequential:
        raise RequestError(f"SAE {sae.name!r} is temporal: its features alone do not add up to the stream")


def _parts(features: Features, sae: Sae, row: int, stream: Float64[Tensor, " d_model"], last: str) -> list[Part]:
    """What features, bias, error and the rest add to the stream."""
    site, entries = features.record.site, features[row]
    values = _recorded_row(features.store, site, row)
    active = torch.from_numpy(entries.indices.astype(np.int64))
    activations = torch.from_numpy(entries.data).double()
    scale, offset = _affine(sae, values)
    directions = decoder_directions(sae, active.tolist()).cpu().double() * scale
    if directions.shape[1] != len(stream):
        raise RequestError(
            f"SAE {sae.name!r} writes rows of width {directions.shape[1]}, and the residual stream has {len(stream)}"
        )
    parts: list[Part] = [
        ("feature", int(feature), float(activation), activation * direction)
        for feature, activation, direction in zip(active, activations, directions, strict=True)
    ]
    parts.append(("bias of the SAE", None, np.nan, offset))
    explained = activations @ directions + offset
    if values is not None and sae.reconstructs:
        parts.append(("error of the SAE", None, np.nan, values.double() - explained))
        explained = values.double()
    if last not in site_names(site):
        parts.append(("rest of the stream", None, np.nan, stream - explained))
    return parts


def _recorded_row(store: Store, site: str, row: int) -> Tensor | None:
    """The row that the SAE read; None if its features alone were recorded."""
    return store[site][row].float() if site in {record.name for record in store.sites} else None


def _affine(sae: Sae, values: Tensor | None) -> tuple[Tensor | float, Float64[Tensor, " d_model"]]:
    """Factor of the decoder directions, and the reconstruction without any feature, which depend on the row read."""
    if values is None and sae.module.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        raise RequestError(
            f"SAE {sae.name!r} normalises its input, which this store does not hold; record the site, too"
        )
    rows = torch.zeros(1, sae.d_in) if values is None else values[None]
    sae.encode(rows)  # decode uses the normalisation of the rows encoded last
    offset = sae.decode(torch.zeros(1, sae.d_sae, device=sae.device))[0].cpu().double()
    scale = row_scale(sae, rows)
    return (scale.cpu().double() if isinstance(scale, Tensor) else scale), offset


def _logits(
    unembed: Unembed, parts: Float64[Tensor, "part d_model"], stream: Float64[Tensor, " d_model"], ids: Sequence[int]
) -> tuple[Float64[Tensor, "part_and_bias token"], Float64[Tensor, "part_and_bias token"]]:
    """Terms of the logits, and these minus their mean over the vocabulary, with the norm's scale that of `stream`.

    The last line is the norm's bias.
    """
    mean = unembed.weight.mean(0, dtype=torch.float64)
    w = torch.cat([unembed.weight[list(ids)].double(), mean[None]])
    directions = read_directions(unembed, stream.expand(len(w), -1), w)
    terms = torch.cat([parts @ directions.T, norm_bias(unembed, w)[None]])
    return terms[:, :-1], terms[:, :-1] - terms[:, -1:]


def _bias(unembed: Unembed, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    if unembed.bias is None:
        return torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.float64)
    bias = unembed.scale * unembed.bias.double()
    return bias[list(ids)], bias[list(ids)] - bias.mean()


def _table(
    terms: Sequence[tuple[str, int | None, float, Tensor, Tensor]],
    index: int,
    token: int,
    unembed: Unembed,
    k: int | None,
) -> pd.DataFrame:
    """The lines of one token."""
    lines = [
        (name, feature, value, float(logits[index]), float(centred[index]))
        for name, feature, value, logits, centred in terms
    ]
    ranked = sorted((line for line in lines if line[1] is not None), key=lambda line: -abs(line[4]))
    top_lines, other_lines = ranked[:k], ranked[k:] if k is not None else []
    if other_lines:
        logit, relative = sum(line[3] for line in other_lines), sum(line[4] for line in other_lines)
        top_lines = [*top_lines, (f"other features ({len(other_lines)})", None, np.nan, logit, relative)]
    table = pd.DataFrame(
        [*top_lines, *(line for line in lines if line[1] is None)],
        columns=["term", "feature", "activation", "logit", "relative"],
    )
    table.insert(0, "token", unembed.token(token))
    table.insert(0, "token_id", token)
    return table


def _token_ids(unembed: Unembed, tokens: str | int | Sequence[str | int] | None, stream: Tensor) -> list[int]:
    if tokens is None:
        return [int(unembed(stream.float()[None])[0].argmax())]
    check_kind("tokens", tokens, (str, int, np.integer, Sequence, np.ndarray), "tokens, as texts or ids")
    return token_ids(unembed, [tokens] if isinstance(tokens, str | int | np.integer) else list(tokens))
