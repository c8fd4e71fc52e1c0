"""How an autoencoder was trained, and whether a recording is the same: centred weights, head, positions, BOS, context.

SAELens trains on TransformerLens models, which it may load with other weights than the checkpoint's. An SAE of such a
release reads rows of that model. With centred writing weights, whatever is written to the residual stream has mean 0
over d_model. Where every block reads the stream through a LayerNorm, which subtracts the mean anyway, nothing else
changes: a row of the centred model is the checkpoint's row minus its mean, exactly.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.io.errors import RequestError

if TYPE_CHECKING:
    from workbench.sae.autoencoder import Sae
    from workbench.store.reader import Store

_LOG = logging.getLogger(__name__)

_STREAM = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)|hook_(pos_)?embed")
_BEHIND_NORM = re.compile(
    r"blocks\.\d+\.(attn\.hook_(q|k|v|z|rot_q|rot_k|pattern|attn_scores)|mlp\.hook_(pre|pre_linear|post))"
)
_CENTRED_EXACTLY = frozenset(
    """
    GPT2LMHeadModel GPTNeoForCausalLM GPTNeoXForCausalLM GPTJForCausalLM CodeGenForCausalLM GPTBigCodeForCausalLM
    PhiForCausalLM StableLmForCausalLM Starcoder2ForCausalLM MptForCausalLM FalconForCausalLM CohereForCausalLM
    OlmoForCausalLM
    """.split()  # noqa: SIM905
)
"""Models whose stream is the sum of what embeddings, attention and MLPs write, and is read through LayerNorm alone.
Not among them: RMSNorm models; norms after the addition (OPT-350M); an embedding's own norm (BLOOM)."""

_SAME_ROWS = frozenset(
    """
    center_unembed default_padding_side default_prepend_bos device device_map dtype local_files_only
    low_cpu_mem_usage move_to_device n_devices attn_implementation torch_dtype trust_remote_code cache_dir token
    use_auth_token
    """.split()  # noqa: SIM905
)
"""Arguments of TransformerLens' loading that leave every activation as it is, up to rounding."""

_CHANGED_SITES = {
    "fold_ln": re.compile(r".*\bln\d?\b(?!\.hook_normalized).*|.*ln_final.*|.*\.mlp\.hook_in"),
    "fold_value_biases": re.compile(r".*attn\.hook_(v|z|result)"),
    "refactor_factored_attn_matrices": re.compile(r".*attn\.hook_(q|k|v|z|rot_q|rot_k|result)"),
}
"""Arguments that change activations of some sites: those whose names match."""


def centres(metadata: Mapping[str, Any]) -> bool:
    """Returns True if the SAE reads rows minus their mean over d_model."""
    site = metadata.get("hook_name")
    return bool(_loading(metadata).get("center_writing_weights")) and bool(
        isinstance(site, str) and _STREAM.fullmatch(site)
    )


def check_training(sae: Sae, site: str, architecture: str) -> None:
    """Refuses an SAE that was trained on other rows of this site than the recorded ones, and cannot be given them.

    Args:
        sae: The autoencoder.
        site: Name of the site that is read.
        architecture: Class of the recorded model: GPT2LMHeadModel.

    Raises:
        RequestError: Its model was loaded with weights of which the recorded rows do not follow.
    """
    metadata = sae.metadata
    loading = _loading(metadata)
    if loading.get("center_writing_weights") and not _BEHIND_NORM.fullmatch(site):
        advice = "record the model with these weights, and remove the setting from its cfg.json"
        if not (centres(metadata) and _STREAM.fullmatch(site)):
            raise RequestError(
                f"SAE {sae.name!r} was trained with center_writing_weights, whose rows of {site} do not follow from "
                f"the recorded ones; {advice}"
            )
        if architecture not in _CENTRED_EXACTLY:
            raise RequestError(
                f"SAE {sae.name!r} was trained with center_writing_weights, and the rows of a {architecture} are "
                f"not known to differ by their mean alone; {advice}"
            )
    for name, pattern in _CHANGED_SITES.items():
        if loading.get(name) and pattern.fullmatch(site):
            raise RequestError(f"SAE {sae.name!r} was trained on a model loaded with {name}, which changes {site}")
    known = {"center_writing_weights", *_CHANGED_SITES, *_SAME_ROWS}
    if other_settings := {name: value for name, value in loading.items() if name not in known and value is not None}:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(other_settings.items()))[:200]
        _LOG.warning(
            f"SAE {sae.name!r} was trained on a model loaded with {listed}: unless the recorded model is the same, its "
            "features are wrong"
        )


def warn_of_other_rows(sae: Sae, store: Store) -> None:
    """Warns, in a line each, where the store has rows unlike those that the SAE was trained on."""
    metadata = sae.metadata
    prefix, bos = store.manifest.tokens_added.get("prefix", ()), metadata.get("prepend_bos")
    if bos is True and not prefix:
        _warn(sae, f"sequences that begin with BOS, and those of {store.path.name} do not", "bos='always'")
    elif bos is False and prefix:
        _warn(sae, f"sequences without BOS, and those of {store.path.name} begin with it", "bos='never'")
    positions = store.tokens["position"].to_numpy() if store.rows else np.zeros(0, np.int64)
    context = metadata.get("context_size")
    if isinstance(context, int) and (beyond := int((positions >= context).sum())):
        _warn(sae, f"sequences of {context} tokens; {beyond:,} rows lie beyond", f"context={context}")
    outside = _outside(metadata.get("seqpos_slice"), positions, context)
    if outside:
        start = metadata["seqpos_slice"]
        _LOG.warning(f"SAE {sae.name!r} was trained on positions {start} alone; {outside:,} rows lie at others")
    excluded = metadata.get("exclude_special_tokens")
    if excluded and (special := int(np.count_nonzero(store.tokens["is_special"].to_numpy(zero_copy_only=False)))):
        _LOG.warning(
            f"SAE {sae.name!r} was trained without special tokens: its features on the {special:,} special tokens "
            "mean nothing; leave them out by NOT is_special"
        )


def _warn(sae: Sae, trained_on: str, setting: str) -> None:
    _LOG.warning(
        f"SAE {sae.name!r} was trained on {trained_on}: features may differ there; record with {setting} for the same"
    )


def _outside(seqpos_slice: Any, positions: np.ndarray, context: Any) -> int:
    """Number of rows at positions that training left out."""
    if not isinstance(seqpos_slice, list | tuple) or not all(
        part is None or type(part) is int for part in seqpos_slice
    ):
        return 0
    if not 1 <= len(seqpos_slice) <= 3 or not len(positions):
        return 0
    length = context if isinstance(context, int) else int(positions.max()) + 1
    trained = np.zeros(max(length, int(positions.max()) + 1), bool)
    trained[:length][slice(*seqpos_slice)] = True
    trained[length:] = True  # which the size of the context speaks of
    return int((~trained[positions]).sum())


def _loading(metadata: Mapping[str, Any]) -> dict[str, Any]:
    value = metadata.get("model_from_pretrained_kwargs")
    return value if isinstance(value, dict) else {}
