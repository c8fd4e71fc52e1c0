"""Which of a store's arrays an autoencoder encodes, and rows of it encoded densely."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from workbench.io.errors import DataError, RequestError
from workbench.sae.load import Sae
from workbench.sites.grammar import full_name
from workbench.store.manifest import SiteRecord
from workbench.store.reader import ActivationArray, Store

_LATENT_BYTES = 64 << 20  # of one block's dense activations in float32


def matching_site(
    store: Store, sae: Sae, site: str | tuple[str, int] | None = None, *, force: bool = False
) -> ActivationArray:
    """The array of `store` that `sae` encodes, by default that of the SAE's own site.

    The residual stream before a block is the one after the block before: an SAE of either reads both. Raises
    RequestError naming both sides where width, site or model differ; `force` allows all but the width.
    """
    own = full_name(sae.site) if sae.site else None
    if site is None:
        if own is None:
            raise RequestError(f"site: SAE {sae.name!r} does not say where it was trained; give site=")
        recorded = {record.name for record in store.sites}
        site = next((name for name in site_names(own) if name in recorded), own)
    array = store[site]
    check_fit(sae, array.site, store.manifest.model.name, store.path, force=force)
    return array


def check_fit(
    sae: Sae, site: SiteRecord, model: str, store: Path, *, force: bool, arguments: tuple[str, str] = ("site", "force")
) -> None:
    """Raises RequestError where `sae` is of another width or, unless `force`, of another site or model than what
    `store` holds, or is to hold. `arguments`: what the caller's site and force are called."""
    asked_site, asked_force = arguments
    width = prod(site.shape)
    if width != sae.d_in:
        raise RequestError(f"SAE {sae.name!r} takes rows of {sae.d_in} numbers and {site.label} of {store} has {width}")
    if force:
        return
    own = full_name(sae.site) if sae.site else None
    if own and site.name not in site_names(own):
        raise RequestError(
            f"SAE {sae.name!r} was trained on {own} and {asked_site} is {site.name}; leave {asked_site} out, or "
            f"{asked_force}=True"
        )
    if sae.model_name and not _same_model(sae.model_name, model):
        raise RequestError(
            f"SAE {sae.name!r} was trained on the model {sae.model_name} and {store} is of {model}; "
            f"if they are the same, {asked_force}=True"
        )


def block_rows(sae: Sae) -> int:
    """Rows whose dense activations make 64 MiB."""
    return max(1, _LATENT_BYTES // (4 * sae.d_sae))


def encode_checked(
    array: ActivationArray, sae: Sae, ids: np.ndarray, values: Float[Tensor, "row ..."]
) -> Float[Tensor, "row feature"]:
    """`sae.encode` of rows `ids`; DataError, with the row, where they or their features are not finite."""
    if (bad := ~values.isfinite().flatten(1).all(1)).any():
        raise not_finite(array, sae, ids[int(bad.nonzero()[0])], features=False)
    activations = sae.encode(values)
    if (bad := ~activations.isfinite().all(1).cpu()).any():
        raise not_finite(array, sae, ids[int(bad.nonzero()[0])], features=True)
    return activations


def not_finite(array: ActivationArray, sae: Sae, row: int, features: bool) -> DataError:
    if features:
        return DataError(f"SAE {sae.name!r} gives row {row} of {array.site.label} features that are not finite")
    return DataError(f"row {row} of {array!r} is not finite; run workbench verify {array.store.path}")


def site_names(site: str) -> tuple[str, ...]:
    """A residual site's two names, before a block and after the one before it; any other's own."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", site)
    if not found:
        return (site,)
    layer = int(found[1])
    other = f"blocks.{layer - 1}.hook_resid_post" if found[2] == "pre" else f"blocks.{layer + 1}.hook_resid_pre"
    return (site, other)


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: owners differ between hubs, and TransformerLens has names of its own."""
    from transformer_lens.supported_models import MODEL_ALIASES

    def plain(name: str) -> str:
        name = name.casefold()
        official = next((own for own, known in MODEL_ALIASES.items() if name in map(str.casefold, known)), name)
        return official.casefold().rsplit("/", 1)[-1]

    return plain(one) == plain(other)
