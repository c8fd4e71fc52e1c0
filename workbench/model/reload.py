"""The model that a store was recorded from, for what activations alone cannot answer: weights and interventions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workbench.io.errors import RequestError
from workbench.model.load import Model, load_model

if TYPE_CHECKING:
    from workbench.store.reader import Store


def recorded_model(store: Store, model: Model | str | None = None, device: str | torch.device | None = None) -> Model:
    """`model`, or what the store names, loaded; refused unless its weights are those that were recorded.

    `model`: what `load_model` gives or takes; None: the name in the manifest, which suffices for "demo" and hub ids.
    A local directory must be given, since a store does not keep a machine's paths. Costs a checksum of all weights,
    about 1 s a gigabyte. Raises RequestError where it cannot be loaded or is another model.
    """
    known = store.manifest.model
    if model is None:
        try:
            model = load_model(known.name, revision=known.revision, device=device, dtype=known.dtype)
        except RequestError as error:
            raise RequestError(
                f"model is not given, and {known.name!r}, which the store names, cannot be loaded; "
                f"give model=, the directory it was recorded from ({error})"
            ) from error
    found = model if isinstance(model, Model) else load_model(model, device=device, dtype=known.dtype)
    if found.fingerprint() != known.fingerprint:
        raise RequestError(
            f"model {found.name!r} has other weights than the store {store.path.name!r} was recorded from "
            f"({known.name!r}, {known.architecture}); give the one that was recorded"
        )
    return found
