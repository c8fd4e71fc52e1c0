"""The array of a store that an autoencoder encodes, and checked dense encoding of its rows."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.sae.load import Sae
from workbench.sae.training import check_training, warn_of_other_rows
from workbench.sites.grammar import full_name
from workbench.store.manifest import ModelRecord, SiteRecord
from workbench.store.reader import ActivationArray, Store

_LATENT_BYTES = 64 << 20  # dense float32 activations of one block


def matching_site(
    store: Store, sae: Sae, site: str | tuple[str, int] | None = None, *, force: bool = False
) -> ActivationArray:
    """Returns the array of `store` that `sae` encodes.

    resid_pre of a block and resid_post of the block before are the same activations: an SAE of either reads both.

    Args:
        store: The recording.
        sae: The autoencoder.
        site: Name or (name, layer). None: the site the SAE was trained on.
        force: Allow another site or model than the SAE's.

    Raises:
        RequestError: Width, site or model differ from the SAE's, or the SAE's files do not record its site.
    """
    trained_on = full_name(sae.site) if sae.site else None
    if site is None:
        if trained_on is None:
            raise RequestError(f"site: the files of SAE {sae.name!r} do not record its site; give site=")
        recorded = {record.name for record in store.sites}
        site = next((name for name in site_names(trained_on) if name in recorded), trained_on)
    array = store[site]
    check_fit(sae, array.site, store.manifest.model, store.path, force=force)
    warn_of_other_rows(sae, store)
    return array


def check_fit(
    sae: Sae,
    site: SiteRecord,
    model: Model | ModelRecord,
    store: Path,
    *,
    force: bool,
    arguments: tuple[str, str] = ("site", "force"),
) -> None:
    """Raises RequestError if `sae` has another width than `site`, was trained on rows that do not follow from the
    recorded ones or, unless `force`, on another site or model.

    Args:
        sae: The autoencoder.
        site: The site to encode.
        model: The recorded model, or its record.
        store: Path of the store, for the message.
        force: Allow another site or model.
        arguments: Names of the caller's arguments for site and force, for the message.
    """
    site_argument, force_argument = arguments
    check_training(sae, site.name, model.architecture)
    width = prod(site.shape)
    if width != sae.d_in:
        raise RequestError(f"SAE {sae.name!r} reads rows of width {sae.d_in}, but {site.label} of {store} has {width}")
    if force:
        return
    trained_on = full_name(sae.site) if sae.site else None
    if trained_on and site.name not in site_names(trained_on):
        raise RequestError(
            f"SAE {sae.name!r} was trained on {trained_on}, but {site_argument} is {site.name}; leave {site_argument} "
            f"out, or give {force_argument}=True"
        )
    if sae.model_name and not same_model(sae.model_name, model.name):
        raise RequestError(
            f"SAE {sae.name!r} was trained on the model {sae.model_name}, but {store} was recorded from {model.name}; "
            f"if they are the same model, give {force_argument}=True"
        )


def block_rows(sae: Sae) -> int:
    """Returns the number of rows whose dense activations take 64 MiB."""
    return max(1, _LATENT_BYTES // (4 * sae.d_sae))


def encode_checked(
    array: ActivationArray, sae: Sae, ids: np.ndarray, values: Float[Tensor, "row ..."]
) -> Float[Tensor, "row feature"]:
    """Returns `sae.encode` of the rows `ids`; DataError with the row if it or its features are not finite."""
    if (bad := ~values.isfinite().flatten(1).all(1)).any():
        raise not_finite(array, sae, ids[int(bad.nonzero()[0])], features=False)
    activations = sae.encode(values)
    if (bad := ~activations.isfinite().all(1).cpu()).any():
        raise not_finite(array, sae, ids[int(bad.nonzero()[0])], features=True)
    return activations


def not_finite(array: ActivationArray, sae: Sae, row: int, features: bool) -> DataError:
    """Returns the error for a row that is not finite, or whose features are not."""
    if features:
        return DataError(f"features of SAE {sae.name!r} are not finite for row {row} of {array.site.label}")
    return DataError(f"row {row} of {array!r} is not finite; run workbench verify {array.store.path}")


def site_names(site: str) -> tuple[str, ...]:
    """Returns both names of a residual site (before a block, after the previous one); else the one name."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", site)
    if not match:
        return (site,)
    layer = int(match[1])
    other = f"blocks.{layer - 1}.hook_resid_post" if match[2] == "pre" else f"blocks.{layer + 1}.hook_resid_pre"
    return (site, other)


def same_model(one: str, other: str) -> bool:
    """Returns True if two names mean the same model: owners differ between hubs, and TransformerLens has aliases."""
    from transformer_lens.supported_models import MODEL_ALIASES

    def plain(name: str) -> str:
        name = name.casefold()
        official = next((key for key, aliases in MODEL_ALIASES.items() if name in map(str.casefold, aliases)), name)
        return official.casefold().rsplit("/", 1)[-1]

    return plain(one) == plain(other)
