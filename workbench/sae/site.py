"""The sites that an autoencoder reads, of a store or of a model, and checked dense encoding of their rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Float
from torch import Tensor

from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.model.unembed import final_norm
from workbench.sae.autoencoder import Sae, check_autoencoder
from workbench.sae.input_rows import Norm, Reading, head_of, normalised, open_reading, renamed, side_by_side
from workbench.sae.training import check_training, warn_of_other_rows
from workbench.sites.grammar import full_name
from workbench.store.manifest import ModelRecord, SiteRecord
from workbench.store.reader import ActivationArray, Store, StoreOrPath, opened

_NORMALISED = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")
_LATENT_BYTES = 64 << 20  # dense float32 activations of one block


@dataclass(frozen=True)
class OfferedSites:
    """Sites from which the input of an autoencoder can be made: those of a store, or of a model to be recorded."""

    path: Path
    """Path of the store."""
    model: Model | ModelRecord
    first: Callable[[Sequence[str]], str | None]
    """Returns the first of these full names that a site has; None: no site has one."""
    record: Callable[[str | tuple[str, int]], SiteRecord]
    """Returns the record of a site; RequestError if there is none."""
    final_norm: Callable[[], Norm]
    """Returns kind and epsilon of the model's final norm; RequestError if they are not known."""
    arguments: tuple[str, str] = ("site", "force")
    """Names of the caller's arguments for site and force, for messages."""


def stored_sites(store: Store) -> OfferedSites:
    """Returns the sites of a store."""
    names = {record.name for record in store.sites}
    return OfferedSites(
        path=store.path,
        model=store.manifest.model,
        first=lambda candidates: next((name for name in candidates if name in names), None),
        record=lambda site: store[site].site,
        final_norm=cache(lambda: Norm(*final_norm(store.path))),
    )


def matching_site(
    store: StoreOrPath, sae: Sae, site: str | tuple[str, int] | Sequence[str] | None = None, *, force: bool = False
) -> ActivationArray:
    """Returns the array of `store` that `sae` encodes; where it is not recorded as it is read, one made of others.

    Warns where its rows are unlike those that the SAE was trained on. For the arguments see `input_reading`.
    """
    store = opened(store)
    check_autoencoder(sae)
    reading = input_reading(sae, site, stored_sites(store), force=force)
    warn_of_other_rows(sae, store)
    return open_reading(store, reading)


def input_reading(
    sae: Sae, site: str | tuple[str, int] | Sequence[str] | None, offered: OfferedSites, *, force: bool = False
) -> Reading:
    """Returns which of the offered sites `sae` reads, and what is computed of them.

    resid_pre of a block and resid_post of the block before are the same activations: an SAE of either reads both.
    hook_mlp_in is mlp.hook_in. ln2.hook_normalized is made of resid_mid. An SAE of one head reads that head. An SAE of
    several sites reads all of them, with axes (row, site, d_model).

    Args:
        sae: The autoencoder.
        site: Name or (name, layer); of an SAE of several sites a list of names, or the names with commas between. None:
            the sites the SAE was trained on.
        offered: The sites of a store or of a model.
        force: Allow another site or model than the SAE's.

    Raises:
        RequestError: Width, site or model differ from the SAE's, or the SAE's files do not record its site.
    """
    choices = _site_choices(sae, site, offered.arguments[0])
    trained_on = sae.sites or (None,) * sae.n_sites
    parts = [_reading(offered, sae, choice, recorded) for choice, recorded in zip(choices, trained_on, strict=True)]
    for part, recorded in zip(parts, trained_on, strict=True):
        check_fit(
            sae, part.site, offered.model, offered.path, force=force, arguments=offered.arguments, trained_on=recorded
        )
    return parts[0] if sae.n_sites == 1 else side_by_side(parts)


def _site_choices(
    sae: Sae, site: str | tuple[str, int] | Sequence[str] | None, argument: str
) -> Sequence[str | tuple[str, int]]:
    """The site of each part of the SAE's input, as the caller or the SAE's files have it."""
    if site is None:
        if not sae.sites:
            more = "" if sae.n_sites == 1 else f", a list of {sae.n_sites} names"
            raise RequestError(
                f"{argument}: the files of SAE {sae.name!r} do not record its site; give {argument}={more}"
            )
        return sae.sites
    if sae.n_sites == 1:
        return [site] if isinstance(site, str) else [cast("tuple[str, int]", tuple(site))]
    names = site.split(",") if isinstance(site, str) else list(site)
    if len(names) != sae.n_sites:
        raise RequestError(
            f"{argument}: SAE {sae.name!r} reads {sae.n_sites} sites at once; give as many, not {len(names)}"
        )
    return [str(name).strip() for name in names]


def _reading(offered: OfferedSites, sae: Sae, site: str | tuple[str, int], trained_on: str | None) -> Reading:
    """The reading of one site, under either of its names, or of what it is made of."""
    name = full_name(site) if isinstance(site, str) else None
    if name is not None and (layer := _NORMALISED.fullmatch(name)) and offered.first([name]) is None:
        return _normalised(offered, sae, name, layer[1])
    if name is not None and trained_on is not None and name == full_name(trained_on):
        names = site_names(name)  # any name of the SAE's own site will do
        site = offered.first(names) or (site if names[0] == name else names[0])
    record = offered.record(site)
    return Reading(record) if sae.head is None else head_of(record, sae.head)


def _normalised(offered: OfferedSites, sae: Sae, name: str, layer: str) -> Reading:
    """TransformerLens' ln2.hook_normalized: RMSNorm without its weights; of a LayerNorm what the SAE's files tell."""
    norm = offered.final_norm()
    folded = (sae.metadata.get("model_from_pretrained_kwargs") or {}).get("fold_ln")
    if norm.kind == "layer" and folded is False:  # then the hook comes after the weights
        return renamed(offered.record(f"blocks.{layer}.ln2.hook_out"), name)
    if norm.kind == "none" or (norm.kind == "layer" and folded is None):
        reason = "has no norm" if norm.kind == "none" else "has LayerNorms, and the SAE's files do not record fold_ln"
        site, force = offered.arguments
        raise RequestError(
            f"SAE {sae.name!r} reads {name}, which cannot be made exactly: {offered.model.name} {reason}; give "
            f"{site}= and {force}=True for another one"
        )
    return normalised(offered.record(f"blocks.{layer}.hook_resid_mid"), norm, name)


def check_fit(
    sae: Sae,
    site: SiteRecord,
    model: Model | ModelRecord,
    store: Path,
    *,
    force: bool,
    arguments: tuple[str, str] = ("site", "force"),
    trained_on: str | None = None,
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
        trained_on: The site that the SAE was trained on, of several the one in question. None: not recorded.
    """
    check_training(sae, site.name, model.architecture)
    width, expected = prod(site.shape), sae.d_in // sae.n_sites
    if width != expected:
        raise RequestError(f"SAE {sae.name!r} reads rows of width {expected}, but {site.label} of {store} has {width}")
    if not force:
        check_trained_on(sae, trained_on, site.name, model.name, f", but {store} was recorded from", arguments)


def check_trained_on(
    sae: Sae,
    trained_on: str | None,
    site: str,
    model: str,
    other_model: str = ", not on",
    arguments: tuple[str, str] = ("site", "force"),
) -> None:
    """Raises RequestError if `sae` was trained on another site or model, as far as its files record them.

    Args:
        sae: The autoencoder.
        trained_on: The site that it was trained on, of several the one in question. None: not recorded.
        site: Name of the site in use.
        model: Name of the model in use.
        other_model: Words before the name of another model in the message.
        arguments: Names of the caller's arguments for site and force, for the message.
    """
    site_argument, force_argument = arguments
    trained_on = full_name(trained_on) if trained_on else None
    if trained_on and site not in site_names(trained_on):
        raise RequestError(
            f"SAE {sae.name!r} was trained on {trained_on}, but {site_argument} is {site}; leave {site_argument} out, "
            f"or give {force_argument}=True"
        )
    if sae.model_name and not same_model(sae.model_name, model):
        raise RequestError(
            f"SAE {sae.name!r} was trained on the model {sae.model_name}{other_model} {model}; if they are the same "
            f"model, give {force_argument}=True"
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
        return DataError(
            f"features of SAE {sae.name!r} are not finite for row {row} of {array.site.label}; its weights "
            "have NaN, or it cannot normalise the row, as one of zeros: use another SAE or record without the row"
        )
    return DataError(f"row {row} of {array!r} is not finite; run workbench verify {array.store.path}")


def site_names(site: str) -> tuple[str, ...]:
    """Returns the names of the same activations: of a residual site both (before a block, after the previous one), of
    hook_mlp_in mlp.hook_in; else the one name."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|mlp_in)", site)
    if not match:
        return (site,)
    layer = int(match[1])
    if match[2] == "mlp_in":
        return (f"blocks.{layer}.mlp.hook_in", site)
    pre = match[2] == "resid_pre"
    twin = f"blocks.{layer - 1}.hook_resid_post" if pre else f"blocks.{layer + 1}.hook_resid_pre"
    return (site, twin)


def same_model(first: str, second: str) -> bool:
    """Returns True if two names mean the same model: owners differ between hubs, and TransformerLens has aliases."""
    from transformer_lens.supported_models import MODEL_ALIASES

    def plain(name: str) -> str:
        name = name.casefold()
        official = next((key for key, aliases in MODEL_ALIASES.items() if name in map(str.casefold, aliases)), name)
        return official.casefold().rsplit("/", 1)[-1]

    return plain(first) == plain(second)
