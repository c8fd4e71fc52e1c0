"""Tokens that a feature promotes or suppresses through the unembedding."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from workbench.features.feature_store import Features
from workbench.io.errors import RequestError
from workbench.model.unembed import load_unembed
from workbench.sae.decoder import decoder_logits, extreme_tokens
from workbench.sae.load import Sae

_RESIDUAL = re.compile(r"hook_(pos_)?embed|blocks\.\d+\.hook_(resid_(pre|mid|post)|attn_out|mlp_out)")


def promoted_tokens(features: Features, sae: Sae, feature: int | np.integer, k: int = 10) -> pd.DataFrame:
    """The `k` tokens that a feature promotes most and the `k` that it suppresses most: `decoder_logits`, strongest
    first; columns token_id, token, logit, the suppressed ones last with the lowest at the end.

    Costs the reading of the store's unembedding and the SAE's fingerprint. Raises RequestError for another SAE than the
    features', one that does not write to the residual stream, or a store without unembedding.
    """
    if k < 1:
        raise RequestError(f"k must be at least 1, not {k}")
    check_sae(features, sae)
    check_writes_residual(features, sae)
    unembed = load_unembed(features.store.path)
    return extreme_tokens(decoder_logits(sae, unembed, [feature])[0], unembed, k)


def check_sae(features: Features, sae: Sae) -> None:
    """RequestError where `sae` is not the one that made `features`; about 1 s a gigabyte of weights."""
    own, given = features.record.sae, sae.fingerprint()
    if own.fingerprint != given:
        raise RequestError(
            f"features {features.path.name} were made with SAE {own.name} ({own.fingerprint[:12]}), "
            f"not with {sae.name} ({given[:12]}); give that one"
        )


def check_writes_residual(features: Features, sae: Sae) -> None:
    """RequestError where the decoder writes something else than (a part of) the residual stream."""
    if "transcoder" not in sae.architecture and not _RESIDUAL.fullmatch(features.record.site):
        raise RequestError(
            f"SAE {sae.name!r} writes {features.record.site}, which is not part of the residual stream: what it does "
            "to logits is not defined"
        )
