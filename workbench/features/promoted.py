"""Tokens that a feature promotes or suppresses directly, through the unembedding."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from workbench.features.feature_store import Features
from workbench.io.checks import check_kind, whole_number
from workbench.io.errors import RequestError
from workbench.model.unembed import load_unembed
from workbench.sae.autoencoder import Sae, check_autoencoder
from workbench.sae.choice import TopK
from workbench.sae.decoder import decoder_logits, extreme_tokens
from workbench.sae.ruled import RULE, ruled_fingerprint, with_sparsity

_RESIDUAL = re.compile(r"hook_(pos_)?embed|blocks\.\d+\.hook_(resid_(pre|mid|post)|attn_out|mlp_out)")


def promoted_tokens(features: Features, sae: Sae, feature: int | np.integer, k: int = 10) -> pd.DataFrame:
    """Returns the `k` tokens whose logits a feature raises most and the `k` that it lowers most, by `decoder_logits`.

    Cost: reads the store's unembedding and computes the SAE's fingerprint.

    Returns:
        Columns token_id, token and logit (effect of one unit of activation); largest first. Null: 0.

    Raises:
        RequestError: Another SAE than the features', one that does not write to the residual stream, or a store without
            unembedding.
    """
    k = whole_number("k", k, at_least=1)
    check_sae(features, sae)
    check_writes_residual(features, sae)
    unembed = load_unembed(features.store.path)
    return extreme_tokens(decoder_logits(sae, unembed, [feature])[0], unembed, k)


def check_sae(features: Features, sae: Sae) -> None:
    """Raises RequestError if `sae`, under a rule or not, did not make `features`; 1 s per gigabyte of weights."""
    check_kind("features", features, Features, "opened features, such as wb.open_features('runs/x.acts')")
    check_autoencoder(sae)
    used, fingerprint = features.record.sae, sae.fingerprint()
    rule = used.config.get(RULE)
    if used.fingerprint not in (fingerprint, rule and ruled_fingerprint(fingerprint, rule)):
        raise RequestError(
            f"features {features.path.name} were made with SAE {used.name} ({used.fingerprint[:12]}), "
            f"not with {sae.name} ({fingerprint[:12]}); give that one"
        )


def running_sae(features: Features, sae: Sae) -> Sae:
    """Returns the SAE whose activations in a running model are those of `features`: `sae` under their sparsity rule.

    Raises:
        RequestError: Another SAE, or features whose rule ranks the rows of a whole store.
    """
    check_sae(features, sae)
    rule = features.record.sae.config.get(RULE)
    if rule is None or features.record.sae.fingerprint == sae.fingerprint():
        return sae
    if rule["choice"] != "topk":
        raise RequestError(
            f"features {features.path.name} were made under {rule['choice']}, which ranks the rows of the whole store, "
            "so a running model has no such features; extract with TopK or without sparsity"
        )
    return with_sparsity(sae, TopK(rule["k"]))


def check_writes_residual(features: Features, sae: Sae) -> None:
    """Raises RequestError if the decoder's output is not (added to) the residual stream."""
    if "transcoder" not in sae.architecture and not _RESIDUAL.fullmatch(features.record.site):
        raise RequestError(
            f"SAE {sae.name!r} reconstructs {features.record.site}, which is not part of the residual stream; its "
            "effect on logits is not defined"
        )
